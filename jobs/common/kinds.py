"""The folders that commands leave: which kind one is of, and outputs that would spoil what is there."""

import os
import posixpath
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from ddpm_core import storage
from ddpm_core.errors import InputError

KindName = Literal[
    "data set", "run", "checkpoint", "sweep", "evaluation", "comparison", "translation", "experiments", "recipe"
]


class Kind(NamedTuple):
    """How a folder of a kind is told: it has these files, and the first of them says this as its `format`."""

    files: tuple[str, ...]
    format: str | None


KINDS: dict[KindName, Kind] = {
    "data set": Kind(("dataset.json",), None),
    "sweep": Kind(("sweep.json",), "ddpm-translate-sweep"),
    "run": Kind(("config.json", "environment.json"), "ddpm-translate"),
    "checkpoint": Kind(("config.json", "model.safetensors"), "ddpm-translate"),
    "evaluation": Kind(("metrics.json",), "ddpm-translate-evaluation"),
    "comparison": Kind(("compare.json",), "ddpm-translate-comparison"),
    "translation": Kind(("run.json",), "ddpm-translate-results"),
    "experiments": Kind(("plan.json",), "ddpm-translate-suite"),
    "recipe": Kind(("recipe.json",), "ddpm-translate-recipe"),
}


def kind_of(uri: str) -> tuple[KindName, dict[str, Any]] | None:
    """The kind of the folder `uri` and its record; None: it is none of ours.

    Raises:
        InputError: the store refuses.
    """
    for name, kind in KINDS.items():
        if not all(storage.is_file(storage.join(uri, file)) for file in kind.files):
            continue
        try:
            record = storage.read_json(storage.join(uri, kind.files[0]))
        except (FileNotFoundError, *storage.NOT_JSON):
            record = None
        record = record if isinstance(record, dict) else {}
        if kind.format is None or record.get("format") == kind.format:
            return name, record
    return None


def a(name: str) -> str:
    """With its article, for messages."""
    return name if name.endswith("s") else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def check_output(output: str, kind: KindName, inputs: Mapping[str, str | None], *, flag: str = "--output") -> None:
    """Refuse an output that would spoil what is there. `inputs`: what the command reads, by its flags.

    Raises:
        InputError: it is a file, it is or contains an input, lies in an input or in a data set, or is of another kind.
    """
    if not storage.is_remote(output) and storage.is_file(output):
        raise InputError(f"{flag} {output} is a file; give a folder")
    for name, uri in inputs.items():
        if not uri:
            continue
        if inside(output, uri):
            where = "is" if inside(uri, output) else "lies in"
            raise InputError(f"{flag} {output} {where} {name}; give a folder outside of it")
        if inside(uri, output):
            raise InputError(f"{flag} {output} contains {name} {uri}; give a folder of its own")
    try:
        around = [each for each in parents(output) if storage.is_file(storage.join(each, KINDS["data set"].files[0]))]
        there = kind_of(output)
    except InputError:  # the store refuses: what writes there tells so
        return
    if around:
        raise InputError(f"{flag} {output} lies in the data set {around[0]}; give a folder outside of it")
    if there is not None and there[0] != kind:
        raise InputError(f"{flag} {output} holds {a(there[0])}; give another folder")


def inside(uri: str, folder: str) -> bool:
    """Whether `uri` is `folder` or lies in it, symbolic links resolved."""
    if not storage.is_remote(uri) and not storage.is_remote(folder):
        uri, folder = os.path.realpath(uri), os.path.realpath(folder)
    return f"{uri.rstrip('/')}/".startswith(f"{folder.rstrip('/')}/")


def parents(uri: str) -> Iterator[str]:
    """The folders that `uri` lies in, up to the root's or the bucket."""
    while (uri := posixpath.dirname(uri.rstrip("/"))) not in ("", "/", "s3:"):
        yield uri
