"""What the sources of images share: checks, splits by name, duplicates.

A source is a class of `options` and a module with `draft(options) -> Draft`. `draft` does every check that is
cheap and reads no image; `Draft.make` does the work.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ddpm_core import config as configs
from ddpm_core import storage
from ddpm_core.errors import InputError
from jobs.datasets import decode, duplicates, reading
from jobs.datasets.format import DatasetCard, IndexRow, Row, find_card, read_card
from jobs.datasets.listing import PACKED
from jobs.datasets.options import Common, FromFiles, Output
from jobs.datasets.scan import name_hash, survey


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """What `Draft.make` gives: rows to write and what to tell."""

    rows: Mapping[str, Iterable[Row]]
    """Rows of each split, sorted by id; iterated once."""
    num_rows: int
    rejected: Sequence[tuple[str, str]] = ()
    """(image, reason) of those that could not be used."""
    copies: Sequence[duplicates.Copy] = ()
    """Images that come twice."""
    notes: Sequence[str] = ()
    """What a reader of results should know."""
    clean: Callable[[], None] = lambda: None
    """Takes away what was kept to go on with, once the data set is whole."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft:
    """A source that passed its checks."""

    card: DatasetCard
    """All that is known before an image is read."""
    make: Callable[[], Made]
    """Does the work."""


def source_folder(options: Common, what: str) -> str:
    """`--source` made absolute; it must be there.

    Raises:
        InputError: not given, missing, or a file.
    """
    if not options.source:
        raise InputError(f"--source is missing; give {what}")
    source = storage.absolute(options.source, flag="--source")
    require_folder(source, "--source")
    return source


def require_folder(uri: str, flag: str) -> None:
    """Raises InputError where `uri` is not a folder (or prefix) with something in it."""
    if storage.is_file(uri):
        unpack = "unpack it and " if uri.lower().endswith(PACKED) else ""
        raise InputError(f"{flag} {uri} is a file; {unpack}give the folder that holds the images")
    if not storage.exists(uri):
        raise InputError(f"{flag} {uri} does not exist; check the path")


def fingerprint(*parts: Any) -> str:
    """Hash of the source's file names and sizes and of small files' content."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Mapping):
            data = "\n".join(f"{name}\t{size}" for name, size in sorted(part.items())).encode()
        else:
            data = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def prepared_by(command: str, options: Output) -> dict[str, Any]:
    """The command and every option that decides the rows; which files are read, `fingerprint` tells."""
    elsewhere = ("output", "source", "overwrite", "set_aside_ok", "num_workers", "append", "domain", "pairs")
    values = {key: value for key, value in configs.to_dict(options).items() if key not in elsewhere}
    return {"command": command, **values}


# ------------------------------------------------------------------------------------------------ splits


def split_names(
    names: Iterable[str], held_out: Sequence[str] = ("val", "test"), kept: Mapping[str, str] | None = None
) -> dict[str, str]:
    """A tenth of the names for each held-out split and the rest for training, by hash of the name.

    No split is empty as long as there is a name for each. With `kept` (names that an earlier version has) those keep
    their split, and each other name has a chance of a tenth: of a handful none need be held out.
    """
    ranked = sorted(set(names), key=lambda name: (name_hash(name), name))
    if kept:
        share = 2**64 // 10
        ends = dict(enumerate(held_out))
        drawn = {name: ends.get(int.from_bytes(name_hash(name), "big") // share, "train") for name in ranked}
        return drawn | {name: kept[name] for name in ranked if name in kept}
    tenth = max(1, round(len(ranked) / 10)) if len(ranked) > len(held_out) else 0
    ends_of = [split for split in held_out for _ in range(tenth)]
    return {name: ends_of[rank] if rank < len(ends_of) else "train" for rank, name in enumerate(ranked)}


def rows_there(options: FromFiles) -> dict[str, IndexRow]:
    """Rows of the data set that --append adds to, by id; {} without it.

    Raises:
        InputError: there is no data set, or it is damaged.
    """
    if not options.append:
        return {}
    output = storage.absolute(options.output, flag="--output")
    card = find_card(output)
    if card is None:
        raise InputError(f"--append: there is no data set at {output}; leave --append out to make one")
    return reading.read_index(output, card)


def weed(
    pixels: decode.Pixels,
    names: Sequence[str],
    splits: Sequence[str],
    options: FromFiles,
    *,
    known: Sequence[bool] | None = None,
    groups: Sequence[int] | None = None,
) -> tuple[list[duplicates.Copy], list[tuple[str, str]], str]:
    """Images that come twice; with `--duplicates drop` they are no longer `ok`, and are given as rejected too.

    `known`: those that an earlier version has already, which are not looked at. `groups`: images are compared with
    those of their group only (default: all); for pairs the group is the domain, since counterparts may well be alike.
    Returns the copies, the rejected, and a note.
    """
    fresh = [i for i in np.flatnonzero(pixels.ok).tolist() if known is None or not known[i]]
    new = duplicates.Pool(
        names=[names[i] for i in fresh],
        splits=[splits[i] for i in fresh],
        groups=[0 if groups is None else groups[i] for i in fresh],
        marks=[pixels.marks[i] for i in fresh],
    )
    found = duplicates.find(new, _pool_there(options, pixels.shape[1], grouped=groups is not None))
    copies, dropped = [copy for _, copy in found], options.duplicates == "drop"
    rejected = []
    if dropped:
        for place, copy in found:
            pixels.ok[fresh[place]] = False
            same = "the same" if copy.kind == "exact" else "nearly the same"
            apart = f", {copy.distance} bits apart" if copy.kind == "near" else ""
            rejected.append((copy.picture, f"{same} image as another ({copy.of} in {copy.split_of}{apart})"))
    return copies, rejected, duplicates.note(copies, dropped)


def _pool_there(options: FromFiles, parts: int, *, grouped: bool) -> duplicates.Pool:
    """The images of the data set that --append adds to."""
    there: list[tuple[str, str, int, tuple[bytes, ...]]] = []
    if options.append:
        output = storage.absolute(options.output, flag="--output")
        card = read_card(output)
        marks = survey(output, card.content_hash).marks
        for name, row in sorted(reading.read_index(output, card).items()):
            if parts == 2:
                there.append((name, row.split, 0, marks[name]))
                continue
            there.append((name, row.split, row.domain if grouped else 0, marks[name][:1]))
            if grouped:  # the targets are images of the source too
                there.append((row.target_id or name, row.split, 1 - row.domain, marks[name][1:]))
    return duplicates.Pool(
        names=[name for name, _, _, _ in there],
        splits=[split for _, split, _, _ in there],
        groups=[group for _, _, group, _ in there],
        marks=[marks for _, _, _, marks in there],
    )
