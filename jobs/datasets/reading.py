"""Reading the data-set format, by this process or on Ray's workers: the same pieces, the same reader."""

import concurrent.futures
import contextlib
import dataclasses
from collections.abc import Container, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
from jaxtyping import UInt8

from ddpm_core import images, storage
from ddpm_core.errors import InputError
from jobs.common import workers
from jobs.datasets.format import MAKE_AGAIN, SCHEMA, DatasetCard, IndexRow, Shard, read_card
from jobs.datasets.options import Encoding

COLUMNS = ("id", "domain", "image", "target")
ROWS_IN_PIECE, PIECE_BYTES = 1024, 64 * 2**20
"""Aim for pieces of this many rows, or decoded bytes: enough of them for every CPU, few enough to cost nothing."""
MAX_GROUP_BYTES = 2**31
"""Of a row group, unpacked, which is read at once; ours have 64 MB or a single row."""


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
    tables = [pyarrow.schema([SCHEMA.field(name) for name in columns]).empty_table()]
    for shard in shards:
        fs, path = storage.filesystem(storage.join(uri, shard.file))
        with _explained(path), fs.open_input_file(path) as file:
            tables.append(pyarrow.parquet.read_table(file, columns=list(columns)))
            tables[-1].validate(full=True)
    return pyarrow.concat_tables(tables)


class Piece(NamedTuple):
    """Row groups of one file that are read together."""

    uri: str
    """Of the file."""
    num_bytes: int
    """Of the file."""
    groups: tuple[int, ...]
    rows: int


@dataclasses.dataclass(frozen=True)
class Split:
    """A split whose files were found whole, to be read piece by piece, anywhere: `mapped(split.read, split.pieces)`."""

    card: DatasetCard
    columns: tuple[str, ...]
    pieces: tuple[Piece, ...]

    def read(self, piece: Piece, wanted: Container[str] | None = None) -> pyarrow.Table:
        """The rows of a piece with decoded images: `image` and `target` are uint8 s s 3 tensors.

        `wanted`: only the rows with these ids; others are not decoded.

        Raises:
            InputError: the file is damaged, gone by now or another one; it is named.
        """
        fs, path = storage.filesystem(piece.uri)

        def read() -> pyarrow.Table:
            with fs.open_input_file(path) as file:
                _check_size(piece.uri, file.size(), piece.num_bytes)
                try:
                    parquet = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True, pre_buffer=True)
                    rows = parquet.read_row_groups(piece.groups, columns=list(self.columns), use_threads=False)
                    rows.validate(full=True)
                    return rows
                except pyarrow.ArrowException as error:
                    raise _damaged(piece.uri, error) from None

        try:
            table = storage.with_retries(piece.uri, read)
        except FileNotFoundError:
            raise InputError(f"{piece.uri} is missing; {MAKE_AGAIN}") from None
        except OSError as error:
            raise _damaged(piece.uri, error) from None
        if wanted is not None:
            table = table.filter(pyarrow.array([name in wanted for name in table["id"].to_pylist()], pyarrow.bool_()))
        return decode_table(table, self.card.image_size, self.card.encoding)


def _check_size(uri: str, found: int, wanted: int) -> None:
    """A file that was cut or put in another's place may read well."""
    if found != wanted:
        raise InputError(f"{uri} has {found:,} bytes where dataset.json says {wanted:,}; {MAKE_AGAIN}")


@contextlib.contextmanager
def _explained(uri: str) -> Iterator[None]:
    """What a file, or the store where it lies, is found to be, as an InputError that names it."""
    try:
        with storage.user_errors(uri):
            try:
                yield
            except pyarrow.ArrowException as error:
                raise _damaged(uri, error) from None
    except FileNotFoundError:
        raise InputError(f"{uri} is missing; {MAKE_AGAIN}") from None
    except OSError as error:  # Arrow's for what it cannot make sense of
        raise _damaged(uri, error) from None


def _damaged(uri: str, error: Exception) -> InputError:
    return InputError(f"{uri} is damaged or not a readable parquet file ({str(error).splitlines()[0]}); {MAKE_AGAIN}")


def open_split(uri: str, split: str, *, columns: Sequence[str] = COLUMNS, rows_in_piece: int | None = None) -> Split:
    """Rows of a split, in pieces of about so many; every file's end is looked at.

    The column `target` is left out where the data set has none.

    Raises:
        InputError: no such split, or a file is missing, damaged or lacks a column (file and column named).
    """
    card = read_card(uri)
    check_split(uri, card, split)
    if unknown := [name for name in columns if name not in SCHEMA.names]:
        raise ValueError(f"columns {unknown} are not of the format: {SCHEMA.names}")
    columns = tuple(name for name in columns if name != "target" or card.has_targets)
    if rows_in_piece is None:
        rows_in_piece = min(ROWS_IN_PIECE, PIECE_BYTES // (3 * card.image_size**2 * (2 if card.has_targets else 1)))
    pieces: list[Piece] = []
    shards = [shard for shard in card.shards if shard.file.startswith(f"{split}/")]
    for shard, groups in zip(shards, check_shards(uri, shards, columns), strict=True):
        first = 0
        for end in range(1, len(groups) + 1):
            if (rows := sum(groups[first:end])) >= rows_in_piece or end == len(groups):
                file = storage.join(uri, shard.file)
                pieces.append(Piece(file, shard.num_bytes, tuple(range(first, end)), rows))
                first = end
    return Split(card, columns, tuple(pieces))


def check_split(uri: str, card: DatasetCard, split: str) -> None:
    """Raises InputError where the data set has no rows in that split."""
    if not card.splits.get(split):
        there = ", ".join(name for name, count in card.splits.items() if count)
        raise InputError(f"{uri} has no rows in split {split!r}; it has {there}")


def read_tables(uri: str, split: str, *, columns: Sequence[str] = COLUMNS) -> Iterator[pyarrow.Table]:
    """The rows of a split with decoded images, in stored order, by this process and its threads alone.

    Raises:
        InputError: as `open_split` and `Split.read`.
    """
    there = open_split(uri, split, columns=columns, rows_in_piece=1)
    yield from workers.mapped(there.read, there.pieces, len(there.pieces), num_workers=0)


def check_shards(uri: str, shards: Sequence[Shard], columns: Sequence[str]) -> list[list[int]]:
    """Read every footer: a wrong file is found now and by name, not in the middle of an epoch. Returns the rows of each
    file's row groups.

    Raises:
        InputError: naming the file, and the column where one is missing or of another type.
    """
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda shard: _check_shard(storage.join(uri, shard.file), shard, columns), shards))


def _check_shard(uri: str, shard: Shard, columns: Sequence[str]) -> list[int]:
    remedy = MAKE_AGAIN
    fs, path = storage.filesystem(uri)
    with _explained(uri), fs.open_input_file(path) as file:
        parquet = pyarrow.parquet.ParquetFile(file)
        schema, metadata, size = parquet.schema_arrow, parquet.metadata, file.size()
    for name in columns:
        if name not in schema.names:
            raise InputError(f"{uri}: column {name!r} is missing; {remedy}")
        if schema.field(name).type != SCHEMA.field(name).type:
            there, right = schema.field(name).type, SCHEMA.field(name).type
            raise InputError(f"{uri}: column {name!r} is {there}, it must be {right}; {remedy}")
    if metadata.num_rows != shard.rows:
        raise InputError(f"{uri} has {metadata.num_rows} rows where dataset.json says {shard.rows}; {remedy}")
    _check_size(uri, size, shard.num_bytes)
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    if any(group.total_byte_size > MAX_GROUP_BYTES for group in groups):
        raise InputError(f"{uri} unpacks to more than images of a data set take; {remedy}")
    return [group.num_rows for group in groups]


def decode_table(table: pyarrow.Table, image_size: int, encoding: Encoding) -> pyarrow.Table:
    """Binary image columns as tensor columns of uint8 s s 3."""
    shape = (image_size, image_size, 3)
    ids = table["id"].to_pylist() if "id" in table.column_names else None
    for index, name in enumerate(table.column_names):
        if name in ("image", "target"):
            pixels = decode_column(table.column(name), image_size, encoding, ids)
            flat = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(pixels.ravel()), int(np.prod(shape)))
            tensor = pyarrow.ExtensionArray.from_storage(pyarrow.fixed_shape_tensor(pyarrow.uint8(), shape), flat)
            table = table.set_column(index, name, tensor)
    return table


def pixels_of(table: pyarrow.Table, name: str) -> UInt8[np.ndarray, "b s s 3"]:
    """A column of `decode_table` as one array."""
    return table.column(name).combine_chunks().to_numpy_ndarray()


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
        image = np.asarray(images.decode(value.as_py(), name=named(row)))
        if image.shape != shape:
            raise InputError(f"{named(row)}: {image.shape[1]} x {image.shape[0]} pixels, expected {image_size}")
        pixels[row] = image
    return pixels
