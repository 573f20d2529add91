"""One pass over the images of a data set: what an append and `jobs.prepare inspect` ask of it."""

import dataclasses
import functools
import hashlib
import heapq
import itertools

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ddpm_core import images
from ddpm_core.errors import InputError
from jobs.common import workers
from jobs.common.progress import Progress
from jobs.datasets import reading, writing
from jobs.datasets.format import read_card

DIGEST_BYTES, HASH_BYTES, THUMB = 16, 8, 8
MARK_BYTES = DIGEST_BYTES + HASH_BYTES + THUMB * THUMB * 3
"""Length of an image's mark."""
SHEET_IMAGES = 48
"""Rows of each domain on the contact sheet, at most."""
SHEET_SIDE = 128
"""Larger images are shown at this size."""


def name_hash(name: str) -> bytes:
    """Orders names at random, always in the same way."""
    return hashlib.blake2b(name.encode(), digest_size=8).digest()


def digest(pixels: UInt8[np.ndarray, "*shape"]) -> bytes:
    """Tells one image's pixels from another's."""
    return hashlib.blake2b(np.ascontiguousarray(pixels).tobytes(), digest_size=DIGEST_BYTES).digest()


def mark(square: UInt8[np.ndarray, "s s 3"]) -> bytes:
    """What is kept of an image to find it again: a digest, its dHash (64 bits: is the grey level of each of 8 x 8
    places higher than that of its left neighbour?) and 8 x 8 pixels of it."""
    image = Image.fromarray(square)
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX))
    thumb = np.asarray(image.resize((THUMB, THUMB), Image.Resampling.BOX))
    return digest(square) + np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes() + thumb.tobytes()


class ContactSheet:
    """A few rows of each domain, chosen by the hash of their ids: source beside target, to be looked at."""

    def __init__(self) -> None:
        self.kept: dict[int, list[tuple[int, str, list[np.ndarray]]]] = {}

    def add(self, row_id: str, domain: int, image: np.ndarray, target: np.ndarray | None) -> None:
        kept = self.kept.setdefault(domain, [])
        rank = -int.from_bytes(name_hash(row_id), "big")
        if len(kept) < SHEET_IMAGES or rank > kept[0][0]:
            self._keep(domain, (rank, row_id, [_shown(each) for each in (image, target) if each is not None]))

    def merge(self, other: "ContactSheet") -> None:
        for domain, kept in other.kept.items():
            for item in kept:
                self._keep(domain, item)

    def _keep(self, domain: int, item: tuple[int, str, list[np.ndarray]]) -> None:
        kept = self.kept.setdefault(domain, [])
        if len(kept) < SHEET_IMAGES:
            heapq.heappush(kept, item)
        else:
            heapq.heappushpop(kept, item)

    def draw(self) -> UInt8[np.ndarray, "H W 3"]:
        """Domain after domain; pairs stand side by side."""
        rows: list[list[np.ndarray]] = []
        for _, kept in sorted(self.kept.items()):
            pairs = [pair for _, _, pair in sorted(kept, reverse=True, key=lambda item: item[0])]
            across = 12 // len(pairs[0])
            rows += [
                list(itertools.chain.from_iterable(pairs[start : start + across]))
                for start in range(0, len(pairs), across)
            ]
        side = rows[0][0].shape[0]
        return images.grid(rows, scale=2 if side <= 64 else 1)


def _shown(square: np.ndarray) -> np.ndarray:
    if len(square) <= SHEET_SIDE:
        return np.array(square)
    return np.asarray(Image.fromarray(square).resize((SHEET_SIDE, SHEET_SIDE), Image.Resampling.BOX))


@dataclasses.dataclass
class Survey:
    """What is known of the rows seen so far."""

    totals: writing.Totals = dataclasses.field(default_factory=writing.Totals)
    """Of training rows."""
    sheet: ContactSheet = dataclasses.field(default_factory=ContactSheet)
    sums: dict[tuple[int, str], np.ndarray] = dataclasses.field(default_factory=dict)
    """(s, s, 3) int64 sum of the images by (domain of the row, image or target)."""
    counts: dict[tuple[int, str], int] = dataclasses.field(default_factory=dict)
    marks: dict[str, tuple[bytes, ...]] = dataclasses.field(default_factory=dict)
    """Marks of the image and, where there is one, of the target, by id."""

    def merge(self, other: "Survey") -> None:
        self.totals.merge(other.totals)
        self.sheet.merge(other.sheet)
        for key, total in other.sums.items():
            self.sums[key] = self.sums[key] + total if key in self.sums else total
            self.counts[key] = self.counts.get(key, 0) + other.counts[key]
        self.marks |= other.marks

    def mean(self, domain: int, column: str) -> UInt8[np.ndarray, "s s 3"]:
        """The mean image."""
        return np.round(self.sums[domain, column] / self.counts[domain, column]).astype(np.uint8)


@functools.lru_cache(maxsize=1)
def survey(uri: str, content_hash: str, *, with_marks: bool = True) -> Survey:
    """All rows of the data set at `uri`; kept, because an append asks for it twice.

    Raises:
        InputError: a file is missing or damaged, or the content is another by now.
    """
    card = read_card(uri)
    if card.content_hash != content_hash:
        raise InputError(f"{uri}: {writing.NOT_ALONE}")
    found = Survey()
    total = sum(card.splits.values())
    with Progress(total=total, unit="row", description="read") as progress:
        for split in (split for split, count in card.splits.items() if count):
            columns = [*reading.COLUMNS, *(["landmarks"] if split == "train" else [])]
            there = reading.open_split(uri, split, columns=columns)
            look = functools.partial(survey_piece, split=there, with_marks=with_marks)
            for part, num_rows in workers.mapped(look, there.pieces, len(there.pieces)):
                found.merge(part)
                progress.update(num_rows)
    return found


def survey_piece(piece: reading.Piece, *, split: reading.Split, with_marks: bool) -> tuple[Survey, int]:
    """A piece's survey, and its number of rows. Landmarks are among the columns of training rows only."""
    part, rows = Survey(), split.read(piece)
    columns = {name: reading.pixels_of(rows, name) for name in ("image", "target") if name in rows.column_names}
    domains = rows["domain"].to_numpy()
    if "landmarks" in rows.column_names:
        part.totals.add(columns["image"], rows["landmarks"].to_pylist())
    for domain in np.unique(domains).tolist():
        for name, pixels in columns.items():
            part.sums[domain, name] = pixels[domains == domain].sum(axis=0, dtype=np.int64)
            part.counts[domain, name] = int((domains == domain).sum())
    for row, (name, domain) in enumerate(zip(rows["id"].to_pylist(), domains.tolist(), strict=True)):
        shown = [pixels[row] for pixels in columns.values()]
        part.sheet.add(name, domain, shown[0], shown[1] if len(shown) > 1 else None)
        if with_marks:
            part.marks[name] = tuple(mark(square) for square in shown)
    return part, len(rows)
