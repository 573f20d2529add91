"""Options of `jobs.prepare`: of every source, of each one, of `inspect`; apart from what reads images, so that
--help need not wait for PyTorch."""

import dataclasses
from typing import Annotated, Literal

import tyro

from ddpm_core.config import MAX_SCALE
from jobs.common.numbers import ImageSize, NumWorkers, Seed, Share, Within

Encoding = Literal["raw", "png", "jpeg"]
Scene = Literal["portraits", "landscapes"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """Options of every command that makes a data set."""

    output: str
    """Folder or s3://bucket/prefix for the data set."""
    encoding: Encoding = "raw"
    """How images are stored: raw (needs no decoding) and png are exact, jpeg takes about half the room."""
    overwrite: bool = False
    """Replace another data set at --output."""
    set_aside_ok: bool = False
    """Exit with 0, not 3, where images were set aside: Ray calls a job FAILED that ends with anything but 0."""
    num_workers: NumWorkers | None = None
    """0: this process alone, without Ray; more: so many tasks at a time on Ray. By itself: this process, and Ray for
    what would take it long."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common(Output):
    """Options of every source of images."""

    source: str | None = None
    """Folder or s3://bucket/prefix that holds the images."""
    image_size: ImageSize = 64
    """Side of the square images, in pixels."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromFiles(Common):
    """Options of sources that read the user's own images."""

    append: bool = False
    """Add the images that are not in the data set at --output yet to it, as its next version."""
    duplicates: Literal["report", "drop"] = "report"
    """Images that come twice, exactly or nearly: list them in duplicates.parquet, or also set the copies aside (first
    in training, then in validation)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Earth(Common):
    """The Earth by day and by night, from the maps that ship with the project (or others in --source)."""

    stride: Annotated[int, Within(1)] | None = None
    """Pixels between training tiles; half a tile unless given. Validation and test tiles never overlap."""
    min_land: Share = 0.25
    """Keep tiles with at least this share of land."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CelebA(FromFiles):
    """CelebA, from your own copy (non-commercial research only)."""

    domain_attribute: str = "Male"
    """The attribute that tells the two domains apart."""
    pairing: Literal["matched", "unpaired", "self"] = "matched"
    """matched: the most similar image of the other domain as target. unpaired: no targets. self: none either, the
    network is to be shown the image's own structure."""
    identity_encoder: str | None = None
    """Folder or s3:// prefix of an identity encoder: matches are looked for among people who look alike."""
    match_correlation: Annotated[float, Within(0, 100, over=True)] = 0.3
    """Attributes that correlate with the domain's by this much or more (lipstick, beard) say the same as the domain
    and are not compared when matching, or a few images would match nearly everything; above 1 compares all."""
    limit: Annotated[int, Within(1)] | None = None
    """Take this many images only (spread over all of them), for trying."""
    seed: Seed = 0
    """Decides between equally good matches."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Day2Night(FromFiles):
    """True pairs of the same place by day and by night."""

    left: Literal["auto", "day", "night"] = "auto"
    """Side-by-side images: what the left half shows. auto: day is where the images are brighter on average."""
    licence: str = "unknown"
    """Licence of the images; it travels to checkpoints and outputs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folders(FromFiles):
    """Two or more folders of your own, one a domain."""

    domain: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=URI, once for each domain; without it every folder in --source is a domain."""
    pairing: Literal["unpaired", "paired", "self"] = "unpaired"
    """paired: images of equal name (up to the ending) in two folders show the same. unpaired: training shows the
    network any image of another domain. self: it shows the structure of the very image to make."""
    pairs: str | None = None
    """A CSV file that says which images are pairs: the first line names two domains, each other line an image of
    either, by its path in the domain's folder (or in --source)."""
    align: Literal["none", "faces"] = "none"
    """faces: portraits are turned and cut so that the largest face lies where CelebA has its own; those without a face
    are set aside. none: images are cut to centred squares."""
    name: str = "folders"
    """Name of the data set."""
    licence: str = "unknown"
    """Licence of the images; it travels to checkpoints and outputs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rendered(Common):
    """Portraits (female, male) or landscapes (day, night) drawn by this program, each with its exact counterpart."""

    scene: Scene = "portraits"
    """What to draw."""
    count: Annotated[int, Within(1, 100_000_000)] = 10_000
    """How many people or places."""
    seed: Seed = 0
    """Which people or places."""
    first: Annotated[int, Within()] = 0
    """Index of the first; more of the same set begin where it ends."""
    moments: Annotated[int, Within(1, 10_000)] = 1
    """Of portraits: how many times each person is drawn, otherwise posed, lit and dressed each time and elsewhere."""
    pairing: Literal["paired", "unpaired", "self"] = "paired"
    """paired: everyone in both domains. unpaired, self: everyone in one domain only, without a counterpart."""
    append: bool = False
    """Add the indices that are not in the data set at --output yet to it, as its next version."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MadePairs(Output):
    """The other side of each image of a data set without pairs, made by a checkpoint: pairs to train on."""

    data: str
    """The data set without pairs: a folder or s3:// prefix that holds dataset.json."""
    checkpoint: str
    """What makes the other side, mostly a prior (jobs.train --preset prior): a run or checkpoint, local or s3://."""
    weights: tuple[Annotated[float, Within(0, MAX_SCALE)], ...] = (2.5, 3.5, 5.0)
    """Guidance weights to try, the least first; without a classifier only the first is tried."""
    classifier: str | None = None
    """Encoder of --method attributes, or a TorchScript file, that says which side an image is on."""
    identity_encoder: str | None = None
    """Encoder that tells people or places apart: of the weights that turn an image the one is taken that keeps most."""
    seed: Seed = 0
    """Of the noise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect:
    """Show what a data set holds: its card, the mean image of each domain, a contact sheet."""

    uri: tyro.conf.Positional[str]
    """The data set."""
    output: str | None = None
    """Folder or s3://bucket/prefix for mean.png and contact_sheet.png; by default beside the data set, NAME-inspect."""


Command = (
    Annotated[Earth, tyro.conf.subcommand("earth")]
    | Annotated[CelebA, tyro.conf.subcommand("celeba")]
    | Annotated[Day2Night, tyro.conf.subcommand("day2night")]
    | Annotated[Folders, tyro.conf.subcommand("folders")]
    | Annotated[Rendered, tyro.conf.subcommand("rendered")]
    | Annotated[MadePairs, tyro.conf.subcommand("pairs")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
)
