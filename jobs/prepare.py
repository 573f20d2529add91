"""Pictures to a data set.

    python -m jobs.prepare earth --output URI
    python -m jobs.prepare celeba --source URI --output URI --pairing matched

The same command again finds the data set complete and does nothing; killed half-way, it starts anew and gives the
same bytes.
"""

import dataclasses
import heapq
import io
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow
import pyarrow.parquet
import tyro

from ddpm_core import images
from ddpm_core.errors import InputError
from jobs import cli, data, storage
from jobs.data import DatasetCard, Row
from jobs.datasets import celeba, common, day2night, earth, folders
from jobs.progress import Progress

Command = (
    Annotated[earth.Options, tyro.conf.subcommand("earth")]
    | Annotated[celeba.Options, tyro.conf.subcommand("celeba")]
    | Annotated[day2night.Options, tyro.conf.subcommand("day2night")]
    | Annotated[folders.Options, tyro.conf.subcommand("folders")]
)
DRAFTS: dict[type, Callable[[Any], common.Draft]] = {
    earth.Options: earth.draft,
    celeba.Options: celeba.draft,
    day2night.Options: day2night.draft,
    folders.Options: folders.draft,
}
REJECTED, CONTACT_SHEET, ENVIRONMENT = "rejected.parquet", "contact_sheet.png", "environment.json"
SHEET_PICTURES = 48
"""Rows of each domain on the contact sheet, at most."""


def main(argv: Sequence[str] | None = None) -> int:
    options = cli.parse(Command, argv, prog="jobs.prepare", description=__doc__)
    output = storage.absolute(options.output, flag="--output")
    check_apart(output, options.source)
    draft = DRAFTS[type(options)](options)
    there = None if options.overwrite else existing(output, draft.card)
    if there is not None:
        print(f"already there: {output}")
        summarise(output, there)
        return cli.SET_ASIDE if there.num_rejected else cli.DONE
    storage.check_writable(output)
    with common.scratch_folder() as scratch:
        card = make(output, draft, Path(scratch))
    summarise(output, card)
    return cli.SET_ASIDE if card.num_rejected else cli.DONE


def check_apart(output: str, source: str | None) -> None:
    """The contact sheet must not be taken for one of the pictures at the next call."""
    if source and f"{output}/".startswith(storage.join(storage.absolute(source, flag="--source"), "")):
        raise InputError(f"--output {output} lies in --source; give a folder outside of it")


def existing(output: str, wanted: DatasetCard) -> DatasetCard | None:
    """The data set already at `output` if it is the wanted one, None if there is none or only half of one.

    Raises:
        InputError: another one is there.
    """
    there = data.find_card(output)
    if there is None:
        return None
    if (there.prepared_by, there.source_hash) != (wanted.prepared_by, wanted.source_hash):
        raise InputError(
            f"--output {output} holds another data set ({difference(there, wanted)}); "
            "give another --output, or --overwrite to replace it"
        )
    return None if data.missing_shards(output, there) else there


def difference(there: DatasetCard, wanted: DatasetCard) -> str:
    """What tells two data sets apart, in a few words."""
    old, new = there.prepared_by, wanted.prepared_by
    for name in [*new, *old]:
        if old.get(name) != new.get(name):
            return f"{name} {old.get(name)}, asked for {new.get(name)}"
    return "made from other files"


def make(output: str, draft: common.Draft, scratch: Path) -> DatasetCard:
    """Do the work; dataset.json is the last file written."""
    data.clear(output)  # first: from here on the folder is not a data set
    made = draft.make(scratch)
    card = dataclasses.replace(draft.card, notes=tuple(made.notes), num_rejected=len(made.rejected))
    write_rejected(output, made.rejected)
    write_environment(output)
    sheet = ContactSheet()

    def on_row(split: str, row: Row) -> None:
        sheet.add(row)
        progress.update()
        if progress.count == made.num_rows:  # the last row: the sheet must be there before dataset.json is
            storage.write_bytes(storage.join(output, CONTACT_SHEET), images.encode_png(sheet.draw()))

    with Progress(total=made.num_rows, unit="row", description="write") as progress:
        return data.write_dataset(output, made.rows, card, on_row=on_row)


def write_rejected(output: str, rejected: Sequence[tuple[str, str]]) -> None:
    where = storage.join(output, REJECTED)
    if not rejected:
        storage.delete_file(where)
        return
    names, reasons = zip(*rejected, strict=True)
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"picture": names, "reason": reasons}), buffer)
    storage.write_bytes(where, buffer.getvalue())


def write_environment(output: str) -> None:
    from ddpm_core import provenance  # it brings torch, which nothing else here needs

    text = json.dumps(provenance.environment(), indent=2)
    storage.write_bytes(storage.join(output, ENVIRONMENT), text.encode())


class ContactSheet:
    """A few rows of each domain, chosen by the hash of their ids: source beside target, to be looked at."""

    def __init__(self) -> None:
        self.kept: dict[int, list[tuple[int, str, list[np.ndarray]]]] = {}

    def add(self, row: Row) -> None:
        kept = self.kept.setdefault(row.domain, [])
        rank = -int.from_bytes(common.name_hash(row.id), "big")
        if len(kept) < SHEET_PICTURES or rank > kept[0][0]:
            pictures = [row.image] if row.target is None else [row.image, row.target]
            (heapq.heappush if len(kept) < SHEET_PICTURES else heapq.heapreplace)(kept, (rank, row.id, pictures))

    def draw(self) -> np.ndarray:
        """(H, W, 3): domain after domain; pairs stand side by side."""
        rows: list[list[np.ndarray]] = []
        for _, kept in sorted(self.kept.items()):
            pictures = [pictures for _, _, pictures in sorted(kept, reverse=True, key=lambda item: item[0])]
            across = 12 // len(pictures[0])
            rows += [
                list(itertools.chain.from_iterable(pictures[start : start + across]))
                for start in range(0, len(pictures), across)
            ]
        side = rows[0][0].shape[0]
        return images.grid(rows, scale=2 if side <= 64 else 1)


def summarise(output: str, card: DatasetCard) -> None:
    """Three lines: what is there, what to know about it, what to look at."""
    counts = ", ".join(f"{count:,} {split}" for split, count in card.splits.items())
    sides = " and ".join(card.domains) if len(card.domains) == 2 else ", ".join(card.domains)
    print(f"{output}: {counts} rows of {card.image_size} px, {card.pairing}, {sides}; {card.licence}")
    aside = f"{card.num_rejected:,} pictures set aside (reasons in {REJECTED})" if card.num_rejected else ""
    print("; ".join(filter(None, [aside or "no picture set aside", *card.notes])))
    print(f"look at it: {storage.join(output, CONTACT_SHEET)}")


if __name__ == "__main__":
    cli.run(main)
