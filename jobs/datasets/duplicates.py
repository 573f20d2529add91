"""Images that come twice: with equal pixels, or saved again, scaled or cropped by a hair.

Two images are nearly the same where their dHashes (`jobs.datasets.scan.mark`) differ in at most MAX_DISTANCE of 64
bits and their 8 x 8 miniatures correlate by MIN_CORRELATION or more. On 999 CelebA images at 64 px
the hash alone would take 61 of the 498,501 pairs of different images for the same (aligned faces are alike); both
together take none. They find again 998 of those saved as JPEG of quality 60, all of those halved in size, 988 of those
cropped by 1 % on each side and 674 of those cropped by 2 %; none is taken for a copy of another.

A copy is listed once, beside the first image that it is a copy of; first are those that are in the data set already,
then test, val and train, then names. So the work grows with the number of different images, not of pairs.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jobs.datasets.scan import DIGEST_BYTES, HASH_BYTES, MARK_BYTES

MAX_DISTANCE = 6
MIN_CORRELATION = 0.98
MIN_CONTRAST = 4.0
"""Images whose miniature spreads less about its mean (standard deviation in levels of 255) are plain: their hash is
noise, so only exact copies of them are found."""
RANK = {"test": 0, "val": 1, "train": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pool:
    """Images among which to look."""

    names: Sequence[str]
    splits: Sequence[str]
    groups: Sequence[int]
    """Only images of one group are compared."""
    marks: Sequence[tuple[bytes, ...]]
    """One a part; an image is a copy of another where all of its parts are."""

    def __add__(self, other: "Pool") -> "Pool":
        return Pool(**{name: [*getattr(self, name), *getattr(other, name)] for name in Pool.__dataclass_fields__})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copy:
    """One line of duplicates.parquet."""

    picture: str
    of: str
    kind: str
    """exact or near."""
    distance: int
    """Bits in which the dHashes differ."""
    split: str
    split_of: str


def find(new: Pool, there: Pool) -> list[tuple[int, Copy]]:
    """Those of `new` that are copies, with their index, in the order of their names; `there` is what came earlier."""
    both = there + new
    num_there = len(there.names)
    found = []
    for group in sorted(set(both.groups)):
        members = [i for i, of in enumerate(both.groups) if of == group]
        members.sort(key=lambda i: (i >= num_there, RANK[both.splits[i]], both.names[i]))
        for copy, first, kind, distance in _copies(members, both.marks, num_there):
            line = Copy(
                picture=both.names[copy],
                of=both.names[first],
                kind=kind,
                distance=distance,
                split=both.splits[copy],
                split_of=both.splits[first],
            )
            found.append((copy - num_there, line))
    return sorted(found, key=lambda item: item[1].picture)


def _copies(
    members: Sequence[int], marks: Sequence[tuple[bytes, ...]], num_there: int
) -> list[tuple[int, int, str, int]]:
    """(copy, first, kind, distance) among members, which stand in the order of precedence."""
    import faiss  # not at the top: every worker that decodes images would load it

    index = faiss.IndexBinaryFlat(8 * HASH_BYTES)
    firsts: list[int] = []
    by_digest: dict[bytes, int] = {}
    found = []
    raw = np.frombuffer(b"".join(b"".join(marks[i]) for i in members), np.uint8)
    raw = raw.reshape(len(members), -1, MARK_BYTES)
    hashes = np.ascontiguousarray(raw[..., DIGEST_BYTES : DIGEST_BYTES + HASH_BYTES])
    thumbs = raw[..., DIGEST_BYTES + HASH_BYTES :].reshape(len(members), raw.shape[1], -1, 3)
    for row, member in enumerate(members):
        digest = b"".join(mark[:DIGEST_BYTES] for mark in marks[member])
        if (first := by_digest.setdefault(digest, member)) != member:
            if member >= num_there:
                found.append((member, first, "exact", 0))
            continue
        if _plain(thumbs[row]):
            continue
        if member >= num_there:
            _, _, rows = index.range_search(hashes[row, :1], MAX_DISTANCE + 1)
            near = np.array([firsts[place] for place in np.sort(rows)], np.int64)
            best = _nearest(row, near, hashes, thumbs)
            if best is not None:
                found.append((member, members[best[0]], "near", best[1]))
                continue
        index.add(hashes[row, :1])
        firsts.append(row)
    return found


def _plain(thumb: np.ndarray) -> bool:
    return bool((thumb.std(axis=-2).max(axis=-1) < MIN_CONTRAST).any())


def _nearest(row: int, rows: np.ndarray, hashes: np.ndarray, thumbs: np.ndarray) -> tuple[int, int] | None:
    """Of `rows` the one that is nearly the same, with its distance, the worst of its parts; None where none is."""
    if not len(rows):
        return None
    distance = np.bitwise_count(hashes[rows] ^ hashes[row]).sum(axis=-1).max(axis=-1)
    centred = [each - each.mean(axis=-2, keepdims=True) for each in (thumbs[rows], thumbs[row])]
    here, there = (each / np.linalg.norm(each, axis=(-2, -1), keepdims=True) for each in centred)
    same = (distance <= MAX_DISTANCE) & ((here * there).sum(axis=(-2, -1)) >= MIN_CORRELATION).all(axis=-1)
    if not same.any():
        return None
    best = int(np.argmin(np.where(same, distance, 8 * HASH_BYTES + 1)))
    return int(rows[best]), int(distance[best])


def note(copies: Sequence[Copy], dropped: bool) -> str:
    """What the card says of them."""
    if not copies:
        return "no duplicates found"
    exact = sum(copy.kind == "exact" for copy in copies)
    across = sum(copy.split != copy.split_of for copy in copies)
    word = "duplicate" if len(copies) == 1 else "duplicates"
    what = f"{len(copies):,} {word} ({exact:,} exact, {len(copies) - exact:,} near), {across:,} across splits"
    return what + (": set aside" if dropped else ", all kept (--duplicates drop sets them aside)")


def lines(copies: Sequence[Copy]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(copy) for copy in copies]
