"""Rows of a split by index, from this node's disk: what training draws its batches from.

    CACHE/FORMAT-HASH-SPLIT/  images.raw   every distinct image once, s s 3 uint8
                              rows.parquet   id, domain, identity, attributes and, as places in images.raw, image
                                             and target; sorted by id

A split is read and decoded once a node: on all of them at once before training starts (`spread`), later by a node that
came later (`load`). From then on, in this run and the next ones on the same data, rows come out of the page cache in
any order, at the cost of copying them; memory holds ids and places only. CACHE is DDPM_TRANSLATE_CACHE or a folder for
temporary files; what has not been used for a week, or for the longest time where room is short, is removed.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow
import pyarrow.parquet
from jaxtyping import UInt8

from ddpm_core.errors import InputError
from jobs.common import cli
from jobs.common.progress import Progress
from jobs.datasets import reading
from jobs.datasets.format import DatasetCard, read_card

FORMAT = 3
"""Version of the cache's layout."""
ROOT = "DDPM_TRANSLATE_CACHE"
"""Environment variable that names the cache's folder."""
UNUSED_S = 7 * 24 * 3600
"""What nobody opened for so long is removed when something new comes."""
MARGIN = 1.05
"""Room wanted on the disk, as a multiple of the images."""
LABELS = ("id", "domain", "identity", "attributes")
"""Columns that say of a row what there is to know beside its images."""
NOBODY = -(2**31) - 1
"""The identity of those of whom it is not known."""
COLUMNS = (*LABELS, "image", "target")
"""What is cached."""


class Labels:
    """What the rows of a split say of themselves, in the order of their ids."""

    def __init__(self, rows: pyarrow.Table, attribute_names: Sequence[str], *, has_targets: bool) -> None:
        """`rows`: the columns LABELS, sorted by id."""
        self.has_targets = has_targets
        """Whether rows have counterparts."""
        self.attribute_names = tuple(attribute_names)
        self.ids: list[str] = rows.column("id").to_pylist()
        """Ids, sorted."""
        self.domain: np.ndarray = rows.column("domain").to_numpy().astype(np.int64)
        """(n,) int64 index of each row's domain."""
        identity = rows.column("identity").cast(pyarrow.int64()).fill_null(NOBODY)
        self.identity: np.ndarray = identity.to_numpy()
        """(n,) int64 who or which place each row shows, or NOBODY."""
        values = rows.column("attributes").combine_chunks()
        self.attributes: np.ndarray | None = None
        """(n, k) int8, one column for each of `attribute_names`; None where a row has none."""
        if self.attribute_names and not values.null_count:
            flat = values.flatten().to_numpy()
            self.attributes = flat.reshape(len(rows), len(self.attribute_names))

    def __len__(self) -> int:
        return len(self.ids)


def read_labels(uri: str, card: DatasetCard, split: str) -> Labels:
    """Of a whole split, without its images and without a cache.

    Raises:
        InputError: a file is missing or damaged.
    """
    rows = reading.read_labels(uri, card, split, LABELS)
    order = np.array(sorted(range(len(rows)), key=rows.column("id").to_pylist().__getitem__), dtype=np.int64)
    return Labels(rows.take(order), card.attribute_names, has_targets=card.has_targets)


class SplitArrays(Labels):
    """A split, its rows by index in the order of their ids, whatever order they are stored in."""

    def __init__(self, folder: Path) -> None:
        rows = pyarrow.parquet.read_table(folder / "rows.parquet", memory_map=False)
        names = json.loads(rows.schema.metadata[b"attribute_names"])
        super().__init__(rows, names, has_targets="target" in rows.column_names)
        side = int(rows.schema.metadata[b"image_size"])
        self._image = rows.column("image").to_numpy()
        self._target = rows.column("target").to_numpy() if "target" in rows.column_names else None
        self._images = np.memmap(folder / "images.raw", np.uint8, "r").reshape(-1, side, side, 3)
        os.utime(folder)  # in use: not the first to be removed

    def images(self, indices: Sequence[int] | np.ndarray) -> UInt8[np.ndarray, "b s s 3"]:
        """Copies of these rows' images."""
        return np.asarray(self._images)[self._image[np.asarray(indices, dtype=np.int64)]]

    def targets(self, indices: Sequence[int] | np.ndarray) -> UInt8[np.ndarray, "b s s 3"]:
        """Copies of these rows' counterparts.

        Raises:
            ValueError: the data set has none.
        """
        if self._target is None:
            raise ValueError("the data set is unpaired: it has no targets")
        return np.asarray(self._images)[self._target[np.asarray(indices, dtype=np.int64)]]


def load(
    uri: str, split: str, *, content_hash: str = "", on_rows: Callable[[int], None] = lambda count: None
) -> SplitArrays:
    """The split, read into this node's cache first if it is not there; another process doing so is waited for.

    With `content_hash` the data set must be that very one: a worker that is replaced goes on with the same rows.
    `on_rows` hears how many more rows are read.

    Raises:
        InputError: no such split, a damaged file, another data set by now, or no room on the disk.
    """
    card = read_card(uri)
    _check_same(uri, card, content_hash or card.content_hash)
    with _Filling(card, split) as filling:
        if filling.start():
            for table in reading.read_tables(uri, split, columns=COLUMNS):
                filling.add(table)
                on_rows(len(table))
            # Of files that are replaced one by one some may have been read.
            _check_same(uri, read_card(uri), card.content_hash)
            filling.finish()
    return SplitArrays(filling.folder)


def _check_same(uri: str, card: DatasetCard, content_hash: str) -> None:
    if card.content_hash != content_hash:
        raise InputError(
            f"{uri} was replaced or appended to since this run began (content hash {content_hash}, now "
            f"{card.content_hash}); bring it back, or begin anew with another --output"
        )


def spread(uri: str, splits: Sequence[str], *, resource: str) -> None:
    """Fill the caches of all nodes that have `resource`, at the same time, before anything waits for them.

    Needs Ray running. A node that is lost meanwhile is passed over: who takes its place reads for itself.

    Raises:
        InputError: as `load`.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get(resource, 0) > 0]
    here = ray.get_runtime_context().get_node_id()
    fill = ray.remote(num_cpus=0, max_retries=0)(_fill)
    filling = [
        fill.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(uri, splits)
        for node in nodes
        if node != here
    ]
    if here in nodes:
        card = read_card(uri)
        for split in splits:
            with Progress(total=card.splits.get(split), unit="row", description=f"read {split}") as progress:
                load(uri, split, on_rows=progress.update)
    for node in filling:
        try:
            ray.get(node)
        except ray.exceptions.RayTaskError as error:
            raise cli.input_error(error) or error from None
        except ray.exceptions.RayError:
            continue  # the node's end, not an error of its own


def _fill(uri: str, splits: Sequence[str]) -> None:
    for split in splits:
        load(uri, split)


class _Filling:
    """One split on its way into the cache: written aside under a lock, renamed when whole."""

    def __init__(self, card: DatasetCard, split: str) -> None:
        self.card, self.split = card, split
        self.folder = _folder(card, split)
        self.aside = self.folder.with_suffix(".part")
        with _explained():
            self.lock = open(self.folder.with_suffix(".lock"), "w")  # noqa: SIM115 - held as long as this object
        self.places: dict[bytes, int] = {}
        self.places_of: dict[str, list[np.ndarray]] = {"image": [], "target": []}
        self.labels: list[pyarrow.Table] = []
        self.count = 0
        self.filling = False

    def __enter__(self) -> "_Filling":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None and self.filling:
            shutil.rmtree(self.aside, ignore_errors=True)
        self.lock.close()

    def start(self) -> bool:
        """Whether it is ours to fill; who is filling it is waited for."""
        if _whole(self.folder):
            return False
        _locked(self.lock, wait=True)
        if _whole(self.folder):
            return False
        for folder in (self.folder, self.aside):  # a temporary folder's cleaner may have taken a file
            shutil.rmtree(folder, ignore_errors=True)
        make_room(_num_bytes(self.card, self.split))
        with _explained():
            self.aside.mkdir()
            self.images = open(self.aside / "images.raw", "wb")  # noqa: SIM115 - closed by finish
        self.filling = True
        return True

    def add(self, table: pyarrow.Table) -> None:
        """Rows as `reading.Split.read` gives them, with COLUMNS."""
        self.labels.append(table.select(LABELS))
        both = "target" in table.column_names
        for name in ("image", "target") if both else ("image",):
            pixels = reading.pixels_of(table, name)
            self.places_of[name].append(self._put_distinct(pixels) if both else self._put(pixels))

    def _put(self, pixels: UInt8[np.ndarray, "b s s 3"]) -> np.ndarray:
        with _explained():
            self.images.write(np.ascontiguousarray(pixels).data)
        self.count += len(pixels)
        return np.arange(self.count - len(pixels), self.count)

    def _put_distinct(self, pixels: UInt8[np.ndarray, "b s s 3"]) -> np.ndarray:
        """Matched sets hold each image several times, as itself and as the counterpart of others."""
        places = []
        for image in pixels:
            digest = hashlib.blake2b(image, digest_size=16).digest()
            if digest not in self.places:
                self.places[digest] = int(self._put(image[None])[0])
            places.append(self.places[digest])
        return np.array(places, dtype=np.int64)

    def finish(self) -> None:
        with _explained():
            self.images.close()
        rows = pyarrow.concat_tables(self.labels)
        ids = rows.column("id").to_pylist()
        if len(ids) != self.card.splits[self.split] or len(set(ids)) != len(ids):
            raise InputError(
                f"{self.card.name}: {len(set(ids)):,} different rows in split {self.split}, dataset.json says "
                f"{self.card.splits[self.split]:,}; make the data set again with python -m jobs.prepare"
            )
        for name, parts in self.places_of.items():
            if parts:
                rows = rows.append_column(name, pyarrow.array(np.concatenate(parts)))
        rows = rows.take(np.array(sorted(range(len(ids)), key=ids.__getitem__), dtype=np.int64))
        facts = {
            "image_size": str(self.card.image_size),
            "num_images": str(self.count),
            "attribute_names": json.dumps(self.card.attribute_names),
        }
        with _explained():
            table = rows.replace_schema_metadata(facts)
            pyarrow.parquet.write_table(table, self.aside / "rows.parquet", write_page_checksum=True)
            os.replace(self.aside, self.folder)
        self.lock.close()


def _folder(card: DatasetCard, split: str) -> Path:
    return cache_folder() / f"{FORMAT}-{card.content_hash}-{split}"


def _num_bytes(card: DatasetCard, split: str) -> int:
    """Of the decoded images, at most: those that occur twice are kept once."""
    return card.splits.get(split, 0) * card.image_size**2 * 3 * (2 if card.has_targets else 1)


def _whole(folder: Path) -> bool:
    with contextlib.suppress(OSError, pyarrow.ArrowException, KeyError):
        rows = pyarrow.parquet.read_table(folder / "rows.parquet", memory_map=False, page_checksum_verification=True)
        facts = rows.schema.metadata
        num_bytes = int(facts[b"num_images"]) * int(facts[b"image_size"]) ** 2 * 3
        return (folder / "images.raw").stat().st_size == num_bytes
    return False


def _locked(file: IO[str], *, wait: bool) -> bool:
    """Whether the file's lock is ours, until it is closed; False where another has it and we do not wait."""
    try:
        with _explained():
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """What the cache's disk refuses, as an InputError with the remedy."""
    try:
        yield
    except BlockingIOError:
        raise
    except OSError as error:
        raise InputError(
            f"{cache_folder()}: decoded images cannot be kept there ({error.strerror or error}); set {ROOT} to a "
            "folder of your own with room on a local disk, on every node"
        ) from None


def cache_folder() -> Path:
    """Where this user's decoded images are kept on this node.

    Raises:
        InputError: it cannot be made, or belongs to somebody else.
    """
    folder = Path(os.environ.get(ROOT) or Path(tempfile.gettempdir()) / f"ddpm-translate-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be made ({error.strerror}); set {ROOT} to a folder on a local disk"
        ) from None
    if folder.stat().st_uid != os.getuid():
        raise InputError(f"{folder} belongs to another user; set {ROOT} to a folder of your own on a local disk")
    return folder


def make_room(num_bytes: int) -> None:
    """Remove what was left half-written or not used for long, and more, the longest unused first, until `num_bytes`
    fit.

    Raises:
        InputError: they do not fit.
    """
    root = cache_folder()
    for aside in root.glob("*.part"):  # of a process that was killed, unless its lock is held
        with _explained(), open(aside.with_suffix(".lock"), "w") as lock:
            if _locked(lock, wait=False):
                shutil.rmtree(aside, ignore_errors=True)
    entries = sorted((entry.stat().st_mtime, entry) for entry in root.iterdir() if (entry / "rows.parquet").exists())
    for used, entry in entries:
        if time.time() - used > UNUSED_S or shutil.disk_usage(root).free < num_bytes * MARGIN:
            shutil.rmtree(entry, ignore_errors=True)  # who reads it keeps it: its pages live as long as they are mapped
    if (free := shutil.disk_usage(root).free) < num_bytes * MARGIN:
        raise InputError(
            f"{root}: {num_bytes / 1e9:.1f} GB of decoded images do not fit ({free / 1e9:.1f} GB free); "
            f"set {ROOT} to a folder with more room, on every node"
        )
