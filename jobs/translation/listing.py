"""What is to be translated, listed one after another: files, or rows of files."""

import dataclasses
import fnmatch
import itertools
import os
import re
from collections.abc import Callable, Iterator

from ddpm_core import images, storage
from ddpm_core.config import ModelConfig
from ddpm_core.errors import InputError
from jobs.datasets import listing, reading
from jobs.datasets.format import DatasetCard
from jobs.translation.shards import Listed

LOOKED_AT = 10_000
"""How much of an input is looked at for an image before anything is written."""


class Passed(listing.PassedOver):
    """What is not translated, counted while the listing goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.of_the_side = 0
        """Rows of a data set that are on the wanted side already."""
        self.num_twice = 0
        """Images of a list that it tells of again."""


@dataclasses.dataclass(frozen=True)
class Sources:
    """What is to be translated."""

    uri: str
    root: str
    """What is asked where an image cannot be read: whether the storage is there at all."""
    images: Callable[[Passed], Iterator[Listed]]
    """Lists them, from the first on."""
    column: str = ""
    """Of parquet files that hold the images, the one they are in."""


def check_any(sources: Sources) -> None:
    """Raises InputError where there is no image that can be read, as far as that is soon told."""
    passed = Passed()
    bad: Listed | None = None
    num_bad = 0
    for image in itertools.islice(sources.images(passed), LOOKED_AT):
        if not image.error:
            return
        bad, num_bad = bad or image, num_bad + 1
    if num_bad < LOOKED_AT:
        raise none_found(sources.uri, passed, bad, num_bad)


def none_found(uri: str, passed: Passed, bad: Listed | None = None, num_bad: int = 0) -> InputError:
    if passed.of_the_side:
        return InputError(f"--input {uri}: all {passed.of_the_side:,} rows are of the wanted side already")
    hint = f"; wanted: {' '.join(sorted(images.SUFFIXES))}"
    if bad is not None:
        hint = f"; {num_bad:,} cannot be read, the first: {bad.error}"
    elif passed.packed:
        hint = f"; {passed.packed} is packed: unpack it"
    return InputError(f"--input {uri} holds no images{hint}")


# -- files --------------------------------------------------------------------------------------------------------


def files(uri: str) -> Sources:
    """The images that `--input` means: a file, all below a folder or prefix, or those that match a pattern.

    Raises:
        InputError: nothing is there.
    """
    if storage.is_file(uri):
        folder, _, name = uri.rpartition("/")
        entry = storage.Entry(storage.num_bytes(uri), storage.mtime_ns(uri), "", name)
        return Sources(uri, folder, lambda passed: iter([_of_file(folder, storage.as_text(name), entry)]))
    root, pattern = uri, "*"
    if not storage.exists(uri) and (fixed := re.match(r"([^*?\[]*)/[^/]*[*?\[]", uri)):
        root, pattern = fixed[1], uri[len(fixed[1]) + 1 :]
    if not storage.exists(root):
        raise InputError(f"--input {uri}: no such file or folder")
    return Sources(uri, root, lambda passed: listed(root, None, pattern, passed))


def listed(root: str, items: Iterator[storage.Item] | None, pattern: str, passed: Passed) -> Iterator[Listed]:
    """The images below `root`, or among `items` of it, that match a pattern."""
    for seen in listing.look(root, items):
        if seen.kind in ("system", "again") or fnmatch.fnmatchcase(seen.name, pattern):
            passed.add(seen)
            if seen.kind == "image" and seen.entry is not None:
                yield _of_file(root, seen.name, seen.entry)
            elif seen.kind == "rejected":
                # a name that is no text is told as it is printed, and another file may be called so
                name = f"{seen.name} (as printed)" if seen.entry is None and _is_there(root, seen.name) else seen.name
                yield Listed(name, storage.join(root, name), error=f"{name}: {seen.reason}")


def _is_there(root: str, name: str) -> bool:
    return "\\" in name and not storage.is_remote(root) and os.path.lexists(storage.join(root, name))


def _of_file(root: str, name: str, entry: storage.Entry) -> Listed:
    path = None if entry.path == name else os.fsencode(entry.path)
    return Listed(name, storage.join(root, name), entry.num_bytes, entry.mtime_ns, entry.etag, path=path)


# -- rows of a data set -------------------------------------------------------------------------------------------


def dataset(uri: str, card: DatasetCard, split: str, domain: str) -> Sources:
    """The rows that can be turned into the wanted side. A paired row has an image of either side; of the other sets,
    rows that are on the wanted side stay out.

    Raises:
        InputError: no such split, or a file is missing or damaged.
    """
    there = reading.open_split(uri, split, columns=("id", "domain"), rows_in_piece=1)

    def rows(passed: Passed) -> Iterator[Listed]:
        for piece in there.pieces:
            table = there.read(piece)
            for row, (name, side) in enumerate(zip(*table.select(["id", "domain"]).to_pydict().values(), strict=True)):
                if card.pairing == "paired" or card.domains[side] != domain:
                    yield Listed(name, row_uri(piece.uri, piece.groups[0], row))
                else:
                    passed.of_the_side += 1

    return Sources(uri, uri, rows)


def row_uri(file: str, group: int, row: int) -> str:
    """Where a row of a parquet file lies: the number of its row group, and its own in that."""
    return f"{file}#{group:05d}.{row:07d}"


def row_of(uri: str) -> tuple[str, int, int]:
    """File, row group and row of a `row_uri`."""
    file, _, place = uri.rpartition("#")
    group, _, row = place.partition(".")
    return file, int(group), int(row)


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
