"""What an evaluation has measured so far, in OUTPUT/.measured: one that is stopped, or whose disk fills, goes on there.

A part is a file of arrays, without pickles: folders may be shared. The parts of other options lie in other folders.
"""

import hashlib
import io
import json
import time
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from ddpm_core import storage
from jobs.evaluation.results import FORMAT_VERSION
from jobs.evaluation.worker import Found

Key = tuple[str, str, int, str]
"""(domain, id, seed, purpose) of one image."""
MEASURED = ".measured"
"""Folder in the output; it goes when the evaluation is complete."""
FLUSH_EVERY_S = 10.0
ROWS, VALUES = "rows/", "values/"


class Journal:
    """What is known of each image: taken up from earlier commands, and written as it comes."""

    def __init__(self, output: str, options: Mapping[str, Any]) -> None:
        """`options`: what the measurements depend on."""
        told = json.dumps([FORMAT_VERSION, options], sort_keys=True).encode()
        self.folder = storage.join(output, MEASURED, hashlib.blake2b(told, digest_size=8).hexdigest())
        self.rows: dict[Key, Found] = {}
        self._pending: dict[Key, Found] = {}
        self._flushed = time.monotonic()
        for name in storage.list_files(self.folder):
            if name.endswith(".npz"):
                self.rows.update(_unpacked(storage.read_bytes(storage.join(self.folder, name))))

    def add(self, rows: Mapping[Key, Found]) -> None:
        """Note rows; they are stored FLUSH_EVERY_S later at the latest, with those that come then."""
        self.rows.update(rows)
        self._pending.update(rows)
        if time.monotonic() - self._flushed >= FLUSH_EVERY_S:
            self.flush()

    def flush(self) -> None:
        if self._pending:
            part = storage.join(self.folder, f"part-{time.time_ns():020d}.npz")
            storage.write_bytes(part, _packed(self._pending))
            self._pending = {}
        self._flushed = time.monotonic()


def _packed(rows: Mapping[Key, Found]) -> bytes:
    """A column of each name, and the rows that have it."""
    arrays: dict[str, Any] = {"keys": np.array(json.dumps([*rows]))}
    for name in {name: None for each in rows.values() for name in each}:
        there = [(i, each[name]) for i, each in enumerate(rows.values()) if name in each]
        arrays[f"{ROWS}{name}"] = np.array([i for i, _ in there])
        arrays[f"{VALUES}{name}"] = np.stack([value for _, value in there])
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return file.getvalue()


def _unpacked(content: bytes) -> dict[Key, Found]:
    """{} of a damaged part: its images are measured again."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            keys = [
                (str(to), str(name), int(seed), str(why)) for to, name, seed, why in json.loads(str(arrays["keys"]))
            ]
            rows: list[Found] = [{} for _ in keys]
            for place in arrays.files:
                if place.startswith(VALUES):
                    name = place.removeprefix(VALUES)
                    for row, value in zip(arrays[f"{ROWS}{name}"].tolist(), arrays[place], strict=True):
                        rows[row][name] = value
            return dict(zip(keys, rows, strict=True))
    except (ValueError, KeyError, IndexError, TypeError, OSError, EOFError, zipfile.BadZipFile):
        return {}
