"""Results as rows of parquet files, for who wants a table and not millions of small objects.

    images/4f0c….parquet    id, image (the PNG's bytes): the results of some images, written once

The manifest's `output` says in which file a result is. While work goes on an image may be in two of them, when its
first one was written and not noted any more; `tidy` ends that.
"""

import collections
import hashlib
import io
from collections.abc import Callable, Iterable

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from ddpm_core import storage

FOLDER = "images"
SCHEMA = pa.schema([("id", pa.string()), ("image", pa.binary())])
MOST_BYTES = 2**28
"""Of results in a file, but for a single larger one."""


class Pack:
    """The results of one batch."""

    def __init__(self, output: str) -> None:
        self.output = output
        self.rows: list[tuple[int, str, bytes]] = []
        self.num_bytes = 0
        self.files: dict[int, str] = {}
        """Of the rows that are written: below the output."""

    def add(self, row: int, name: str, image: bytes) -> None:
        """Row `row` of the batch, of the image `name`."""
        if self.rows and self.num_bytes + len(image) > MOST_BYTES:
            self.flush()
        self.rows.append((row, name, image))
        self.num_bytes += len(image)

    def flush(self) -> None:
        """Write what is added: equal images make an equal file, by whomever it is written again."""
        if not self.rows:
            return
        rows, names, images = zip(*self.rows, strict=True)
        digest = hashlib.blake2b("\0".join(names).encode(), digest_size=16).hexdigest()
        file = f"{FOLDER}/{digest}.parquet"
        _write(storage.join(self.output, file), pa.table({"id": names, "image": images}, SCHEMA))
        self.files |= dict.fromkeys(rows, file)
        self.rows, self.num_bytes = [], 0


def image_of(output: str, file: str, name: str) -> bytes:
    """One result. Raises KeyError where it is not there."""
    table = _read(storage.join(output, file))
    return dict(zip(table["id"].to_pylist(), table["image"].to_pylist(), strict=True))[name]


def tidy(output: str, rows: Callable[[], Iterable[pa.Table]], *, is_first: bool) -> None:
    """Leave of each image the result that its row tells of. `rows`: all of the manifest, with id and output, as often
    as they are asked for. `is_first`: no earlier run has left files of which some rows may be out of date."""
    counts: collections.Counter[str] = collections.Counter()
    for table in rows():
        counts.update(table["output"].to_pylist())
    partly: dict[str, set[str]] = {}
    for name in storage.list_files(storage.join(output, FOLDER)):
        file = f"{FOLDER}/{name}"
        if not counts[file]:
            storage.delete_file(storage.join(output, file))
        elif not is_first and len(_read(storage.join(output, file), ["id"])) > counts[file]:
            partly[file] = set()
    if not partly:
        return
    for table in rows():
        for name, file in zip(table["id"].to_pylist(), table["output"].to_pylist(), strict=True):
            if file in partly:
                partly[file].add(name)
    for file, names in partly.items():
        uri = storage.join(output, file)
        table = _read(uri)
        _write(uri, table.filter(pa.compute.is_in(table["id"], pa.array(sorted(names)))))


def _read(uri: str, columns: list[str] | None = None) -> pa.Table:
    fs, path = storage.filesystem(uri)

    def read() -> pa.Table:
        with fs.open_input_file(path) as file:
            return pyarrow.parquet.ParquetFile(file).read(columns)

    return storage.with_retries(uri, read)


def _write(uri: str, table: pa.Table) -> None:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, compression="none")  # images are packed already
    storage.write_bytes(uri, buffer.getvalue())
