"""What results are called: as their images, by names that every disk takes and that never meet."""

import collections
import hashlib
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from ddpm_core import images

RESERVED = frozenset(
    {"preview.png", "report.html", "manifest.parquet", "rejected.parquet", "rejected.txt", "run.json", "driver.json"}
)
"""What lies in the output beside the results."""
NAME_BYTES = 255
"""Most bytes of a file's name, on every file system in use."""
LAST_WAY = 3


class Hashes:
    """A set of texts, of which only 8 bytes each are kept. Of ten million, one is found by mistake once in 200,000
    times that all are asked for."""

    def __init__(self) -> None:
        self.sorted = np.empty(0, np.uint64)

    def add(self, texts: Iterable[str]) -> None:
        self.add_hashes(hashed(texts))

    def add_hashes(self, new: np.ndarray) -> None:
        self.sorted = np.sort(np.concatenate([self.sorted, new]), kind="stable")  # which merges what is sorted

    def have(self, texts: Sequence[str]) -> np.ndarray:
        """Which of the texts are there."""
        return found(self.sorted, hashed(texts))[1]


def hashed(texts: Iterable[str]) -> np.ndarray:
    """64 bits of each."""
    digests = [hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest() for text in texts]
    return np.frombuffer(b"".join(digests), np.uint64)


def found(hashes: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where in the sorted `hashes` each of `wanted` is, the last of equal ones, and whether it is there at all."""
    places = np.searchsorted(hashes, wanted, side="right") - 1
    if not len(hashes):
        return places, np.zeros(len(wanted), bool)
    return places, (places >= 0) & (hashes[np.maximum(places, 0)] == wanted)


class Taken:
    """Names that are given already, to images that are not at hand."""

    def __init__(self) -> None:
        self.files, self.folders = Hashes(), Hashes()

    def add(self, paths: Sequence[str]) -> None:
        keys = [_key(path) for path in paths]
        self.files.add(keys)
        self.folders.add({above for key in keys for above in _folders(key)})

    def meets(self, keys: Sequence[str]) -> set[str]:
        """Those of the keys that are another's, lie where a folder must, or below where a file is."""
        above = {key: list(_folders(key)) for key in keys}
        folders = sorted({each for those in above.values() for each in those})
        files = {folder for folder, there in zip(folders, self.files.have(folders), strict=True) if there}
        there = self.files.have(keys) | self.folders.have(keys)
        return {key for key, is_there in zip(keys, there, strict=True) if is_there or files.intersection(above[key])}


def output_names(
    ids: Iterable[str], taken: Mapping[str, str], others: Taken | None = None, *, suffix: str = ".png"
) -> dict[str, str]:
    """id → output path, of names that every file system takes. Ids whose outputs would meet keep their own suffix
    (a.jpg.png); where these meet too, or a file would lie where a folder must, a hash of the id is added.

    `taken`: names given by an earlier run, which stay; so do those of `others`. Case and the spelling of accents do not
    tell names apart on every disk, so they do not here.
    """
    wanted = list(ids)
    step = {name: 0 for name in wanted if name not in taken}
    paths = {name: _way(name, 0, suffix) for name in step}
    keys = {name: _key(path) for name, path in paths.items()}
    fixed = {_key(path) for path in (*RESERVED, *taken.values())}
    met: dict[str, bool] = {}
    while True:
        if others is not None and (new := sorted({*keys.values()} - met.keys())):
            meeting = others.meets(new)
            met |= {key: key in meeting for key in new}
        files = collections.Counter([*fixed, *keys.values()])
        folders = {above for path in files for above in _folders(path)}
        first: dict[str, int] = {}
        for name, key in keys.items():
            first[key] = min(step[name], first.get(key, LAST_WAY))
        clashing = [
            name
            for name, key in keys.items()
            # a file gives way to a folder, unless an earlier run has put it there; of files those that still can
            if (
                files[key] > 1
                or key in folders
                or met.get(key, False)
                or any(above in fixed for above in _folders(key))
            )
            and step[name] == first[key] < LAST_WAY
        ]
        if not clashing:
            return {name: taken.get(name) or paths[name] for name in wanted}
        for name in clashing:
            step[name] += 1
            paths[name] = _way(name, step[name], suffix)
            keys[name] = _key(paths[name])


def _way(name: str, step: int, suffix: str) -> str:
    """What the result of an image may be called; the next where that clashes."""
    stem = _stem(name)
    if step == 1:
        path = f"{_inside(name)}{suffix}"
    else:
        mark = f"~{hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}" if step else ""
        path = f"{posixpath.basename(stem) if step == LAST_WAY else stem}{mark}{suffix}"
    return "/".join(_shortened(part, suffix) for part in path.split("/"))


def _key(path: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def _folders(path: str) -> Iterator[str]:
    while path := posixpath.dirname(path):
        yield path


def _shortened(part: str, suffix: str) -> str:
    """A file's or folder's name of at most NAME_BYTES; what is cut off leaves a hash."""
    if len(part.encode()) <= NAME_BYTES:
        return part
    end = f"~{hashlib.blake2b(part.encode(), digest_size=8).hexdigest()}" + (suffix if part.endswith(suffix) else "")
    return part.encode()[: NAME_BYTES - len(end)].decode(errors="ignore") + end


def _inside(name: str) -> str:
    """`name` without parts that lead out of a folder or hide in it, and without control characters: a data set's ids
    are any strings."""
    parts = re.sub(r"[\x00-\x1f\x7f]", "_", name).split("/")
    return "/".join("_" + part if not part or part.startswith(".") else part for part in parts)


def _stem(name: str) -> str:
    folder, slash, base = _inside(name).rpartition("/")
    stem, dot, suffix = base.rpartition(".")
    return folder + slash + (stem if dot and stem and "." + suffix.lower() in images.SUFFIXES else base)
