"""Writing the data-set format: rows into shards, dataset.json last."""

import dataclasses
import hashlib
import importlib.metadata
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from jaxtyping import UInt8
from PIL import Image

from ddpm_core import images, storage
from ddpm_core.config import to_dict
from ddpm_core.errors import InputError
from jobs.datasets.format import (
    CARD,
    CONTACT_SHEET,
    DUPLICATES,
    ENVIRONMENT,
    REASONS,
    REJECTED,
    SCHEMA,
    SPLITS,
    DatasetCard,
    IndexRow,
    Row,
    Shard,
    find_card,
    missing_shards,
)
from jobs.datasets.options import Encoding

NOT_ALONE = "another program wrote there at the same time; give the same command again"
ROWS_PER_GROUP = 256
SHARD_BYTES = 64 * 2**20
"""A shard is closed once its encoded images reach this size: what the writer holds in memory."""
JPEG_QUALITY = 95


# ---------------------------------------------------------------------------------------------- writing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Before:
    """The data set that an append adds to."""

    card: DatasetCard
    index: Mapping[str, IndexRow] = dataclasses.field(default_factory=dict)
    totals: "Totals" = dataclasses.field(default_factory=lambda: Totals())
    """Of its training rows; the new ones are added."""


def write_dataset(uri: str, rows_by_split: Mapping[str, Iterable[Row]], card: DatasetCard) -> DatasetCard:
    """Write the rows as a data set; dataset.json last, so that a half-written folder is not one.

    Raises:
        InputError, AssertionError: as `write_rows`.
    """
    card = write_rows(uri, rows_by_split, card)
    write_card(uri, card)
    return card


def write_rows(
    uri: str, rows_by_split: Mapping[str, Iterable[Row]], card: DatasetCard, before: Before | None = None
) -> DatasetCard:
    """Write the shards; returns the card that tells of them, for `write_card`.

    Rows of a split must come sorted by id; they are streamed, at most one shard is held in memory. With `before` the
    rows are added to that data set, whose files stay.

    Raises:
        InputError: an id or an identity occurs twice, there are no training rows, or somebody else writes there.
        AssertionError: rows out of order or of another size than the card says.
    """
    there = None if before is None else before.card
    if there is not None:
        check_alone(uri, there)
    clear(uri, there)
    if before is None:
        before = Before(card=dataclasses.replace(card, domain_counts={}, shards=(), content_hash=""))
    old, totals, seen = before.card, before.totals, _Unique(before.index)
    counts = {split: dict.fromkeys(card.domains, 0) | old.domain_counts.get(split, {}) for split in SPLITS}
    digest = hashlib.blake2b(old.content_hash.encode(), digest_size=16)
    shards: list[Shard] = list(old.shards)
    for split in SPLITS:
        first = sum(shard.file.startswith(f"{split}/") for shard in old.shards)
        writer = _ShardWriter(uri, split, card, first, there)
        for row in rows_by_split.get(split, ()):
            seen.check(row, split)
            counts[split][card.domains[row.domain]] += 1
            if split == "train":
                totals.add(row.image[None], [row.landmarks])
            digest.update(split.encode() + writer.add(row))
        shards += writer.close()
    if not sum(counts["train"].values()):
        raise InputError(f"{uri}: no image for training is left; give a source with more images")
    return dataclasses.replace(
        card,
        splits={split: sum(of.values()) for split, of in counts.items()},
        domain_counts=counts,
        mean_color=totals.mean_color(),
        mean_landmarks=totals.mean_landmarks(card.image_size),
        shards=tuple(shards),
        content_hash=digest.hexdigest() if len(shards) > len(old.shards) else old.content_hash,
        made_with={
            name: importlib.metadata.version(name) for name in ("numpy", "pillow", "pyarrow", "resvg_py", "torch")
        },
    )


def write_card(uri: str, card: DatasetCard, before: DatasetCard | None = None) -> None:
    """Makes the files at `uri` a data set, or the next version of `before`: in one step, at the end.

    Raises:
        InputError: somebody else has written there meanwhile.
    """
    check_alone(uri, before, card)
    text = json.dumps(to_dict(card), indent=2, ensure_ascii=False) + "\n"
    storage.write_bytes(storage.join(uri, CARD), text.encode())


def check_alone(uri: str, before: DatasetCard | None, after: DatasetCard | None = None) -> None:
    """Two that write to one place at a time would mix their files.

    Raises:
        InputError: the card is not `before` (None: there is none) any more, or files of `after` are not those written.
    """
    if find_card(uri) != before or (after is not None and missing_shards(uri, after)):
        raise InputError(f"{uri}: {NOT_ALONE}")


def clear(uri: str, keep: DatasetCard | None = None) -> None:
    """Remove a data set, whole or half-written, dataset.json first, or all that is not of `keep`; other files stay."""
    shards = rf"({'|'.join(SPLITS)})/part-\d{{5}}\.parquet"
    aside = r"\.[0-9a-f]{8}\.tmp"  # as releases before this one left it
    others = "|".join(re.escape(name) for name in (REJECTED, REASONS, DUPLICATES, CONTACT_SHEET, ENVIRONMENT))
    ours = re.compile(
        rf"({shards}|{re.escape(CARD)})({aside})?|({others}){aside}|\.write-probe-[0-9a-f]{{8}}({aside})?"
        rf"|(({'|'.join(SPLITS)})/)?{storage.DEBRIS}"
    )
    kept = set() if keep is None else {CARD, *(shard.file for shard in keep.shards)}
    files = [file for file in storage.list_files(uri) if ours.fullmatch(file) and file not in kept]
    for file in sorted(files, key=lambda file: file != CARD):
        storage.delete_file(storage.join(uri, file))


def encode(image: UInt8[np.ndarray, "s s 3"], encoding: Encoding) -> bytes:
    """An image as it is stored."""
    if encoding == "raw":
        return np.ascontiguousarray(image).tobytes()
    if encoding == "png":
        return images.encode_png(image)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def stored(image: UInt8[np.ndarray, "s s 3"], encoding: Encoding) -> UInt8[np.ndarray, "s s 3"]:
    """An image as it is read back."""
    return np.asarray(images.decode(encode(image, encoding))) if encoding == "jpeg" else image


class _ShardWriter:
    """Rows of one split into shards of bounded size, 256 rows a row group, or fewer where images are large."""

    def __init__(self, uri: str, split: str, card: DatasetCard, first: int, before: DatasetCard | None) -> None:
        self.uri, self.split, self.card, self.first, self.before = uri, split, card, first, before
        self.shards: list[Shard] = []
        self.pending: list[dict[str, Any]] = []
        self._open()

    def _open(self) -> None:
        self.buffer = pyarrow.BufferOutputStream()
        self.parquet = pyarrow.parquet.ParquetWriter(
            self.buffer,
            SCHEMA,
            compression={name: "zstd" for name in SCHEMA.names if name not in ("image", "target")}
            | dict.fromkeys(("image", "target"), "zstd" if self.card.encoding == "raw" else "none"),
            use_dictionary=False,
            write_statistics=["id", "domain"],
            write_page_checksum=True,
        )
        self.rows = self.num_bytes = 0

    def add(self, row: Row) -> bytes:
        """Take a row; returns what identifies its content."""
        side = self.card.image_size
        for pixels in (row.image, row.target):
            assert pixels is None or (pixels.shape == (side, side, 3) and pixels.dtype == np.uint8), row.id
        assert (row.target is not None) == self.card.has_targets, row.id
        image = encode(row.image, self.card.encoding)
        target = None if row.target is None else encode(row.target, self.card.encoding)
        record = {**{name: getattr(row, name) for name in SCHEMA.names}, "image": image, "target": target}
        self.pending.append(record)
        self.rows += 1
        self.num_bytes += len(image) + len(target or b"")
        full = self.num_bytes >= SHARD_BYTES
        if len(self.pending) == ROWS_PER_GROUP or (full and self.rows == len(self.pending)):
            self._flush()
            if full:
                self._finish()
                self._open()
        parts = [row.id.encode(), bytes([row.domain]), image, target or b""]
        for labels in ([row.identity] if row.identity is not None else None, row.attributes):
            parts += [] if labels is None else [np.asarray(labels, "<i4").tobytes()]
        return b"".join(len(part).to_bytes(8, "little") + part for part in parts)

    def close(self) -> list[Shard]:
        self._flush()
        if self.rows:
            self._finish()
        return self.shards

    def _flush(self) -> None:
        if self.pending:
            columns = {name: [record[name] for record in self.pending] for name in SCHEMA.names}
            self.parquet.write_table(pyarrow.table(columns, schema=SCHEMA), row_group_size=ROWS_PER_GROUP)
            self.pending = []

    def _finish(self) -> None:
        self.parquet.close()
        data = self.buffer.getvalue()
        file = f"{self.split}/part-{self.first + len(self.shards):05d}.parquet"
        check_alone(self.uri, self.before)
        storage.write_bytes(storage.join(self.uri, file), memoryview(data))
        self.shards.append(Shard(file=file, rows=self.rows, num_bytes=data.size))


class _Unique:
    """Sees to it that ids are unique and sorted and that no two splits share an identity."""

    def __init__(self, index: Mapping[str, IndexRow]) -> None:
        self.ids = set(index)
        self.identities = {row.identity: row.split for row in index.values() if row.identity is not None}
        self.last = ("", "")

    def check(self, row: Row, split: str) -> None:
        if row.id in self.ids:
            raise InputError(f"id {row.id!r} occurs twice; every image needs a name of its own")
        assert self.last[0] != split or self.last[1] < row.id, f"{row.id} after {self.last[1]}: not sorted"
        self.ids.add(row.id)
        self.last = (split, row.id)
        if row.identity is not None and self.identities.setdefault(row.identity, split) != split:
            other = self.identities[row.identity]
            raise InputError(f"identity {row.identity} is in both {other} and {split}; a split must not share one")


class Totals:
    """Sums over training rows; integers, so that neither the order of rows nor appends leave a trace in the means."""

    LANDMARK_UNIT = 2**-20

    def __init__(self) -> None:
        self.color, self.pixels = np.zeros(3, np.int64), 0
        self.landmarks, self.landmark_rows = np.zeros(0, np.int64), 0

    def add(self, pixels: UInt8[np.ndarray, "b s s 3"], landmarks: Sequence[Sequence[float] | None]) -> None:
        self.color = self.color + pixels.sum(axis=(0, 1, 2), dtype=np.int64)
        self.pixels += pixels.size // 3
        for points in landmarks:
            if points is not None:
                values = np.round(np.asarray(points, np.float32) / self.LANDMARK_UNIT).astype(np.int64)
                self.landmarks = values + self.landmarks if self.landmark_rows else values
                self.landmark_rows += 1

    def merge(self, other: "Totals") -> None:
        self.color, self.pixels = self.color + other.color, self.pixels + other.pixels
        if other.landmark_rows:
            self.landmarks = other.landmarks + self.landmarks if self.landmark_rows else other.landmarks
            self.landmark_rows += other.landmark_rows

    def mean_color(self) -> tuple[float, ...]:
        """r g b in [-1, 1], rounded: the mean needs no more."""
        return tuple(round(float(c), 6) for c in self.color / max(self.pixels, 1) / 127.5 - 1)

    def mean_landmarks(self, image_size: int) -> tuple[float, ...]:
        """x0 y0 x1 y1 ... as shares of the side, rounded; () where no row has any."""
        scale = self.LANDMARK_UNIT / max(self.landmark_rows, 1) / image_size
        return tuple(round(float(x), 6) for x in self.landmarks * scale)
