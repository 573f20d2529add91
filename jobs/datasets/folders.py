"""Any folders of pictures, one a domain; alone, or paired by equal names.

    SOURCE/cats/…  SOURCE/dogs/…              --source SOURCE
    SOURCE/train/cats/…  SOURCE/test/cats/…   the same, split already
    anywhere                                  --domain cats=URI --domain dogs=URI

Folders are read to any depth. A `train`, `val` or `test` folder within a domain (or around the domains) decides the
split of what it holds.
"""

import dataclasses
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ddpm_core.errors import InputError
from jobs import storage
from jobs.data import SPLITS, DatasetCard, Row
from jobs.datasets import common
from jobs.datasets.common import Picture, Pixels

SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(common.Common):
    """Two or more folders of your own, one a domain."""

    domain: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=URI, once for each domain; without it every folder in --source is a domain."""
    pairing: Literal["unpaired", "paired"] = "unpaired"
    """paired: pictures of equal name (up to the ending) in two folders show the same."""
    name: str = "folders"
    """Name of the data set."""
    licence: str = "unknown"
    """Licence of the pictures; it travels to checkpoints and outputs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """One picture of one domain."""

    file: str
    """Path within its domain."""
    uri: str
    split: str | None
    """What a split folder says."""

    @property
    def name(self) -> str:
        """Path without ending: counterparts share it, and it decides the split where no folder does."""
        return posixpath.splitext(self.file)[0]


def draft(options: Options) -> common.Draft:
    """Raises InputError where folders, pictures or counterparts are missing."""
    common.check_common(options)
    if options.domain:
        if options.source:
            raise InputError("--source and --domain are both given; give one of them")
        domains, sizes = _named_domains(options.domain)
    else:
        source = common.source_folder(options, "a folder with one folder for each domain, or --domain NAME=URI ...")
        domains, sizes = domains_in(source)
    return draft_domains(
        domains, sizes, options, command="folders", name=options.name, licence=options.licence, pairing=options.pairing
    )


def _named_domains(pairs: Sequence[str]) -> tuple[dict[str, list[Item]], dict[str, int]]:
    domains: dict[str, list[Item]] = {}
    sizes: dict[str, int] = {}
    for pair in pairs:
        name, equals, uri = pair.partition("=")
        if not (name and equals and uri):
            raise InputError(f"--domain {pair}: write NAME=URI, such as --domain day=/pictures/day")
        if name in domains:
            raise InputError(f"--domain {name} is given twice; names must differ")
        uri = storage.absolute(uri, flag=f"--domain {name}")
        common.require_folder(uri, f"--domain {name}")
        found = storage.file_sizes(uri)
        domains[name] = _items(uri, found)
        sizes |= {f"{name}/{file}": size for file, size in found.items()}
    return domains, sizes


def domains_in(source: str) -> tuple[dict[str, list[Item]], dict[str, int]]:
    """Items of each domain below `source`, and the size of every file."""
    sizes = storage.file_sizes(source)
    domains: dict[str, list[Item]] = {}
    for file in common.picture_files(sizes):
        head, _, rest = file.partition("/")
        within = file
        split = SPLIT_FOLDERS.get(head) if "/" in rest else None
        if split:  # SOURCE/train/cats/1.jpg
            head, _, rest = rest.partition("/")
        if rest:  # not a picture lying beside the domains' folders
            within = posixpath.join(split, rest) if split else rest
            item = Item(file=within, uri=storage.join(source, file), split=split or _split_folder(rest))
            domains.setdefault(head, []).append(item)
    return domains, sizes


def _items(uri: str, files: Mapping[str, int]) -> list[Item]:
    return [
        Item(file=file, uri=storage.join(uri, file), split=_split_folder(file)) for file in common.picture_files(files)
    ]


def _split_folder(file: str) -> str | None:
    head, slash, _ = file.partition("/")
    return SPLIT_FOLDERS.get(head) if slash else None


def draft_domains(
    domains: Mapping[str, list[Item]],
    sizes: Mapping[str, int],
    options: common.Common,
    *,
    command: str,
    name: str,
    licence: str,
    pairing: Literal["unpaired", "paired"],
) -> common.Draft:
    """A draft of these domains (also what day2night's two folders become).

    Raises:
        InputError: too few domains, an empty one, or (paired) not two of them or no common names.
    """
    where = options.source or "--domain"
    if len(domains) < 2:
        there = f"only {', '.join(domains)}" if domains else "no pictures in sub-folders"
        raise InputError(f"{where}: {there}; two folders of pictures or more are needed, one a domain")
    if empty := [domain for domain, items in domains.items() if not items]:
        raise InputError(f"--domain {empty[0]}: no pictures there; check the path")
    if pairing == "paired":
        check_pairs(domains)
    card = DatasetCard(
        name=name,
        licence=licence,
        source="pictures given by the user",
        image_size=options.image_size,
        encoding=options.encoding,
        domains=tuple(domains),
        pairing=pairing,
        prepared_by=common.prepared_by(command, options),
        source_hash=common.fingerprint(sizes, *domains),
    )
    return common.Draft(card=card, make=lambda scratch: _make(domains, pairing, options.image_size, scratch))


def check_pairs(domains: Mapping[str, list[Item]]) -> None:
    """Raises InputError unless two domains share names that are unique in each."""
    if len(domains) != 2:
        raise InputError(f"--pairing paired needs two domains, there are {len(domains)}: {', '.join(domains)}")
    for domain, items in domains.items():
        seen: dict[str, str] = {}
        for item in items:
            if item.name in seen:
                raise InputError(
                    f"{domain}: {seen[item.name]} and {item.file} have the same name; a pair needs one of each"
                )
            seen[item.name] = item.file
    (a, items_a), (b, items_b) = domains.items()
    if not {item.name for item in items_a} & {item.name for item in items_b}:
        raise InputError(
            f"no picture of {a} has a counterpart of the same name in {b} "
            f"({items_a[0].file}, {items_b[0].file}); rename them, or use --pairing unpaired"
        )


def assign_splits(domains: Mapping[str, Sequence[Item]]) -> tuple[dict[tuple[str, str], str], str]:
    """The split of each (domain, file), and a word on how it was found.

    Folders decide; splits that no folder names take a tenth each of what is left, by hash of the name, so that
    pictures of equal name in two domains are never in two splits.
    """
    given = {item.split for items in domains.values() for item in items if item.split}
    held_out = [split for split in ("val", "test") if split not in given]
    by_name: dict[str, str] = {}
    for items in domains.values():
        free = {item.name for item in items if item.split in (None, "train")} - set(by_name)
        by_name |= common.split_names(free, held_out)
    splits = {
        (domain, item.file): item.split if item.split in ("val", "test") else by_name[item.name]
        for domain, items in domains.items()
        for item in items
    }
    if not held_out:
        return splits, "split as the folders say"
    drawn = " and ".join(f"10% {split}" for split in held_out)
    return splits, f"split by hash of the name: {drawn}" + (", the rest as the folders say" if given else "")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A row before its pictures are fetched."""

    id: str
    domain: int
    image: tuple[int, int]
    """Index into the decoded pictures, and part."""
    target: tuple[int, int] | None = None
    target_id: str | None = None


def _make(domains: Mapping[str, list[Item]], pairing: str, size: int, scratch: Path) -> common.Made:
    splits, note = assign_splits(domains)
    flat = [(domain, item) for domain, items in domains.items() for item in items]
    pictures = [Picture(name=f"{domain}/{item.file}", uri=item.uri) for domain, item in flat]
    pixels, rejected = common.decode_pictures(pictures, size=size, halves=False, scratch=scratch)
    index = {(domain, item.file): i for i, (domain, item) in enumerate(flat) if pixels.ok[i]}
    if pairing == "paired":
        plans, alone = _paired(domains, splits, index)
        rejected = sorted([*rejected, *alone])
    else:
        plans = [
            (splits[domain, item.file], Plan(f"{domain}/{item.file}", number, (index[domain, item.file], 0)))
            for number, (domain, items) in enumerate(domains.items())
            for item in items
            if (domain, item.file) in index
        ]
    return planned(plans, pixels, rejected, [note])


def _paired(
    domains: Mapping[str, list[Item]], splits: dict[tuple[str, str], str], index: dict[tuple[str, str], int]
) -> tuple[list[tuple[str, Plan]], list[tuple[str, str]]]:
    """Rows of pictures with their counterparts; and those that have none, with the reason."""
    (a, items_a), (b, items_b) = domains.items()
    others = {item.name: item for item in items_b}
    plans, alone = [], []
    for item in items_a:
        other = others.pop(item.name, None)
        if other is None:
            alone.append((f"{a}/{item.file}", f"no counterpart of the same name in {b}"))
        elif (a, item.file) in index and (b, other.file) in index:
            image, target = (index[a, item.file], 0), (index[b, other.file], 0)
            plans.append((splits[a, item.file], Plan(item.name, 0, image, target, f"{b}/{other.file}")))
        elif (a, item.file) in index or (b, other.file) in index:
            good = f"{a}/{item.file}" if (a, item.file) in index else f"{b}/{other.file}"
            alone.append((good, "its counterpart cannot be used"))
    alone += [(f"{b}/{item.file}", f"no counterpart of the same name in {a}") for item in others.values()]
    return plans, alone


def planned(
    plans: Sequence[tuple[str, Plan]], pixels: Pixels, rejected: Sequence[tuple[str, str]], notes: Sequence[str]
) -> common.Made:
    """(split, plan) of every row, as rows sorted by id."""
    ordered = sorted(plans, key=lambda item: item[1].id)
    return common.Made(
        rows={split: _rows([plan for of, plan in ordered if of == split], pixels) for split in SPLITS},
        num_rows=len(ordered),
        rejected=rejected,
        notes=notes,
    )


def _rows(plans: Sequence[Plan], pixels: Pixels) -> Iterator[Row]:
    for plan in plans:
        yield Row(
            id=plan.id,
            domain=plan.domain,
            image=pixels[plan.image],
            target=None if plan.target is None else pixels[plan.target],
            target_id=plan.target_id,
        )
