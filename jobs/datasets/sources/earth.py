"""The Earth by day and by night: two maps of NASA's, registered to the pixel, cut into tiles.

The maps ship with the project (4096 x 2048, equirectangular: row 0 is 90 N, column 0 is 180 W). Training, validation
and test are regions of the globe: the map is divided into blocks of 256 pixels, a block belongs wholly to one split and
no tile crosses a block's edge, so no pixel of a test tile was ever seen in training.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, UInt8

from ddpm_core import images, storage
from ddpm_core.errors import InputError
from jobs.datasets import source
from jobs.datasets.format import DatasetCard, Row
from jobs.datasets.listing import image_files
from jobs.datasets.options import Earth

MAPS = Path(__file__).with_name("earth_maps")
LICENCE = "public domain (credit: NASA Blue Marble / Earth at Night)"
DOMAINS = ("day", "night")
BLOCK = 256
"""Side of a region that belongs wholly to one split, in pixels of the map."""
CYCLE, TEST, VAL = 20, (0, 12, 14), (6, 18)
"""Block (row, column) is number (4 row + 7 column) mod 20. Chosen so that no two test blocks touch by an edge, every
inhabited continent has some, and land tiles divide about 75 : 10 : 15."""
MAX_LATITUDE = 80.0
"""Beyond it the maps are flat fill."""
MIN_CONTRAST = 4.0
"""Tiles by day whose grey levels spread less (standard deviation) are plain ice or plain forest: nothing to learn."""


def draft(options: Earth) -> source.Draft:
    """Raises InputError where the maps are missing or the sizes do not fit."""
    if options.image_size > BLOCK:
        raise InputError(f"--image-size is {options.image_size}; earth's tiles may be at most {BLOCK} pixels")
    if options.stride is not None and not 1 <= options.stride <= BLOCK:
        raise InputError(f"--stride is {options.stride}; it must lie between 1 and {BLOCK}")
    if not 0 <= options.min_land <= 1:
        raise InputError(f"--min-land is {options.min_land}; it must lie in [0, 1]")
    if options.source is not None:
        folder = source.source_folder(options, "a folder with day.* and night.*")
    else:
        folder = str(maps_folder())
    files = {domain: storage.join(folder, _map_file(folder, domain)) for domain in DOMAINS}
    content = {domain: storage.read_bytes(file) for domain, file in files.items()}
    card = DatasetCard(
        name="earth",
        licence=LICENCE if options.source is None else "unknown",
        source="NASA Blue Marble (day) and Earth at Night (night), equirectangular maps, 4096 x 2048"
        if options.source is None
        else "equirectangular maps given by the user",
        image_size=options.image_size,
        encoding=options.encoding,
        domains=DOMAINS,
        pairing="paired",
        prepared_by=source.prepared_by("earth", options),
        source_hash=source.fingerprint(*content.values()),
    )
    return source.Draft(card=card, make=lambda: _make(options, content))


def maps_folder() -> Path:
    """Beside this file; or, as the package of a submitted job leaves them out, where the project is installed.

    Raises:
        InputError: it is not installed on this node.
    """
    roots = [MAPS.parents[2]]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        project = importlib.metadata.distribution("ddpm-translate")
        roots.append(Path(str(project.locate_file(""))))
        origin = json.loads(project.read_text("direct_url.json") or "{}")  # of an editable install
        roots.append(Path(urllib.parse.unquote(urllib.parse.urlsplit(origin.get("url", "")).path)))
    for root in roots:
        if (folder := root / "jobs/datasets/sources" / MAPS.name).is_dir():
            return folder
    raise InputError(
        "the maps of the Earth do not travel with a submitted job, and the project is not installed on this node; "
        "give --source with a day.* and a night.*"
    )


def _map_file(folder: str, domain: str) -> str:
    found = [
        file for file in image_files(storage.list_files(folder, recursive=False)) if file.rsplit(".", 1)[0] == domain
    ]
    if len(found) != 1:
        there = "there are " + " and ".join(found) if found else "there is none"
        raise InputError(f"--source {folder}: exactly one map called {domain}.* is needed; {there}")
    return found[0]


def _make(options: Earth, content: dict[str, bytes]) -> source.Made:
    day, night = (np.asarray(images.decode(content[domain], name=f"the {domain} map")) for domain in DOMAINS)
    if day.shape != night.shape or day.shape[1] != 2 * day.shape[0]:
        raise InputError(
            f"the maps are {day.shape[1]} x {day.shape[0]} and {night.shape[1]} x {night.shape[0]} pixels; "
            "both must be equirectangular, equally large and twice as wide as high"
        )
    sums = Sums.of(day)
    tiles = select_tiles(sums, options)
    counts = {split: len(of) for split, of in tiles.items()}
    if not all(counts.values()):
        raise InputError(f"the maps give {counts} tiles; lower --min-land or --image-size, or give larger maps")
    rows = {split: _rows(day, night, of, options.image_size) for split, of in tiles.items()}
    land = np.array([len(tiles["val"]), len(tiles["test"])]) / disjoint_land_tiles(sums, options)
    note = f"of the land that disjoint tiles cover, {land[0]:.0%} is for validation and {land[1]:.0%} for the test"
    return source.Made(rows=rows, num_rows=sum(counts.values()), notes=[note])


def is_land(day: UInt8[np.ndarray, "h w 3"]) -> Bool[np.ndarray, "h w"]:
    """Where the day map shows land or ice: water is where blue stands out, or where it is all but black."""
    r, g, b = (day[..., channel].astype(np.int16) for channel in range(3))
    blue = (b - r > 12) & (4 * (b - r) > b) & (2 * b - r - g >= 20) & (r < 110)  # thin snow is a bluish grey
    black = (r < 8) & (g < 16)
    return ~(blue | black)


def split_of(block_row: int, block_column: int) -> str:
    """The split that a block of the map belongs to."""
    number = (4 * block_row + 7 * block_column) % CYCLE
    return "test" if number in TEST else "val" if number in VAL else "train"


class Sums(NamedTuple):
    """Summed-area tables of the day map, one row and column larger than it."""

    land: Float64[np.ndarray, "h_1 w_1"]
    grey: Float64[np.ndarray, "h_1 w_1"]
    squares: Float64[np.ndarray, "h_1 w_1"]
    """Of the grey levels."""

    @classmethod
    def of(cls, day: UInt8[np.ndarray, "h w 3"]) -> "Sums":
        grey = day.mean(axis=-1)
        layers = (is_land(day).astype(np.float64), grey, grey**2)
        return cls(*(np.pad(layer.cumsum(0).cumsum(1), ((1, 0), (1, 0))) for layer in layers))

    def means(self, top: int, left: int, size: int) -> list[float]:
        """Mean of each layer over a tile."""
        bottom, right = top + size, left + size
        return [(of[bottom, right] - of[top, right] - of[bottom, left] + of[top, left]) / size**2 for of in self]


def select_tiles(sums: Sums, options: Earth) -> dict[str, list[tuple[int, int]]]:
    """(top, left) of each split's tiles, sorted: enough land, some contrast, not polar."""
    size, (height, width) = options.image_size, (side - 1 for side in sums.land.shape)
    train_stride = options.stride if options.stride is not None else max(size // 2, 1)
    tiles: dict[str, list[tuple[int, int]]] = {"train": [], "val": [], "test": []}
    for block_row in range(height // BLOCK):
        for block_column in range(width // BLOCK):
            split = split_of(block_row, block_column)
            steps = range(0, BLOCK - size + 1, train_stride if split == "train" else size)
            for top in (block_row * BLOCK + step for step in steps):
                if max(abs(90 - 180 * row / height) for row in (top, top + size)) > MAX_LATITUDE:
                    continue
                for left in (block_column * BLOCK + step for step in steps):
                    land, mean, square = sums.means(top, left, size)
                    if land >= options.min_land and square - mean**2 >= MIN_CONTRAST**2:
                        tiles[split].append((top, left))
    return {split: sorted(of) for split, of in tiles.items()}


def disjoint_land_tiles(sums: Sums, options: Earth) -> int:
    """Tiles there would be in all if none overlapped."""
    disjoint = dataclasses.replace(options, stride=options.image_size)
    return sum(len(of) for of in select_tiles(sums, disjoint).values())


def _rows(day: np.ndarray, night: np.ndarray, tiles: list[tuple[int, int]], size: int) -> Iterator[Row]:
    columns = day.shape[1] // BLOCK
    for top, left in tiles:
        here = np.s_[top : top + size, left : left + size]
        name = f"y{top:04d}-x{left:04d}"
        yield Row(
            id=name,
            domain=0,
            image=np.ascontiguousarray(day[here]),
            target=np.ascontiguousarray(night[here]),
            target_id=name,
            identity=top // BLOCK * columns + left // BLOCK,  # the region: no two splits share one
        )
