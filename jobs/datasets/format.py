"""The data-set format: written once by `jobs.prepare`, read by every other job.

    DATASET/  dataset.json                     written last: a folder without it is not a data set
              rejected.parquet, rejected.txt   image, reason, version: what was set aside
              duplicates.parquet               image, of, kind, distance, split, split_of, version
              train|val|test/part-00000.parquet
                id          string             unique; rows are sorted by it
                domain      int8               index into dataset.json's domains
                image       binary             square, s s 3 uint8 sRGB, encoded as dataset.json says
                target      binary | null      the counterpart, encoded likewise; null when unpaired or self
                target_id   string | null      what the counterpart is called at its source
                identity    int32 | null       of the person or place; no two splits share one
                attributes  list<int8> | null  one a name of attribute_names
                landmarks   list<float32> | null   x0 y0 x1 y1 ..., in pixels of the stored image

`raw` images are their s*s*3 bytes, so that a column of them is one array in memory and nothing is decoded.
The same rows give the same bytes. An append writes further shards and then replaces dataset.json: rows are sorted
within a shard, and of the two tables lines whose `version` is above dataset.json's do not count.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from jaxtyping import UInt8

from ddpm_core import storage
from ddpm_core.config import Pairing, from_dict
from ddpm_core.errors import InputError
from jobs.datasets.options import Encoding

FORMAT_VERSION = 2
"""Version of the layout above; raised when an older reader would misread a newer data set."""

MAKE_AGAIN = "make the data set again with python -m jobs.prepare"
"""The remedy for a data set that cannot be read."""
CARD = "dataset.json"
MAX_SIDE = 1024
"""Pixels along a side of a data set's images."""
REJECTED, DUPLICATES, REASONS = "rejected.parquet", "duplicates.parquet", "rejected.txt"
CONTACT_SHEET, ENVIRONMENT = "contact_sheet.png", "environment.json"
SPLITS = ("train", "val", "test")
SCHEMA = pyarrow.schema(
    [
        pyarrow.field("id", pyarrow.string(), nullable=False),
        pyarrow.field("domain", pyarrow.int8(), nullable=False),
        pyarrow.field("image", pyarrow.binary(), nullable=False),
        pyarrow.field("target", pyarrow.binary()),
        pyarrow.field("target_id", pyarrow.string()),
        pyarrow.field("identity", pyarrow.int32()),
        pyarrow.field("attributes", pyarrow.list_(pyarrow.int8())),
        pyarrow.field("landmarks", pyarrow.list_(pyarrow.float32())),
    ]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One image of one domain, with its counterpart where it has one."""

    id: str
    domain: int
    image: UInt8[np.ndarray, "s s 3"]
    target: UInt8[np.ndarray, "s s 3"] | None = None
    target_id: str | None = None
    identity: int | None = None
    attributes: Sequence[int] | None = None
    landmarks: Sequence[float] | None = None


class IndexRow(NamedTuple):
    """What a row says of itself, without its images."""

    split: str
    domain: int
    target_id: str | None
    identity: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One parquet file of a data set."""

    file: str
    """Path relative to the data set."""
    rows: int
    num_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """What one append brought."""

    prepared_by: dict[str, Any]
    """The command and its options, as the card's own."""
    source_hash: str
    rows: int
    """Those that were new."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetCard:
    """All of `dataset.json`."""

    format_version: int = FORMAT_VERSION
    """Version of the format, of rows and card alike."""
    name: str
    """Name of the data set."""
    licence: str
    """Licence of the images; it travels to checkpoints and outputs."""
    source: str
    """Where the images come from, with the credit they ask for."""
    image_size: int
    """Side of the square images, in pixels."""
    encoding: Encoding
    """How `image` and `target` are stored."""
    domains: tuple[str, ...]
    """Names of the sides; a row's `domain` is an index into them."""
    pairing: Pairing
    """paired: true counterparts. matched: nearest neighbours as proxies. unpaired: no targets. self: none either, the
    network is shown the structure of the very image it is to make. synthetic: targets made by a model, to be shown."""
    attribute_names: tuple[str, ...] = ()
    """What the numbers of the column `attributes` stand for."""
    prepared_by: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The command and its options, without where it read and wrote: the same again means nothing to do."""
    source_hash: str = ""
    """Hash of names and sizes of the source's files: tells whether it changed since."""
    notes: tuple[str, ...] = ()
    """What a reader of results should know of how the images were paired and split."""
    num_rejected: int = 0
    """Images of the source that could not be used; rejected.parquet says why."""
    # from here on filled in by the writer
    version: int = 1
    """1 when made, one more for each append that brought rows."""
    parts: tuple[Part, ...] = ()
    """What each append brought, in order."""
    splits: dict[str, int] = dataclasses.field(default_factory=dict)
    """Rows in each split."""
    domain_counts: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    """Rows of each domain in each split."""
    mean_color: tuple[float, ...] = (0.0, 0.0, 0.0)
    """Mean of the training images' pixels, r g b in [-1, 1]."""
    mean_landmarks: tuple[float, ...] = ()
    """Mean of the training rows' landmarks, x0 y0 x1 y1 ..., as shares of the side; () where there are none."""
    shards: tuple[Shard, ...] = ()
    """The files that make up the data set."""
    content_hash: str = ""
    """Hash of every row's split, id, domain, images, identity and attributes, in order."""
    made_with: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Versions of the packages that decide the bytes."""

    @property
    def has_targets(self) -> bool:
        """Whether rows have counterparts."""
        return self.pairing in ("paired", "matched", "synthetic")

    def num_images(self, split: str, domain: str) -> int:
        """Images of a domain in a split: every pair has one of either, other rows are of one domain."""
        return self.splits.get(split, 0) if self.pairing == "paired" else self.domain_counts[split].get(domain, 0)


# ---------------------------------------------------------------------------------------------- reading


def find_card(uri: str) -> DatasetCard | None:
    """The card of a complete data set, None where there is none.

    Raises:
        InputError: dataset.json is damaged or of another version, or the store refuses.
    """
    where = storage.join(uri, CARD)
    try:
        values = storage.read_json(where)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except storage.NOT_JSON as error:
        raise InputError(f"{where} is damaged ({error}); {MAKE_AGAIN}") from None
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(f"{where} has format_version {version}, this program reads {FORMAT_VERSION}; {MAKE_AGAIN}")
    return _card(values, where)


def _card(values: dict[str, Any], where: str) -> DatasetCard:
    needed = {field.name for field in dataclasses.fields(DatasetCard)}
    for name in sorted(needed - set(values)):
        raise InputError(f"{where} is damaged: no field {name!r}; {MAKE_AGAIN}")
    card = from_dict(DatasetCard, values, where=where)
    good_counts = set(card.splits) <= set(SPLITS) and all(isinstance(n, int) for n in card.splits.values())
    good_counts &= 0 < card.image_size <= MAX_SIDE and all(shard.rows >= 0 for shard in card.shards)
    per_split = dict.fromkeys(card.splits, 0)
    for shard in card.shards:
        split = shard.file.partition("/")[0]
        per_split[split] = per_split.get(split, 0) + shard.rows
    if not good_counts or per_split != card.splits or len(card.mean_color) != 3 or not card.domains:
        raise InputError(f"{where} is damaged: shards, counts, domains or mean colour do not fit; {MAKE_AGAIN}")
    return card


def read_card(uri: str) -> DatasetCard:
    """The card of the data set at `uri`.

    Raises:
        InputError: not a data set, damaged, or of another version.
    """
    card = find_card(uri)
    if card is None:
        what = "is not a data set (no dataset.json)" if storage.exists(uri) else "does not exist"
        raise InputError(f"{uri} {what}; make a data set with python -m jobs.prepare")
    return card


def missing_shards(uri: str, card: DatasetCard) -> list[str]:
    """Files that the card names and that are gone or of another size."""
    sizes = storage.file_sizes(uri)
    return [shard.file for shard in card.shards if sizes.get(shard.file) != shard.num_bytes]
