"""Images that files tell of: a list of URIs, parquet with an image or a URI column, an S3 Inventory."""

import contextlib
import csv
import datetime
import fnmatch
import functools
import gzip
import io
import itertools
import os
import posixpath
import re
import urllib.parse
import zlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet

from ddpm_core import images, storage
from ddpm_core.errors import InputError
from jobs.datasets import reading
from jobs.datasets.listing import is_system
from jobs.translation import listing
from jobs.translation.listing import LOOKED_AT, Passed, Sources, row_uri
from jobs.translation.names import Hashes
from jobs.translation.shards import Listed

LISTS = (".txt", ".lst", ".list")
URI_COLUMNS = ("uri", "url", "path", "file", "file_name", "image_path", "image_uri", "key")
"""Of several columns of text, the first of these tells where an image lies."""
AT_ONCE = (1_000, 10_000)
"""Lines of a list read together: at first, so that work begins soon, and then."""
MAX_LINE = 2**16
"""Letters of a line in a list."""
T = TypeVar("T")


def find(uri: str) -> Sources:
    """What `--input` means, by what is there.

    Raises:
        InputError: nothing is there, or nothing that tells of images.
    """
    end = posixpath.splitext(uri)[1].lower()
    if storage.is_file(uri):
        if end == ".parquet":
            return packed(uri, [uri])
        if end == ".json":
            return inventory(uri)
        return of_list(uri) if end in LISTS else listing.files(uri)
    if end == ".parquet" and (pattern := re.match(r"([^*?\[]*)/[^/]*[*?\[]", uri)):
        found = [item.path for item in storage.walk(pattern[1]) if item.entry is not None]
        matching = [
            each for each in (storage.join(pattern[1], path) for path in found) if fnmatch.fnmatchcase(each, uri)
        ]
        if matching:
            return packed(uri, matching)
    if not storage.is_file(uri) and storage.exists(uri):
        found = []
        for item in itertools.islice(storage.walk(uri, skip=is_system), LOOKED_AT):
            suffix = posixpath.splitext(item.name)[1].lower()
            if item.entry is not None and suffix in images.SUFFIXES:
                break
            if item.entry is not None and suffix == ".parquet":
                found.append(storage.join(uri, item.path))
        else:
            if found:
                return packed(uri, found)
    return listing.files(uri)


# -- where they lie -----------------------------------------------------------------------------------------------


def of_list(uri: str) -> Sources:
    """A text file with a URI or a path a line; a relative one is below the list's folder."""
    return Sources(uri, posixpath.dirname(uri), lambda passed: _at(_lines(uri), posixpath.dirname(uri), passed))


def _lines(uri: str) -> Iterator[str]:
    with _opened(uri) as stream:
        text = io.TextIOWrapper(stream, "utf-8", errors="surrogateescape")
        for line in iter(lambda: text.readline(MAX_LINE), ""):
            if len(line) == MAX_LINE:
                raise InputError(f"{uri}: a line is longer than any URI; give a text file with a URI a line")
            if line.strip():
                yield line.strip("\r\n")


@contextlib.contextmanager
def _opened(uri: str) -> Iterator[Any]:
    """A file to be read bit by bit; .gz is unpacked."""
    fs, path = storage.filesystem(uri)
    try:
        stream = storage.with_retries(uri, lambda: fs.open_input_stream(path, compression=None))
    except FileNotFoundError:
        raise InputError(f"{uri}: no such file") from None
    try:
        with storage.user_errors(uri), stream:
            yield gzip.GzipFile(fileobj=stream) if uri.endswith(".gz") else stream
    except (gzip.BadGzipFile, EOFError, zlib.error, csv.Error, KeyError) as error:
        raise InputError(f"{uri} is damaged ({str(error) or type(error).__name__}); bring it anew") from None


def _at(uris: Iterator[str], folder: str, passed: Passed) -> Iterator[Listed]:
    """Images by where they lie; what is told twice counts once."""
    seen, sizes = Hashes(), itertools.chain(AT_ONCE, itertools.repeat(AT_ONCE[-1]))
    while some := list(itertools.islice(uris, next(sizes))):
        rows = {row.id: row for row in (_of_uri(each, folder) for each in some)}
        there = dict(zip(rows, seen.have([*rows]), strict=True))
        new = [row for name, row in rows.items() if not there[name]]
        passed.num_twice += len(some) - len(new)
        seen.add([row.id for row in new])
        places = [os.fsdecode(row.path) if row.path else row.input for row in new]
        known = [row.error == "" for row in new]
        found = iter(storage.stamps([place for place, is_known in zip(places, known, strict=True) if is_known]))
        for row, is_known in zip(new, known, strict=True):
            size, mtime_ns = next(found) if is_known else (0, 0)
            yield row._replace(size=size, mtime_ns=mtime_ns)


def _of_uri(given: str, folder: str) -> Listed:
    uri = given if "://" in given or given.startswith("/") else storage.join(folder, given)
    name = storage.as_text(re.sub(r"^\w+://|^/+", "", given))
    try:
        uri = storage.absolute(uri, flag="the list's")
    except InputError as error:
        return Listed(name, uri, error=str(error))
    path = None if storage.as_text(uri) == uri else uri.encode("utf-8", "surrogateescape")
    return Listed(name, storage.as_text(uri), path=path)


# -- rows of parquet files ----------------------------------------------------------------------------------------


def packed(uri: str, files: list[str]) -> Sources:
    """Parquet files with a column of images (bytes, or a struct that has them) or of URIs. The id is the column `id`'s
    value, or else file and row.

    Raises:
        InputError: there is no such column, or several.
    """
    schema = _schema(files[0])
    kind, column = _column(files[0], schema)
    root = posixpath.dirname(files[0]) if len(files) == 1 else uri.rpartition("*")[0].rpartition("/")[0] or uri
    if kind == "uri":

        def texts() -> Iterator[str]:
            return (each for file in files for _, _, table in _groups(file, [column]) for each in _texts(table))

        return Sources(uri, root, lambda passed: _at(texts(), root, passed))
    named = "id" in schema.names

    def rows(passed: Passed) -> Iterator[Listed]:
        seen = Hashes()
        for file in files:
            size, mtime_ns = storage.num_bytes(file), storage.mtime_ns(file)
            stem = posixpath.splitext(file.removeprefix(root).lstrip("/"))[0]
            for group, num_rows, table in _groups(file, ["id"] if named else []):
                places = [f"{stem}/{group:05d}-{row:07d}" for row in range(num_rows)]
                names = [storage.as_text(str(each)) for each in _values(table["id"])] if named else places
                again = set()
                there = seen.have(names)
                for row, (name, place) in enumerate(zip(names, places, strict=True)):
                    at = row_uri(file, group, row)
                    if there[row] or name in again:
                        error = f"{name}: another row has this id"
                        yield Listed(f"{name} (again, {place})", at, size, mtime_ns, error=error)
                    else:
                        yield Listed(name, at, size, mtime_ns)
                    again.add(name)
                seen.add(names)

    return Sources(uri, root, rows, column=column)


def _schema(file: str) -> pa.Schema:
    fs, path = storage.filesystem(file)

    def read() -> pa.Schema:
        with fs.open_input_file(path) as stream, _readable(file):
            return pyarrow.parquet.read_schema(stream)

    return _asked(file, read)


@contextlib.contextmanager
def _readable(file: str) -> Iterator[None]:
    try:
        yield
    except pa.ArrowException as error:
        raise _damaged(file, error) from None


def _damaged(file: str, error: Exception) -> InputError:
    return InputError(f"{file} is not a readable parquet file ({str(error).splitlines()[0]})")


def _asked(file: str, read: Callable[[], T]) -> T:
    """What `read` gives, as `storage.with_retries`; what Arrow cannot make sense of is the file's fault."""
    try:
        return storage.with_retries(file, read)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _damaged(file, error) from None


def _column(file: str, schema: pa.Schema) -> tuple[str, str]:
    """("image" or "uri", name) of the column that tells of images."""
    binary = [field.name for field in schema if _holds_bytes(field.type)]
    texts = [field.name for field in schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]
    chosen = ["image"] if "image" in binary else binary
    if not chosen:
        texts = [name for name in texts if name != "id"] or texts
        chosen = [name for name in URI_COLUMNS if name in texts][:1] or texts
    if len(chosen) != 1:
        raise InputError(
            f"{file} has the columns {', '.join(schema.names)}; one must hold the images' bytes (call it image) or say "
            "where they lie (call it uri)"
        )
    return ("image" if binary else "uri"), chosen[0]


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _groups(file: str, columns: list[str]) -> Iterator[tuple[int, int, pa.Table]]:
    """Number, rows and columns of each row group."""
    for group in itertools.count():
        if (found := _group(file, group, columns)) is None:
            return
        yield group, *found


def _group(file: str, group: int, columns: list[str]) -> tuple[int, pa.Table] | None:
    fs, path = storage.filesystem(file)

    def read() -> tuple[int, pa.Table] | None:
        with fs.open_input_file(path) as stream, _readable(file):
            opened = pyarrow.parquet.ParquetFile(stream)
            if group >= opened.num_row_groups:
                return None
            if missing := [name for name in columns if name not in opened.schema_arrow.names]:
                raise InputError(f"{file} has no column {missing[0]}, as others of the input have")
            about = opened.metadata.row_group(group)
            chunks = [about.column(index) for index in range(about.num_columns)]
            held = sum(each.total_uncompressed_size for each in chunks if each.path_in_schema.split(".")[0] in columns)
            if held > reading.MAX_GROUP_BYTES:
                raise InputError(
                    f"{file}: row group {group} unpacks to {held / 1e9:,.1f} GB; at most "
                    f"{reading.MAX_GROUP_BYTES / 1e9:.1f} are read at once: write it anew with smaller row groups"
                )
            table = opened.read_row_group(group, columns=columns)
            if len(table) != about.num_rows:
                raise InputError(f"{file}: row group {group} has {len(table)} rows and says {about.num_rows}")
            return about.num_rows, table

    return _asked(file, read)


def _texts(table: pa.Table) -> list[str]:
    return [each for each in _values(table.column(0)) if each]


def _values(column: pa.ChunkedArray) -> list[Any]:
    """A column's values; text that is no UTF-8 as names of files have it."""
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return column.to_pylist()
    texts = column.cast(pa.large_binary()).to_pylist()
    return [None if each is None else each.decode("utf-8", "surrogateescape") for each in texts]


@functools.lru_cache(maxsize=2)  # batches of one row group follow each other
def images_of(file: str, group: int, column: str) -> list[bytes | None]:
    """The images of a row group.

    Raises:
        InputError: the file is gone, damaged, another one or has no such column.
    """
    try:
        found = _group(file, group, [column])
    except FileNotFoundError:
        found = None
    if found is None:
        raise InputError(f"{file} is gone or another one by now; give the command again")
    return [each.get("bytes") if isinstance(each, dict) else each for each in found[1].column(0).to_pylist()]


# -- S3 Inventory -------------------------------------------------------------------------------------------------


def inventory(uri: str) -> Sources:
    """The objects of a bucket as S3 Inventory lists them (manifest.json; CSV or parquet).

    Raises:
        InputError: it is no such manifest, or of another format.
    """
    try:
        told = storage.read_json(uri)
        bucket, kind = told["sourceBucket"], told["fileFormat"].lower()
        keys = [file["key"] for file in told["files"]]
        fields = [name.strip() for name in told["fileSchema"].split(",")]
        home = told["destinationBucket"].removeprefix("arn:aws:s3:::")
    except (*storage.NOT_JSON, KeyError, TypeError, AttributeError):
        raise InputError(
            f"{uri} is not the manifest.json of an S3 Inventory; give an image, a folder, a list of URIs (.txt), "
            "parquet or such a manifest"
        ) from None
    readers: dict[str, Callable[[str], Iterator[dict[str, Any]]]]
    readers = {"csv": lambda file: _csv_rows(file, fields), "parquet": _parquet_rows}
    if kind not in readers:
        raise InputError(f"{uri} lists {told['fileFormat']} files; set the inventory to CSV or Parquet")
    root = f"s3://{bucket}"

    def entries() -> Iterator[storage.Entry]:
        for key in keys:
            for row in readers[kind](f"s3://{home}/{key}"):
                if str(row.get("islatest", "true")).lower() != "false" and not _is_true(row.get("isdeletemarker")):
                    yield _entry(row)

    def rows(passed: Passed) -> Iterator[Listed]:
        items = storage.items_of(entries(), is_system)
        return listing.listed(root, items, "*", passed)

    return Sources(uri, root, rows)


def _is_true(value: Any) -> bool:
    return str(value).lower() == "true"


def _csv_rows(file: str, fields: list[str]) -> Iterator[dict[str, Any]]:
    names = [name.lower() for name in fields]
    with _opened(file) as stream:
        for values in csv.reader(io.TextIOWrapper(stream, "utf-8", newline="")):
            row = dict(zip(names, values, strict=False))
            yield {**row, "key": urllib.parse.unquote_plus(row["key"])}


def _parquet_rows(file: str) -> Iterator[dict[str, Any]]:
    wanted = {name.replace("_", ""): name for name in _schema(file).names}
    columns = [
        wanted[n] for n in ("key", "size", "lastmodifieddate", "etag", "islatest", "isdeletemarker") if n in wanted
    ]
    for _, _, table in _groups(file, columns):
        for row in table.to_pylist():
            yield {name.replace("_", ""): value for name, value in row.items()}


def _entry(row: dict[str, Any]) -> storage.Entry:
    when = row.get("lastmodifieddate") or 0
    if isinstance(when, str):
        when = datetime.datetime.fromisoformat(when)
    if isinstance(when, datetime.datetime):
        when = int(when.replace(tzinfo=when.tzinfo or datetime.UTC).timestamp() * 1000) * 1_000_000
    return storage.Entry(int(row.get("size") or 0), int(when), "", row["key"], str(row.get("etag") or "").strip('"'))
