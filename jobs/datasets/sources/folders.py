"""Any folders of images, one a domain; alone, or paired by equal names.

    SOURCE/cats/…  SOURCE/dogs/…              --source SOURCE
    SOURCE/train/cats/…  SOURCE/test/cats/…   the same, split already
    anywhere                                  --domain cats=URI --domain dogs=URI
    pairs.csv                                 cats,dogs / sub/1.jpg,7.png / …: --pairs pairs.csv

Folders are read to any depth; jobs/datasets/layout.py says what is a domain there and what a split.
"""

import codecs
import collections
import csv
import dataclasses
import io
import posixpath
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from ddpm_core import faces, storage
from ddpm_core.errors import InputError
from jobs.datasets import decode, duplicates, layout
from jobs.datasets.decode import File, Pixels
from jobs.datasets.format import SPLITS, DatasetCard, IndexRow, Row, find_card
from jobs.datasets.layout import Item, Layout, item_name
from jobs.datasets.listing import list_images
from jobs.datasets.options import Folders, FromFiles
from jobs.datasets.source import (
    Draft,
    Made,
    fingerprint,
    prepared_by,
    require_folder,
    rows_there,
    source_folder,
    split_names,
    weed,
)

ALIKE = 1.02
"""Images whose ratios of width to height differ by a smaller factor lie apart by less than a pixel of 64, if at all."""
MAX_LIST_BYTES = 100_000_000
"""Of --pairs: a million pairs have about 60 bytes each."""


def draft(options: Folders) -> Draft:
    """Raises InputError where folders, images or counterparts are missing."""
    if options.domain:
        if options.source:
            raise InputError("--source and --domain are both given; give one of them")
        there = _named_domains(options.domain)
    else:
        source = source_folder(options, "a folder with one folder for each domain, or --domain NAME=URI ...")
        there = layout.domains_in(source, list_images(source))
    domains = _as_before(there.domains, options)
    pairs = None
    if options.pairs is not None:
        if options.pairing == "self":
            raise InputError("--pairs has no effect with --pairing self; give one of them")
        pairs = parse_pairs(storage.absolute(options.pairs, flag="--pairs"), domains, options.source)
        domains = {domain: domains[domain] for domain in pairs.domains}
    return draft_domains(
        dataclasses.replace(there, domains=domains),
        options,
        command="folders",
        name=options.name,
        licence=options.licence,
        pairing=options.pairing if pairs is None else "paired",
        pairs=pairs,
        template=faces.template_for(faces.CELEBA, options.align),
    )


def _as_before(domains: dict[str, list[Item]], options: Folders) -> dict[str, list[Item]]:
    """With --append: the domains of the data set that is there, some of which may bring nothing new."""
    card = find_card(storage.absolute(options.output, flag="--output")) if options.append else None
    if card is None or not set(domains) <= set(card.domains) or not any(domains.values()):
        return domains
    return {domain: domains.get(domain, []) for domain in card.domains}


def _named_domains(pairs: Sequence[str]) -> Layout:
    parts: dict[str, Layout] = {}
    for pair in pairs:
        name, equals, uri = pair.partition("=")
        if not (name and equals and uri):
            raise InputError(f"--domain {pair}: write NAME=URI, such as --domain day=/images/day")
        if name in parts:
            raise InputError(f"--domain {name} is given twice; names must differ")
        layout.check_names([*parts, name], "--domain")
        uri = storage.absolute(uri, flag=f"--domain {name}")
        require_folder(uri, f"--domain {name}")
        parts[name] = layout.named_domain(name, uri, list_images(uri))
    return Layout(
        domains={name: part.domains[name] for name, part in parts.items()},
        sizes={file: size for part in parts.values() for file, size in part.sizes.items()},
        rejected={file: reason for part in parts.values() for file, reason in part.rejected.items()},
        notes=[note for part in parts.values() for note in part.notes],
        hint=next((part.hint for part in parts.values() if part.hint), ""),
    )


def draft_domains(
    there: Layout,
    options: FromFiles,
    *,
    command: str,
    name: str,
    licence: str,
    pairing: Literal["unpaired", "paired", "self"],
    pairs: "Pairs | None" = None,
    template: tuple[float, ...] = (),
) -> Draft:
    """A draft of these domains (also what day2night's two folders become); `template` as in `decode_images`.

    Raises:
        InputError: too few domains, an empty one, or (paired) not two of them or no common names.
    """
    domains, where = there.domains, options.source or "--domain"
    if len(domains) < 2:
        only = f"only {', '.join(domains)}" if domains else "no images in sub-folders"
        raise InputError(f"{where}: {only}; two folders of images or more are needed, one a domain{there.hint}")
    empty = [domain for domain, items in domains.items() if not items]
    if empty and (pairing == "paired" or not options.append or len(empty) == len(domains)):
        raise InputError(f"--domain {empty[0]}: no images there; check the path{there.hint}")
    held_out = [name for name, of in domains.items() if not any(item.split in (None, "train") for item in of)]
    if held_out and not options.append:
        raise InputError(
            f"{where}: all images of {' and of '.join(held_out)} lie in folders for val or test; training needs some"
        )
    rejected = dict(there.rejected)
    if pairing == "paired" and pairs is None:
        domains, ambiguous = match_names(domains)
        rejected |= ambiguous
    card = DatasetCard(
        name=name,
        licence=licence,
        source="images given by the user",
        image_size=options.image_size,
        encoding=options.encoding,
        domains=tuple(domains),
        pairing=pairing,
        prepared_by=prepared_by(command, options),
        source_hash=fingerprint(there.sizes, *domains, *([] if pairs is None else [pairs.content])),
    )
    there = dataclasses.replace(there, domains=domains, rejected=rejected)
    return Draft(card=card, make=lambda: _make(there, pairing, pairs, options, template))


def match_names(domains: Mapping[str, list[Item]]) -> tuple[dict[str, list[Item]], dict[str, str]]:
    """The images of two domains, counterparts under one name, and those left out since their name is not theirs alone.

    Where no name is equal, one that differs in capitals only is taken for it if there is just one.

    Raises:
        InputError: there are not two domains, or no common names.
    """
    if len(domains) != 2:
        raise InputError(f"--pairing paired needs two domains, there are {len(domains)}: {', '.join(domains)}")
    alone: dict[str, dict[str, Item]] = {}
    ambiguous: dict[str, str] = {}
    for domain, items in domains.items():
        by_name: dict[str, list[Item]] = {}
        for item in items:
            by_name.setdefault(item.name, []).append(item)
        alone[domain] = {name: of[0] for name, of in by_name.items() if len(of) == 1}
        for of in (of for of in by_name.values() if len(of) > 1):
            reason = f"{len(of)} images have this name ({', '.join(item.file for item in of[:3])}); a pair needs one"
            ambiguous |= {f"{domain}/{item.file}": reason for item in of}
    (a, ones), (b, twos) = alone.items()
    spelled: dict[str, list[str]] = {}
    for name in set(ones) - set(twos):
        spelled.setdefault(name.casefold(), []).append(name)
    free = collections.Counter(name.casefold() for name in set(twos) - set(ones))
    for name, item in twos.items():
        same = spelled.get(name.casefold(), []) if name not in ones else []
        if len(same) == 1 and free[name.casefold()] == 1:
            twos[name] = dataclasses.replace(item, called=same[0])
    if not set(ones) & {item.name for item in twos.values()}:
        raise InputError(
            f"no image of {a} has a counterpart of the same name in {b} ({domains[a][0].file}, {domains[b][0].file}); "
            "rename them, list the pairs in --pairs FILE.csv, or use --pairing unpaired"
        )
    return {a: list(ones.values()), b: list(twos.values())}, ambiguous


@dataclasses.dataclass(frozen=True)
class Pairs:
    """What --pairs says."""

    domains: tuple[str, str]
    lines: list[tuple[Item, Item]]
    content: bytes


def parse_pairs(uri: str, domains: Mapping[str, list[Item]], source: str | None) -> Pairs:
    """Raises InputError with the number of the line that is wrong: no such domain or image, a pair twice."""
    content, lines = _cells(uri)
    if len(lines) < 2:
        raise InputError(f"--pairs {uri} lists no pairs; the first line names two domains, each other line a pair")
    spelled = {name.casefold(): name for name in domains}
    header = [spelled.get(name.strip().casefold(), name.strip()) for name in lines[0]]
    if len(header) != 2 or len(set(header)) != 2:
        raise InputError(
            f"--pairs {uri} line 1: two different domains are needed, parted by a comma; it has "
            f"{', '.join(header)[:80]!r}"
        )
    for name in header:
        if name not in domains:
            raise InputError(f"--pairs {uri} line 1: there is no domain {name[:80]!r}; there are {', '.join(domains)}")
    known = [_by_path(name, domains[name], source) for name in header]
    pairs: dict[tuple[str, str], int] = {}
    found = []
    for number, line in enumerate(lines[1:], 2):
        if not "".join(line).strip():
            continue
        if len(line) != 2:
            raise InputError(f"--pairs {uri} line {number}: two images are expected, it has {len(line)} columns")
        items = []
        for name, path, there in zip(header, line, known, strict=True):
            item = there.get(path.strip()) or there.get(_plain(path))
            if item is None:
                example = f", such as {domains[name][0].file}" if domains[name] else ""
                raise InputError(
                    f"--pairs {uri} line {number}: there is no image {path.strip()[:200]!r} in {name}; write its path "
                    f"in that folder{example}"
                )
            items.append(item)
        one, two = items
        if (first := pairs.setdefault((one.file, two.file), number)) != number:
            raise InputError(f"--pairs {uri} line {number}: the same pair as in line {first}")
        found.append((one, two))
    if not found:
        raise InputError(f"--pairs {uri} lists no pairs; the first line names two domains, each other line a pair")
    return Pairs((header[0], header[1]), found, content)


def _cells(uri: str) -> tuple[bytes, list[list[str]]]:
    """A table's bytes and its cells, as spreadsheets write them: parted by commas, semicolons or tabs.

    Raises:
        InputError: it is not there, not text, or larger than any list of pairs.
    """
    try:
        if (num_bytes := storage.num_bytes(uri)) > MAX_LIST_BYTES:
            raise InputError(
                f"--pairs {uri} has {num_bytes / 1e6:,.0f} MB; a list of pairs has at most {MAX_LIST_BYTES / 1e6:,.0f}"
            )
        content = storage.read_bytes(uri)
        wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if wide else "utf-8-sig")
        if "\0" in text:
            raise InputError(f"--pairs {uri} holds NUL bytes, so it is no text; save it as CSV in UTF-8")
        text = re.sub(r"\Asep=.\r?\n", "", text)  # what Excel puts before the table
        first = text.lstrip().partition("\n")[0]
        table = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count), skipinitialspace=True)
        return content, list(table)
    except FileNotFoundError:
        raise InputError(f"--pairs {uri} does not exist; check the path") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"--pairs {uri} is not a CSV file in UTF-8 ({error})") from None


def _by_path(domain: str, items: Sequence[Item], source: str | None) -> dict[str, Item]:
    """Items by their path in the domain's folder, else in the source, behind the domain's name, or from the root."""
    root = storage.join(storage.absolute(source), "") if source else None
    named: dict[str, Item] = {}
    for item in items:
        in_source = [item.uri.removeprefix(root)] if root else []
        for path in (item.uri, f"{domain}/{item.file}", *in_source):
            named[_plain(path)] = item
    return named | {_plain(item.file): item for item in items} | {item.file: item for item in items}


def _plain(path: str) -> str:
    """A path in one spelling: ./a//b.jpg and a\\b.jpg are a/b.jpg, accents are composed."""
    return posixpath.normpath(unicodedata.normalize("NFC", path.strip().replace("\\", "/")))


def assign_splits(
    domains: Mapping[str, Sequence[Item]], kept: Mapping[str, str] | None = None
) -> tuple[dict[tuple[str, str], str], str]:
    """The split of each (domain, file), and a word on how it was found.

    Names in `kept` (an earlier version's) keep their split. Otherwise folders decide; splits that no folder names take
    a tenth each of what is left, by hash of the name, so that images of equal name in two domains are never in two
    splits.
    """
    kept = kept or {}
    given = {item.split for items in domains.values() for item in items if item.split}
    held_out = [split for split in ("val", "test") if split not in given]
    by_name: dict[str, str] = {}
    for items in domains.values():
        free = {item.name for item in items if item.split in (None, "train")} - set(by_name)
        by_name |= split_names(free, held_out, kept)
    splits = {
        (domain, item.file): kept.get(item.name)
        or (item.split if item.split in ("val", "test") else by_name[item.name])
        for domain, items in domains.items()
        for item in items
    }
    return splits, _how_split(held_out, bool(given))


def _how_split(held_out: Sequence[str], given: bool) -> str:
    if not held_out:
        return "split as the folders say"
    drawn = " and ".join(f"10% {split}" for split in held_out)
    return f"split by hash of the name: {drawn}" + (", the rest as the folders say" if given else "")


def kept_names(there: Mapping[str, IndexRow], domains: Sequence[str], pairing: str) -> dict[str, str]:
    """Split of each `Item.name` that an earlier version has."""
    if pairing == "paired":
        return {name: row.split for name, row in there.items()}
    return {item_name(name.removeprefix(f"{domains[row.domain]}/")): row.split for name, row in there.items()}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A row before its images are fetched."""

    id: str
    domain: int
    image: tuple[int, int]
    """Index into the decoded images, and part."""
    target: tuple[int, int] | None = None
    target_id: str | None = None


def _make(
    found: Layout,
    pairing: str,
    pairs: Pairs | None,
    options: FromFiles,
    template: tuple[float, ...],
) -> Made:
    there, domains = rows_there(options), found.domains
    torn: list[tuple[str, str]] = []
    if pairs is not None:
        splits, torn, note = split_pairs(pairs, there)
        domains = {domain: [item for item in of if (domain, item.file) in splits] for domain, of in domains.items()}
    flat = [(domain, item) for domain, items in domains.items() for item in items]
    names = [f"{domain}/{item.file}" for domain, item in flat]
    pixels, rejected = decode.decode_images(
        [File(name, item.uri) for name, (_, item) in zip(names, flat, strict=True)],
        size=options.image_size,
        halves=False,
        encoding=options.encoding,
        template=template,
    )
    if pairs is None:
        used = {name for name, ok in zip(names, pixels.ok, strict=True) if ok}
        rows = {domain: [item for item in of if f"{domain}/{item.file}" in used] for domain, of in domains.items()}
        if pairing == "paired":  # of what has no counterpart none is held out: there is no row of it
            both = set.intersection(*({item.name for item in of} for of in rows.values()))
            rows = {domain: [item for item in of if item.name in both] for domain, of in rows.items()}
        splits, note = assign_splits(rows, kept_names(there, list(domains), pairing))
    order = list(domains)
    earlier = images_there(there, order) if pairing == "paired" else there
    copies, dropped, word = weed(
        pixels,
        names,
        [splits.get((domain, item.file), "train") for domain, item in flat],
        options,
        known=[not {name, posixpath.splitext(name)[0]}.isdisjoint(earlier) for name in names],
        groups=[order.index(domain) for domain, _ in flat] if pairing == "paired" else None,
    )
    index = {(domain, item.file): i for i, (domain, item) in enumerate(flat) if pixels.ok[i]}
    alone: list[tuple[str, str]] = []
    if pairs is not None:
        plans, alone = _listed(pairs, splits, index, {name for name, _ in torn})
    elif pairing == "paired":
        plans, alone = _paired(domains, splits, index)
    else:
        plans = [
            (splits[domain, item.file], Plan(f"{domain}/{item.file}", number, (index[domain, item.file], 0)))
            for number, (domain, items) in enumerate(domains.items())
            for item in items
            if (domain, item.file) in index
        ]
    rejected += [*found.rejected.items(), *dropped, *torn, *alone]
    notes = [note, *found.notes, *pixels.notes(), *_shapes_apart([plan for _, plan in plans], pixels, names), word]
    return planned(plans, pixels, sorted(rejected), notes, copies)


def _shapes_apart(plans: Sequence[Plan], pixels: Pixels, names: Sequence[str]) -> list[str]:
    """A note of pairs whose images differ in shape.

    Each is cut to its own middle, and no other cut would be surer: the shapes do not tell whether the narrower image
    is cut at its sides, squeezed, or taken with another lens.
    """
    pairs = [(plan.image[0], plan.target[0]) for plan in plans if plan.target is not None]
    ratios = {}
    for pair in pairs:
        (w, h), (other_w, other_h) = (pixels.sizes[row] for row in pair)
        if w and other_w:
            ratios[pair] = max(w * other_h, other_w * h) / min(w * other_h, other_w * h)
    apart = [pair for pair, ratio in ratios.items() if ratio > ALIKE]
    if not apart:
        return []
    worst = max(apart, key=lambda pair: (ratios[pair], names[pair[0]]))
    shown = ", ".join(f"{names[row]} {pixels.sizes[row][0]} x {pixels.sizes[row][1]}" for row in worst)
    return [
        f"{len(apart):,} of {len(pairs):,} pairs differ in shape and may lie apart: crop them alike (worst: {shown})"
    ]


PAIR = "~"
"""Between the files of a pair that --pairs lists, in its id."""


def images_there(there: Mapping[str, IndexRow], domains: Sequence[str]) -> dict[str, str]:
    """Split of each image of an earlier version's pairs; where they were pairs by name, those of the first domain
    stand without their ending."""
    first, second = domains
    found = {}
    for name, row in there.items():
        target = row.target_id or ""
        found[target] = row.split
        found[f"{first}/{name.removesuffix(PAIR + target.removeprefix(f'{second}/'))}"] = row.split
    return found


def split_pairs(
    pairs: Pairs, there: Mapping[str, IndexRow]
) -> tuple[dict[tuple[str, str], str], list[tuple[str, str]], str]:
    """The split of each (domain, file) in a pair, pairs that cannot have one, and a word on how it was found.

    Images that hang together by pairs share a split: that of an earlier version, else the one a folder says (test
    before val), else one by hash. Where an earlier version has them in two splits, new pairs among them are refused.
    """
    kept = images_there(there, pairs.domains)
    above: dict[tuple[str, str], tuple[str, str]] = {}

    def root(node: tuple[str, str]) -> tuple[str, str]:
        while (parent := above.setdefault(node, node)) != node:
            above[node] = above[parent]
            node = parent
        return node

    a, b = pairs.domains
    for one, two in pairs.lines:
        first, second = sorted((root((a, one.file)), root((b, two.file))))
        above[second] = first  # so the root is the first of its group by name
    items = {(domain, item.file): item for line in pairs.lines for domain, item in zip((a, b), line, strict=True)}
    old: dict[tuple[str, str], set[str]] = {root(node): set() for node in items}
    given: dict[tuple[str, str], set[str]] = {root(node): set() for node in items}
    for (domain, file), item in items.items():
        names = (f"{domain}/{file}", f"{domain}/{item.name}")
        old[root((domain, file))] |= {kept[name] for name in names if name in kept}
        given[root((domain, file))] |= {item.split} if item.split else set()
    held_out = [split for split in ("val", "test") if split not in set().union(*given.values())]
    free = {"/".join(node): node for node in old if not old[node] and given[node] <= {"train"}}
    drawn = split_names(free, held_out, dict.fromkeys(there, "train"))
    splits = {node: drawn[name] for name, node in free.items()}
    for node in set(old) - set(splits):
        splits[node] = min(old[node] or given[node], key=lambda split: duplicates.RANK[split])
    torn = [
        (
            pair_id(one, two),
            f"earlier versions have images of it in {' and in '.join(sorted(old[root((a, one.file))]))}",
        )
        for one, two in pairs.lines
        if len(old[root((a, one.file))]) > 1 and pair_id(one, two) not in there
    ]
    note = _how_split(held_out, any(given.values()))
    return {node: splits[root(node)] for node in items}, torn, note


def pair_id(one: Item, two: Item) -> str:
    """The id of a pair that --pairs lists: an image may be in several."""
    return f"{one.file}{PAIR}{two.file}"


def _listed(
    pairs: Pairs, splits: dict[tuple[str, str], str], index: dict[tuple[str, str], int], torn: set[str]
) -> tuple[list[tuple[str, Plan]], list[tuple[str, str]]]:
    """Rows of the pairs that --pairs lists; and those that are not usable, with the reason."""
    a, b = pairs.domains
    plans, alone = [], []
    for one, two in pairs.lines:
        name = pair_id(one, two)
        gone = [f"{domain}/{file}" for domain, file in ((a, one.file), (b, two.file)) if (domain, file) not in index]
        if gone:
            alone.append((name, f"an image of the pair cannot be used ({gone[0]})"))
        elif name not in torn:
            image, target = (index[a, one.file], 0), (index[b, two.file], 0)
            plans.append((splits[a, one.file], Plan(name, 0, image, target, f"{b}/{two.file}")))
    return plans, [line for line in alone if line[0] not in torn]


def _paired(
    domains: Mapping[str, list[Item]], splits: dict[tuple[str, str], str], index: dict[tuple[str, str], int]
) -> tuple[list[tuple[str, Plan]], list[tuple[str, str]]]:
    """Rows of images with their counterparts; and usable ones that have none, with the reason."""
    (a, items_a), (b, items_b) = domains.items()
    others = {item.name: item for item in items_b}
    plans, alone = [], []
    for item in items_a:
        other = others.pop(item.name, None)
        if other is None:
            if (a, item.file) in index:
                alone.append((f"{a}/{item.file}", f"no counterpart of the same name in {b}"))
        elif (a, item.file) in index and (b, other.file) in index:
            image, target = (index[a, item.file], 0), (index[b, other.file], 0)
            plans.append((splits[a, item.file], Plan(item.name, 0, image, target, f"{b}/{other.file}")))
        elif (a, item.file) in index or (b, other.file) in index:
            good = f"{a}/{item.file}" if (a, item.file) in index else f"{b}/{other.file}"
            alone.append((good, "its counterpart cannot be used"))
    reason = f"no counterpart of the same name in {a}"
    alone += [(f"{b}/{item.file}", reason) for item in others.values() if (b, item.file) in index]
    return plans, alone


def planned(
    plans: Sequence[tuple[str, Plan]],
    pixels: Pixels,
    rejected: Sequence[tuple[str, str]],
    notes: Sequence[str],
    copies: Sequence[duplicates.Copy],
) -> Made:
    """(split, plan) of every row, as rows sorted by id."""
    ordered = sorted(plans, key=lambda item: item[1].id)
    return Made(
        rows={split: _rows([plan for of, plan in ordered if of == split], pixels) for split in SPLITS},
        num_rows=len(ordered),
        rejected=rejected,
        notes=notes,
        copies=copies,
    )


def _rows(plans: Sequence[Plan], pixels: Pixels) -> Iterator[Row]:
    for plan in plans:
        yield Row(
            id=plan.id,
            domain=plan.domain,
            image=pixels[plan.image],
            target=None if plan.target is None else pixels[plan.target],
            target_id=plan.target_id,
            landmarks=pixels.landmarks[plan.image[0]],
        )
