"""The stress test: images from outside of the data set, translated, and what the judges say of each.

    flipped     the classifier takes the result for the wanted side
    identity    cosine between source and result
    found       the result's own source is the nearest to it among all sources of its folder
    distance    of the source's features to those of the nearest training image, as the share of held-out images
                that are nearer: above FAR it is out of distribution

A translation is a success where the image was flipped and found; a judge that is not there has no say.
"""

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.parquet
from jaxtyping import UInt8

from ddpm_core import faces, images, nets, storage
from ddpm_core.nets import Net
from jobs.datasets import cache
from jobs.datasets.format import find_card
from jobs.reports import grids
from jobs.reports.html import image
from jobs.suite.plan import Figure, Section
from jobs.suite.results import Results

FAR = 0.95
"""A source farther from the training images than this share of the held-out ones is out of distribution."""
MAX_TRAINING = 2048
"""Training images that a source is compared with, spread over the split."""
MAX_HELD_OUT = 512
NUM_IN_GRID = 12
"""Images in the PNG; the page shows all."""

Pixels = UInt8[np.ndarray, "s s 3"]


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """One image's translation; None where there was no judge."""

    name: str
    source: Pixels
    """As the network saw it."""
    result: Pixels
    note: str
    flipped: bool | None
    identity: float | None
    found: bool | None
    distance: float | None

    @property
    def success(self) -> bool | None:
        said = [each for each in (self.flipped, self.found) if each is not None]
        return all(said) if said else None

    @property
    def far(self) -> bool | None:
        return None if self.distance is None else self.distance > FAR


@dataclasses.dataclass(frozen=True)
class Folder:
    """What became of one jobs.translate command."""

    key: str
    to: str
    snapshots: tuple[Snapshot, ...]
    """Sorted by identity, the best kept first."""
    rejected: dict[str, str]
    """Name → why it was set aside."""


def draw(results: Results, section: Section, figure: Figure) -> tuple[bytes, dict[str, Any]] | str:
    """Successes and failures side by side, of each folder."""
    found = {key: measured(results, figure, key) for key in figure.translations}
    folders = [folder for folder in found.values() if folder is not None]
    if not any(folder.snapshots for folder in folders):
        return "no images: " + (results.missing(figure.translations[0]) if figure.translations else "none are named")
    absent = [results.missing(key) for key, folder in found.items() if folder is None]
    rows = [row for folder in folders for row in _grid_rows(folder)]
    side = max(image.shape[0] for row in rows for image in row)
    png = grids.labelled_grid(["source", "result"] * 3, _in_threes(rows, side))
    shown = {"title": figure.title, "folders": [*map(_shown, folders)], "notes": [_legend(figure), *absent]}
    return png, {"stress": shown}


def measured(results: Results, figure: Figure, key: str) -> Folder | None:
    """The translated folder of a command, judged; None where it is not there. Judged once."""
    there = results.stress.get((figure, key))
    if there is None and storage.exists(storage.join(results.output, key, "run.json")):
        results.stress[figure, key] = there = _measure(results, figure, key)
    return there


def as_json(folder: Folder) -> dict[str, Any]:
    """Without its images."""
    shown = [
        {field: getattr(each, field) for field in ("name", "note", "flipped", "identity", "found", "distance")}
        for each in folder.snapshots
    ]
    return {"translation": folder.key, "to": folder.to, "pictures": shown, "rejected": folder.rejected}


# -- reading and judging ------------------------------------------------------------------------------------------


def _measure(results: Results, figure: Figure, key: str) -> Folder:
    uri = storage.join(results.output, key)
    note = storage.read_json(storage.join(uri, "run.json"))
    table = pyarrow.parquet.read_table(io.BytesIO(storage.read_bytes(storage.join(uri, "manifest.parquet"))))
    manifest = {row["id"]: row for row in table.to_pylist()}
    good = [row for row in manifest.values() if row["status"] == "ok"]
    rejected = {row["id"]: row["error"] for row in manifest.values() if row["status"] == "rejected"}
    to = note["options"]["domain"]
    if not good:
        return Folder(key, to, (), rejected)
    sources = np.stack(_sources(note, [row["id"] for row in good]))
    made = np.stack([_result(storage.join(uri, row["output"]), note["model"]["image_size"]) for row in good])
    flipped, identity, found = _judged(results, figure, note, sources, made)
    distances = _distances(results, figure, sources)
    snapshots = [
        Snapshot(row["id"], sources[i], made[i], row["note"], flipped[i], identity[i], found[i], distances[i])
        for i, row in enumerate(good)
    ]
    return Folder(key, to, tuple(sorted(snapshots, key=lambda each: -(each.identity or 0.0))), rejected)


def _sources(note: dict[str, Any], names: Sequence[str]) -> list[Pixels]:
    """The images as the network saw them."""
    asked, config = note["command"], note["model"]
    if (card := find_card(asked["input"])) is not None:
        split = cache.load(asked["input"], asked["split"])
        places = {name: i for i, name in enumerate(split.ids)}
        to = card.domains.index(asked["domain"])
        rows = [places[name] for name in names]
        swapped = [card.pairing == "paired" and int(split.domain[i]) == to for i in rows]
        return [(split.targets if swap else split.images)([i])[0] for i, swap in zip(rows, swapped, strict=True)]
    from jobs.translation.batch import read_image

    template: tuple[float, ...] = ()
    if note["options"].get("align") == "faces":
        template = faces.template_for(tuple(config["data"]["landmarks"]), "faces")
    found = [
        read_image(
            name,
            storage.join(asked["input"], name),
            root=asked["input"],
            image_size=config["image_size"],
            template=template,
            output_size="model",
        )
        for name in names
    ]
    if wrong := [each.error for each in found if each.error]:
        raise FileNotFoundError(wrong[0])
    return [view.pixels for each in found for view in each.views]


def _result(uri: str, side: int) -> Pixels:
    return images.to_square(images.decode(storage.read_bytes(uri), name=uri), side)


def _judged(
    results: Results, figure: Figure, note: dict[str, Any], sources: np.ndarray, made: np.ndarray
) -> tuple[list[bool | None], list[float | None], list[bool | None]]:
    """flipped, identity, found of each image."""
    nobody: list[Any] = [None] * len(made)
    flipped, identity, found = nobody, nobody, nobody
    if figure.classifier:
        domains = tuple(note["model"]["domains"])
        judge = nets.classifier(results.uri(figure.classifier), domains)
        said = _features(judge, made).argmax(axis=1)
        flipped = [bool(index == domains.index(note["options"]["domain"])) for index in said]
    if figure.identity:
        judge = nets.identity_net(results.uri(figure.identity))
        likeness = _features(judge, made) @ _features(judge, sources).T
        identity = [float(value) for value in likeness.diagonal()]
        if len(made) > 1:  # alone, every image is its own nearest
            others = np.where(np.eye(len(made), dtype=bool), -np.inf, likeness).max(axis=1)
            found = [bool(own > other) for own, other in zip(identity, others, strict=True)]
    return flipped, identity, found


def _distances(results: Results, figure: Figure, sources: np.ndarray) -> list[float | None]:
    """Share of held-out images that lie nearer to a training image than each source does."""
    if not figure.data:
        return [None] * len(sources)
    uri = results.uri(figure.data)
    net = nets.feature_net()
    train = _features(net, _spread(uri, "train", MAX_TRAINING))
    usual = np.sort(_nearest(_features(net, _spread(uri, "test", MAX_HELD_OUT)), train))
    return [float(np.searchsorted(usual, value) / len(usual)) for value in _nearest(_features(net, sources), train)]


def _spread(uri: str, split: str, most: int) -> np.ndarray:
    rows = cache.load(uri, split)
    return rows.images(np.unique(np.linspace(0, len(rows) - 1, min(len(rows), most)).astype(int)))


def _nearest(queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    squared = (queries**2).sum(axis=1)[:, None] + (gallery**2).sum(axis=1)[None] - 2 * queries @ gallery.T
    return np.sqrt(squared.min(axis=1).clip(0))


def _features(net: Net, batch: np.ndarray) -> np.ndarray:
    return nets.features(net.module, batch).double().numpy()


# -- showing ------------------------------------------------------------------------------------------------------


def _grid_rows(folder: Folder) -> list[list[Pixels]]:
    """The best and the worst, for the PNG."""
    shown = folder.snapshots
    if len(shown) > NUM_IN_GRID:
        shown = (*shown[: NUM_IN_GRID // 2], *shown[-(NUM_IN_GRID // 2) :])
    return [[each.source, each.result] for each in shown]


def _in_threes(pairs: Sequence[Sequence[Pixels]], side: int) -> list[list[Pixels]]:
    blank = np.full((side, side, 3), 255, np.uint8)
    cells = [[_padded(image, side) for image in pair] for pair in pairs]
    cells += [[blank, blank]] * (-len(cells) % 3)
    return [[*cells[i], *cells[i + 1], *cells[i + 2]] for i in range(0, len(cells), 3)]


def _padded(image: Pixels, side: int) -> Pixels:
    """Images of networks of different sizes in one grid."""
    return (
        image if image.shape[0] == side else image.repeat(side // image.shape[0], 0).repeat(side // image.shape[0], 1)
    )


def _shown(folder: Folder) -> dict[str, Any]:
    """A folder's images, successes beside failures."""
    words = {True: ("good", "Success"), False: ("bad", "Failure"), None: ("even", "Nobody judged")}
    groups = [
        (kind, word, [_photo(each) for each in folder.snapshots if each.success is success])
        for success, (kind, word) in words.items()
    ]
    count = len(folder.snapshots)
    return {"key": folder.key, "to": folder.to, "count": count, "groups": groups, "rejected": folder.rejected}


def _photo(each: Snapshot) -> dict[str, Any]:
    said = []
    if each.flipped is not None:
        said.append("flipped" if each.flipped else "not flipped")
    if each.identity is not None:
        mark = {True: ", nearest to its source", False: ", nearer to another", None: ""}[each.found]
        said.append(f"identity {each.identity:.2f}{mark}")
    if each.distance is not None:
        said.append(f"{'out of' if each.far else 'in'} distribution ({100 * each.distance:.0f} %)")
    if each.note:
        said.append(each.note)
    source, result = (image("", images.encode_png(of)) for of in (each.source, each.result))
    return {"name": each.name, "said": "; ".join(said), "source": source, "result": result}


def _legend(figure: Figure) -> str:
    parts = ["Left the photo as the network saw it, right the result; sorted by identity."]
    if figure.identity:
        parts.append("Identity is the cosine between the two; a result should be nearest to its own source.")
    if figure.data:
        parts.append(
            "The share is of held-out images that are nearer to a training image; above "
            f"{100 * FAR:.0f} % a photo is out of distribution."
        )
    return " ".join(parts)
