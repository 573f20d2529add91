"""Translating many images, on Ray or in this process: what `jobs.translate` and `jobs.evaluate` share.

A row on its way: `id`, `output` (path below the output, "" to keep the image in the row), `to` (domain),
`seed`, `image` (uint8 s s 3, the source), `error` ("" while all is well), `note` (what was done to the source that
its owner should know, mostly ""). Where results are to have their photos' own size also `file` (the photo's bytes) and
`views` (the `full_size.View` that the network sees of it, or one for each face; () where there is an error): these
are translated then, and `image` is the first of them.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from ddpm_core import checkpoint, full_size, images, marks, nets, storage
from ddpm_core.config import Faces, OutputFormat, OutputSize
from ddpm_core.errors import InputError, reason
from ddpm_core.translator import NOT_FINITE, Translated
from jobs.common import workers
from jobs.datasets import reading
from jobs.datasets.format import DatasetCard
from jobs.translation import listing, opening, packs, tables
from jobs.translation.options import GuidanceNets

Batch = dict[str, np.ndarray]
Plan = Mapping[str, list[tuple[str, int, str]]]
"""What to make of the row with this id: (domain, seed, output) for each result."""

TWO_IMAGES = "looks like two images side by side, of which the middle is taken: cut them apart first"
BATCH_BYTES = 2**28
"""Files in a batch have no more bytes together, but for a single one."""
AT_ONCE, MOST_AT_ONCE = 16, 128
"""Images that the network sees at once where nobody says how many, and as many as are tried."""
READ_THREADS = 8
"""Images read at once by one task: hides a bucket's latency."""


class AtOnce:
    """How many images the network sees at once: doubled as long as that makes an image MIN_GAIN cheaper."""

    MIN_GAIN = 1.03

    def __init__(self, fixed: int | None) -> None:
        """`fixed`: it is said, and stays."""
        self.now = fixed or AT_ONCE
        self.is_found = fixed is not None
        self.best_rate = 0.0
        self.is_warm = False
        """Whether a pass of this size has been: the first one makes ready what others use."""

    def took(self, num: int, seconds: float) -> None:
        """Note what a pass of `num` images took."""
        if self.is_found or num != self.now:
            return
        if not self.is_warm:
            self.is_warm = True
        elif (rate := num / max(seconds, 1e-9)) >= self.MIN_GAIN * self.best_rate:
            self.best_rate, self.is_warm = rate, False
            self.now, self.is_found = min(2 * num, MOST_AT_ONCE), num == MOST_AT_ONCE
        else:
            self.now, self.is_found = num // 2, True

    def holds(self, num: int) -> None:
        """Memory holds no more than `num`."""
        self.now, self.is_found = min(self.now, num), True


class Translate:
    """A worker of a pool: rows with a source image become rows with the result, or with the result written."""

    SHARED = True
    """By threads: one at a time is with the network, while others write."""

    def __init__(
        self,
        *,
        checkpoint_uri: str,
        ema: float | None,
        sampling: dict[str, Any],
        output: str | None,
        num_threads: int,
        guides: Mapping[str, Any] = MappingProxyType({}),
        record: Mapping[str, Any] = MappingProxyType({}),
        output_format: OutputFormat | Literal["parquet"] = "png",
        mark_key: bytes = b"",
        tiles: bool = False,
        identity_net: str | None = None,
        batch_size: int | None = sys.maxsize,
    ) -> None:
        """`sampling`, `guides`: fields of SamplingConfig and of Guides. `output`: where results go, None to keep them
        in `result`. `record`: what is told within each file of how it was made, beside checkpoint and licence.
        `mark_key`: of the invisible mark, b"" for none. `tiles`: photos of their own size are drawn in windows.
        `identity_net`: compares each result with its source. `batch_size`: images that the network sees at once, at
        most; None to find how many are best."""
        torch.set_num_threads(num_threads)
        loaded = checkpoint.load(checkpoint_uri, ema=ema)
        self.translator = opening.translator(loaded, GuidanceNets(**guides))
        self.sampling, self.output, self.tiles = sampling, output, tiles
        record = {"checkpoint": loaded.fingerprint, "licence": loaded.config.data.licence, **record}
        self.is_packed = output_format == "parquet"
        kind: OutputFormat = "png" if output_format == "parquet" else output_format
        self.encode = functools.partial(marks.finish, record=record, kind=kind, key=mark_key)
        self.identity = nets.identity_net(identity_net) if identity_net else None
        self.turn = threading.Lock()
        self.most = sys.maxsize
        """Images at once, as far as memory allows."""
        self.at_once = AtOnce(batch_size)

    def __call__(self, batch: Batch) -> Batch:
        made, errors = list(np.zeros_like(batch["image"])[:, None]), batch["error"].astype(object)
        began = time.perf_counter()
        wanted: dict[tuple[str, int], list[int]] = {}
        for row, (to, seed, error) in enumerate(zip(batch["to"], batch["seed"], batch["error"], strict=True)):
            if not error and not self.tiles:
                wanted.setdefault((str(to), int(seed)), []).append(row)
        for (to, seed), rows in wanted.items():
            for row, squares in self._translated(batch, rows, to, seed):
                made[row] = squares.images
                if not squares.finite.all():
                    errors[row] = NOT_FINITE
        if self.output is None:
            results = np.stack([squares[0] for squares in made])
            return {**batch, "result": results, "error": errors}
        outputs, pack = batch["output"].astype(object), packs.Pack(self.output)
        for row in np.flatnonzero(errors == "").tolist():
            try:
                if self.tiles:
                    data, made[row] = self._in_tiles(batch, row)
                else:
                    data = self._file(batch, row, made[row])
            except InputError as error:
                errors[row] = f"{batch['id'][row]}: {error}"
                continue
            if self.is_packed:
                pack.add(row, str(batch["id"][row]), data)
                continue
            try:
                storage.write_bytes(storage.join(self.output, outputs[row]), data)
            except storage.UnusableNameError as error:
                errors[row] = f"its result cannot be written: {error}"
        pack.flush()
        for row, file in pack.files.items():
            outputs[row] = file
        sizes = [views[0].size if views else (0, 0) for views in batch["views"]] if "views" in batch else []
        size = np.array(sizes or [batch["image"].shape[2:0:-1]] * len(made), np.int32).reshape(-1, 2)
        kept = {name: column for name, column in batch.items() if name not in ("image", "file", "views")}
        kept["identity_cosine"] = self._likeness(batch, made, np.flatnonzero(errors == "").tolist())
        seconds = np.full(len(made), (time.perf_counter() - began) / max(len(made), 1))
        numbers = {"width": size[:, 0], "height": size[:, 1], "seconds": seconds, "most": np.full(len(made), self.most)}
        return {**kept, "output": outputs, "error": errors, **numbers}

    def _translated(self, batch: Batch, rows: list[int], to: str, seed: int) -> Iterator[tuple[int, Translated]]:
        """Each row with what came of its image, or of each of its views; never more at once than the batch has rows."""
        seen = [seen_in(batch, row) for row in rows]
        squares = np.concatenate(seen)
        parts = list(self._attempts(squares, to, seed, len(batch["id"])))
        pixels, finite = (np.concatenate([getattr(part, name) for part in parts]) for name in Translated._fields)
        ends = np.cumsum([len(each) for each in seen])
        for row, end, each in zip(rows, ends.tolist(), seen, strict=True):
            yield row, Translated(pixels[end - len(each) : end], finite[end - len(each) : end])

    def _attempts(self, squares: UInt8[np.ndarray, "n s s 3"], to: str, seed: int, most: int) -> Iterator[Translated]:
        """`squares` translated, at most `most` at once, and no more than memory has shown to hold.

        Raises:
            InputError: it does not hold one.
        """
        first = 0
        while first < len(squares):
            part = squares[first : first + min(most, self.most, self.at_once.now)]
            try:
                with self.turn:
                    began = time.perf_counter()
                    made = self.translator.attempt(part, to, seed=seed, **self.sampling)
                    self.at_once.took(len(part), time.perf_counter() - began)
            except RuntimeError as error:
                if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                    raise
                if len(part) == 1:
                    raise InputError("out of memory with one image at a time; use a machine that has more") from error
                self.most = len(part) // 2
                self.at_once.holds(self.most)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            first += len(part)
            yield made

    def _likeness(self, batch: Batch, made: list[UInt8[np.ndarray, "_ s s 3"]], rows: list[int]) -> np.ndarray:
        """Of each row the cosine between what the identity net takes source and result for; of several views the least;
        no number where it is not known."""
        found = np.full(len(made), np.nan, np.float32)
        if self.identity is None or not rows:
            return found
        squares = [
            np.concatenate(each) for each in ([seen_in(batch, row) for row in rows], [made[row] for row in rows])
        ]
        with self.turn:
            cosines = nets.likeness(self.identity.module, *squares, device=str(self.translator.device))
        starts = np.cumsum([0, *(len(made[row]) for row in rows[:-1])])
        found[rows] = np.minimum.reduceat(cosines, starts)
        return found

    def _in_tiles(self, batch: Batch, row: int) -> tuple[bytes, UInt8[np.ndarray, "1 s s 3"]]:
        """The file of a photo drawn in windows, and what the network would see of it.

        Raises:
            InputError: it is too small or too large for that, or its values are no numbers; or as `_file`.
        """
        photo, to, seed = images.decode(batch["file"][row]), str(batch["to"][row]), int(batch["seed"][row])
        with self.turn:
            made = self.translator.in_tiles(photo, to, seed=seed, **self.sampling)
        square = images.to_square(Image.fromarray(made), self.translator.config.image_size)
        return self.encode(made), square[None]

    def _file(self, batch: Batch, row: int, results: UInt8[np.ndarray, "n s s 3"]) -> bytes:
        """The result's file: at the size of the photo where that is in the batch, else as it is.

        Raises:
            InputError: there is no such file of that size.
        """
        if "views" not in batch:
            return self.encode(results[0])
        return full_size.finish(batch["file"][row], batch["views"][row], list(results), self.encode)


def seen_in(batch: Batch, row: int) -> UInt8[np.ndarray, "_ s s 3"]:
    """What the network sees of a row: its image, or each of its photo's views."""
    if "views" not in batch:
        return batch["image"][[row]]
    return np.stack([view.pixels for view in batch["views"][row]])


class Source(NamedTuple):
    """Where rows come from: `read` makes the batches of each task."""

    tasks: Iterable[Any]
    read: Callable[[Any], list[Batch]]
    rescue: "workers.Rescue[Any, Batch] | None" = None

    def batches(self) -> Iterator[Batch]:
        """Every batch, by this process."""
        for batches in workers.mapped(self.read, self.tasks, 0, num_workers=0):
            yield from batches

    def through(
        self, worker: Callable[..., Callable[[Batch], Batch]], pool: workers.Pool, **make: Any
    ) -> Iterator[Batch]:
        """Every batch through a worker of the pool."""
        return workers.piped(self.read, self.tasks, worker, make, pool, self.rescue)


# -- sources: files -----------------------------------------------------------------------------------------------


def file_tasks(items: Iterable[dict[str, Any]], root: str, *, shard: int, batch_size: int) -> Iterator[Batch]:
    """Tasks for `read_images`, of items in order, as many at a time as BATCH_BYTES of files allow: a batch may hold
    their content.

    `items`: id, input (its whole path, or below `root` the bytes `path`), output, size in bytes.
    """
    some: list[dict[str, Any]] = []

    def task() -> Batch:
        uris = [storage.join(root, os.fsdecode(each["path"])) if each["path"] else each["input"] for each in some]
        named = {name: [each[name] for each in some] for name in ("id", "output")}
        columns = {name: np.array(values, object) for name, values in {**named, "uri": uris}.items()}
        return {**columns, "shard": np.full(len(some), shard)}

    for item in items:
        if some and (len(some) == batch_size or sum(each["size"] for each in (*some, item)) > BATCH_BYTES):
            yield task()
            some = []
        some.append(item)
    if some:
        yield task()


def halves(task: Batch) -> list[Batch]:
    """A task in two; nothing where it is of one image."""
    middle = len(task["id"]) // 2
    parts = (slice(0, middle), slice(middle, None))
    return [{name: column[part] for name, column in task.items()} for part in parts] if middle else []


def given_up(task: Batch, reason: str) -> Batch:
    """What becomes of images that cannot even be tried."""
    num = len(task["id"])
    told = {"error": np.full(num, reason, object), "note": np.full(num, "", object)}
    numbers: Batch = {name: np.zeros(num) for name in ("width", "height", "seconds", "identity_cosine")}
    numbers["most"] = np.full(num, sys.maxsize)
    return {**{name: task[name] for name in ("id", "output", "shard")}, **told, **numbers}


def read_images(
    batch: Batch,
    *,
    root: str,
    image_size: int,
    to: str,
    seed: int,
    template: tuple[float, ...] = (),
    output_size: OutputSize = "model",
    which: Faces = "largest",
    column: str = "",
) -> list[Batch]:
    """Each file read and prepared as training did it; what cannot be read gets its reason in `error`. `column`: of the
    parquet file that holds the images, where `uri` is a `listing.row_uri`; then all of a batch are of one row group."""
    options: dict[str, Any] = {
        "image_size": image_size,
        "template": template,
        "output_size": output_size,
        "which": which,
    }
    names, uris = batch["id"].tolist(), batch["uri"].tolist()
    with concurrent.futures.ThreadPoolExecutor(READ_THREADS) as threads:
        if column:
            contents = packed_images(uris, column)
            read = list(threads.map(functools.partial(read_packed, **options), names, contents))
        else:
            read = list(threads.map(functools.partial(read_image, root=root, **options), names, uris))
    black = np.zeros((image_size, image_size, 3), np.uint8)
    rows = {
        **{name: column for name, column in batch.items() if name != "uri"},
        "to": np.array([to] * len(read)),
        "seed": np.full(len(read), seed, np.int64),
        "image": np.stack([each.views[0].pixels if each.views else black for each in read]),
        "error": np.array([each.error for each in read], dtype=object),
        "note": np.array(["; ".join(each.views[0].notes) if each.views else "" for each in read], dtype=object),
    }
    if output_size == "own":
        for name in ("views", "file"):
            rows[name] = np.empty(len(read), dtype=object)
            for row, each in enumerate(read):
                rows[name][row] = getattr(each, name)
    return [rows]


def packed_images(uris: list[str], column: str) -> list[bytes | None]:
    """The images of rows of one row group."""
    file, group, _ = listing.row_of(uris[0])
    rows = tables.images_of(file, group, column)
    places = [listing.row_of(uri)[2] for uri in uris]
    return [rows[place] if place < len(rows) else None for place in places]


def read_packed(name: str, data: bytes | None, **options: Any) -> "ReadImage":
    """See `read_images`."""
    if data is None:
        return ReadImage((), f"{name}: no image in this row")
    try:
        storage.check_size(name, len(data), images.MAX_BYTES)
        images.check_kind(name, data)
    except InputError as error:
        return ReadImage((), str(error))
    with images.reading.take(len(data)):
        return seen_of(name, data, **options)


class ReadImage(NamedTuple):
    """A file as it was read, or why it was not."""

    views: tuple[full_size.View, ...]
    error: str = ""
    file: bytes = b""


def read_image(
    name: str,
    uri: str,
    *,
    root: str,
    image_size: int,
    template: tuple[float, ...],
    output_size: OutputSize,
    which: Faces = "largest",
) -> ReadImage:
    """See `read_images`.

    Raises:
        InputError: the storage of `root` itself is gone, which no single image is to blame for.
    """
    with images.reading.take(storage.local_size(uri)):
        try:
            data = storage.read_bytes(uri, max_bytes=images.MAX_BYTES)
            images.check_kind(name, data)
        except FileNotFoundError:
            return ReadImage((), f"{name}: gone since the folder was listed")
        except InputError as error:
            storage.exists(root)  # raises where the server is unreachable or refuses everything
            return ReadImage((), f"{name}: {reason(error, name, uri)}")
        return seen_of(name, data, image_size=image_size, template=template, output_size=output_size, which=which)


def seen_of(
    name: str,
    data: bytes,
    *,
    image_size: int,
    template: tuple[float, ...],
    output_size: OutputSize,
    which: Faces = "largest",
) -> ReadImage:
    """What the network sees of an image file, or why it sees nothing."""
    try:
        views = full_size.look(data, image_size, template, output_size=output_size, which=which, name=name)
    except InputError as error:
        return ReadImage((), str(error))
    if output_size == "own":
        return ReadImage(tuple(views), file=data)
    if not template and looks_like_two(views[0].size, views[0].pixels):
        views = [dataclasses.replace(views[0], notes=(*views[0].notes, TWO_IMAGES))]
    return ReadImage(tuple(views))


def looks_like_two(size: tuple[int, int], square: UInt8[np.ndarray, "s s 3"]) -> bool:
    """Whether an image of that width and height, of which `square` is the middle, looks like two side by side: exactly
    twice as wide as high (many panoramas are), and across the middle it changes far more than anywhere else."""
    width, height = size
    if width != 2 * height:
        return False
    columns = square.astype(np.float32)
    steps = np.abs(columns[:, 3:] - columns[:, :-3]).mean((0, 2))  # three apart: shrinking blurs a seam
    seam, others = steps[len(square) // 2 - 2], np.median(steps)
    return bool(seam > 12 and seam > 3 * others)


# -- sources: rows of a data set ----------------------------------------------------------------------------------


def dataset_rows(
    uri: str, card: DatasetCard, plans: Mapping[str, Plan], *, batch_size: int, keep_truth: bool = False
) -> Source:
    """The rows of each split that its plan names, once for each result wanted of them, with the side to start from.

    Raises:
        InputError: a split's files are missing or damaged.
    """
    splits, tasks = {}, []
    for name, plan in plans.items():
        # A task of rows enough for a few whole batches, however few of them the plan names.
        rows = math.ceil(4 * batch_size * card.splits.get(name, 0) / max(len(plan), 1))
        splits[name] = reading.open_split(uri, name, rows_in_piece=rows)
        tasks += [(name, piece) for piece in splits[name].pieces]
    read = functools.partial(read_rows, splits=splits, plans=plans, batch_size=batch_size, keep_truth=keep_truth)
    return Source(tasks, read)


def read_rows(
    task: tuple[str, reading.Piece],
    *,
    splits: Mapping[str, reading.Split],
    plans: Mapping[str, Plan],
    batch_size: int,
    keep_truth: bool,
) -> list[Batch]:
    """See `dataset_rows`: the batches of one (split, piece)."""
    split, plan = splits[task[0]], plans[task[0]]
    table = split.read(task[1], wanted=plan)
    columns = {name: reading.pixels_of(table, name) for name in ("image", "target") if name in table.column_names}
    rows = expand_rows(
        {"id": np.array(table["id"].to_pylist()), "domain": table["domain"].to_numpy(), **columns},
        plan=plan,
        domains=list(split.card.domains),
        paired=split.card.pairing == "paired",
        image_size=split.card.image_size,
        keep_truth=keep_truth,
    )
    starts = range(0, len(rows["id"]), batch_size)
    return [{name: column[start : start + batch_size] for name, column in rows.items()} for start in starts]


def piece_tasks(items: Iterable[dict[str, Any]], *, shard: int, most: int | None = None) -> Iterator[Batch]:
    """Tasks of items as `file_tasks` has them that are rows of parquet files: those of a row group, at most `most`."""
    for _, group in itertools.groupby(items, key=lambda item: listing.row_of(item["input"])[:2]):
        while some := list(itertools.islice(group, most)):
            named = {"id": "id", "output": "output", "uri": "input"}
            columns = {name: np.array([each[of] for each in some], object) for name, of in named.items()}
            yield {**columns, "shard": np.full(len(some), shard)}


def read_piece(task: Batch, *, split: reading.Split, to: str, seed: int, batch_size: int) -> list[Batch]:
    """The batches of one of `piece_tasks`."""
    file, group, _ = listing.row_of(task["uri"][0])
    piece = next(each for each in split.pieces if each.uri == file and each.groups == (group,))
    plan = {name: [(to, seed, output)] for name, output in zip(task["id"], task["output"], strict=True)}
    read = read_rows(("", piece), splits={"": split}, plans={"": plan}, batch_size=batch_size, keep_truth=False)
    return [{**each, "shard": np.full(len(each["id"]), task["shard"][0])} for each in read]


def expand_rows(
    batch: Batch, *, plan: Plan, domains: list[str], paired: bool, image_size: int, keep_truth: bool
) -> Batch:
    """See `dataset_rows`. In a paired set the image of the other side is the source, whichever column it is in."""
    chosen = [
        (row, to, seed, output) for row, name in enumerate(batch["id"]) for to, seed, output in plan.get(str(name), ())
    ]
    swapped = [paired and domains[int(batch["domain"][row])] == to for row, to, _, _ in chosen]
    empty = np.zeros((0, image_size, image_size, 3), np.uint8)

    def squares(from_target: Iterable[bool]) -> np.ndarray:
        picked = [batch["target" if t else "image"][c[0]] for c, t in zip(chosen, from_target, strict=True)]
        return np.stack(picked).astype(np.uint8) if picked else empty

    rows = {
        "id": np.array([str(batch["id"][c[0]]) for c in chosen], dtype=object),
        "output": np.array([c[3] for c in chosen], dtype=object),
        "to": np.array([c[1] for c in chosen], dtype=object),
        "seed": np.array([c[2] for c in chosen], dtype=np.int64),
        "image": squares(swapped),
        "error": np.array([""] * len(chosen), dtype=object),
        "note": np.array([""] * len(chosen), dtype=object),
    }
    if keep_truth:
        rows["truth"] = squares([not s for s in swapped])
    return rows
