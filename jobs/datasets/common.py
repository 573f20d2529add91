"""What the sources of pictures share: options, decoding with Ray Data, splits by name, progress.

A source is a module with an `Options` dataclass and `draft(options) -> Draft`. `draft` does every check that is
cheap and reads no picture; `Draft.make` does the work.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import posixpath
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import ray.data
from jaxtyping import UInt8

from ddpm_core import images
from ddpm_core.errors import InputError
from jobs import cli, storage
from jobs.data import DatasetCard, Encoding, Row
from jobs.progress import Progress

PICTURES_PER_TASK = 64
"""Pictures that one Ray task decodes."""


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
class Made:
    """What `Draft.make` gives: rows to write and what to tell."""

    rows: Mapping[str, Iterable[Row]]
    """Rows of each split, sorted by id; iterated once."""
    num_rows: int
    rejected: Sequence[tuple[str, str]] = ()
    """(picture, reason) of those that could not be used."""
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
        if posixpath.splitext(file)[1].lower() in images.SUFFIXES
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
    """The command and every option that decides the rows."""
    elsewhere = ("output", "source", "overwrite")
    values = {key: value for key, value in dataclasses.asdict(options).items() if key not in elsewhere}
    return {"command": command, **values}


# ------------------------------------------------------------------------------------------------ splits


def name_hash(name: str) -> bytes:
    """Orders names at random, always in the same way."""
    return hashlib.blake2b(name.encode(), digest_size=8).digest()


def split_names(names: Iterable[str], held_out: Sequence[str] = ("val", "test")) -> dict[str, str]:
    """A tenth of the names for each held-out split and the rest for training, by hash of the name.

    No split is empty as long as there is a name for each.
    """
    ranked = sorted(set(names), key=lambda name: (name_hash(name), name))
    tenth = max(1, round(len(ranked) / 10)) if len(ranked) > len(held_out) else 0
    ends = [split for split in held_out for _ in range(tenth)]
    return {name: ends[rank] if rank < len(ends) else "train" for rank, name in enumerate(ranked)}


# ---------------------------------------------------------------------------------------------- decoding


class Pixels:
    """Decoded pictures on disk: (n, parts, s, s, 3) uint8, so that 200,000 of them need no memory."""

    def __init__(self, array: np.ndarray, ok: np.ndarray) -> None:
        self.array, self.ok = array, ok
        """ok: (n,) bool, whether the picture could be decoded."""

    def __getitem__(self, index: tuple[int, int]) -> UInt8[np.ndarray, "s s 3"]:
        return np.array(self.array[index])

    def means(self) -> np.ndarray:
        """(parts,) mean grey level of each part over the decoded pictures."""
        per_picture = np.array([self.array[row].mean(axis=(1, 2, 3)) for row in np.flatnonzero(self.ok)])
        return per_picture.mean(axis=0)


def decode_pictures(
    pictures: Sequence[Picture], *, size: int, halves: bool, scratch: Path
) -> tuple[Pixels, list[tuple[str, str]]]:
    """Every picture cut to a centred square of `size`, by Ray Data over all its CPUs.

    With `halves` a picture is two side by side, and each becomes a part.
    Returns the pixels and (name, reason) of each picture that could not be decoded.

    Raises:
        InputError: none could be decoded, or the store refuses.
    """
    parts = 2 if halves else 1
    shape = (len(pictures), parts, size, size, 3)
    array = np.memmap(scratch / "pixels.raw", np.uint8, "w+", shape=shape)
    ok = np.zeros(len(pictures), bool)
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
            decode_batch, batch_size=None, batch_format="pyarrow", fn_kwargs={"size": size, "halves": halves}
        )
        for batch in decoded.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
            indices, names, errors = (batch.column(name).to_pylist() for name in ("index", "name", "error"))
            values = batch.column("pixels").to_pylist()
            for index, name, value, error in zip(indices, names, values, errors, strict=True):
                if error is None:
                    array[index] = np.frombuffer(value, np.uint8).reshape(shape[1:])
                    ok[index] = True
                else:
                    rejected.append((name, error))
            progress.update(len(indices))
    if not ok.any():
        name, reason = min(rejected)
        raise InputError(f"none of the {len(pictures)} pictures can be used; the first: {name}: {reason}")
    return Pixels(array, ok), sorted(rejected)


def _batched(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def decode_batch(batch: pyarrow.Table, size: int, halves: bool) -> pyarrow.Table:
    """One task's pictures: pixels, or the reason why there are none."""
    pixels: list[bytes | None] = []
    errors: list[str | None] = []
    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # reading waits on the network, decoding does not
        contents = pool.map(_read_or_error, batch.column("uri").to_pylist())
        for content in contents:
            try:
                if isinstance(content, InputError):
                    raise content
                pixels.append(decode_one(content, size, halves).tobytes())
                errors.append(None)
            except InputError as error:
                pixels.append(None)
                errors.append(str(error).removeprefix("picture: "))
    return pyarrow.table(
        {
            "index": batch.column("index"),
            "name": batch.column("name"),
            "pixels": pyarrow.array(pixels, pyarrow.binary()),
            "error": pyarrow.array(errors, pyarrow.string()),
        }
    )


def decode_one(content: bytes, size: int, halves: bool) -> UInt8[np.ndarray, "parts size size 3"]:
    """A file's bytes as one square, or as two where it is two pictures side by side.

    Raises:
        InputError: not a usable picture.
    """
    image = images.decode(content)
    if not halves:
        return images.to_square(image, size)[None]
    if image.width % 2 or not image.width / image.height >= 1.2:
        raise InputError(f"{image.width} x {image.height} pixels; two pictures side by side are expected")
    middle = image.width // 2
    left, right = image.crop((0, 0, middle, image.height)), image.crop((middle, 0, image.width, image.height))
    return np.stack([images.to_square(left, size), images.to_square(right, size)])


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
        if storage.is_remote(uri):
            raise
        return InputError(str(error).removeprefix(f"{uri}: "))


class Archive:
    """A zip file, local or remote: listed once, then each member costs one ranged read, from any thread."""

    def __init__(self, uri: str) -> None:
        fs, path = storage.filesystem(uri)
        try:
            with storage.explained(uri):
                self.file = fs.open_input_file(path)
                listing = zipfile.ZipFile(self.file).infolist()
        except zipfile.BadZipFile as error:
            raise InputError(f"{uri} is not a whole zip file ({error}); download it again") from None
        self.members = {info.filename: info for info in listing if not info.is_dir()}

    def sizes(self) -> dict[str, int]:
        """Size of each member by its path."""
        return {name: info.file_size for name, info in self.members.items()}

    def read(self, member: str) -> bytes:
        """Raises KeyError where there is no such member, BadZipFile where it is damaged."""
        info = self.members[member]
        # local header: 30 bytes, name and extra field (whose length may differ from the listing's), then data
        start, size = info.header_offset, 30 + len(info.filename.encode()) + 2**10 + info.compress_size
        data = self.file.read_at(size, start)
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
