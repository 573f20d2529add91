"""What a translation has listed and done, in files beside its results: bounded memory, however many images there are.

    .shards/00000002/listing-00017.parquet   images that one run has listed, in its order: what to do with each, or what
                                             an earlier run has done
    .shards/00000002/part-….parquet          what has been done of it since: small, some seconds apart
    .shards/00000002/done-00017.parquet      the same rows when all are done; written once
    manifest.parquet                         all of them, put together at the end; then .shards goes

A run that is started again lists again, and takes from these files what is done: of equal inputs the row that was
written last counts. No image is ever put below a hidden folder.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from ddpm_core import storage
from ddpm_core.errors import InputError
from jobs.translation.names import Hashes, Taken, found, hashed, output_names

MANIFEST = pa.schema(
    [
        ("id", pa.string()),
        ("input", pa.string()),  # where it lies; of a row of a file FILE#ROW-GROUP.ROW
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("etag", pa.string()),
        ("output", pa.string()),  # below the folder of results
        ("seed", pa.int64()),
        ("options", pa.string()),  # which; run.json has them in full
        ("checkpoint", pa.string()),
        ("status", pa.string()),  # ok, rejected; gone: its image is no longer there, the result is; "": to be done
        ("error", pa.string()),
        ("note", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("seconds", pa.float32()),  # its share of the time that its batch took
        ("identity_cosine", pa.float32()),  # of source and result, with --identity-net; of several faces the least
    ]
)
LISTING = MANIFEST.append(pa.field("path", pa.binary()))
"""With the name by which a file is opened where that is no text."""
RESULT = ("output", "status", "error", "note", "width", "height", "seconds", "identity_cosine")
"""What becomes of a row."""
REJECTED = pa.schema([MANIFEST.field(name) for name in ("id", "input", "error")])
FIRST_ROWS = (1_000, 10_000)
"""Rows of a run's first shards: work begins with them at once."""
SHARD_ROWS = 100_000
"""Of the others."""


class Listed(NamedTuple):
    """An image, as its source lists it."""

    id: str
    input: str
    size: int = 0
    mtime_ns: int = 0
    etag: str = ""
    error: str = ""
    """Why it cannot even be read."""
    path: bytes | None = None


class Result(NamedTuple):
    """What became of an image."""

    output: str
    status: str
    error: str
    note: str
    width: int | None
    height: int | None
    seconds: float
    identity_cosine: float | None


def is_same(row: Mapping[str, Any], image: Listed) -> bool:
    """Whether an image is the one that a row tells of: by its etag, where the store has one, else by its time. One that
    could not be looked at, then or now, is taken for the same."""
    if not all(each["etag"] or each["mtime_ns"] or each["size"] for each in (row, image._asdict())):
        return True
    if row["etag"] or image.etag:
        return row["size"] == image.size and row["etag"] == image.etag
    return row["size"] == image.size and row["mtime_ns"] == image.mtime_ns


def read(uri: str) -> pa.Table:
    """One of our files.

    Raises:
        InputError: it is damaged.
    """
    content = storage.read_bytes(uri)
    with _damaged(uri):
        return pyarrow.parquet.read_table(io.BytesIO(content))


def groups(uri: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Columns of a file of ours, of any length, piece by piece.

    Raises:
        InputError: it is damaged.
    """
    for number in itertools.count():
        if (table := group(uri, number, columns)) is None:
            return
        yield table


def group(uri: str, number: int, columns: Sequence[str] | None = None) -> pa.Table | None:
    """One piece; None after the last."""
    fs, path = storage.filesystem(uri)

    def part() -> pa.Table | None:
        with _damaged(uri), fs.open_input_file(path) as opened:
            file = pyarrow.parquet.ParquetFile(opened)
            return file.read_row_group(number, columns=columns and [*columns]) if number < file.num_row_groups else None

    return storage.with_retries(uri, part)


@contextlib.contextmanager
def _damaged(uri: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, KeyError) as error:
        raise InputError(f"{uri} is damaged ({str(error).splitlines()[0]}); give a new --output folder") from None


def _bytes(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


# -- what earlier runs have left ----------------------------------------------------------------------------------


class Known:
    """What earlier runs have noted of each image, found by where it lies. Of a row 15 bytes are held: a hash, its place
    in the files and whether its result is there; and 8 for its result's name."""

    def __init__(self, files: Sequence[str], output: str, *, sweep: bool = True) -> None:
        """`files`: those that come later count. `sweep`: delete what a kill has left half-written.

        Raises:
            InputError: one is damaged, or of another kind.
        """
        self.files = files
        self.names = Taken()
        self.num_ok = 0
        """Rows with a result."""
        there = Hashes()
        if files:
            there.add_hashes(_outputs(output, sweep))
        self.parts: list[tuple[str, int]] = []
        """File and row group of each piece."""
        hashes, present, ends = [np.empty(0, np.uint64)], [np.empty(0, bool)], [0]
        for uri in files:
            for number, table in enumerate(groups(uri, ("input", "output", "status"))):
                outputs = table["output"].to_pylist()
                self.names.add([output for output in outputs if output])
                self.num_ok += table["status"].to_pylist().count("ok")
                hashes.append(hashed(table["input"].to_pylist()))
                present.append(there.have(outputs))
                ends.append(ends[-1] + len(table))
                self.parts.append((uri, number))
        self.ends = np.array(ends)
        every = np.concatenate(hashes)
        self.places = np.argsort(every, kind="stable").astype(np.uint32)
        self.hashes = every[self.places]
        self.present = np.concatenate(present)
        self.is_last = np.append(self.hashes[1:] != self.hashes[:-1], True)[: len(every)]
        self.met = np.zeros(len(every), bool)
        self.table = functools.lru_cache(maxsize=4)(lambda part: group(*self.parts[part]))

    def take(self, inputs: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The rows of these inputs, as far as there are; `present`: whether the result is there."""
        places, there = found(self.hashes, hashed(inputs))
        self.met[places[there]] = True
        rows = self._rows(self.places[places[there]].astype(np.int64))
        wanted = {*inputs}
        return {row["input"]: row for row in rows if row["input"] in wanted}

    def rest(self, most: int) -> Iterator[list[dict[str, Any]]]:
        """The rows of inputs that were not asked for, in their order, some at a time."""
        places = np.sort(self.places[self.is_last & ~self.met]).astype(np.int64)
        for first in range(0, len(places), most):
            yield self._rows(places[first : first + most])

    def _rows(self, places: np.ndarray) -> list[dict[str, Any]]:
        rows = []
        parts = np.searchsorted(self.ends, places, side="right") - 1
        for part in np.unique(parts):
            mine = places[parts == part]
            table = self.table(int(part))
            assert table is not None
            table = table.take(mine - self.ends[part])
            for place, row in zip(mine, table.to_pylist(), strict=True):
                rows.append({**row, "present": bool(self.present[place])})
        return rows


def _outputs(output: str, sweep: bool) -> np.ndarray:
    """Hashes of the files that are there."""
    found = []
    walk = (item.path for item in storage.walk(output))
    while some := list(itertools.islice(walk, SHARD_ROWS)):
        for path in some:
            if sweep and storage.is_debris(path):
                storage.delete_file(storage.join(output, path))
        found.append(hashed(some))
    return np.concatenate([np.empty(0, np.uint64), *found])


# -- what this run lists and does ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Counts:
    """Of a run's images."""

    images: int = 0
    todo: int = 0
    unreadable: int = 0
    """By what the listing says of them."""


@dataclasses.dataclass
class _Shard:
    """One at work."""

    table: pa.Table
    rows: dict[str, int]
    """Of the images to be done, by id."""
    results: dict[str, Result] = dataclasses.field(default_factory=dict)


class Shards:
    """The files of one run."""

    FLUSH_EVERY_S = 2.0
    MAX_PARTS = 200

    def __init__(self, output: str) -> None:
        self.whole = storage.join(output, "manifest.parquet")
        self.folder = storage.join(output, ".shards")
        there = [name for name in storage.list_files(self.folder) if name.endswith(".parquet")]
        self.earlier = sorted({name.partition("/")[0] for name in there})
        self.place = storage.join(self.folder, f"{max(map(int, self.earlier), default=0) + 1:08d}")
        self.output = output
        self.files = [self.whole] if storage.exists(self.whole) else []
        """What earlier runs have left; what comes later counts."""
        done = {name.replace("/done-", "/listing-") for name in there if "/done-" in name}
        for run in self.earlier:
            mine = sorted(name for name in there if name.startswith(f"{run}/"))
            for kind in ("listing-", "part-", "done-"):  # of a shard: what was to be done, was done, is all done
                names = [name for name in mine if name.startswith(f"{run}/{kind}")]
                self.files += [storage.join(self.folder, name) for name in names if name not in done]
        self.counts = Counts()
        self.num_shards = 0
        self.listed: queue.Queue[int | BaseException | None] = queue.Queue()
        """Shards with something to do, in order; None at the end; or what has gone wrong."""
        self.is_listed = threading.Event()
        self.open: dict[int, _Shard] = {}
        self.pending: list[tuple[int, str]] = []
        """Images whose results are in no part yet: shard and id."""
        self.parts: dict[str, set[int]] = {}
        """Files of parts, and the shards whose rows they hold."""
        self.flushed = time.monotonic()

    # -- listing: by a thread of its own

    def list_images(
        self,
        images: Iterable[Listed],
        known: Known,
        facts: Mapping[str, Any],
        *,
        suffix: str,
        stop: threading.Event,
    ) -> None:
        """List `images` in shards. `facts`: columns that all have in common. `suffix`: of the results' files; "" where
        who makes them says which these are."""
        images = iter(images)
        sizes = itertools.chain(FIRST_ROWS, itertools.repeat(SHARD_ROWS))
        while not stop.is_set() and (some := list(itertools.islice(images, next(sizes)))):
            rows = list(self.rows(some, known, facts, suffix))
            self.counts.images += len(rows)
            self.counts.todo += sum(row["status"] == "" for row in rows)
            self.counts.unreadable += sum(row["status"] == "rejected" for row in rows)
            self._put(rows)
        if stop.is_set():
            return
        for rows in known.rest(SHARD_ROWS):
            kept = [{**row, "status": "gone"} for row in rows if row["status"] in ("ok", "gone") and row["present"]]
            if kept:
                self._put(kept)
        for run in self.earlier:  # all of it is in this run's files now
            storage.delete_folder(storage.join(self.folder, run))

    def rows(
        self, some: Sequence[Listed], known: Known, facts: Mapping[str, Any], suffix: str
    ) -> Iterator[dict[str, Any]]:
        """What is to be done with images, or has been."""
        before = known.take([image.input for image in some])
        given = {image.id: row["output"] for image in some if (row := before.get(image.input)) and row["output"]}
        names: Mapping[str, str] = {}
        if suffix:
            names = output_names((image.id for image in some if not image.error), given, known.names, suffix=suffix)
            known.names.add([name for id, name in names.items() if id not in given])
        for image in some:
            row = before.get(image.input)
            if (
                row is not None
                and row["status"] in ("ok", "gone")
                and row["present"]
                and row["options"] == facts["options"]
                and is_same(row, image)
            ):
                yield {**row, "status": "ok"}
                continue
            error = image.error
            new = {**image._asdict(), **facts, "output": names.get(image.id, ""), "note": ""}
            yield {**new, "status": "rejected" if error else ""}

    def _put(self, rows: list[dict[str, Any]]) -> None:
        number, self.num_shards = self.num_shards, self.num_shards + 1
        table = pa.Table.from_pylist(rows, schema=LISTING)
        if any(row["status"] == "" for row in rows):
            storage.write_bytes(self._uri("listing", number), _bytes(table))
            self.listed.put(number)
        else:
            self._close(number, table)

    def _uri(self, kind: str, number: int) -> str:
        return storage.join(self.place, f"{kind}-{number:05d}.parquet")

    # -- working

    def todo(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """The number of each shard and its rows to do; waits for those that are not listed yet.

        Raises:
            InputError: what has gone wrong with the listing.
        """
        while (number := self.listed.get()) is not None:
            if isinstance(number, BaseException):
                raise number
            table = read(self._uri("listing", number))
            rows = table.select(["id", "input", "output", "size", "status", "path"]).to_pylist()
            todo = {row["id"]: place for place, row in enumerate(rows) if row["status"] == ""}
            self.open[number] = _Shard(table, todo)
            yield number, [rows[place] for place in todo.values()]

    def note(self, number: int, results: Mapping[str, Result]) -> None:
        """What became of images of a shard; it is on disk at the latest after FLUSH_EVERY_S and a further call.

        Raises:
            InputError: another driver has done the shard.
        """
        shard = self.open[number]
        new = {id: result for id, result in results.items() if id not in shard.results}
        shard.results |= new
        self.pending += [(number, id) for id in new]
        if len(shard.results) == len(shard.rows):
            self._close(number, _with(shard.table, shard))
            del self.open[number]
            self.pending = [each for each in self.pending if each[0] != number]
            for part in [part for part, shards in self.parts.items() if not shards & self.open.keys()]:
                storage.delete_file(part)
                del self.parts[part]
        if time.monotonic() - self.flushed >= self.FLUSH_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Write what is pending."""
        if len(self.parts) >= self.MAX_PARTS:  # one in the place of many
            old, self.parts = [*self.parts], {}
            self.pending = [(number, id) for number, shard in list(self.open.items()) for id in shard.results]
            self._flush()
            for part in old:
                storage.delete_file(part)
        self._flush()
        self.flushed = time.monotonic()

    def _flush(self) -> None:
        if not self.pending:
            return
        ids = collections.defaultdict(list)
        for number, id in self.pending:
            ids[number].append(id)
        tables = [_with(shard.table.take([shard.rows[id] for id in ids[n]]), shard) for n, shard in self._open(ids)]
        uri = storage.join(self.place, f"part-{time.time_ns():020d}.parquet")
        storage.write_bytes(uri, _bytes(pa.concat_tables(tables)))
        self.parts[uri] = {*ids}
        self.pending = []

    def _open(self, numbers: Iterable[int]) -> list[tuple[int, _Shard]]:
        return [(number, self.open[number]) for number in numbers]

    def _close(self, number: int, table: pa.Table) -> None:
        uri = self._uri("done", number)
        if not storage.write_once(uri, _bytes(table.select(MANIFEST.names))):
            raise InputError(f"{uri} was written by another driver; let one work at a time, and give the command again")

    # -- the end

    def done(self) -> Iterator[pa.Table]:
        """All rows, shard by shard."""
        for number in range(self.num_shards):
            yield read(self._uri("done", number))

    def pick(self, numbers: Sequence[int], num_ok: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Rows with a result by their numbers among those; `num_ok`: how many each shard has."""
        first = 0
        for number, num in enumerate(num_ok):
            if mine := [each - first for each in numbers if first <= each < first + num]:
                table = read(self._uri("done", number))
                good = table.filter(pa.compute.equal(table["status"], "ok")).take(mine)
                yield from good.append_column("path", pa.nulls(len(mine), pa.binary())).to_pylist()
            first += num

    def finish(self, options: Mapping[str, Any]) -> None:
        """manifest.parquet and rejected.parquet, from what is done, and then nothing else."""
        schema = MANIFEST.with_metadata({b"options": json.dumps(dict(options), sort_keys=True).encode()})
        rejected = storage.join(self.output, "rejected.parquet")
        num_rejected = 0
        with contextlib.ExitStack() as files:
            whole, bad = (files.enter_context(storage.writing(uri)) for uri in (self.whole, rejected))
            with _writer(whole, schema) as all_rows, _writer(bad, REJECTED) as bad_rows:
                for table in self.done():
                    all_rows.write_table(table.cast(schema))
                    some = table.filter(pa.compute.equal(table["status"], "rejected")).select(REJECTED.names)
                    num_rejected += len(some)
                    bad_rows.write_table(some)
        if not num_rejected:
            storage.delete_file(rejected)

    def remove(self) -> None:
        """The manifest has it all."""
        storage.delete_folder(self.folder)


def _with(table: pa.Table, shard: _Shard) -> pa.Table:
    """Rows with what became of them."""
    ids = table["id"].to_pylist()
    for name in RESULT:
        field = LISTING.field(name)
        found = [
            getattr(shard.results[id], name) if id in shard.results else old
            for id, old in zip(ids, table[name].to_pylist(), strict=True)
        ]
        table = table.set_column(table.schema.get_field_index(name), field, pa.array(found, field.type))
    return table


def _writer(path: str, schema: pa.Schema) -> pyarrow.parquet.ParquetWriter:
    return pyarrow.parquet.ParquetWriter(path, schema, compression="zstd")


def facts_of(job: Any) -> dict[str, Any]:
    """What all rows of a `TranslationJob` have in common; its options by 16 digits that tell them apart."""
    options = hashlib.blake2b(json.dumps(job.options, sort_keys=True).encode(), digest_size=8).hexdigest()
    return {"seed": job.args.seed, "options": options, "checkpoint": job.loaded.fingerprint}
