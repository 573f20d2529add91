"""What the sources of pictures share: options, decoding with Ray Data, splits by name, progress.

A source is a module with an `Options` dataclass and `draft(options) -> Draft`. `draft` does every check that is
cheap and reads no picture; `Draft.make` does the work.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import posixpath
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow
import ray.data
from jaxtyping import UInt8

from ddpm_core import faces, images
from ddpm_core.errors import InputError
from jobs import cli, data, storage
from jobs.data import DatasetCard, Encoding, Row
from jobs.datasets import duplicates
from jobs.progress import Progress
from jobs.survey import mark, name_hash, survey

PICTURES_PER_TASK = 64
"""Pictures that one Ray task decodes."""
UNREADABLE = {".heic", ".heif"}
"""What phones write and Pillow does not read: set aside with the reason rather than passed over."""
DECODED = pyarrow.schema(
    [
        pyarrow.field("pixels", pyarrow.binary()),
        pyarrow.field("marks", pyarrow.list_(pyarrow.binary())),
        pyarrow.field("enlarged", pyarrow.bool_()),
        pyarrow.field("landmarks", pyarrow.list_(pyarrow.float32())),
        pyarrow.field("num_faces", pyarrow.int32()),
        pyarrow.field("error", pyarrow.string()),
    ]
)
"""What comes back of a picture."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    """Options of every source."""

    output: str
    """Folder or s3://bucket/prefix for the data set."""
    source: str | None = None
    """Folder or s3://bucket/prefix that holds the pictures."""
    image_size: int = 64
    """Side of the square pictures, in pixels."""
    encoding: Encoding = "raw"
    """How pictures are stored: raw (needs no decoding) and png are exact, jpeg takes about half the room."""
    overwrite: bool = False
    """Replace another data set at --output."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromFiles(Common):
    """Options of sources that read the user's own pictures."""

    append: bool = False
    """Add the pictures that are not in the data set at --output yet to it, as its next version."""
    duplicates: Literal["report", "drop"] = "report"
    """Pictures that come twice, exactly or nearly: list them in duplicates.parquet, or also set the copies aside (first
    in training, then in validation)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """What `Draft.make` gives: rows to write and what to tell."""

    rows: Mapping[str, Iterable[Row]]
    """Rows of each split, sorted by id; iterated once."""
    num_rows: int
    rejected: Sequence[tuple[str, str]] = ()
    """(picture, reason) of those that could not be used."""
    copies: Sequence[duplicates.Copy] = ()
    """Pictures that come twice."""
    notes: Sequence[str] = ()
    """What a reader of results should know."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft:
    """A source that passed its checks."""

    card: DatasetCard
    """All that is known before a picture is read."""
    make: Callable[[Path], Made]
    """Does the work; the folder is for scratch files that the rows still need while they are iterated."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """One file to decode."""

    name: str
    """What to call it in messages."""
    uri: str
    """The file; `archive.zip!member` for a member of an archive."""


def check_common(options: Common) -> None:
    """Raises InputError for a size that no network takes."""
    if not images.MIN_SIDE <= options.image_size <= 1024:
        raise InputError(f"--image-size is {options.image_size}; it must lie between {images.MIN_SIDE} and 1024")


def source_folder(options: Common, what: str) -> str:
    """`--source` made absolute; it must be there.

    Raises:
        InputError: not given, missing, or a file.
    """
    if not options.source:
        raise InputError(f"--source is missing; give {what}")
    source = storage.absolute(options.source, flag="--source")
    require_folder(source, "--source")
    return source


def require_folder(uri: str, flag: str) -> None:
    """Raises InputError where `uri` is not a folder (or prefix) with something in it."""
    if storage.is_file(uri):
        raise InputError(f"{flag} {uri} is a file; give the folder that holds the pictures")
    if not storage.exists(uri):
        raise InputError(f"{flag} {uri} does not exist; check the path")


def picture_files(files: Iterable[str]) -> list[str]:
    """Those of the paths that end like pictures, without hidden ones and what macOS leaves in archives."""
    return [
        file
        for file in files
        if posixpath.splitext(file)[1].lower() in images.SUFFIXES | UNREADABLE
        and not any(part.startswith((".", "__MACOSX")) for part in file.split("/"))
    ]


def fingerprint(*parts: Any) -> str:
    """Hash of the source's file names and sizes and of small files' content."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Mapping):
            data = "\n".join(f"{name}\t{size}" for name, size in sorted(part.items())).encode()
        else:
            data = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def prepared_by(command: str, options: Common) -> dict[str, Any]:
    """The command and every option that decides the rows; which files are read, `fingerprint` tells."""
    elsewhere = ("output", "source", "overwrite", "append", "domain", "pairs")
    values = {key: value for key, value in dataclasses.asdict(options).items() if key not in elsewhere}
    return {"command": command, **values}


# ------------------------------------------------------------------------------------------------ splits


def split_names(
    names: Iterable[str], held_out: Sequence[str] = ("val", "test"), kept: Mapping[str, str] | None = None
) -> dict[str, str]:
    """A tenth of the names for each held-out split and the rest for training, by hash of the name.

    No split is empty as long as there is a name for each. With `kept` (names that an earlier version has) those keep
    their split, and each other name has a chance of a tenth: of a handful none need be held out.
    """
    ranked = sorted(set(names), key=lambda name: (name_hash(name), name))
    if kept:
        share = 2**64 // 10
        ends = dict(enumerate(held_out))
        drawn = {name: ends.get(int.from_bytes(name_hash(name), "big") // share, "train") for name in ranked}
        return drawn | {name: kept[name] for name in ranked if name in kept}
    tenth = max(1, round(len(ranked) / 10)) if len(ranked) > len(held_out) else 0
    ends_of = [split for split in held_out for _ in range(tenth)]
    return {name: ends_of[rank] if rank < len(ends_of) else "train" for rank, name in enumerate(ranked)}


def rows_there(options: FromFiles) -> dict[str, data.IndexRow]:
    """Rows of the data set that --append adds to, by id; {} without it.

    Raises:
        InputError: there is no data set, or it is damaged.
    """
    if not options.append:
        return {}
    output = storage.absolute(options.output, flag="--output")
    card = data.find_card(output)
    if card is None:
        raise InputError(f"--append: there is no data set at {output}; leave --append out to make one")
    return data.read_index(output, card)


# ---------------------------------------------------------------------------------------------- decoding


class Pixels:
    """Decoded pictures in a file, (n, parts, s, s, 3) uint8, so that 200,000 of them need no memory."""

    def __init__(self, shape: tuple[int, int, int, int, int], scratch: Path) -> None:
        self.shape, self.scratch = shape, scratch
        # It has no name: nothing of it is left when the process is killed.
        self.file = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115
        self.ok = np.zeros(shape[0], bool)
        """(n,) whether the picture is used."""
        self.marks: list[tuple[bytes, ...]] = [()] * shape[0]
        """`survey.mark` of each part."""
        self.num_enlarged = 0
        """Pictures that are smaller than they are stored."""
        self.landmarks: list[list[float] | None] = [None] * shape[0]
        """In pixels of the stored picture, of those that were aligned."""
        self.num_several = 0
        """Aligned pictures with other faces than the one that was taken."""

    def __setitem__(self, row: int, pixels: bytes) -> None:
        size = int(np.prod(self.shape[1:]))
        assert len(pixels) == size, row
        with self._explained():
            self.file.seek(row * size)
            self.file.write(pixels)

    def __getitem__(self, index: tuple[int, int]) -> UInt8[np.ndarray, "s s 3"]:
        row, part = index
        size = int(np.prod(self.shape[2:]))
        with self._explained():
            self.file.seek((row * self.shape[1] + part) * size)
            return np.frombuffer(self.file.read(size), np.uint8).reshape(self.shape[2:])

    def _explained(self) -> contextlib.AbstractContextManager[None]:
        bytes_needed = int(np.prod(self.shape))
        return storage.explained(f"{self.scratch} (TMPDIR says where) for {bytes_needed / 1e6:,.0f} MB of pixels")

    def means(self) -> np.ndarray:
        """(parts,) mean grey level of each part over the decoded pictures."""
        rows = np.flatnonzero(self.ok).tolist()
        return np.array([[self[row, part].mean() for part in range(self.shape[1])] for row in rows]).mean(axis=0)

    def notes(self) -> list[str]:
        """What a reader should know of how they were decoded."""
        words = []
        if self.num_enlarged:
            what = "1 picture is" if self.num_enlarged == 1 else f"{self.num_enlarged:,} pictures are"
            was = "was" if self.num_enlarged == 1 else "were"
            words.append(f"{what} smaller than {self.shape[2]} pixels and {was} enlarged")
        if any(points is not None for points in self.landmarks):
            words.append(f"aligned to CelebA's landmarks; of several faces ({self.num_several:,} pictures) the largest")
        return words


def decode_pictures(
    pictures: Sequence[Picture],
    *,
    size: int,
    halves: bool,
    scratch: Path,
    encoding: Encoding,
    template: tuple[float, ...] = (),
) -> tuple[Pixels, list[tuple[str, str]]]:
    """Every picture cut to a centred square of `size`, by Ray Data over all its CPUs.

    With `halves` a picture is two side by side, and each becomes a part. With `template` (`faces.CELEBA`) the square
    is not the centred one but that which brings the largest face there. Marks are those of the pictures as `encoding`
    stores them.
    Returns the pixels and (name, reason) of each picture that could not be decoded.

    Raises:
        InputError: none could be decoded, or the store refuses.
    """
    pixels = Pixels((len(pictures), 2 if halves else 1, size, size, 3), scratch)
    rejected = []
    tables = [
        pyarrow.table(
            {
                "index": pyarrow.array(range(start, start + len(some)), pyarrow.int64()),
                "name": [picture.name for picture in some],
                "uri": [picture.uri for picture in some],
            }
        )
        for start, some in zip(
            itertools.count(0, PICTURES_PER_TASK), _batched(pictures, PICTURES_PER_TASK), strict=False
        )
    ]
    with cli.ray_session(), Progress(total=len(pictures), description="decode") as progress:
        decoded = ray.data.from_arrow(tables).map_batches(
            decode_batch,
            batch_size=None,
            batch_format="pyarrow",
            fn_kwargs={"size": size, "halves": halves, "encoding": encoding, "template": template},
        )
        for batch in decoded.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
            for line in batch.to_pylist():
                if line["error"] is not None:
                    rejected.append((line["name"], line["error"]))
                    continue
                pixels[line["index"]] = line["pixels"]
                pixels.ok[line["index"]] = True
                pixels.marks[line["index"]] = tuple(line["marks"])
                pixels.num_enlarged += line["enlarged"]
                pixels.landmarks[line["index"]] = line["landmarks"]
                pixels.num_several += (line["num_faces"] or 0) > 1
            progress.update(len(batch))
    if not pixels.ok.any():
        name, reason = min(rejected)
        raise InputError(f"none of the {len(pictures)} pictures can be used; the first: {name}: {reason}")
    return pixels, sorted(rejected)


def weed(
    pixels: Pixels,
    names: Sequence[str],
    splits: Sequence[str],
    options: FromFiles,
    *,
    known: Sequence[bool] | None = None,
    groups: Sequence[int] | None = None,
) -> tuple[list[duplicates.Copy], list[tuple[str, str]], str]:
    """Pictures that come twice; with `--duplicates drop` they are no longer `ok`, and are given as rejected too.

    `known`: those that an earlier version has already, which are not looked at. `groups`: pictures are compared with
    those of their group only (default: all); for pairs the group is the domain, since counterparts may well be alike.
    Returns the copies, the rejected, and a note.
    """
    fresh = [i for i in np.flatnonzero(pixels.ok).tolist() if known is None or not known[i]]
    new = duplicates.Pool(
        names=[names[i] for i in fresh],
        splits=[splits[i] for i in fresh],
        groups=[0 if groups is None else groups[i] for i in fresh],
        marks=[pixels.marks[i] for i in fresh],
    )
    found = duplicates.find(new, _pool_there(options, pixels.shape[1], grouped=groups is not None))
    copies, dropped = [copy for _, copy in found], options.duplicates == "drop"
    rejected = []
    if dropped:
        for place, copy in found:
            pixels.ok[fresh[place]] = False
            same = (
                "the same picture as" if copy.kind == "exact" else f"nearly the same picture ({copy.distance} bits) as"
            )
            rejected.append((copy.picture, f"{same} {copy.of} in {copy.split_of}"))
    return copies, rejected, duplicates.note(copies, dropped)


def _pool_there(options: FromFiles, parts: int, *, grouped: bool) -> duplicates.Pool:
    """The pictures of the data set that --append adds to."""
    there: list[tuple[str, str, int, tuple[bytes, ...]]] = []
    if options.append:
        output = storage.absolute(options.output, flag="--output")
        card = data.read_card(output)
        marks = survey(output, card.content_hash).marks
        for name, row in sorted(data.read_index(output, card).items()):
            if parts == 2:
                there.append((name, row.split, 0, marks[name]))
                continue
            there.append((name, row.split, row.domain if grouped else 0, marks[name][:1]))
            if grouped:  # the targets are pictures of the source too
                there.append((row.target_id or name, row.split, 1 - row.domain, marks[name][1:]))
    return duplicates.Pool(
        names=[name for name, _, _, _ in there],
        splits=[split for _, split, _, _ in there],
        groups=[group for _, _, group, _ in there],
        marks=[marks for _, _, _, marks in there],
    )


def _batched(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def decode_batch(
    batch: pyarrow.Table, size: int, halves: bool, encoding: Encoding = "raw", template: tuple[float, ...] = ()
) -> pyarrow.Table:
    """One task's pictures: pixels and their marks, or the reason why there are none."""
    done: list[dict[str, Any]] = []
    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # reading waits on the network, decoding does not
        for content in pool.map(_read_or_error, batch.column("uri").to_pylist()):
            try:
                if isinstance(content, InputError):
                    raise content
                squares, facts = portrait(content, size, template) if template else decode_one(content, size, halves)
                marks = [mark(data.stored(square, encoding)) for square in squares]
                done.append({"pixels": squares.tobytes(), "marks": marks, **facts})
            except InputError as error:
                reason = str(error).removeprefix("picture: ")
                done.append({"pixels": None, "error": reason})
    columns = pyarrow.Table.from_pylist(done, schema=DECODED)
    return columns.append_column("index", batch.column("index")).append_column("name", batch.column("name"))


def portrait(
    content: bytes, size: int, template: tuple[float, ...]
) -> tuple[UInt8[np.ndarray, "1 size size 3"], dict[str, Any]]:
    """A file's bytes as the square around its largest face; and what else `DECODED` asks for.

    Raises:
        InputError: not a usable picture, or there is no face.
    """
    found = faces.read_portrait(content, size, template)
    landmarks = [value * size for value in found.landmarks]
    return found.pixels[None], {"enlarged": found.zoom > 1, "landmarks": landmarks, "num_faces": found.num_faces}


def decode_one(
    content: bytes, size: int, halves: bool
) -> tuple[UInt8[np.ndarray, "parts size size 3"], dict[str, Any]]:
    """A file's bytes as one square, or as two where it is two pictures side by side; and whether that enlarged it.

    Raises:
        InputError: not a usable picture.
    """
    image = images.decode(content, square=None if halves else size)
    pieces = [image]
    if halves:
        if image.width % 2 or not image.width / image.height >= 1.2:
            raise InputError(f"{image.width} x {image.height} pixels; two pictures side by side are expected")
        middle = image.width // 2
        pieces = [image.crop((0, 0, middle, image.height)), image.crop((middle, 0, image.width, image.height))]
    enlarged = min(min(piece.size) for piece in pieces) < size
    return np.stack([images.to_square(piece, size) for piece in pieces]), {"enlarged": enlarged}


def _read_or_error(uri: str) -> bytes | InputError:
    """A picture's bytes. What is wrong with one file sets it aside; a store that refuses stops the work."""
    try:
        archive, bang, member = uri.partition(".zip!")
        return _archive(f"{archive}.zip").read(member) if bang else storage.read_bytes(uri)
    except FileNotFoundError:
        return InputError("the file is gone")
    except (zipfile.BadZipFile, KeyError) as error:
        return InputError(f"cannot be read from the archive ({error})")
    except InputError as error:
        if storage.is_remote(uri) and not isinstance(error, storage.UnusableNameError):
            raise
        return InputError(str(error).removeprefix(f"{uri}: "))


class Archive:
    """A zip file, local or remote: listed once, then each member costs one ranged read, from any thread."""

    def __init__(self, uri: str) -> None:
        fs, path = storage.filesystem(uri)
        self.uri = uri
        self.file = storage.persistently(uri, lambda: fs.open_input_file(path))
        try:
            listing = storage.persistently(uri, self._listing)
        except zipfile.BadZipFile as error:
            raise InputError(f"{uri} is not a whole zip file ({error}); download it again") from None
        self.members = {info.filename: info for info in listing if not info.is_dir()}

    def _listing(self) -> list[zipfile.ZipInfo]:
        try:
            return zipfile.ZipFile(self.file).infolist()
        except (ValueError, NotImplementedError, struct.error) as error:  # so it ends where the listing is nonsense
            raise zipfile.BadZipFile(str(error)) from None

    def sizes(self) -> dict[str, int]:
        """Size of each member by its path."""
        return {name: info.file_size for name, info in self.members.items()}

    def read(self, member: str) -> bytes:
        """Raises KeyError where there is no such member, BadZipFile where it is damaged."""
        info = self.members[member]
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise zipfile.BadZipFile(f"packed by method {info.compress_type}, only 0 and 8 are read: pack it anew")
        # local header: 30 bytes, name and extra field (whose length may differ from the listing's), then data
        start, size = info.header_offset, 30 + len(info.filename.encode()) + 2**10 + info.compress_size
        data = storage.persistently(self.uri, lambda: self.file.read_at(size, start))
        if len(data) < 30 or data[:4] != b"PK\x03\x04" or info.flag_bits & 1:
            raise zipfile.BadZipFile("damaged or encrypted member")
        skip = 30 + int.from_bytes(data[26:28], "little") + int.from_bytes(data[28:30], "little")
        data = data[skip : skip + info.compress_size]
        try:
            content = data if info.compress_type == zipfile.ZIP_STORED else zlib.decompress(data, -15)
        except zlib.error as error:
            raise zipfile.BadZipFile(str(error)) from None
        if zlib.crc32(content) != info.CRC:
            raise zipfile.BadZipFile("bad checksum")
        return content


@functools.lru_cache(maxsize=2)
def _archive(uri: str) -> Archive:
    return Archive(uri)


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """Where decoded pictures wait to be written; removed at the end."""
    return tempfile.TemporaryDirectory(prefix="ddpm-prepare-")
