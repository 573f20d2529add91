"""The data-set format: written once by `jobs.prepare`, read by every other job through Ray Data.

    DATASET/  dataset.json                     written last: a folder without it is not a data set
              train|val|test/part-00000.parquet
                id          string             unique; rows are sorted by it
                domain      int8               index into dataset.json's domains
                image       binary             square, s s 3 uint8 sRGB, encoded as dataset.json says
                target      binary | null      the counterpart, encoded likewise; null when unpaired
                target_id   string | null      what the counterpart is called at its source
                identity    int32 | null       of the person or place; no two splits share one
                attributes  list<int8> | null  one a name of attribute_names
                landmarks   list<float32> | null   x0 y0 x1 y1 ..., in pixels of the stored picture

`raw` pictures are their s*s*3 bytes, so that a column of them is one array in memory and nothing is decoded.
The same rows give the same bytes.
"""

import concurrent.futures
import dataclasses
import hashlib
import importlib.metadata
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow
import pyarrow.parquet
import ray.data
from jaxtyping import UInt8
from PIL import Image
from ray.data.extensions import ArrowTensorArray

from ddpm_core import images
from ddpm_core.config import from_dict, to_dict
from ddpm_core.errors import InputError
from jobs import storage

FORMAT_VERSION = 1
"""Version of the layout above; raised when an older reader would misread a newer data set."""

Encoding = Literal["raw", "png", "jpeg"]
Pairing = Literal["paired", "matched", "unpaired"]

CARD = "dataset.json"
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
    """paired: true counterparts. matched: nearest neighbours as proxies. unpaired: no targets."""
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
    splits: dict[str, int] = dataclasses.field(default_factory=dict)
    """Rows in each split."""
    domain_counts: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    """Rows of each domain in each split."""
    mean_color: tuple[float, ...] = (0.0, 0.0, 0.0)
    """Mean of the training pictures' pixels, r g b in [-1, 1]."""
    shards: tuple[Shard, ...] = ()
    """The files that make up the data set."""
    content_hash: str = ""
    """Hash of every row's split, id, domain and pictures, in order."""
    made_with: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Versions of the packages that decide the bytes."""


# ---------------------------------------------------------------------------------------------- writing


def write_dataset(
    uri: str,
    rows_by_split: Mapping[str, Iterable[Row]],
    card: DatasetCard,
    *,
    on_row: Callable[[str, Row], None] = lambda split, row: None,
) -> DatasetCard:
    """Write the rows as a data set; dataset.json last, so that a half-written folder is not one.

    Rows of a split must come sorted by id; they are streamed, at most one shard is held in memory.
    `on_row` sees each row once, in order.

    Raises:
        InputError: an id or an identity occurs twice, or there are no training rows.
        AssertionError: rows out of order or of another size than the card says.
    """
    clear(uri)
    mean, counts = _MeanColor(), {}
    digest = hashlib.blake2b(digest_size=16)
    seen = _Unique()
    shards: list[Shard] = []
    for split in SPLITS:
        counts[split] = dict.fromkeys(card.domains, 0)
        writer = _ShardWriter(uri, split, card)
        for row in rows_by_split.get(split, ()):
            seen.check(row, split)
            counts[split][card.domains[row.domain]] += 1
            if split == "train":
                mean.add(row.image)
            digest.update(split.encode() + writer.add(row))
            on_row(split, row)
        shards += writer.close()
    if not sum(counts["train"].values()):
        raise InputError(f"{uri}: no picture for training is left; give a source with more pictures")
    card = dataclasses.replace(
        card,
        splits={split: sum(of.values()) for split, of in counts.items()},
        domain_counts=counts,
        mean_color=mean.value(),
        shards=tuple(shards),
        content_hash=digest.hexdigest(),
        made_with={name: importlib.metadata.version(name) for name in ("numpy", "pillow", "pyarrow")},
    )
    text = json.dumps(to_dict(card), indent=2, ensure_ascii=False) + "\n"
    storage.write_bytes(storage.join(uri, CARD), text.encode())
    return card


def clear(uri: str) -> None:
    """Remove a data set, whole or half-written, dataset.json first; other files stay."""
    ours = re.compile(rf"(({'|'.join(SPLITS)})/part-\d{{5}}\.parquet|{re.escape(CARD)})(\.[0-9a-f]{{8}}\.tmp)?")
    files = [file for file in storage.list_files(uri) if ours.fullmatch(file)]
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


class _ShardWriter:
    """Rows of one split into shards of bounded size, 256 rows a row group."""

    def __init__(self, uri: str, split: str, card: DatasetCard) -> None:
        self.uri, self.split, self.card = uri, split, card
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
        )
        self.rows = self.num_bytes = 0

    def add(self, row: Row) -> bytes:
        """Take a row; returns what identifies its content."""
        side = self.card.image_size
        for picture in (row.image, row.target):
            assert picture is None or (picture.shape == (side, side, 3) and picture.dtype == np.uint8), row.id
        assert (row.target is None) == (self.card.pairing == "unpaired"), row.id
        image = encode(row.image, self.card.encoding)
        target = None if row.target is None else encode(row.target, self.card.encoding)
        record = {**{name: getattr(row, name) for name in SCHEMA.names}, "image": image, "target": target}
        self.pending.append(record)
        self.rows += 1
        self.num_bytes += len(image) + len(target or b"")
        if len(self.pending) == ROWS_PER_GROUP:
            self._flush()
            if self.num_bytes >= SHARD_BYTES:
                self._finish()
                self._open()
        parts = [row.id.encode(), bytes([row.domain]), image, target or b""]
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
        file = f"{self.split}/part-{len(self.shards):05d}.parquet"
        storage.write_bytes(storage.join(self.uri, file), memoryview(data))
        self.shards.append(Shard(file=file, rows=self.rows, num_bytes=data.size))


class _Unique:
    """Sees to it that ids are unique and sorted and that no two splits share an identity."""

    def __init__(self) -> None:
        self.ids: set[str] = set()
        self.identities: dict[int, str] = {}
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


class _MeanColor:
    def __init__(self) -> None:
        self.total, self.count = np.zeros(3, np.int64), 0

    def add(self, image: UInt8[np.ndarray, "s s 3"]) -> None:
        self.total += image.sum(axis=(0, 1), dtype=np.int64)
        self.count += image.shape[0] * image.shape[1]

    def value(self) -> tuple[float, ...]:
        """r g b in [-1, 1], rounded: the mean needs no more."""
        return tuple(round(float(c), 6) for c in self.total / max(self.count, 1) / 127.5 - 1)


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
        raise InputError(f"{where} is damaged ({error}); make the data set again with python -m jobs.prepare") from None
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(
            f"{where} has format_version {version}, this program reads {FORMAT_VERSION}; "
            "make the data set again with python -m jobs.prepare"
        )
    return _card(values, where)


def _card(values: dict[str, Any], where: str) -> DatasetCard:
    needed = {field.name for field in dataclasses.fields(DatasetCard)}
    for name in sorted(needed - set(values)):
        raise InputError(f"{where} is damaged: no field {name!r}; make the data set again with python -m jobs.prepare")
    card = from_dict(DatasetCard, values, where=where)
    good_counts = set(card.splits) <= set(SPLITS) and all(isinstance(n, int) for n in card.splits.values())
    per_split = dict.fromkeys(card.splits, 0)
    for shard in card.shards:
        split = shard.file.partition("/")[0]
        per_split[split] = per_split.get(split, 0) + shard.rows
    if not good_counts or per_split != card.splits or len(card.mean_color) != 3 or not card.domains:
        raise InputError(
            f"{where} is damaged: shards, counts, domains or mean colour do not fit; "
            "make the data set again with python -m jobs.prepare"
        )
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


def read_split(
    uri: str, split: str, *, columns: Sequence[str] = ("id", "domain", "image", "target")
) -> ray.data.Dataset:
    """Rows of a split with decoded pictures: `image` and `target` are uint8 s s 3 tensors.

    `target` is left out where the data set has none. Needs Ray running; lazy like any Ray data set.

    Raises:
        InputError: no such split, or a file is missing, damaged or lacks a column (file and column named).
    """
    card = read_card(uri)
    if not card.splits.get(split):
        there = ", ".join(name for name, count in card.splits.items() if count)
        raise InputError(f"{uri} has no rows in split {split!r}; it has {there}")
    if unknown := [name for name in columns if name not in SCHEMA.names]:
        raise ValueError(f"columns {unknown} are not of the format: {SCHEMA.names}")
    columns = [name for name in columns if name != "target" or card.pairing != "unpaired"]
    shards = [shard for shard in card.shards if shard.file.startswith(f"{split}/")]
    check_shards(uri, shards, columns)
    context = ray.data.DataContext.get_current()
    context.use_datasource_v2 = False  # V2 starts its actors anew on every execution, seconds each time
    fs, path = storage.filesystem(uri)
    rows = ray.data.read_parquet(
        [storage.join(path, shard.file) for shard in shards],
        filesystem=fs,
        columns=columns,
        override_num_blocks=max(1, min(card.splits[split] // ROWS_PER_BLOCK, 1024)),
    )
    return rows.map_batches(
        decode_batch,
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"image_size": card.image_size, "encoding": card.encoding},
    )


def check_shards(uri: str, shards: Sequence[Shard], columns: Sequence[str]) -> None:
    """Read every footer: a wrong file is found now and by name, not in the middle of an epoch.

    Raises:
        InputError: naming the file, and the column where one is missing or of another type.
    """
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda shard: _check_shard(storage.join(uri, shard.file), shard.rows, columns), shards))


def _check_shard(uri: str, num_rows: int, columns: Sequence[str]) -> None:
    remedy = "make the data set again with python -m jobs.prepare"
    fs, path = storage.filesystem(uri)
    try:
        with storage.explained(uri), fs.open_input_file(path) as file:
            parquet = pyarrow.parquet.ParquetFile(file)
            schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
    except FileNotFoundError:
        raise InputError(f"{uri} is missing; {remedy}") from None
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{uri} is not a readable parquet file ({str(error).splitlines()[0]}); {remedy}") from None
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


# ------------------------------------------------------------------------------------------- random access


class SplitArrays:
    """A split in memory, rows by index in the order of their ids, whatever order Ray's blocks came in.

    The pictures stay where Ray put them (workers of one machine share its object store); only the rows asked
    for are copied.
    """

    def __init__(self, tables: Sequence[pyarrow.Table]) -> None:
        tables = [table for table in tables if table.num_rows]
        self._tables = list(tables)  # they own the memory that the views below look at
        ids = list(itertools.chain.from_iterable(table.column("id").to_pylist() for table in tables))
        order = np.array(sorted(range(len(ids)), key=ids.__getitem__), dtype=np.int64)
        self.ids: list[str] = [ids[row] for row in order]
        """Ids, sorted."""
        for one, two in itertools.pairwise(self.ids):
            assert one < two, f"id {one} came twice"
        domains = [table.column("domain").to_numpy() for table in tables]
        self.domain: np.ndarray = np.concatenate(domains)[order].astype(np.int64) if tables else np.zeros(0, np.int64)
        """(n,) int64 index of each row's domain."""
        self.has_targets = bool(tables) and "target" in tables[0].column_names
        """Whether rows have counterparts."""
        self._images = _Gather([chunk for table in tables for chunk in _tensors(table, "image")], order)
        targets = [chunk for table in tables for chunk in _tensors(table, "target")] if self.has_targets else []
        self._targets = _Gather(targets, order) if targets else None

    def __len__(self) -> int:
        return len(self.ids)

    def images(self, indices: Sequence[int] | np.ndarray) -> UInt8[np.ndarray, "b s s 3"]:
        """Copies of these rows' pictures."""
        return self._images(np.asarray(indices, dtype=np.int64))

    def targets(self, indices: Sequence[int] | np.ndarray) -> UInt8[np.ndarray, "b s s 3"]:
        """Copies of these rows' counterparts.

        Raises:
            ValueError: the data set has none.
        """
        if self._targets is None:
            raise ValueError("the data set is unpaired: it has no targets")
        return self._targets(np.asarray(indices, dtype=np.int64))


def load_split(rows: "ray.data.DataIterator | ray.data.Dataset") -> SplitArrays:
    """All rows of `read_split`, from the data set itself or from a Train worker's (unsplit) shard of it."""
    return SplitArrays(list(rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)))


def _tensors(table: pyarrow.Table, name: str) -> Iterator[np.ndarray]:
    for chunk in table.column(name).chunks:
        if len(chunk):
            yield chunk.to_numpy(zero_copy_only=True)


class _Gather:
    """Rows of several arrays by their index in a given order."""

    def __init__(self, chunks: Sequence[np.ndarray], order: np.ndarray) -> None:
        self.chunks = list(chunks)
        sizes = np.array([len(chunk) for chunk in chunks], dtype=np.int64)
        starts = np.cumsum(sizes) - sizes
        self.chunk = np.repeat(np.arange(len(chunks)), sizes)[order]
        self.row = order - starts[self.chunk]
        assert sizes.sum() == len(order), "rows and pictures differ in number"

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        chunk, row = self.chunk[indices], self.row[indices]
        out = np.empty((len(indices), *self.chunks[0].shape[1:]), self.chunks[0].dtype)
        for number in np.unique(chunk):
            here = np.flatnonzero(chunk == number)
            out[here] = self.chunks[number][row[here]]
        return out
