"""What one translation's command says; evaluations share how images are drawn."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

import tyro

from ddpm_core import config as configs
from ddpm_core.config import Framing, OutputFormat, SamplingConfig
from jobs.common.numbers import BatchSize, NumWorkers, Seed, Share, Within

T = TypeVar("T")


def overriding(fields_of: type) -> Callable[[type[T]], type[T]]:
    """Make a class the dataclass of `fields_of`'s options, None where one is not given; flags keep their help."""

    def made(cls: type[T]) -> type[T]:
        fields: list[Any] = [
            (name, Annotated[hint, tyro.conf.arg(help=doc)], None)
            for name, hint, doc in configs.optional_fields(fields_of)
        ]
        own = {"__doc__": cls.__doc__, "__module__": cls.__module__}
        return dataclasses.make_dataclass(cls.__name__, fields, namespace=own, frozen=True, kw_only=True)

    return made


@overriding(SamplingConfig)
class SamplingOverrides:
    """How images are drawn; what is not given is the checkpoint's own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuidanceNets:
    """Nets that lead the sampling beside the network's own condition."""

    classifier_guidance: str | None = None
    """A run or checkpoint of an attribute classifier trained with --encoder.noise-aware on the network's chain: leads
    towards what it takes for the wanted domain."""
    classifier_scale: Annotated[float, Within(0, 1000, over=True)] = 1.0
    """Its weight."""
    identity_guidance: str | None = None
    """A run or checkpoint of an identity encoder: leads towards what it takes for the person or place of the source."""
    identity_scale: Annotated[float, Within(0, 1000, over=True)] = 1.0
    """Its weight."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TranslateArgs:
    """What to translate, with what, into what."""

    checkpoint: str
    """A run (its best checkpoint) or a checkpoint folder, local or s3://."""
    input: str
    """Folder or s3:// prefix of images, searched to any depth; one image; a pattern such as 'photos/*.jpg', where *
    also stands for folders; a data set (holds dataset.json); parquet with a column of images or URIs; a .txt with a URI
    a line; or the manifest.json of an S3 Inventory."""
    output: str
    """Folder or s3:// prefix for the results; outside the input."""
    domain: str
    """The side to produce, such as night."""
    sampling: Annotated[SamplingOverrides, tyro.conf.arg(name="")] = SamplingOverrides()
    guides: Annotated[GuidanceNets, tyro.conf.arg(name="")] = GuidanceNets()
    framing: Annotated[Framing, tyro.conf.arg(name="")] = Framing()
    ema: Share | None = None
    """Weights averaged over this share of the training; those that validated best by default."""
    seed: Seed = 0
    """Another seed gives another result for each image."""
    batch_size: BatchSize | None = None
    """Images the network sees at once; memory and speed, not results (but for 1 of 255 with one or two). By default 16
    on CPUs, where more gain nothing, and on GPUs what is found to be fastest, up to 128. Where memory does not hold so
    many: half, and so on."""
    num_workers: NumWorkers | None = None
    """Copies of the network; by default one for each GPU, or for each CPU where there is none. 0: this process alone,
    without Ray."""
    tiles: bool = False
    """Draw scenes at their own size in overlapping windows of the network's, whose predictions are averaged at each
    step (MultiDiffusion), instead of carrying the change of one small view to them: detail drawn anew, at a pass for
    each window."""
    mark_key: str = "public"
    """Of the invisible mark in each result of 64 pixels and more: none, public (a key that everybody has), or a file
    that holds a secret one (openssl rand -hex 32)."""
    identity_net: str | None = None
    """How much each result shows whom its source shows goes into the manifest, as this net sees it: a net file that
    gives an embedding, or a run of our own identity encoder."""
    set_aside_ok: bool = False
    """Exit with 0, not 3, where images were set aside: Ray calls a job FAILED that ends with anything but 0."""
    output_format: OutputFormat | Literal["parquet"] = "png"
    """How results are stored: each in a file, of which JPEG and WebP lose a little; or as PNGs in the rows of parquet
    files, images/*.parquet with id and image."""
    max_rejected: str | None = None
    """Stop where more images are set aside: a number, or a share such as 1%, judged from 300 images on."""
    dry_run: bool = False
    """Count, try ten images, say what all would take in time, requests and money, and write nothing."""
    replace: bool = False
    """Do again what the output holds of another checkpoint, other guidance or another seed; without it such a command
    is refused."""
    split: str = "test"
    """Of a data set, the rows to translate."""
