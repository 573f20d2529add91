"""The data-set format: written once by `jobs.prepare`, read by every other job through Ray Data.

    DATASET/  dataset.json                     written last: a folder without it is not a data set
              rejected.parquet                 picture, reason, version: what was set aside
              duplicates.parquet               picture, of, kind, distance, split, split_of, version
              train|val|test/part-00000.parquet
                id          string             unique; rows are sorted by it
                domain      int8               index into dataset.json's domains
                image       binary             square, s s 3 uint8 sRGB, encoded as dataset.json says
                target      binary | null      the counterpart, encoded likewise; null when unpaired or self
                target_id   string | null      what the counterpart is called at its source
                identity    int32 | null       of the person or place; no two splits share one
                attributes  list<int8> | null  one a name of attribute_names
                landmarks   list<float32> | null   x0 y0 x1 y1 ..., in pixels of the stored picture

`raw` pictures are their s*s*3 bytes, so that a column of them is one array in memory and nothing is decoded.
The same rows give the same bytes. An append writes further shards and then replaces dataset.json: rows are sorted
within a shard, and of the two tables lines whose `version` is above dataset.json's do not count.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow
import pyarrow.dataset
import pyarrow.parquet
import ray.data
from jaxtyping import UInt8
from PIL import Image
from ray.data.extensions import ArrowTensorArray

from ddpm_core import images
from ddpm_core.config import from_dict, to_dict
from ddpm_core.errors import InputError
from jobs import storage

FORMAT_VERSION = 2
"""Version of the layout above; raised when an older reader would misread a newer data set."""

Encoding = Literal["raw", "png", "jpeg"]
Pairing = Literal["paired", "matched", "unpaired", "self"]

MAKE_AGAIN = "make the data set again with python -m jobs.prepare"
"""The remedy for a data set that cannot be read."""
NOT_ALONE = "another program wrote there at the same time; give the same command again"
CARD = "dataset.json"
REJECTED, DUPLICATES = "rejected.parquet", "duplicates.parquet"
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
ROWS_PER_GROUP = 256
SHARD_BYTES = 64 * 2**20
"""A shard is closed once its encoded pictures reach this size: what the writer holds in memory."""
ROWS_PER_BLOCK = 1024
"""Aim for Ray blocks of this many rows: enough of them for every CPU, few enough to cost nothing."""
JPEG_QUALITY = 95


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One picture of one domain, with its counterpart where it has one."""

    id: str
    domain: int
    image: UInt8[np.ndarray, "s s 3"]
    target: UInt8[np.ndarray, "s s 3"] | None = None
    target_id: str | None = None
    identity: int | None = None
    attributes: Sequence[int] | None = None
    landmarks: Sequence[float] | None = None


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
    """Licence of the pictures; it travels to checkpoints and outputs."""
    source: str
    """Where the pictures come from, with the credit they ask for."""
    image_size: int
    """Side of the square pictures, in pixels."""
    encoding: Encoding
    """How `image` and `target` are stored."""
    domains: tuple[str, ...]
    """Names of the sides; a row's `domain` is an index into them."""
    pairing: Pairing
    """paired: true counterparts. matched: nearest neighbours as proxies. unpaired: no targets. self: none either, the
    network is shown the structure of the very picture it is to make."""
    attribute_names: tuple[str, ...] = ()
    """What the numbers of the column `attributes` stand for."""
    prepared_by: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The command and its options, without where it read and wrote: the same again means nothing to do."""
    source_hash: str = ""
    """Hash of names and sizes of the source's files: tells whether it changed since."""
    notes: tuple[str, ...] = ()
    """What a reader of results should know of how the pictures were paired and split."""
    num_rejected: int = 0
    """Pictures of the source that could not be used; rejected.parquet says why."""
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
    """Mean of the training pictures' pixels, r g b in [-1, 1]."""
    mean_landmarks: tuple[float, ...] = ()
    """Mean of the training rows' landmarks, x0 y0 x1 y1 ..., as shares of the side; () where there are none."""
    shards: tuple[Shard, ...] = ()
    """The files that make up the data set."""
    content_hash: str = ""
    """Hash of every row's split, id, domain, pictures, identity and attributes, in order."""
    made_with: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Versions of the packages that decide the bytes."""

    @property
    def has_targets(self) -> bool:
        """Whether rows have counterparts."""
        return self.pairing in ("paired", "matched")


# ---------------------------------------------------------------------------------------------- writing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Before:
    """The data set that an append adds to."""

    card: DatasetCard
    index: Mapping[str, "IndexRow"] = dataclasses.field(default_factory=dict)
    totals: "Totals" = dataclasses.field(default_factory=lambda: Totals())
    """Of its training rows; the new ones are added."""


def write_dataset(
    uri: str,
    rows_by_split: Mapping[str, Iterable[Row]],
    card: DatasetCard,
    *,
    on_row: Callable[[str, Row], None] = lambda split, row: None,
) -> DatasetCard:
    """Write the rows as a data set; dataset.json last, so that a half-written folder is not one.

    Raises:
        InputError, AssertionError: as `write_rows`.
    """
    card = write_rows(uri, rows_by_split, card, on_row=on_row)
    write_card(uri, card)
    return card


def write_rows(
    uri: str,
    rows_by_split: Mapping[str, Iterable[Row]],
    card: DatasetCard,
    *,
    before: Before | None = None,
    on_row: Callable[[str, Row], None] = lambda split, row: None,
) -> DatasetCard:
    """Write the shards; returns the card that tells of them, for `write_card`.

    Rows of a split must come sorted by id; they are streamed, at most one shard is held in memory.
    `on_row` sees each row once, in order. With `before` the rows are added to that data set, whose files stay.

    Raises:
        InputError: an id or an identity occurs twice, there are no training rows, or somebody else writes there.
        AssertionError: rows out of order or of another size than the card says.
    """
    there = None if before is None else before.card
    if there is not None:
        check_alone(uri, there)
    clear(uri, there)
    if before is None:
        before = Before(card=dataclasses.replace(card, domain_counts={}, shards=(), content_hash=""))
    old, totals, seen = before.card, before.totals, _Unique(before.index)
    counts = {split: dict.fromkeys(card.domains, 0) | old.domain_counts.get(split, {}) for split in SPLITS}
    digest = hashlib.blake2b(old.content_hash.encode(), digest_size=16)
    shards: list[Shard] = list(old.shards)
    for split in SPLITS:
        first = sum(shard.file.startswith(f"{split}/") for shard in old.shards)
        writer = _ShardWriter(uri, split, card, first, there)
        for row in rows_by_split.get(split, ()):
            seen.check(row, split)
            counts[split][card.domains[row.domain]] += 1
            if split == "train":
                totals.add(row.image[None], [row.landmarks])
            digest.update(split.encode() + writer.add(row))
            on_row(split, row)
        shards += writer.close()
    if not sum(counts["train"].values()):
        raise InputError(f"{uri}: no picture for training is left; give a source with more pictures")
    return dataclasses.replace(
        card,
        splits={split: sum(of.values()) for split, of in counts.items()},
        domain_counts=counts,
        mean_color=totals.mean_color(),
        mean_landmarks=totals.mean_landmarks(card.image_size),
        shards=tuple(shards),
        content_hash=digest.hexdigest() if len(shards) > len(old.shards) else old.content_hash,
        made_with={
            name: importlib.metadata.version(name) for name in ("numpy", "pillow", "pyarrow", "resvg_py", "torch")
        },
    )


def write_card(uri: str, card: DatasetCard, before: DatasetCard | None = None) -> None:
    """Makes the files at `uri` a data set, or the next version of `before`: in one step, at the end.

    Raises:
        InputError: somebody else has written there meanwhile.
    """
    check_alone(uri, before, card)
    text = json.dumps(to_dict(card), indent=2, ensure_ascii=False) + "\n"
    storage.write_bytes(storage.join(uri, CARD), text.encode())


def check_alone(uri: str, before: DatasetCard | None, after: DatasetCard | None = None) -> None:
    """Two that write to one place at a time would mix their files.

    Raises:
        InputError: the card is not `before` (None: there is none) any more, or files of `after` are not those written.
    """
    if find_card(uri) != before or (after is not None and missing_shards(uri, after)):
        raise InputError(f"{uri}: {NOT_ALONE}")


def clear(uri: str, keep: DatasetCard | None = None) -> None:
    """Remove a data set, whole or half-written, dataset.json first, or all that is not of `keep`; other files stay."""
    shards = rf"({'|'.join(SPLITS)})/part-\d{{5}}\.parquet"
    aside = r"\.[0-9a-f]{8}\.tmp"
    others = "|".join(re.escape(name) for name in (REJECTED, DUPLICATES, CONTACT_SHEET, ENVIRONMENT))
    ours = re.compile(
        rf"({shards}|{re.escape(CARD)})({aside})?|({others}){aside}|\.write-probe-[0-9a-f]{{8}}({aside})?"
    )
    kept = set() if keep is None else {CARD, *(shard.file for shard in keep.shards)}
    files = [file for file in storage.list_files(uri) if ours.fullmatch(file) and file not in kept]
    for file in sorted(files, key=lambda file: file != CARD):
        storage.delete_file(storage.join(uri, file))


def encode(image: UInt8[np.ndarray, "s s 3"], encoding: Encoding) -> bytes:
    """A picture as it is stored."""
    if encoding == "raw":
        return np.ascontiguousarray(image).tobytes()
    if encoding == "png":
        return images.encode_png(image)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def stored(image: UInt8[np.ndarray, "s s 3"], encoding: Encoding) -> UInt8[np.ndarray, "s s 3"]:
    """A picture as it is read back."""
    return np.asarray(images.decode(encode(image, encoding))) if encoding == "jpeg" else image


class _ShardWriter:
    """Rows of one split into shards of bounded size, 256 rows a row group, or fewer where pictures are large."""

    def __init__(self, uri: str, split: str, card: DatasetCard, first: int, before: DatasetCard | None) -> None:
        self.uri, self.split, self.card, self.first, self.before = uri, split, card, first, before
        self.shards: list[Shard] = []
        self.pending: list[dict[str, Any]] = []
        self._open()

    def _open(self) -> None:
        self.buffer = pyarrow.BufferOutputStream()
        self.parquet = pyarrow.parquet.ParquetWriter(
            self.buffer,
            SCHEMA,
            compression={name: "zstd" for name in SCHEMA.names if name not in ("image", "target")}
            | dict.fromkeys(("image", "target"), "zstd" if self.card.encoding == "raw" else "none"),
            use_dictionary=False,
            write_statistics=["id", "domain"],
            write_page_checksum=True,
        )
        self.rows = self.num_bytes = 0

    def add(self, row: Row) -> bytes:
        """Take a row; returns what identifies its content."""
        side = self.card.image_size
        for picture in (row.image, row.target):
            assert picture is None or (picture.shape == (side, side, 3) and picture.dtype == np.uint8), row.id
        assert (row.target is not None) == self.card.has_targets, row.id
        image = encode(row.image, self.card.encoding)
        target = None if row.target is None else encode(row.target, self.card.encoding)
        record = {**{name: getattr(row, name) for name in SCHEMA.names}, "image": image, "target": target}
        self.pending.append(record)
        self.rows += 1
        self.num_bytes += len(image) + len(target or b"")
        full = self.num_bytes >= SHARD_BYTES
        if len(self.pending) == ROWS_PER_GROUP or (full and self.rows == len(self.pending)):
            self._flush()
            if full:
                self._finish()
                self._open()
        parts = [row.id.encode(), bytes([row.domain]), image, target or b""]
        for labels in ([row.identity] if row.identity is not None else None, row.attributes):
            parts += [] if labels is None else [np.asarray(labels, "<i4").tobytes()]
        return b"".join(len(part).to_bytes(8, "little") + part for part in parts)

    def close(self) -> list[Shard]:
        self._flush()
        if self.rows:
            self._finish()
        return self.shards

    def _flush(self) -> None:
        if self.pending:
            columns = {name: [record[name] for record in self.pending] for name in SCHEMA.names}
            self.parquet.write_table(pyarrow.table(columns, schema=SCHEMA), row_group_size=ROWS_PER_GROUP)
            self.pending = []

    def _finish(self) -> None:
        self.parquet.close()
        data = self.buffer.getvalue()
        file = f"{self.split}/part-{self.first + len(self.shards):05d}.parquet"
        check_alone(self.uri, self.before)
        storage.write_bytes(storage.join(self.uri, file), memoryview(data))
        self.shards.append(Shard(file=file, rows=self.rows, num_bytes=data.size))


class _Unique:
    """Sees to it that ids are unique and sorted and that no two splits share an identity."""

    def __init__(self, index: Mapping[str, "IndexRow"]) -> None:
        self.ids = set(index)
        self.identities = {row.identity: row.split for row in index.values() if row.identity is not None}
        self.last = ("", "")

    def check(self, row: Row, split: str) -> None:
        if row.id in self.ids:
            raise InputError(f"id {row.id!r} occurs twice; every picture needs a name of its own")
        assert self.last[0] != split or self.last[1] < row.id, f"{row.id} after {self.last[1]}: not sorted"
        self.ids.add(row.id)
        self.last = (split, row.id)
        if row.identity is not None and self.identities.setdefault(row.identity, split) != split:
            other = self.identities[row.identity]
            raise InputError(f"identity {row.identity} is in both {other} and {split}; a split must not share one")


class Totals:
    """Sums over training rows; integers, so that neither the order of rows nor appends leave a trace in the means."""

    LANDMARK_UNIT = 2**-20

    def __init__(self) -> None:
        self.color, self.pixels = np.zeros(3, np.int64), 0
        self.landmarks, self.landmark_rows = np.zeros(0, np.int64), 0

    def add(self, pictures: UInt8[np.ndarray, "b s s 3"], landmarks: Sequence[Sequence[float] | None]) -> None:
        self.color = self.color + pictures.sum(axis=(0, 1, 2), dtype=np.int64)
        self.pixels += pictures.size // 3
        for points in landmarks:
            if points is not None:
                values = np.round(np.asarray(points, np.float32) / self.LANDMARK_UNIT).astype(np.int64)
                self.landmarks = values + self.landmarks if self.landmark_rows else values
                self.landmark_rows += 1

    def merge(self, other: "Totals") -> None:
        self.color, self.pixels = self.color + other.color, self.pixels + other.pixels
        if other.landmark_rows:
            self.landmarks = other.landmarks + self.landmarks if self.landmark_rows else other.landmarks
            self.landmark_rows += other.landmark_rows

    def mean_color(self) -> tuple[float, ...]:
        """r g b in [-1, 1], rounded: the mean needs no more."""
        return tuple(round(float(c), 6) for c in self.color / max(self.pixels, 1) / 127.5 - 1)

    def mean_landmarks(self, image_size: int) -> tuple[float, ...]:
        """x0 y0 x1 y1 ... as shares of the side, rounded; () where no row has any."""
        scale = self.LANDMARK_UNIT / max(self.landmark_rows, 1) / image_size
        return tuple(round(float(x), 6) for x in self.landmarks * scale)


# ---------------------------------------------------------------------------------------------- reading


def find_card(uri: str) -> DatasetCard | None:
    """The card of a complete data set, None where there is none.

    Raises:
        InputError: dataset.json is damaged or of another version, or the store refuses.
    """
    where = storage.join(uri, CARD)
    try:
        text = storage.read_bytes(where)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        values = json.loads(text)
    except ValueError as error:
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


class IndexRow(NamedTuple):
    """What a row says of itself, without its pictures."""

    split: str
    domain: int
    target_id: str | None
    identity: int | None


def read_index(uri: str, card: DatasetCard) -> dict[str, IndexRow]:
    """Every row by its id, without Ray; the columns of pictures are not read.

    Raises:
        InputError: a file is missing or damaged.
    """
    index = {}
    for split in card.splits:
        values = read_labels(uri, card, split, ["id", "domain", "target_id", "identity"]).to_pydict()
        for name, *others in zip(*values.values(), strict=True):
            index[name] = IndexRow(split, *others)
    return index


def read_labels(uri: str, card: DatasetCard, split: str, columns: Sequence[str]) -> pyarrow.Table:
    """Columns without pictures of a split's rows, in stored order, without Ray; only they are read.

    Raises:
        InputError: a file is missing or damaged.
    """
    shards = [shard for shard in card.shards if shard.file.startswith(f"{split}/")]
    check_shards(uri, shards, columns)
    fs, path = storage.filesystem(uri)
    tables = [pyarrow.schema([SCHEMA.field(name) for name in columns]).empty_table()]
    for shard in shards:
        with storage.explained(uri), fs.open_input_file(storage.join(path, shard.file)) as file:
            tables.append(pyarrow.parquet.read_table(file, columns=list(columns)))
    return pyarrow.concat_tables(tables)


def read_split(
    uri: str, split: str, *, columns: Sequence[str] = ("id", "domain", "image", "target")
) -> ray.data.Dataset:
    """Rows of a split with decoded pictures: `image` and `target` are uint8 s s 3 tensors.

    `target` is left out where the data set has none. Needs Ray running; lazy like any Ray data set.

    Raises:
        InputError: no such split, or a file is missing, damaged or lacks a column (file and column named).
    """
    card, columns, shards = _readable(uri, split, columns)
    context = ray.data.DataContext.get_current()
    context.use_datasource_v2 = False  # V2 starts its actors anew on every execution, seconds each time
    fs, path = storage.filesystem(uri)
    rows = ray.data.read_parquet(
        [storage.join(path, shard.file) for shard in shards],
        filesystem=fs,
        columns=columns,
        override_num_blocks=max(1, min(card.splits[split] // ROWS_PER_BLOCK, 1024)),
        fragment_scan_options=pyarrow.dataset.ParquetFragmentScanOptions(page_checksum_verification=True),
    )
    return rows.map_batches(
        decode_batch,
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"image_size": card.image_size, "encoding": card.encoding},
    )


def read_tables(
    uri: str, split: str, *, columns: Sequence[str] = ("id", "domain", "image", "target")
) -> Iterator[pyarrow.Table]:
    """The rows of `read_split` by this process and its threads alone, without Ray, a few hundred at a time.

    Raises:
        InputError: as `read_split`.
    """
    card, columns, shards = _readable(uri, split, columns)
    decode = functools.partial(decode_batch, image_size=card.image_size, encoding=card.encoding)
    num_threads = os.cpu_count() or 1
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        ahead: collections.deque[concurrent.futures.Future[pyarrow.Table]] = collections.deque()
        for shard in shards:
            for batch in _read_batches(storage.join(uri, shard.file), columns):
                ahead.append(pool.submit(decode, pyarrow.Table.from_batches([batch])))
                if len(ahead) > num_threads:
                    yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _read_batches(file: str, columns: Sequence[str]) -> Iterator[pyarrow.RecordBatch]:
    content = pyarrow.BufferReader(storage.read_bytes(file))
    try:
        parquet = pyarrow.parquet.ParquetFile(content, page_checksum_verification=True)
        yield from parquet.iter_batches(ROWS_PER_GROUP, columns=columns)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{file} is damaged ({str(error).splitlines()[0]}); {MAKE_AGAIN}") from None


@contextlib.contextmanager
def damage_told(uri: str, split: str) -> Iterator[None]:
    """Where Ray Data fails on the rows of a split inside of this, the damaged file is named if that is why.

    Raises:
        InputError: naming the file.
    """
    try:
        yield
    except InputError:
        raise
    except Exception:
        for _ in read_tables(uri, split):
            pass
        raise


def _readable(uri: str, split: str, columns: Sequence[str]) -> tuple[DatasetCard, list[str], list[Shard]]:
    """The card, those of the columns that the data set has, and the split's files, all of them checked."""
    card = read_card(uri)
    if not card.splits.get(split):
        there = ", ".join(name for name, count in card.splits.items() if count)
        raise InputError(f"{uri} has no rows in split {split!r}; it has {there}")
    if unknown := [name for name in columns if name not in SCHEMA.names]:
        raise ValueError(f"columns {unknown} are not of the format: {SCHEMA.names}")
    columns = [name for name in columns if name != "target" or card.has_targets]
    shards = [shard for shard in card.shards if shard.file.startswith(f"{split}/")]
    check_shards(uri, shards, columns)
    return card, columns, shards


def check_shards(uri: str, shards: Sequence[Shard], columns: Sequence[str]) -> None:
    """Read every footer: a wrong file is found now and by name, not in the middle of an epoch.

    Raises:
        InputError: naming the file, and the column where one is missing or of another type.
    """
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda shard: _check_shard(storage.join(uri, shard.file), shard.rows, columns), shards))


def _check_shard(uri: str, num_rows: int, columns: Sequence[str]) -> None:
    remedy = MAKE_AGAIN
    fs, path = storage.filesystem(uri)
    try:
        with storage.explained(uri), fs.open_input_file(path) as file:
            try:
                parquet = pyarrow.parquet.ParquetFile(file)
            except pyarrow.ArrowInvalid as error:
                reason = str(error).splitlines()[0]
                raise InputError(f"{uri} is not a readable parquet file ({reason}); {remedy}") from None
            schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
    except FileNotFoundError:
        raise InputError(f"{uri} is missing; {remedy}") from None
    for name in columns:
        if name not in schema.names:
            raise InputError(f"{uri}: column {name!r} is missing; {remedy}")
        if schema.field(name).type != SCHEMA.field(name).type:
            there, right = schema.field(name).type, SCHEMA.field(name).type
            raise InputError(f"{uri}: column {name!r} is {there}, it must be {right}; {remedy}")
    if rows != num_rows:
        raise InputError(f"{uri} has {rows} rows where dataset.json says {num_rows}; {remedy}")


def decode_batch(batch: pyarrow.Table, image_size: int, encoding: Encoding) -> pyarrow.Table:
    """Binary picture columns as tensor columns of uint8 s s 3."""
    for name in ("image", "target"):
        if name in batch.column_names:
            ids = batch.column("id").to_pylist() if "id" in batch.column_names else None
            pixels = decode_column(batch.column(name), image_size, encoding, ids)
            index = batch.column_names.index(name)
            batch = batch.set_column(index, name, ArrowTensorArray.from_numpy(pixels))
    return batch


def decode_column(
    column: pyarrow.ChunkedArray, image_size: int, encoding: Encoding, ids: Sequence[str] | None = None
) -> UInt8[np.ndarray, "b s s 3"]:
    """Stored pictures as one array; `raw` is a view of the column's bytes.

    Raises:
        InputError: a picture is missing, damaged or of another size; its id is named.
    """
    array = column.combine_chunks() if isinstance(column, pyarrow.ChunkedArray) else column
    if isinstance(array, pyarrow.ChunkedArray):
        array = pyarrow.concat_arrays(array.chunks)
    shape = (image_size, image_size, 3)

    def named(row: int) -> str:
        return f"row {ids[row] if ids else row}"

    if array.null_count:
        raise InputError(f"{named(array.is_null().to_pylist().index(True))}: no picture; make the data set again")
    if encoding == "raw":
        offsets = np.frombuffer(array.buffers()[1], np.int32)[array.offset : array.offset + len(array) + 1]
        sizes = np.diff(offsets)
        if (wrong := np.flatnonzero(sizes != np.prod(shape))).size:
            raise InputError(f"{named(int(wrong[0]))}: {sizes[wrong[0]]} bytes; a raw picture has {np.prod(shape)}")
        flat = np.frombuffer(array.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]
        return flat.reshape(len(array), *shape)
    pixels = np.empty((len(array), *shape), np.uint8)
    for row, value in enumerate(array):
        picture = np.asarray(images.decode(value.as_py(), name=named(row)))
        if picture.shape != shape:
            raise InputError(f"{named(row)}: {picture.shape[1]} x {picture.shape[0]} pixels, expected {image_size}")
        pixels[row] = picture
    return pixels
