"""A data set from a source's draft: made, extended, or found to be there."""

import copy
import dataclasses
import io
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow
import pyarrow.parquet

from ddpm_core import images, provenance, storage
from ddpm_core.errors import InputError, printable
from jobs.common import cli, kinds, resume, workers
from jobs.common.progress import Progress, duration
from jobs.datasets import duplicates, reading, source, writing
from jobs.datasets.format import (
    CONTACT_SHEET,
    DUPLICATES,
    ENVIRONMENT,
    MAKE_AGAIN,
    REASONS,
    REJECTED,
    DatasetCard,
    Part,
    Row,
    find_card,
    missing_shards,
)
from jobs.datasets.options import Output
from jobs.datasets.scan import ContactSheet, Survey, digest, survey


def check_apart(output: str, options: Output) -> None:
    """The contact sheet must not be taken for one of the images at the next call.

    Raises:
        InputError: as `kinds.check_output`.
    """
    sources = {f"--{name}": getattr(options, name, None) or "" for name in ("source", "data", "checkpoint")}
    for domain in getattr(options, "domain", ()):
        name, _, uri = domain.partition("=")
        sources[f"--domain {name}"] = uri
    there = {flag: storage.absolute(uri, flag=flag) for flag, uri in sources.items() if uri}
    kinds.check_output(output, "data set", there)


def make(output: str, draft: source.Draft, *, append: bool, overwrite: bool, num_workers: int | None) -> int:
    """The draft's data set at `output`, or its rows added to the one there, unless that has them; how many images are
    set aside in it.

    Raises:
        InputError: another data set is there, or the source cannot be used.
    """
    before = extended(output, draft.card) if append else None
    there = None if overwrite else existing(output, draft.card, before)
    if there is not None:
        print(f"already there: {output}")
        summarise(output, there)
        return there.num_rejected
    storage.check_writable(output)
    started = time.monotonic()
    with workers.session(num_workers):
        made = draft.make()
        card = write(output, draft.card, made) if before is None else extend(output, draft.card, made, before)
        made.clean()
    seconds = max(time.monotonic() - started, 1e-3)
    rows = sum(card.splits.values()) - (0 if before is None else sum(before.splits.values()))
    summarise(output, card, f"{rows:,} rows in {duration(seconds)}, {rows / seconds:.3g} a second")
    return card.num_rejected


def card_at(output: str) -> DatasetCard | None:
    """As `data.find_card`, with a remedy for who is making a data set."""
    try:
        return find_card(output)
    except InputError as error:
        remedy = "give another --output, or --overwrite to replace it"
        raise InputError(str(error).replace(MAKE_AGAIN, remedy)) from None


def existing(output: str, wanted: DatasetCard, before: DatasetCard | None) -> DatasetCard | None:
    """The data set already at `output` if it is the wanted one (or has the wanted part: `before` is given where one is
    to be added), None if there is work to do.

    Raises:
        InputError: another one is there, or a damaged one that cannot be made again by this command.
    """
    there = card_at(output)
    if there is None:
        return None
    of_parts = [(there.prepared_by, there.source_hash), *((part.prepared_by, part.source_hash) for part in there.parts)]
    wanted_part = (wanted.prepared_by, wanted.source_hash)
    if wanted_part not in (of_parts if before is not None else of_parts[:1]):
        if before is not None:
            return None
        raise InputError(
            f"--output {output} holds another data set ({difference(there, wanted)}); "
            "give another --output, --append to add to it, or --overwrite to replace it"
        )
    missing = missing_shards(output, there)
    if missing and there.parts:
        raise InputError(
            f"{storage.join(output, missing[0])} is missing or damaged, and --append added to this data set since; "
            "bring that file back, or give --overwrite to start anew and append again"
        )
    return None if missing else there


def difference(there: DatasetCard, wanted: DatasetCard) -> str:
    """What tells two data sets apart, in a few words."""
    for name, old, new in resume.differences(there.prepared_by, wanted.prepared_by):
        return f"{name if name == 'command' else '--' + name.replace('_', '-')} {old}, asked for {new}"
    return "made from other files"


FORMAT_FIELDS = ("name", "licence", "image_size", "encoding", "domains", "pairing", "attribute_names")
FORMAT_OPTIONS = ("align", "seed")


def extended(output: str, wanted: DatasetCard) -> DatasetCard:
    """The card of the data set that --append adds to.

    Raises:
        InputError: there is none, or the new images do not fit.
    """
    there = card_at(output)
    if there is None:
        raise InputError(f"--append: there is no data set at {output}; leave --append out to make one")
    pairs = [(name, getattr(there, name), getattr(wanted, name)) for name in FORMAT_FIELDS]
    pairs += [(name, there.prepared_by.get(name), wanted.prepared_by.get(name)) for name in FORMAT_OPTIONS]
    for name, old, new in pairs:
        if old != new:
            old, new = (", ".join(value) if isinstance(value, tuple) else value for value in (old, new))
            raise InputError(
                f"--append: {output} has {name.replace('_', ' ')} {old}, the new images {new}; "
                "give the same, or another --output without --append"
            )
    return there


def write(output: str, card: DatasetCard, made: source.Made) -> DatasetCard:
    """A data set of its own; dataset.json is the last file written."""
    sheet = ContactSheet()
    card = dataclasses.replace(card, notes=tuple(made.notes))
    card = write_rows(output, made.rows, card, made.num_rows, sheet)
    return finish(output, card, sheet, made.rejected, made.copies, None)


def extend(output: str, card: DatasetCard, made: source.Made, before: DatasetCard) -> DatasetCard:
    """The next version of the data set: further shards, and dataset.json in the place of the old one at the end."""
    seen = copy.deepcopy(survey(output, before.content_hash))  # sums and sheet grow with the new rows
    there = writing.Before(card=before, index=reading.read_index(output, before), totals=seen.totals)
    clashes: list[tuple[str, str]] = []
    rows = {split: fresh(of, before, seen, clashes) for split, of in made.rows.items()}
    grown = write_rows(output, rows, card, made.num_rows, seen.sheet, there)
    num_new = sum(grown.splits.values()) - sum(before.splits.values())
    num_known = made.num_rows - num_new - len(clashes)
    version = before.version + (1 if num_new else 0)
    word = f"version {version}: {num_new:,} rows added, {num_known:,} were there already"
    grown = dataclasses.replace(
        grown,
        source=before.source,
        prepared_by=before.prepared_by,
        source_hash=before.source_hash,
        notes=(*before.notes, *([word] if num_new else []), *(note for note in made.notes if note not in before.notes)),
        version=version,
        parts=(*before.parts, Part(prepared_by=card.prepared_by, source_hash=card.source_hash, rows=num_new)),
    )
    return finish(output, grown, seen.sheet, [*made.rejected, *clashes], made.copies, before)


def fresh(rows: Iterable[Row], card: DatasetCard, seen: Survey, clashes: list[tuple[str, str]]) -> Iterator[Row]:
    """Rows whose id is not there yet; those whose id belongs to other images are added to `clashes`."""
    for row in rows:
        if row.id not in seen.marks:
            yield row
            continue
        # A match is drawn from those who are there and may change: only true counterparts are compared.
        pixels = [row.image, row.target] if card.pairing == "paired" else [row.image]
        stored = [writing.stored(each, card.encoding) for each in pixels if each is not None]
        if not all(mark.startswith(digest(each)) for mark, each in zip(seen.marks[row.id], stored, strict=False)):
            clashes.append((row.id, "another image of this name is there already; rename the new one"))


def write_rows(
    output: str,
    rows: Mapping[str, Iterable[Row]],
    card: DatasetCard,
    num_rows: int,
    sheet: ContactSheet,
    before: writing.Before | None = None,
) -> DatasetCard:
    def seen(of: Iterable[Row]) -> Iterator[Row]:
        for row in of:
            yield row
            sheet.add(row.id, row.domain, row.image, row.target)
            progress.update()

    with Progress(total=num_rows, unit="row", description="write") as progress:
        return writing.write_rows(output, {split: seen(of) for split, of in rows.items()}, card, before)


def finish(
    output: str,
    card: DatasetCard,
    sheet: ContactSheet,
    rejected: Sequence[tuple[str, str]],
    copies: Sequence[duplicates.Copy],
    before: DatasetCard | None,
) -> DatasetCard:
    """The files beside the shards, then dataset.json."""
    writing.check_alone(output, before, card)
    lines = [{"picture": name, "reason": reason} for name, reason in rejected]
    lines = write_lines(output, REJECTED, lines, card.version, before)
    if lines:
        text = cli.reasons_text((line["picture"], line["reason"]) for line in lines)
        storage.write_bytes(storage.join(output, REASONS), text)
    else:
        storage.delete_file(storage.join(output, REASONS))
    write_lines(output, DUPLICATES, duplicates.lines(copies), card.version, before)
    storage.write_bytes(storage.join(output, CONTACT_SHEET), images.encode_png(sheet.draw()))
    storage.write_bytes(storage.join(output, ENVIRONMENT), json.dumps(provenance.environment(), indent=2).encode())
    card = dataclasses.replace(card, num_rejected=len(lines))
    writing.write_card(output, card, before)
    return card


def write_lines(
    output: str, file: str, lines: Sequence[dict[str, Any]], version: int, before: DatasetCard | None
) -> list[dict[str, Any]]:
    """A table beside the shards, with the lines that `before` has; no file where there are none. Returns the lines."""
    where = storage.join(output, file)
    old = [] if before is None else read_lines(output, file, before)
    told = [{name: value for name, value in line.items() if name != "version"} for line in old]
    lines = [*old, *({**line, "version": version} for line in lines if line not in told)]
    if not lines:
        storage.delete_file(where)
        return []
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), buffer)
    storage.write_bytes(where, buffer.getvalue())
    return lines


def read_lines(output: str, file: str, card: DatasetCard) -> list[dict[str, Any]]:
    """What rejected.parquet or duplicates.parquet says up to the version of the card.

    Raises:
        InputError: it is damaged.
    """
    where = storage.join(output, file)
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(storage.read_bytes(where)))
    except FileNotFoundError:
        return []
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{where} is not a readable parquet file ({str(error).splitlines()[0]}); delete it") from None
    return [line for line in table.to_pylist() if line["version"] <= card.version]


def summarise(output: str, card: DatasetCard, speed: str = "") -> None:
    """Three lines: what is there, what to know about it, what to look at."""
    counts = ", ".join(f"{count:,} {split}" for split, count in card.splits.items())
    sides = " and ".join(card.domains) if len(card.domains) == 2 else ", ".join(card.domains)
    line = f"{output}: {counts} rows of {card.image_size} px, {card.pairing}, {sides}; {card.licence}"
    print(printable("; ".join(filter(None, [line, speed]))))
    if empty := [split for split in ("train", "val") if not card.splits.get(split)]:
        print(f"no rows for {' and '.join(empty)}: jobs.train does not take it; prepare it again with more images")
    aside = "no image set aside"
    if card.num_rejected:
        why = cli.tally(line["reason"] for line in read_lines(output, REJECTED, card))
        what = "image" if card.num_rejected == 1 else "images"
        aside = f"{card.num_rejected:,} {what} set aside: {why}; the reasons are in {storage.join(output, REASONS)}"
    print(printable("; ".join([aside, *card.notes])))
    print(f"look at it: {storage.join(output, CONTACT_SHEET)}")
