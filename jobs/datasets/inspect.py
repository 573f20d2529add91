"""What a data set holds: its card, mean images, a contact sheet."""

import collections
from collections.abc import Iterator, Mapping

import numpy as np

from ddpm_core import images, storage
from ddpm_core.errors import InputError
from jobs.common import cli, workers
from jobs.datasets import assemble, reading
from jobs.datasets.format import (
    CONTACT_SHEET,
    DUPLICATES,
    REJECTED,
    DatasetCard,
    IndexRow,
    missing_shards,
    read_card,
)
from jobs.datasets.options import Inspect
from jobs.datasets.scan import survey

# ------------------------------------------------------------------------------------------------- inspect


def inspect(options: Inspect) -> int:
    uri = storage.absolute(options.uri, flag="URI")
    card = read_card(uri)
    output = storage.absolute(options.output or f"{uri}-inspect", flag="--output")
    if f"{output}/".startswith(f"{uri}/"):
        raise InputError(f"--output {output} lies in the data set; give a folder outside of it")
    if missing := missing_shards(uri, card):
        raise InputError(
            f"{storage.join(uri, missing[0])} is missing or of another size; make the data set again with "
            "python -m jobs.prepare"
        )
    index = reading.read_index(uri, card)
    storage.check_writable(output)
    for name, value in facts(uri, card, index):
        print(f"{name:<12} {value}")
    with workers.session(None):
        seen = survey(uri, card.content_hash, with_marks=False)
    columns = ["image", "target"] if card.has_targets else ["image"]
    present = [domain for domain in range(len(card.domains)) if (domain, "image") in seen.sums]
    means = [[seen.mean(domain, column) for column in columns] for domain in present]
    shown = {
        "mean.png": images.grid(means, scale=max(1, 256 // card.image_size)),
        CONTACT_SHEET: seen.sheet.draw(),
    }
    for name, pixels in shown.items():
        storage.write_bytes(storage.join(output, name), images.encode_png(np.asarray(pixels)))
    sides = "source beside target, " if card.has_targets else ""
    print(f"look at it   {storage.join(output, 'mean.png')} ({sides}{', '.join(card.domains[d] for d in present)})")
    print(f"             {storage.join(output, CONTACT_SHEET)}")
    return cli.DONE


def facts(uri: str, card: DatasetCard, index: Mapping[str, IndexRow]) -> Iterator[tuple[str, str]]:
    """(heading, value) of each line that tells of the data set."""
    yield "data set", f"{card.name}, version {card.version} at {uri}"
    yield "licence", card.licence
    yield "source", card.source
    size = sum(shard.num_bytes for shard in card.shards)
    side = f"{card.image_size} x {card.image_size} pixels"
    yield "images", f"{side}, {card.encoding}; {size / 1e6:,.1f} MB in {len(card.shards)} files"
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
    most = cli.tally((line["reason"] for line in assemble.read_lines(uri, REJECTED, card)), most=4)
    yield "set aside", f"{card.num_rejected:,}" + (f": {most}" if most else "")
    copies = collections.Counter(
        (line["kind"], line["split"] != line["split_of"]) for line in assemble.read_lines(uri, DUPLICATES, card)
    )
    across = sum(count for (_, crosses), count in copies.items() if crosses)
    kinds = ", ".join(
        f"{sum(copies[kind, crosses] for crosses in (True, False)):,} {kind}" for kind in ("exact", "near")
    )
    yield "duplicates", f"{copies.total():,} ({kinds}; {across:,} across splits)" if copies else "none known"
    yield "content", card.content_hash
