"""What one training command says: where, on what, and the options that decide what is computed."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import tyro

from ddpm_core.config import (
    MAX_WEIGHT,
    DiffusionConfig,
    EncoderOptions,
    GANConfig,
    Method,
    Pairing,
    Precision,
    SamplingConfig,
    UNetConfig,
)
from ddpm_core.errors import InputError
from jobs.common.numbers import Cpus, NumWorkers, Seed, Within, check_number, within

Parallel = Literal["ddp", "fsdp"]
"""Workers with a copy of the network each, or with a part of it each."""
Weight = Annotated[float, Within(0, MAX_WEIGHT)]
"""Of a loss."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimisation."""

    learning_rate: Annotated[float, Within(0, 100, over=True)] = 2e-4
    """Peak learning rate of AdamW, or of the GANs' Adam, which wants 2e-4."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or a cosine down to zero at the last step."""
    warmup_steps: Annotated[int, Within()] = 200
    """Steps over which the learning rate rises from zero."""
    weight_decay: Annotated[float, Within(0, 1000)] = 0.0
    """AdamW's decoupled weight decay; the GANs have none."""
    grad_clip: Annotated[float, Within(0, 1_000_000, over=True)] = 1.0
    """Largest norm of the gradient; longer ones are scaled down, but not the GANs'."""
    ema_sigma_rels: tuple[Annotated[float, Within(0, 0.28, over=True)], ...] = (0.05, 0.1)
    """Lengths of the EMAs as shares of the run so far (power-function EMA). All are validated and kept."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Everything that decides what a training run computes; it is saved with the run."""

    epochs: Annotated[int, Within(1, 1_000_000)] = 54
    """Passes over the training images."""
    global_batch_size: Annotated[int, Within(1, 1_000_000)] = 64
    """Images in one optimiser step, over all workers."""
    accumulate: Annotated[int, Within(1, 1_000_000)] = 1
    """Parts that a worker takes its share of a step in, one after the other: large batches in less memory."""
    seed: Seed = 0
    """Order of samples, noise, timesteps, dropout and initial weights are functions of it."""
    target_domain: str | None = None
    """Train this direction only; without it one network learns every direction."""
    pairing: Pairing | None = None
    """What the network is shown beside x_0, as the data set was prepared unless given. paired, matched: the
    counterpart. unpaired: any image of another side. self: the structure of the very image it is to make. none:
    nothing, for a prior of all sides that images are edited with (--sampling.start flowedit). synthetic: the other side
    as a model made it (jobs.prepare pairs)."""
    flip: bool = True
    """Mirror source and target together, half of the time."""
    max_shift: Annotated[int, Within(0, 1024)] = 0
    """Move source and target together by up to this many pixels each way, edges mirrored."""
    max_train_images: Annotated[int, Within(1)] | None = None
    """Use only this many training rows, spread evenly over the ids: of folders, which sort by domain, some of each."""
    max_val_images: Annotated[int, Within(1)] = 512
    """Validate on at most this many rows, spread evenly over the split."""
    validate_every_epochs: Annotated[int, Within(1)] = 1
    """Validate and write a checkpoint after every so many epochs, and after the last."""
    precision: Precision = "auto"
    """Arithmetic of the network: auto takes bf16 where the hardware has it."""
    gradient_checkpointing: bool = False
    """Compute activations again instead of keeping them: large images in less memory, for one more forward pass."""
    init_from: str | None = None
    """Begin with the weights of this run or checkpoint, local or s3://, on other data, domains or image size. The
    network, the diffusion and the sampling come from there unless given; optimiser, averages and steps begin anew."""
    identity_encoder: str | None = None
    """Checkpoint of an encoder, local or s3://, that says how alike two images are to the losses below."""
    identity_weight: Weight = 0.0
    """Weight of the loss that keeps who is in the source, by the encoder's embedding."""
    perceptual_weight: Weight = 0.0
    """Weight of the loss that keeps what the source looks like, by the encoder's feature maps."""
    method: Method = "diffusion"
    """The diffusion model, or a GAN to compare it with: pix2pix learns from pairs, cyclegan without. Or an encoder:
    identity tells people apart, attributes says what an image shows."""
    unet: UNetConfig = UNetConfig()
    """The network."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """The forward process and the loss."""
    gan: GANConfig = GANConfig()
    """Networks and losses of the GANs."""
    encoder: EncoderOptions = EncoderOptions()
    """An encoder and its loss."""
    sampling: SamplingConfig = SamplingConfig()
    """Sampling defaults that the checkpoint carries."""
    optim: OptimConfig = OptimConfig()
    """Optimisation."""
    validation_loss_config: Annotated[DiffusionConfig | None, tyro.conf.Suppress] = None
    """Whose loss validation measures, where it is not `diffusion`'s own: trials of a sweep over the loss must be
    compared by one."""


RENAMED = {"measured_by": "validation_loss_config"}
"""Options by the names that earlier releases stored."""


def stored_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """TrainOptions as a run or a sweep has stored them, by today's names."""
    return {RENAMED.get(name, name): value for name, value in values.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainArgs:
    """What one command says: where, on what, and the training options."""

    data: str
    """Data set to train on: a folder or s3:// prefix that holds dataset.json."""
    output: str
    """The run: a folder or s3:// prefix. If it holds an unfinished run of the same options, it is resumed."""
    preset: str = "celeba-64"
    """Options to start from; single ones are changed by the flags below."""
    num_workers: str = "1"
    """Training processes: one a GPU, or one for every one or two CPU cores. 2:8 takes as many as there is room for,
    goes on with fewer when nodes are lost and grows when they come. 0 trains in this process, for debuggers."""
    use_gpu: bool = False
    """One GPU for each worker."""
    cpus_per_worker: Cpus = 1
    """CPU cores for each worker, and its number of threads."""
    wait_for_nodes_s: Annotated[int, Within(0, 10_000_000)] = 0
    """How long to wait for a cluster with an autoscaler to grow to what the workers need, in seconds."""
    checkpoint_every_minutes: Annotated[float, Within(0, 1_000_000, over=True)] = 10.0
    """Between validations too; it is stored while training goes on, and again whenever a node is about to be taken."""
    keep_every_epochs: Annotated[int, Within()] = 0
    """Keep the checkpoints of every so many epochs beside the best and the last one; 0 keeps none."""
    parallel: Parallel = "ddp"
    """How workers share the network: each a copy, or, for networks that do not fit, each a part of it (FSDP2)."""
    max_failures: Annotated[int, Within()] = 3
    """How often in a row workers may be lost without a further checkpoint before giving up; each time training goes on
    from the last one."""
    profile: bool = False
    """Trace a few steps of the first worker, to RUN/profile/."""
    mlflow: str | None = None
    """Curves and images go there too: an MLflow server (http://…), a database (sqlite:///…) or a local folder."""
    options: Annotated[TrainOptions, tyro.conf.arg(name="")] = TrainOptions()
    given: Annotated[tuple[str, ...], tyro.conf.Suppress, tyro.conf.Fixed] = ()
    """Flags that the command names, as `--epochs`; the other options are the preset's."""

    @property
    def workers(self) -> tuple[int, int]:
        """Least and most training processes.

        Raises:
            InputError: --num-workers is neither a number nor two.
        """
        found = re.fullmatch(r"(\d+)(?::(\d+))?", self.num_workers)
        if not found:
            raise InputError(f"--num-workers is {self.num_workers}; give a number such as 4, or least:most such as 2:8")
        least, most = int(found[1]), int(found[2] or found[1])
        check_number("--num-workers", most, within(NumWorkers))
        if most < least or (found[2] and not least):
            raise InputError(f"--num-workers is {self.num_workers}; the least comes first and is 1 or more")
        return least, most
