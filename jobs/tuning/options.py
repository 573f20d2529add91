"""What one sweep's command says."""

import dataclasses
from typing import Annotated, Literal

import tyro

from jobs.common.numbers import BatchSize, Cpus, NumWorkers, Seed, Within
from jobs.training.options import TrainOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepArgs:
    """What to search, and how."""

    data: str
    """Data set: a folder or s3:// prefix that holds dataset.json."""
    output: str
    """The sweep: a folder or s3:// prefix."""
    preset: str = "celeba-64"
    """Training options to start from; single ones are changed by the flags below."""
    num_trials: Annotated[int, Within(1, 100_000)] | None = None
    """Trainings, the preset's own among them; by default 16, none with --checkpoint."""
    num_points: Annotated[int, Within(0, 100_000)] = 100
    """Trials of sampling options on the best network; 0 leaves that stage out."""
    space: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=LOW:HIGH[:log]|NAME=A,B,C")] = ()
    """What to search beside the learning rate: any training option by its dotted name, and options of sampling as
    sampling.NAME (guidance_scale, guidance_low, guidance_high, guidance_rescale, num_steps, sampler, ema ...). A name
    that is searched anyway gets this range."""
    checkpoint: str | None = None
    """A run or checkpoint to tune the sampling of; nothing is trained."""
    search: Literal["tpe", "random"] = "tpe"
    """How Optuna proposes values."""
    early_stopping: Literal["asha", "none"] = "asha"
    """Whether trials that lag behind end before their last epoch; the preset's own never does."""
    grace_epochs: Annotated[int, Within(1)] | None = None
    """Epochs that every trial gets; by default a quarter of them."""
    reduction_factor: Annotated[int, Within(2, 1000)] = 3
    """One trial of so many goes on at each rung of ASHA."""
    study: str | None = None
    """Optuna's storage: a database's URL such as sqlite:///sweep.db, by default OUTPUT/study.journal."""
    search_seed: Seed = 0
    """Of the search, and of the noise that sampling trials begin with."""
    num_images: Annotated[int, Within(2)] = 64
    """Validation images of each domain that a sampling trial is measured on; four times as many of the test split at
    the end."""
    domain: str | None = None
    """The side that sampling trials produce; by default each that the network was trained for."""
    feature_net: str = "auto"
    """What realism is measured with, as for jobs.evaluate."""
    classifier: str | None = None
    """Which domain a result is taken for becomes an objective, judged by this net or run."""
    identity_net: str | None = None
    """Whom a result shows becomes an objective, judged by this net or run."""
    prefer: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=WEIGHT")] = ()
    """How much an objective weighs in the choice: kid, psnr, psnr_to_source, identity_cosine, flip_rate, nfe; 1 each
    unless given, 0 leaves one out of the choice."""
    num_workers: NumWorkers = 1
    """Training processes of a trial. 0: one trial after the other in this process, without Ray."""
    use_gpu: bool = False
    """One GPU for each worker, and for each sampling trial."""
    cpus_per_worker: Cpus = 1
    """CPU cores for each worker, and for each sampling trial."""
    max_concurrent: Annotated[int, Within(1, 4096)] | None = None
    """Trials at a time; by default as many as there is room for."""
    wait_for_nodes_s: Annotated[int, Within(0, 10_000_000)] = 0
    """How long to wait for a cluster with an autoscaler to grow to what one trial needs, in seconds."""
    max_failures: Annotated[int, Within()] = 3
    """How often a trial may lose its workers or its node without a further checkpoint before it counts as failed."""
    batch_size: BatchSize = 16
    """Images the network sees at once in sampling trials; memory and speed, not results."""
    options: Annotated[TrainOptions, tyro.conf.arg(name="")] = TrainOptions()
    given: Annotated[tuple[str, ...], tyro.conf.Suppress, tyro.conf.Fixed] = ()
    """As TrainArgs'."""
