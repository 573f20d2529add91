"""What has been translated, a row an image."""

import io
import time
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet

from ddpm_core import storage
from ddpm_core.errors import InputError


class Manifest:
    """What has been done, a row an image: small parts while the work goes on, one `manifest.parquet` at the end.

    Each part is written whole or not at all, so a killed run loses at most the rows since the last one.
    """

    SCHEMA = pa.schema(
        [
            ("id", pa.string()),
            ("output", pa.string()),
            ("status", pa.string()),
            ("error", pa.string()),
            ("note", pa.string()),
            ("size", pa.int64()),
            ("mtime_ns", pa.int64()),
            ("width", pa.int32()),
            ("height", pa.int32()),
        ]
    )
    FLUSH_EVERY_S = 2.0
    MAX_PARTS = 200

    def __init__(self, output: str) -> None:
        """Take up what earlier runs noted under `output`."""
        self.whole = storage.join(output, "manifest.parquet")
        self.folder = storage.join(output, ".manifest")  # no image is ever put below a hidden folder
        self.rows: dict[str, dict[str, Any]] = {}
        self.pending: list[dict[str, Any]] = []
        self.num_parts = 0
        self.flushed = time.monotonic()
        if storage.exists(self.whole):
            self._take(self.whole)
        for name in storage.list_files(self.folder):
            if name.endswith(".parquet"):
                self._take(storage.join(self.folder, name))
                self.num_parts += 1

    def _take(self, uri: str) -> None:
        try:
            table = pyarrow.parquet.read_table(io.BytesIO(storage.read_bytes(uri)), schema=self.SCHEMA)
        except (pa.ArrowInvalid, KeyError) as error:
            raise InputError(f"{uri} is damaged ({error}); give a new --output folder") from None
        self.rows.update({row["id"]: row for row in table.to_pylist()})

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Note rows; they are on disk at the latest after FLUSH_EVERY_S and a further call."""
        for row in rows:
            self.rows[row["id"]] = row
            self.pending.append(row)
        if time.monotonic() - self.flushed >= self.FLUSH_EVERY_S:
            self.flush()

    def flush(self) -> None:
        if self.pending:
            # Later parts sort behind earlier ones, whichever run wrote them.
            self._write(storage.join(self.folder, f"part-{time.time_ns():020d}.parquet"), self.pending)
            self.pending, self.num_parts = [], self.num_parts + 1
        self.flushed = time.monotonic()
        if self.num_parts >= self.MAX_PARTS:
            self.finish()

    def finish(self) -> None:
        """One file instead of many parts."""
        self._write(self.whole, [self.rows[name] for name in sorted(self.rows)])
        storage.delete_folder(self.folder)
        self.pending, self.num_parts = [], 0

    def _write(self, uri: str, rows: list[dict[str, Any]]) -> None:
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema=self.SCHEMA), buffer, compression="zstd")
        storage.write_bytes(uri, buffer.getvalue())
