"""What is to be translated: files below a folder or rows of a data set, and the names of their results."""

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow.fs

from ddpm_core import images, storage
from ddpm_core.config import ModelConfig
from ddpm_core.errors import InputError
from jobs.datasets import reading
from jobs.datasets.format import DatasetCard

# -- the listing and the manifest ---------------------------------------------------------------------------------


def list_images(uri: str) -> tuple[list[dict[str, Any]], int]:
    """The images below `uri` as {id: path below it, size, mtime_ns}, sorted, and how many other files there are.

    What is hidden by a dot is left out (`._x.jpg` is what macOS leaves on foreign disks).

    Raises:
        InputError: `uri` does not exist or is a file.
    """
    fs, path = storage.filesystem(uri)
    with storage.user_errors(uri):
        kind = fs.get_file_info(path).type
        if kind == pyarrow.fs.FileType.NotFound:
            raise InputError(f"--input {uri}: no such folder")
        if kind == pyarrow.fs.FileType.File:
            raise InputError(f"--input {uri} is a file; give the folder that holds the images")
        infos = fs.get_file_info(pyarrow.fs.FileSelector(path, recursive=True))
    files = [info for info in infos if info.type == pyarrow.fs.FileType.File]
    named = [(info.path[len(path) :].lstrip("/"), info) for info in files]
    found = [
        {"id": name, "size": info.size, "mtime_ns": info.mtime_ns or 0}
        for name, info in named
        if "." + info.extension.lower() in images.SUFFIXES and not any(p.startswith(".") for p in name.split("/"))
    ]
    return sorted(found, key=lambda each: each["id"]), len(files) - len(found)


def output_names(ids: Iterable[str], taken: Mapping[str, str]) -> dict[str, str]:
    """id → output path, suffix .png; ids whose outputs would meet keep their own suffix (a.jpg.png).

    `taken`: names given by an earlier run, which stay. Case does not tell names apart on every disk, so it does
    not here.
    """
    names = {name: taken.get(name) or _stem(name) + ".png" for name in ids}
    while True:
        users: dict[str, list[str]] = {}
        for name in {**taken, **names}:
            users.setdefault((names.get(name) or taken[name]).casefold(), []).append(name)
        clashing = [
            name
            for group in users.values()
            if len(group) > 1
            for name in group
            if name not in taken and names[name] != _inside(name) + ".png"
        ]
        if not clashing:
            break
        names.update({name: _inside(name) + ".png" for name in clashing})
    outputs: dict[str, str] = {}
    for name in {**taken, **names}:
        output = names.get(name) or taken[name]
        if outputs.setdefault(output, name) != name:
            raise InputError(f"{name} and {outputs[output]} would both become {output}; rename one")
    return names


def _inside(name: str) -> str:
    """`name` without parts that lead out of a folder or hide in it: a data set's ids are any strings."""
    return "/".join("_" + part if not part or part.startswith(".") else part for part in name.split("/"))


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
