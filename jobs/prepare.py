"""Pictures to a data set.

    python -m jobs.prepare earth --output URI
    python -m jobs.prepare celeba --source URI --output URI --pairing matched
    python -m jobs.prepare folders --source NEW --output URI --append
    python -m jobs.prepare inspect URI

The same command again finds the data set complete and does nothing; killed half-way, it starts anew and gives the
same bytes.
"""

import collections
import copy
import dataclasses
import io
import json
import posixpath
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow
import pyarrow.parquet
import tyro

from ddpm_core import images, provenance
from ddpm_core.errors import InputError
from jobs import cli, data, storage
from jobs.data import CONTACT_SHEET, DUPLICATES, ENVIRONMENT, REJECTED, DatasetCard, Row
from jobs.datasets import celeba, common, day2night, duplicates, earth, folders, rendered
from jobs.progress import Progress, duration
from jobs.survey import ContactSheet, Survey, digest, survey


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect:
    """Show what a data set holds: its card, the mean picture of each domain, a contact sheet."""

    uri: tyro.conf.Positional[str]
    """The data set."""
    output: str | None = None
    """Folder or s3://bucket/prefix for mean.png and contact_sheet.png; ./inspect-NAME unless given."""


Command = (
    Annotated[earth.Options, tyro.conf.subcommand("earth")]
    | Annotated[celeba.Options, tyro.conf.subcommand("celeba")]
    | Annotated[day2night.Options, tyro.conf.subcommand("day2night")]
    | Annotated[folders.Options, tyro.conf.subcommand("folders")]
    | Annotated[rendered.Options, tyro.conf.subcommand("rendered")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
)
DRAFTS: dict[type, Callable[[Any], common.Draft]] = {
    earth.Options: earth.draft,
    celeba.Options: celeba.draft,
    day2night.Options: day2night.draft,
    folders.Options: folders.draft,
    rendered.Options: rendered.draft,
}


def main(argv: Sequence[str] | None = None) -> int:
    options = cli.parse(Command, argv, prog="jobs.prepare", description=__doc__)
    if isinstance(options, Inspect):
        return inspect(options)
    output = storage.absolute(options.output, flag="--output")
    check_apart(output, options)
    append = getattr(options, "append", False)
    if append and options.overwrite:
        raise InputError("--append and --overwrite are both given; give one of them")
    draft = DRAFTS[type(options)](options)
    before = extended(output, draft.card) if append else None
    there = None if options.overwrite else existing(output, draft.card, before)
    if there is not None:
        print(f"already there: {output}")
        summarise(output, there)
        return cli.SET_ASIDE if there.num_rejected else cli.DONE
    storage.check_writable(output)
    started = time.monotonic()
    with common.scratch_folder() as scratch:
        made = draft.make(Path(scratch))
        card = write(output, draft.card, made) if before is None else extend(output, draft.card, made, before)
    seconds = max(time.monotonic() - started, 1e-3)
    rows = sum(card.splits.values()) - (0 if before is None else sum(before.splits.values()))
    summarise(output, card, f"{rows:,} rows in {duration(seconds)}, {rows / seconds:.3g} a second")
    return cli.SET_ASIDE if card.num_rejected else cli.DONE


def check_apart(output: str, options: common.Common) -> None:
    """The contact sheet must not be taken for one of the pictures at the next call."""
    sources = {"--source": options.source or ""}
    for domain in getattr(options, "domain", ()):
        name, _, uri = domain.partition("=")
        sources[f"--domain {name}"] = uri
    for flag, uri in sources.items():
        if uri and f"{output}/".startswith(storage.join(storage.absolute(uri, flag=flag), "")):
            raise InputError(f"--output {output} lies in {flag}; give a folder outside of it")


def card_at(output: str) -> DatasetCard | None:
    """As `data.find_card`, with a remedy for who is making a data set."""
    try:
        return data.find_card(output)
    except InputError as error:
        remedy = "give another --output, or --overwrite to replace it"
        raise InputError(str(error).replace(data.MAKE_AGAIN, remedy)) from None


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
    missing = data.missing_shards(output, there)
    if missing and there.parts:
        raise InputError(
            f"{storage.join(output, missing[0])} is missing or damaged, and --append added to this data set since; "
            "bring that file back, or give --overwrite to start anew and append again"
        )
    return None if missing else there


def difference(there: DatasetCard, wanted: DatasetCard) -> str:
    """What tells two data sets apart, in a few words."""
    old, new = there.prepared_by, wanted.prepared_by
    for name in [*new, *old]:
        if old.get(name) != new.get(name):
            return f"{name} {old.get(name)}, asked for {new.get(name)}"
    return "made from other files"


FORMAT_FIELDS = ("name", "licence", "image_size", "encoding", "domains", "pairing", "attribute_names")
FORMAT_OPTIONS = ("align", "seed")


def extended(output: str, wanted: DatasetCard) -> DatasetCard:
    """The card of the data set that --append adds to.

    Raises:
        InputError: there is none, or the new pictures do not fit.
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
                f"--append: {output} has {name.replace('_', ' ')} {old}, the new pictures {new}; "
                "give the same, or another --output without --append"
            )
    return there


def write(output: str, card: DatasetCard, made: common.Made) -> DatasetCard:
    """A data set of its own; dataset.json is the last file written."""
    sheet = ContactSheet()
    card = dataclasses.replace(card, notes=tuple(made.notes))
    card = write_rows(output, made.rows, card, made.num_rows, sheet)
    return finish(output, card, sheet, made.rejected, made.copies, None)


def extend(output: str, card: DatasetCard, made: common.Made, before: DatasetCard) -> DatasetCard:
    """The next version of the data set: further shards, and dataset.json in the place of the old one at the end."""
    seen = copy.deepcopy(survey(output, before.content_hash))  # sums and sheet grow with the new rows
    there = data.Before(card=before, index=data.read_index(output, before), totals=seen.totals)
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
        parts=(*before.parts, data.Part(prepared_by=card.prepared_by, source_hash=card.source_hash, rows=num_new)),
    )
    return finish(output, grown, seen.sheet, [*made.rejected, *clashes], made.copies, before)


def fresh(rows: Iterable[Row], card: DatasetCard, seen: Survey, clashes: list[tuple[str, str]]) -> Iterator[Row]:
    """Rows whose id is not there yet; those whose id belongs to other pictures are added to `clashes`."""
    for row in rows:
        if row.id not in seen.marks:
            yield row
            continue
        # A match is drawn from those who are there and may change: only true counterparts are compared.
        pictures = [row.image, row.target] if card.pairing == "paired" else [row.image]
        stored = [data.stored(picture, card.encoding) for picture in pictures if picture is not None]
        if not all(mark.startswith(digest(picture)) for mark, picture in zip(seen.marks[row.id], stored, strict=False)):
            clashes.append((row.id, "another picture of this name is there already; rename the new one"))


def write_rows(
    output: str,
    rows: Mapping[str, Iterable[Row]],
    card: DatasetCard,
    num_rows: int,
    sheet: ContactSheet,
    before: data.Before | None = None,
) -> DatasetCard:
    def on_row(split: str, row: Row) -> None:
        sheet.add(row.id, row.domain, row.image, row.target)
        progress.update()

    with Progress(total=num_rows, unit="row", description="write") as progress:
        return data.write_rows(output, rows, card, before=before, on_row=on_row)


def finish(
    output: str,
    card: DatasetCard,
    sheet: ContactSheet,
    rejected: Sequence[tuple[str, str]],
    copies: Sequence[duplicates.Copy],
    before: DatasetCard | None,
) -> DatasetCard:
    """The files beside the shards, then dataset.json."""
    data.check_alone(output, before, card)
    lines = [{"picture": picture, "reason": reason} for picture, reason in rejected]
    num_rejected = write_lines(output, REJECTED, lines, card.version, before)
    write_lines(output, DUPLICATES, duplicates.lines(copies), card.version, before)
    storage.write_bytes(storage.join(output, CONTACT_SHEET), images.encode_png(sheet.draw()))
    write_environment(output)
    card = dataclasses.replace(card, num_rejected=num_rejected)
    data.write_card(output, card, before)
    return card


def write_lines(
    output: str, file: str, lines: Sequence[dict[str, Any]], version: int, before: DatasetCard | None
) -> int:
    """A table beside the shards, with the lines that `before` has; no file where there are none. Returns how many."""
    where = storage.join(output, file)
    old = [] if before is None else read_lines(output, file, before)
    told = [{name: value for name, value in line.items() if name != "version"} for line in old]
    lines = [*old, *({**line, "version": version} for line in lines if line not in told)]
    if not lines:
        storage.delete_file(where)
        return 0
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), buffer)
    storage.write_bytes(where, buffer.getvalue())
    return len(lines)


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
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{where} is not a readable parquet file ({str(error).splitlines()[0]}); delete it") from None
    return [line for line in table.to_pylist() if line["version"] <= card.version]


def write_environment(output: str) -> None:
    text = json.dumps(provenance.environment(), indent=2)
    storage.write_bytes(storage.join(output, ENVIRONMENT), text.encode())


def summarise(output: str, card: DatasetCard, speed: str = "") -> None:
    """Three lines: what is there, what to know about it, what to look at."""
    counts = ", ".join(f"{count:,} {split}" for split, count in card.splits.items())
    sides = " and ".join(card.domains) if len(card.domains) == 2 else ", ".join(card.domains)
    line = f"{output}: {counts} rows of {card.image_size} px, {card.pairing}, {sides}; {card.licence}"
    print("; ".join(filter(None, [line, speed])))
    what = "picture" if card.num_rejected == 1 else "pictures"
    aside = f"{card.num_rejected:,} {what} set aside (reasons in {REJECTED})" if card.num_rejected else ""
    print("; ".join([aside or "no picture set aside", *card.notes]))
    print(f"look at it: {storage.join(output, CONTACT_SHEET)}")


# ------------------------------------------------------------------------------------------------- inspect


def inspect(options: Inspect) -> int:
    uri = storage.absolute(options.uri, flag="URI")
    card = data.read_card(uri)
    output = storage.absolute(options.output or f"inspect-{posixpath.basename(uri)}", flag="--output")
    if f"{output}/".startswith(f"{uri}/"):
        raise InputError(f"--output {output} lies in the data set; give a folder outside of it")
    if missing := data.missing_shards(uri, card):
        raise InputError(
            f"{storage.join(uri, missing[0])} is missing or of another size; make the data set again with "
            "python -m jobs.prepare"
        )
    index = data.read_index(uri, card)
    storage.check_writable(output)
    for name, value in facts(uri, card, index):
        print(f"{name:<12} {value}")
    seen = survey(uri, card.content_hash, with_marks=False)
    columns = ["image", "target"] if card.has_targets else ["image"]
    present = [domain for domain in range(len(card.domains)) if (domain, "image") in seen.sums]
    means = [[seen.mean(domain, column) for column in columns] for domain in present]
    pictures = {
        "mean.png": images.grid(means, scale=max(1, 256 // card.image_size)),
        CONTACT_SHEET: seen.sheet.draw(),
    }
    for name, picture in pictures.items():
        storage.write_bytes(storage.join(output, name), images.encode_png(np.asarray(picture)))
    sides = "source beside target, " if card.has_targets else ""
    print(f"look at it   {storage.join(output, 'mean.png')} ({sides}{', '.join(card.domains[d] for d in present)})")
    print(f"             {storage.join(output, CONTACT_SHEET)}")
    return cli.DONE


def facts(uri: str, card: DatasetCard, index: Mapping[str, data.IndexRow]) -> Iterator[tuple[str, str]]:
    """(heading, value) of each line that tells of the data set."""
    yield "data set", f"{card.name}, version {card.version} at {uri}"
    yield "licence", card.licence
    yield "source", card.source
    size = sum(shard.num_bytes for shard in card.shards)
    side = f"{card.image_size} x {card.image_size} pixels"
    yield "pictures", f"{side}, {card.encoding}; {size / 1e6:,.1f} MB in {len(card.shards)} files"
    yield "pairing", card.pairing
    for split, count in card.splits.items():
        each = ", ".join(f"{number:,} {domain}" for domain, number in card.domain_counts[split].items())
        yield split, f"{count:,} rows ({each})"
    if people := {row.identity for row in index.values() if row.identity is not None}:
        yield "identities", f"{len(people):,}"
    if card.attribute_names:
        yield "attributes", f"{len(card.attribute_names)}: {', '.join(card.attribute_names)}"
    if card.mean_landmarks:
        yield "landmarks", f"{len(card.mean_landmarks) // 2} points"
    yield "prepared by", " ".join(f"{name}={value}" for name, value in card.prepared_by.items())
    for number, part in enumerate(card.parts, 1):
        yield f"append {number}", f"{part.rows:,} rows by {' '.join(f'{k}={v}' for k, v in part.prepared_by.items())}"
    for note in card.notes:
        yield "note", note
    rejected = collections.Counter(reason_kind(line["reason"]) for line in read_lines(uri, REJECTED, card))
    most = ", ".join(f"{count:,} {reason}" for reason, count in rejected.most_common(5))
    yield "set aside", f"{card.num_rejected:,}" + (f" ({most})" if most else "")
    copies = collections.Counter(
        (line["kind"], line["split"] != line["split_of"]) for line in read_lines(uri, DUPLICATES, card)
    )
    across = sum(count for (_, crosses), count in copies.items() if crosses)
    kinds = ", ".join(
        f"{sum(copies[kind, crosses] for crosses in (True, False)):,} {kind}" for kind in ("exact", "near")
    )
    yield "duplicates", f"{copies.total():,} ({kinds}; {across:,} across splits)" if copies else "none known"
    yield "content", card.content_hash


def reason_kind(reason: str) -> str:
    """A reason without what is particular to one picture."""
    if reason.startswith(("the same picture", "nearly the same picture")):
        return reason.partition(" as ")[0].partition(" (")[0] + " as another"
    return reason.partition(" (")[0].partition(";")[0]


if __name__ == "__main__":
    cli.run(main)
