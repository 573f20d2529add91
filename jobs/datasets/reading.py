"""Reading the data-set format: by Ray Data, or by this process alone."""

import collections
import concurrent.futures
import contextlib
import functools
import os
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow
import pyarrow.dataset
import pyarrow.parquet
import ray.data
from jaxtyping import UInt8
from ray.data.extensions import ArrowTensorArray

from ddpm_core import images, storage
from ddpm_core.errors import InputError
from jobs.datasets import writing
from jobs.datasets.format import MAKE_AGAIN, SCHEMA, DatasetCard, Encoding, IndexRow, Shard, read_card

ROWS_PER_BLOCK = 1024
"""Aim for Ray blocks of this many rows: enough of them for every CPU, few enough to cost nothing."""


def read_index(uri: str, card: DatasetCard) -> dict[str, IndexRow]:
    """Every row by its id, without Ray; the columns of images are not read.

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
    """Columns without images of a split's rows, in stored order, without Ray; only they are read.

    Raises:
        InputError: a file is missing or damaged.
    """
    shards = [shard for shard in card.shards if shard.file.startswith(f"{split}/")]
    check_shards(uri, shards, columns)
    fs, path = storage.filesystem(uri)
    tables = [pyarrow.schema([SCHEMA.field(name) for name in columns]).empty_table()]
    for shard in shards:
        with storage.user_errors(uri), fs.open_input_file(storage.join(path, shard.file)) as file:
            tables.append(pyarrow.parquet.read_table(file, columns=list(columns)))
    return pyarrow.concat_tables(tables)


def read_split(
    uri: str, split: str, *, columns: Sequence[str] = ("id", "domain", "image", "target")
) -> ray.data.Dataset:
    """Rows of a split with decoded images: `image` and `target` are uint8 s s 3 tensors.

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
        yield from parquet.iter_batches(writing.ROWS_PER_GROUP, columns=columns)
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
        with storage.user_errors(uri), fs.open_input_file(path) as file:
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
    """Binary image columns as tensor columns of uint8 s s 3."""
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
    """Stored images as one array; `raw` is a view of the column's bytes.

    Raises:
        InputError: an image is missing, damaged or of another size; its id is named.
    """
    array = column.combine_chunks() if isinstance(column, pyarrow.ChunkedArray) else column
    if isinstance(array, pyarrow.ChunkedArray):
        array = pyarrow.concat_arrays(array.chunks)
    shape = (image_size, image_size, 3)

    def named(row: int) -> str:
        return f"row {ids[row] if ids else row}"

    if array.null_count:
        raise InputError(f"{named(array.is_null().to_pylist().index(True))}: no image; make the data set again")
    if encoding == "raw":
        offsets = np.frombuffer(array.buffers()[1], np.int32)[array.offset : array.offset + len(array) + 1]
        sizes = np.diff(offsets)
        if (wrong := np.flatnonzero(sizes != np.prod(shape))).size:
            raise InputError(f"{named(int(wrong[0]))}: {sizes[wrong[0]]} bytes; a raw image has {np.prod(shape)}")
        flat = np.frombuffer(array.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]
        return flat.reshape(len(array), *shape)
    pixels = np.empty((len(array), *shape), np.uint8)
    for row, value in enumerate(array):
        picture = np.asarray(images.decode(value.as_py(), name=named(row)))
        if picture.shape != shape:
            raise InputError(f"{named(row)}: {picture.shape[1]} x {picture.shape[0]} pixels, expected {image_size}")
        pixels[row] = picture
    return pixels
