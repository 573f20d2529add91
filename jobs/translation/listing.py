"""What is to be translated: files below a folder or rows of a data set, and the names of their results."""

import collections
import dataclasses
import fnmatch
import hashlib
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from ddpm_core import images, storage
from ddpm_core.config import ModelConfig
from ddpm_core.errors import InputError
from jobs.datasets import listing, reading
from jobs.datasets.format import DatasetCard

RESERVED = frozenset({"preview.png", "manifest.parquet", "rejected.txt", "run.json"})
"""What lies in the output beside the results."""
NAME_BYTES = 255
"""Most bytes of a file's name, on every file system in use."""


@dataclasses.dataclass(frozen=True)
class Sources:
    """What is to be translated, where it comes from files."""

    root: str
    """The folder or prefix that `path` is below."""
    rows: list[dict[str, Any]]
    """id, path, size, mtime_ns and error of each image, sorted by id: the id is `storage.as_text` of the path below the
    root; `error` says why it cannot even be read, mostly ""."""
    num_others: int
    """Files that are no images."""
    notes: list[str]
    """What was passed over, in words."""


def list_sources(uri: str) -> Sources:
    """The images that `--input` means: a file, all below a folder or prefix, or those that match a pattern.

    Raises:
        InputError: there is none that can be read.
    """
    if storage.is_file(uri):
        folder, _, name = uri.rpartition("/")
        row = {"id": storage.as_text(name), "path": name, "size": storage.num_bytes(uri)}
        return Sources(folder, [row | {"mtime_ns": storage.mtime_ns(uri), "error": ""}], 0, [])
    root, pattern = uri, "*"
    if not storage.exists(uri) and (fixed := re.match(r"([^*?\[]*)/[^/]*[*?\[]", uri)):
        root, pattern = fixed[1], uri[len(fixed[1]) + 1 :]
    if not storage.exists(root):
        raise InputError(f"--input {uri}: no such file or folder")
    there = listing.list_images(root)

    def wanted(name: str) -> bool:
        return fnmatch.fnmatchcase(name, pattern)

    rows = {
        name: {
            "id": name,
            "path": entry.path,
            "size": entry.num_bytes,
            "mtime_ns": entry.mtime_ns,
            "error": "",
        }
        for name, entry in there.images.items()
        if wanted(name)
    }
    if not rows:
        kinds = " ".join(sorted(images.SUFFIXES))
        raise InputError(f"--input {uri} holds no images{there.hint() or f'; wanted: {kinds}'}")
    for name, reason in there.rejected.items():
        if wanted(name):
            # a name that is no text is told as it is printed, and another file may be called so
            own = f"{name} (as printed)" if name in rows else name
            rows[own] = {"id": own, "path": name, "size": 0, "mtime_ns": 0, "error": f"{own}: {reason}"}
    others = [name for name in there.others if wanted(name) and name not in there.rejected]
    return Sources(root, [rows[name] for name in sorted(rows)], len(others), there.notes)


# -- names of results ---------------------------------------------------------------------------------------------


def output_names(ids: Iterable[str], taken: Mapping[str, str]) -> dict[str, str]:
    """id → output path, suffix .png, of names that every file system takes. Ids whose outputs would meet keep their own
    suffix (a.jpg.png); where these meet too, or a file would lie where a folder must, a hash of the id is added.

    `taken`: names given by an earlier run, which stay. Case and the spelling of accents do not tell names apart on
    every disk, so they do not here.
    """
    wanted = list(ids)
    step = {name: 0 for name in wanted if name not in taken}
    paths = {name: _way(name, 0) for name in step}
    keys = {name: _key(path) for name, path in paths.items()}
    fixed = {_key(path) for path in (*RESERVED, *taken.values())}
    while True:
        files = collections.Counter([*fixed, *keys.values()])
        folders = {above for path in files for above in _folders(path)}
        first: dict[str, int] = {}
        for name, key in keys.items():
            first[key] = min(step[name], first.get(key, LAST_WAY))
        clashing = [
            name
            for name, key in keys.items()
            # a file gives way to a folder, unless an earlier run has put it there; of files those that still can
            if (files[key] > 1 or key in folders or any(above in fixed for above in _folders(key)))
            and step[name] == first[key] < LAST_WAY
        ]
        if not clashing:
            return {name: taken.get(name) or paths[name] for name in wanted}
        for name in clashing:
            step[name] += 1
            paths[name] = _way(name, step[name])
            keys[name] = _key(paths[name])


LAST_WAY = 3


def _way(name: str, step: int) -> str:
    """What the result of an image may be called; the next where that clashes."""
    stem = _stem(name)
    if step == 1:
        path = f"{_inside(name)}.png"
    else:
        mark = f"~{hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}" if step else ""
        path = f"{posixpath.basename(stem) if step == LAST_WAY else stem}{mark}.png"
    return "/".join(map(_shortened, path.split("/")))


def _key(path: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def _folders(path: str) -> Iterable[str]:
    while path := posixpath.dirname(path):
        yield path


def _shortened(part: str) -> str:
    """A file's or folder's name of at most NAME_BYTES; what is cut off leaves a hash."""
    if len(part.encode()) <= NAME_BYTES:
        return part
    end = f"~{hashlib.blake2b(part.encode(), digest_size=8).hexdigest()}" + (".png" if part.endswith(".png") else "")
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


def check_dataset(uri: str, card: DatasetCard, config: ModelConfig) -> None:
    """A data set must be of the checkpoint's kind.

    Raises:
        InputError: other domains, or images of another size.
    """
    if tuple(card.domains) != tuple(config.domains):
        raise InputError(
            f"{uri} has the domains {', '.join(card.domains)}, the checkpoint {', '.join(config.domains)}; "
            "give the checkpoint data like what it was trained on"
        )
    if card.image_size != config.image_size:
        raise InputError(
            f"{uri} has images of {card.image_size} px, the checkpoint takes {config.image_size} px; "
            f"prepare it again with --image-size {config.image_size}"
        )


def split_rows(uri: str, card: DatasetCard, split: str) -> list[tuple[str, int]]:
    """(id, domain) of every row of a data set's split, without its images, sorted by id; needs no Ray.

    Raises:
        InputError: no such split.
    """
    reading.check_split(uri, card, split)
    rows = reading.read_labels(uri, card, split, ["id", "domain"])
    return sorted(zip(rows["id"].to_pylist(), rows["domain"].to_pylist(), strict=True))
