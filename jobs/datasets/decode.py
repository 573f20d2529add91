"""Files to squares, by all CPUs; what cannot be read is set aside with its reason."""

import collections
import concurrent.futures
import contextlib
import functools
import tempfile
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from ddpm_core import faces, images, storage
from ddpm_core.errors import InputError, reason
from jobs.common import workers
from jobs.common.progress import Progress
from jobs.datasets import writing
from jobs.datasets.archive import archive
from jobs.datasets.options import Encoding
from jobs.datasets.scan import mark

IMAGES_PER_TASK, FACES_PER_TASK = 64, 8
"""Images that one task decodes, and of those in which it looks for faces, which takes thirty times as long."""
READ_THREADS = 8
"""Images at once in one task: hides a bucket's latency."""


class File(NamedTuple):
    """An image to decode."""

    name: str
    """What to call it in messages."""
    uri: str
    """The file; `archive.zip!member` for a member of an archive."""


class Decoded(NamedTuple):
    """What comes of a file."""

    pixels: bytes
    """(parts, size, size, 3) uint8."""
    marks: tuple[bytes, ...]
    """Of each part."""
    enlarged: bool
    """Whether it was smaller than it is stored."""
    landmarks: list[float] | None = None
    """In pixels of the stored image, where it was aligned."""
    num_faces: int = 0
    notes: tuple[str, ...] = ()
    """Of `images.decode`."""
    size: tuple[int, int] = (0, 0)
    """Width and height that the file has, where the square is its middle."""


# ---------------------------------------------------------------------------------------------- decoding


class Pixels:
    """Decoded images in a file, (n, parts, s, s, 3) uint8, so that 200,000 of them need no memory."""

    def __init__(self, shape: tuple[int, int, int, int, int]) -> None:
        self.shape = shape
        with self._explained():
            # It has no name, nor a folder of its own: nothing is left when the process is killed.
            self.file = tempfile.TemporaryFile()  # noqa: SIM115
        self.ok = np.zeros(shape[0], bool)
        """(n,) whether the image is used."""
        self.marks: list[tuple[bytes, ...]] = [()] * shape[0]
        """`survey.mark` of each part."""
        self.num_enlarged = 0
        """Images that are smaller than they are stored."""
        self.landmarks: list[list[float] | None] = [None] * shape[0]
        """In pixels of the stored image, of those that were aligned."""
        self.num_several = 0
        """Aligned images with other faces than the one that was taken."""
        self.num_noted: collections.Counter[str] = collections.Counter()
        """Images by the notes of `images.decode`."""
        self.sizes = [(0, 0)] * shape[0]
        """Width and height that the file has, where the square is its middle."""

    def __setitem__(self, row: int, pixels: bytes) -> None:
        size = int(np.prod(self.shape[1:]))
        assert len(pixels) == size, row
        with self._explained():
            self.file.seek(row * size)
            self.file.write(pixels)

    def put(self, row: int, decoded: Decoded) -> None:
        """An image of `decode_images`."""
        self[row] = decoded.pixels
        self.ok[row] = True
        self.marks[row] = decoded.marks
        self.num_enlarged += decoded.enlarged
        self.landmarks[row] = decoded.landmarks
        self.num_several += decoded.num_faces > 1
        self.num_noted.update(decoded.notes)
        self.sizes[row] = decoded.size

    def __getitem__(self, index: tuple[int, int]) -> UInt8[np.ndarray, "s s 3"]:
        row, part = index
        size = int(np.prod(self.shape[2:]))
        with self._explained():
            self.file.seek((row * self.shape[1] + part) * size)
            return np.frombuffer(self.file.read(size), np.uint8).reshape(self.shape[2:])

    def _explained(self) -> contextlib.AbstractContextManager[None]:
        bytes_needed = int(np.prod(self.shape))
        return storage.user_errors(
            f"{tempfile.gettempdir()} (TMPDIR says where) for {bytes_needed / 1e6:,.0f} MB of pixels"
        )

    def means(self) -> np.ndarray:
        """(parts,) mean grey level of each part over the decoded images."""
        rows = np.flatnonzero(self.ok).tolist()
        return np.array([[self[row, part].mean() for part in range(self.shape[1])] for row in rows]).mean(axis=0)

    def notes(self) -> list[str]:
        """What a reader should know of how they were decoded."""
        words = []
        if self.num_enlarged:
            what = "1 image is" if self.num_enlarged == 1 else f"{self.num_enlarged:,} images are"
            was = "was" if self.num_enlarged == 1 else "were"
            words.append(f"{what} smaller than {self.shape[2]} pixels and {was} enlarged")
        if any(points is not None for points in self.landmarks):
            words.append(f"aligned to CelebA's landmarks; of several faces ({self.num_several:,} images) the largest")
        for note, count in sorted(self.num_noted.items()):
            words.append(f"{note} ({count:,} image{'s' * (count > 1)})")
        return words


def decode_images(
    files: Sequence[File],
    *,
    size: int,
    halves: bool,
    encoding: Encoding,
    template: tuple[float, ...] = (),
) -> tuple[Pixels, list[tuple[str, str]]]:
    """Every image cut to a centred square of `size`.

    With `halves` an image is two side by side, and each becomes a part. With `template` (`faces.CELEBA`) the square
    is not the centred one but that which brings the largest face there. Marks are those of the images as `encoding`
    stores them.
    Returns the pixels and (name, reason) of each image that could not be decoded.

    Raises:
        InputError: none could be decoded, or the store refuses.
    """
    pixels = Pixels((len(files), 2 if halves else 1, size, size, 3))
    rejected = []
    decode = functools.partial(decode_task, size=size, halves=halves, encoding=encoding, template=template)
    each = FACES_PER_TASK if template else IMAGES_PER_TASK
    tasks = [(start, [file.uri for file in files[start : start + each]]) for start in range(0, len(files), each)]
    with Progress(total=len(files), description="decode", warms_up=True) as progress:
        for start, found in workers.mapped(decode, tasks, len(tasks)):
            for row, decoded in enumerate(found, start):
                if isinstance(decoded, str):
                    rejected.append((files[row].name, decoded))
                else:
                    pixels.put(row, decoded)
            progress.update(len(found))
    if not pixels.ok.any():
        name, reason = min(rejected)
        raise InputError(f"none of the {len(files)} images can be used; the first: {name}: {reason}")
    return pixels, sorted(rejected)


def decode_task(
    task: tuple[int, Sequence[str]], *, size: int, halves: bool, encoding: Encoding, template: tuple[float, ...]
) -> tuple[int, list[Decoded | str]]:
    """The images of one task, (index of the first, files): each decoded, or the reason why it is not."""
    decode = functools.partial(decode_file, size=size, halves=halves, encoding=encoding, template=template)
    with concurrent.futures.ThreadPoolExecutor(READ_THREADS) as pool:
        return task[0], list(pool.map(decode, task[1]))


def decode_file(uri: str, *, size: int, halves: bool, encoding: Encoding, template: tuple[float, ...]) -> Decoded | str:
    """A file's square or squares, or the reason why there are none.

    Raises:
        InputError: the store refuses.
    """
    with images.reading.take(num_bytes(uri)):
        content = read_or_error(uri)
        try:
            if isinstance(content, InputError):
                raise content
            squares, facts = portrait(content, size, template) if template else decode_one(content, size, halves)
        except InputError as error:
            return str(error).removeprefix("image: ")
    marks = tuple(mark(writing.stored(square, encoding)) for square in squares)
    return Decoded(squares.tobytes(), marks, **facts)


def portrait(
    content: bytes, size: int, template: tuple[float, ...]
) -> tuple[UInt8[np.ndarray, "1 size size 3"], dict[str, Any]]:
    """A file's bytes as the square around its largest face; and what else `Decoded` asks for.

    Raises:
        InputError: not a usable image, or there is no face.
    """
    found = faces.read_portrait(content, size, template)
    landmarks = [value * size for value in found.landmarks]
    facts = {"enlarged": found.zoom > 1, "landmarks": landmarks, "num_faces": found.num_faces, "notes": found.decoded}
    return found.pixels[None], facts


def decode_one(
    content: bytes, size: int, halves: bool
) -> tuple[UInt8[np.ndarray, "parts size size 3"], dict[str, Any]]:
    """A file's bytes as one square, or as two where it is two images side by side; and whether that enlarged it.

    Raises:
        InputError: not a usable image.
    """
    image = images.decode(content, square=None if halves else size)
    pieces = [image]
    if halves:
        if image.width % 2 or not image.width / image.height >= 1.2:
            raise InputError(f"{image.width} x {image.height} pixels; two images side by side are expected")
        middle = image.width // 2
        pieces = [image.crop((0, 0, middle, image.height)), image.crop((middle, 0, image.width, image.height))]
    enlarged = min(min(piece.size) for piece in pieces) < size
    facts = {"enlarged": enlarged, "notes": image.info["notes"], "size": image.info["size"]}
    return np.stack([images.to_square(piece, size) for piece in pieces]), facts


def num_bytes(uri: str) -> int:
    """Size of a file, 0 where that is not known yet."""
    packed, member = in_archive(uri)
    if not packed:
        return storage.local_size(uri)
    info = archive(packed).members.get(member)
    return info.file_size if info else 0


def in_archive(uri: str) -> tuple[str, str]:
    """The zip file and the member that a `File.uri` means; ("", "") for any other file, whatever its name."""
    file, bang, member = uri.partition(".zip!")
    return (f"{file}.zip", member) if bang and _is_archive(f"{file}.zip") else ("", "")


_is_archive = functools.lru_cache(maxsize=64)(storage.is_file)


def read_or_error(uri: str, *, max_bytes: int = images.MAX_BYTES) -> bytes | InputError:
    """An image's bytes. What is wrong with one file sets it aside; a store that refuses stops the work."""
    packed, member = in_archive(uri)
    try:
        if packed:
            content = archive(packed).read(member, max_bytes=max_bytes)
        else:
            content = storage.read_bytes(uri, max_bytes=max_bytes)
        images.check_kind(member or uri, content)
        return content
    except FileNotFoundError:
        return InputError("the file is gone")
    except (zipfile.BadZipFile, KeyError) as error:
        return InputError(f"cannot be read from the archive ({error})")
    except InputError as error:
        if storage.is_remote(uri) and not isinstance(error, (storage.UnusableNameError, storage.TooLargeError)):
            raise
        return InputError(reason(error, member or uri))
