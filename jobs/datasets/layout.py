"""Which folder of images is a domain, and which a split.

    SOURCE/cats/…            SOURCE/dogs/…               folders are domains
    SOURCE/train/cats/…      SOURCE/test/cats/…          splits around domains; also training_set, val_images, dev, …
    SOURCE/trainA/…          SOURCE/testB/…              split and domain in one name; also train_A, B_val, …
    SOURCE/cats/train/…      SOURCE/cats/2024/test/…     splits within a domain

What looks like a split and may be a domain is refused: a test image that is trained on spoils every figure.
"""

import dataclasses
import functools
import itertools
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ddpm_core import storage
from ddpm_core.errors import InputError
from jobs.datasets.listing import Listing

SPLIT_WORDS = {
    word: split
    for split, words in {
        "train": "train training",
        "val": "val valid validation dev eval evaluation",
        "test": "test testing holdout heldout",
    }.items()
    for word in words.split()
}
DECORATION = re.compile(r"(?i)(data)?sets?|splits?|data|images?|imgs?|photos?|pictures?|folders?")
"""Words that say nothing of what a split's folder holds."""
PART = re.compile(r"(?i)(fold|split|part|chunk|shard|subset|cv)[-_ ]?\d+")
"""Folders that hold a share of one set."""
LONGEST_NAME = 100
"""Letters of a domain's name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """One image of one domain."""

    file: str
    """Path within its domain."""
    uri: str
    split: str | None
    """What a split folder says."""
    called: str = ""
    """The name, where it is that of a counterpart spelled otherwise."""

    @property
    def name(self) -> str:
        """Path without ending, in one spelling: counterparts share it; where no folder does, it decides the split."""
        return self.called or item_name(self.file)


def item_name(file: str) -> str:
    """A path without its ending, as `Item.name` says: accents composed (macOS keeps them apart), split folders by the
    split's own name."""
    head, slash, rest = unicodedata.normalize("NFC", posixpath.splitext(file)[0]).partition("/")
    return f"{pure_split(head) or head}/{rest}" if slash else head


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """The domains of a source."""

    domains: dict[str, list[Item]]
    sizes: dict[str, int]
    """Of every file, for `fingerprint`."""
    rejected: dict[str, str]
    """What cannot be read, with the reason."""
    notes: list[str]
    """What was passed over."""
    hint: str
    """Why images may be missing, as the end of a message."""


# ------------------------------------------------------------------------------------------- splits


@functools.lru_cache(maxsize=4096)
def parse_split(folder: str) -> tuple[str, str] | None:
    """The split that a folder's name says and what else it says: trainA is (train, A), test_images (test, "").

    None where it says no split.
    """
    text = re.sub(r"(?i)(hold|held)[-_ ]out", "holdout", folder)
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_]+", text)
    if len(words) == 1 and SPLIT_WORDS.get(words[0][:-1].casefold()) and words[0][-1] in "abxyABXY":
        words = [words[0][:-1], words[0][-1]]  # traina, TRAINA
    splits = [SPLIT_WORDS[word.casefold()] for word in words if word.casefold() in SPLIT_WORDS]
    if not splits:
        return None
    rest = [word for word in words if not DECORATION.fullmatch(word)]
    rest.remove(next(word for word in rest if word.casefold() in SPLIT_WORDS))
    return splits[0], "_".join(rest)


def pure_split(folder: str) -> str | None:
    """The split of a folder whose name says nothing else."""
    split, label = parse_split(folder) or (None, "")
    return None if label else split


def splits_within(files: Iterable[str]) -> dict[str, str | None]:
    """The split of each file of a domain: that of the first folder, or of a deeper one with another split beside it."""
    files = list(files)
    beside: dict[str, set[str]] = {}
    for file in files:
        for parent, folder in _steps(file):
            if found := parse_split(folder):
                beside.setdefault(parent, set()).add(found[0])

    def split_of(file: str) -> str | None:
        for parent, folder in _steps(file):
            if not parent and (split := pure_split(folder)):
                return split
            if len(beside.get(parent, ())) > 1 and (found := parse_split(folder)):
                return found[0]
        return None

    return {file: split_of(file) for file in files}


def _steps(file: str) -> Iterable[tuple[str, str]]:
    """(path of the parent, name) of each folder on the way to a file."""
    *folders, _ = file.split("/")
    return [("/".join(folders[:depth]), folder) for depth, folder in enumerate(folders)]


# ------------------------------------------------------------------------------------------- domains


def domains_in(source: str, listing: Listing) -> Layout:
    """The domains below a folder.

    Raises:
        InputError: what is a domain there and what a split is not sure, or a domain's name cannot be used.
    """
    wrapped = _wrapper(listing.images)
    files = {path: path.removeprefix(wrapped) for path in listing.images}
    around = _splits_around(source, files.values())
    places: dict[str, list[_Place]] = {}
    spelled: dict[str, str] = {}
    for path, file in files.items():
        if (found := _place(path, file, around)) is not None:
            domain, place = found
            if place.split:  # train/Cats and test/cats
                domain = spelled.setdefault(_folded(domain), domain)
            places.setdefault(domain, []).append(place)
    domains, notes, hint = {}, [*listing.notes], listing.hint()
    for domain, of in sorted(places.items()):
        domains[domain], again = _items(source, listing, of)
        notes += again
    if beside := len(files) - sum(map(len, places.values())):
        notes.append(f"{beside:,} image{'' if beside == 1 else 's'} beside the domains' folders passed over")
        hint = hint or f"; {beside:,} lie in no domain's folder (if each is two side by side: jobs.prepare day2night)"
    notes += _without_combined(domains)
    if len(parts := [domain for domain in domains if PART.fullmatch(domain)]) > 1:
        raise _unsure(source, parts)
    if len(domains) == 1:
        hint = _deeper(storage.join(f"{source}/{wrapped}", *domains), *domains.values()) or hint
    check_names(domains, f"--source {source}")
    return Layout(domains=domains, sizes=listing.sizes, rejected=listing.rejected, notes=notes, hint=hint)


def named_domain(name: str, uri: str, listing: Listing) -> Layout:
    """The one domain that `--domain NAME=URI` names."""
    items, again = _items(uri, listing, [_Place(path, path, None) for path in listing.images])
    return Layout(
        domains={name: items},
        sizes={f"{name}/{path}": size for path, size in listing.sizes.items()},
        rejected={f"{name}/{path}": reason for path, reason in listing.rejected.items()},
        notes=[f"{name}: {note}" for note in [*listing.notes, *again]],
        hint=listing.hint(),
    )


def check_names(domains: Iterable[str], where: str) -> None:
    """Raises InputError for names of domains that no file, label or command line takes, or that are too much alike."""
    seen: dict[str, str] = {}
    for name in domains:
        if not name.strip() or len(name) > LONGEST_NAME or re.search(r"[/\\\x00-\x1f\x7f-\x9f\ud800-\udfff]|^\.", name):
            raise InputError(
                f"{where}: {name[:LONGEST_NAME]!r} cannot be a domain's name; take letters and digits, at most "
                f"{LONGEST_NAME}: rename the folder, or give --domain NAME=URI"
            )
        other = seen.setdefault(_folded(name), name)
        if other != name:
            raise InputError(
                f"{where}: the domains {other} and {name} differ only in capitals or in how accents are stored; "
                "put their images into one folder"
            )


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


class _Place(NamedTuple):
    """Where an image lies."""

    path: str
    """In the source."""
    within: str
    """In its domain."""
    split: str | None
    """What a folder around the domain says."""


def _place(path: str, file: str, around: Mapping[str, tuple[str, str]]) -> tuple[str, _Place] | None:
    """An image's domain, and its place there; None where it lies in none. `file`: its path below the wrapper."""
    head, *rest = file.split("/")
    split, label = around.get(head, (None, ""))
    if split and label:
        return (label, _Place(path, "/".join([split, *rest]), split)) if rest else None
    outer = []
    if split:  # train/cats/1.jpg, training_set/training_set/cats/1.jpg, train/trainA/1.jpg
        while len(rest) > 1 and pure_split(rest[0]) == split:
            rest = rest[1:]
        outer, head, rest = [head], rest[0], rest[1:]
        inner = parse_split(head)
        head = inner[1] if inner and inner[0] == split and inner[1] else head
    return (head, _Place(path, "/".join([*outer, *rest]), split)) if rest else None


def _deeper(folder: str, items: Iterable[Item]) -> str:
    """A hint where the only domain may be the folder around the domains."""
    inner = sorted({item.file.partition("/")[0] for item in items if "/" in item.file})
    return f"; if {', '.join(inner[:3])} are the domains, give --source {folder}" if len(inner) > 1 else ""


def _wrapper(files: Iterable[str]) -> str:
    """The one folder around folders of splits, with its slash: horse2zebra/ around trainA/, testA/, …; "" without."""
    tops = {file.partition("/")[0] for file in files}
    inner = {file.partition("/")[2].partition("/")[0] for file in files if "/" in file}
    top = tops.pop() if len(tops) == 1 else ""
    if not top or parse_split(top) or len(inner) < 2 or not all(map(parse_split, inner)):
        return ""
    return f"{top}/"


def _splits_around(source: str, files: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Split and domain ("" where the folders within say it) of the folders directly below the source; {} where none is
    a split.

    Raises:
        InputError: some are and some are not, or they say different things.
    """
    heads = sorted({file.partition("/")[0] for file in files if "/" in file})
    found = {head: parsed for head in heads if (parsed := parse_split(head))}
    if not found:
        return {}
    labels = {_folded(label) for _, label in found.values()}
    trained = {_folded(label) for split, label in found.values() if split == "train"}
    if len(found) < len(heads) or (len(labels) > 1 and (labels != trained or "" in labels or _numbered(labels))):
        raise _unsure(source, heads)
    return {head: (split, label if len(labels) > 1 else "") for head, (split, label) in found.items()}


def _numbered(labels: Iterable[str]) -> bool:
    return any(label.isdigit() or parse_split(label) for label in labels)


def _unsure(source: str, folders: Sequence[str]) -> InputError:
    shown = ", ".join(folders[:6]) + (", …" if len(folders) > 6 else "")
    return InputError(
        f"--source {source}: which of the folders {shown} are domains and which are splits is not sure; lay them out "
        "as DOMAIN/train, DOMAIN/test (or train/DOMAIN, test/DOMAIN), or name each domain: --domain NAME=URI"
    )


def _without_combined(domains: dict[str, list[Item]]) -> list[str]:
    """Removes what pix2pix keeps beside A and B: AB, both side by side in one image."""
    if len(domains) != 3:
        return []
    plain = {re.sub(r"[\W_]|2|to|and", "", domain.casefold()): domain for domain in domains}
    for both, domain in plain.items():
        one, two = (other for other in plain if other != both) if len(plain) == 3 else ("", "")
        if one and both in (one + two, two + one):
            rest = " and ".join(other for other in domains if other != domain)
            return [f"{domain} passed over: {len(domains.pop(domain)):,} images of {rest} side by side"]
    return []


def _items(source: str, listing: Listing, places: Sequence[_Place]) -> tuple[list[Item], list[str]]:
    """The images of a domain, sorted, and a note of those that links reach again: they are taken once, where they lie
    themselves."""
    splits = splits_within(place.within for place in places)
    real = {place.path: listing.images[place.path].real or f"/{place.path}" for place in places}
    taken: dict[str, Item] = {}
    places = sorted(places, key=lambda place: (not real[place.path].endswith(f"/{place.path}"), place))
    for path, within, around in places:
        uri = storage.join(source, listing.images[path].path)
        item = Item(file=within, uri=uri, split=around or splits[within])
        taken.setdefault(real[path], item)
    items = sorted(taken.values(), key=lambda item: item.file)
    for one, two in itertools.pairwise(items):
        if one.file == two.file:
            raise InputError(f"{one.uri} and {two.uri} would both be {one.file} of one domain; rename one")
    num_again = len(places) - len(items)
    links = "1 link" if num_again == 1 else f"{num_again:,} links"
    return items, [f"{links} to images that are there already passed over"] if num_again else []
