"""What one evaluation's command says."""

import dataclasses
from typing import Annotated

import tyro

from jobs.common.numbers import BatchSize, NumWorkers, Seed, Share, Within
from jobs.translation.options import GuidanceNets, SamplingOverrides


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateArgs:
    """What to measure on what."""

    checkpoint: str
    """A run (its best checkpoint) or a checkpoint folder, local or s3://."""
    data: str
    """Data set: a folder or s3:// prefix that holds dataset.json."""
    output: str
    """Folder or s3:// prefix for metrics.json, grid.png and report.html."""
    num_images: Annotated[int, Within()] = 512
    """Images to translate for each domain, spread evenly over the split; 0 takes all."""
    num_diverse: Annotated[int, Within()] = 32
    """Of them, those drawn with three seeds to see how different the results are; a GAN has but one result.
    0: none."""
    split: str = "test"
    """Rows to measure on."""
    domain: str | None = None
    """The side to produce; by default each that the checkpoint was trained for."""
    num_train: Annotated[int, Within()] = 2048
    """Training images of each domain, spread evenly, that say how far real images are from real ones, and whether
    results are what was learned over again; 0 leaves that out."""
    sampling: Annotated[SamplingOverrides, tyro.conf.arg(name="")] = SamplingOverrides()
    guides: Annotated[GuidanceNets, tyro.conf.arg(name="")] = GuidanceNets()
    feature_net: str = "auto"
    """What realism is measured with: auto (EfficientNet-lite0), inception, or a net file."""
    classifier: str | None = None
    """Which domain an image is taken for: a net file (.pt, .pt2) that gives a logit of each domain, or a run of an
    attribute classifier of ours. Not one that leads the sampling."""
    identity_net: str | None = None
    """Whom an image shows: a net file that gives an embedding, or a run of our own identity encoder. Not one that the
    model was trained with or that leads the sampling."""
    ema: Share | None = None
    """Weights averaged over this share of the training; those that validated best by default."""
    seed: Seed = 0
    """Of the sampling noise, the bootstrap and the KID subsets."""
    batch_size: BatchSize = 16
    """Images the network sees at once; memory and speed, not results."""
    num_workers: NumWorkers | None = None
    """Copies of the network; by default one for each GPU, or for each CPU where there is none. 0: this process alone,
    without Ray."""
