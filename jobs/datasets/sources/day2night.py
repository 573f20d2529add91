"""Places by day and by night, as they are distributed for pix2pix or as two folders.

SOURCE/{train,val,test}/*.jpg        each image is two, side by side
SOURCE/day/…  SOURCE/night/…         (or Day, NIGHT) counterparts have equal names; split folders are respected
"""

import dataclasses
from collections.abc import Mapping, Sequence

from ddpm_core import storage
from ddpm_core.errors import InputError
from jobs.datasets import decode, layout
from jobs.datasets.decode import File
from jobs.datasets.format import DatasetCard
from jobs.datasets.layout import Item
from jobs.datasets.listing import list_images
from jobs.datasets.options import Day2Night
from jobs.datasets.source import (
    Draft,
    Made,
    fingerprint,
    prepared_by,
    rows_there,
    source_folder,
    weed,
)
from jobs.datasets.sources import folders
from jobs.datasets.sources.folders import Plan

DOMAINS = ("day", "night")


def draft(options: Day2Night) -> Draft:
    """Raises InputError where neither layout is found, or images or counterparts are missing."""
    source = source_folder(options, "pix2pix's folder of side-by-side images, or one with day/ and night/")
    listing = list_images(source)
    there = layout.domains_in(source, listing)
    domains = {domain.casefold(): items for domain, items in there.domains.items()}
    if set(DOMAINS) <= set(domains):
        if options.left != "auto":
            raise InputError(
                f"--left {options.left} has no effect: {source} has day/ and night/, not pairs side by side"
            )
        return folders.draft_domains(
            dataclasses.replace(there, domains={domain: domains[domain] for domain in DOMAINS}),
            options,
            command="day2night",
            name="day2night",
            licence=options.licence,
            pairing="paired",
        )
    if set(DOMAINS) & set(domains):
        (one,) = set(DOMAINS) & set(domains)
        (gone,) = set(DOMAINS) - {one}
        raise InputError(f"--source {source}: there are images in {one}/ and none in {gone}/; both are needed")
    splits = layout.splits_within(listing.images)
    items = [
        Item(file=file, uri=storage.join(source, entry.path), split=splits[file])
        for file, entry in listing.images.items()
        if all(layout.pure_split(folder) for folder in file.split("/")[:-1])
    ]
    if not items:
        raise InputError(
            f"--source {source}: no images in day/ and night/ nor in train/, val/ and test/; check the path"
            + listing.hint()
        )
    notes = [*listing.notes]
    if elsewhere := len(listing.images) - len(items):
        notes.append(f"{elsewhere:,} images in other folders passed over")
    card = DatasetCard(
        name="day2night",
        licence=options.licence,
        source="images given by the user",
        image_size=options.image_size,
        encoding=options.encoding,
        domains=DOMAINS,
        pairing="paired",
        prepared_by=prepared_by("day2night", options),
        source_hash=fingerprint(listing.sizes),
    )
    return Draft(card=card, make=lambda: _make(items, listing.rejected, notes, options))


def _make(items: Sequence[Item], unread: Mapping[str, str], found: Sequence[str], options: Day2Night) -> Made:
    there = rows_there(options)
    kept = {layout.item_name(name): row.split for name, row in there.items()}
    splits, note = folders.assign_splits({"": items}, kept)
    files = [File(item.file, item.uri) for item in items]
    pixels, rejected = decode.decode_images(files, size=options.image_size, halves=True, encoding=options.encoding)
    left, notes = options.left, [note, *found]
    if left == "auto":
        means = pixels.means()
        left = "day" if means[0] >= means[1] else "night"
        notes.append(f"left halves taken for {left} (mean grey {means[0]:.0f}, right {means[1]:.0f})")
    day = 0 if left == "day" else 1
    pixels.marks = [(marks[day], marks[1 - day]) if marks else () for marks in pixels.marks]
    names = [item.file for item in items]
    copies, dropped, word = weed(
        pixels, names, [splits["", name] for name in names], options, known=[name in there for name in names]
    )
    plans = [
        (splits["", item.file], Plan(item.file, 0, (number, day), (number, 1 - day), item.file))
        for number, item in enumerate(items)
        if pixels.ok[number]
    ]
    rejected += [*unread.items(), *dropped]
    return folders.planned(plans, pixels, sorted(rejected), [*notes, *pixels.notes(), word], copies)
