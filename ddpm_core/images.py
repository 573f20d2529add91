"""Images in and out: decoding what users really have, and the one preprocessing of training and use.

uint8   b h w 3   sRGB
float   b 3 h w   in [-1, 1]
"""

import contextlib
import functools
import hashlib
import io
import math
import posixpath
import struct
import threading
import warnings
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pillow_heif
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageCms, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor, nn

from ddpm_core import colour, containers
from ddpm_core.config import OutputFormat
from ddpm_core.errors import InputError

MAX_PIXELS = 100_000_000
"""Larger images are refused before they are decoded (decompression bombs); a JPEG counts as its decoder scales it."""
MAX_JPEG_PIXELS = 4 * MAX_PIXELS
"""Larger JPEGs are refused, too."""
MIN_SIDE = 8
"""Smaller images are refused: there is nothing in them to translate."""
MAX_BYTES = 4 * MAX_PIXELS
"""Larger files are set aside unread: the largest image needs no more, even uncompressed and with transparency."""
BACKGROUND = (255, 255, 255)
"""Transparent images are laid over this colour."""
LARGE_PIXELS = 24_000_000
"""Where a square is wanted of a larger image, it is cut out and shrunk first, to four times its side or more."""
STRIP_PIXELS = 2**20
"""Colours are converted strip by strip, so that the steps between take no memory to speak of."""
MAX_SLOW_PIXELS = 16_000_000
"""Larger images are refused where Pillow decodes in Python (QOI, plain and 16-bit PNM, BMP in runs): 1 to 2 s for each
million pixels."""
MAX_EXIF_BYTES, MAX_EXIF_PARTS = 2**20, 16
"""Longer EXIF data, and those in more parts, are not looked at: values become objects of hundreds of bytes."""
MAX_THUMBNAILS = 8
"""Pages of a TIFF that may stand before the image itself: to the n-th Pillow takes a time of n²."""
QUICK_PIXELS = 2**21
"""Larger PNGs are packed quickly: of 12 megapixels in 1.6 s instead of 11.5, in a sixth more bytes."""
QUALITY = 95
"""Of JPEG and WebP, of 100."""
MEDIA_TYPES: dict[OutputFormat, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
"""Of what images are encoded as."""
MAX_SIDE: dict[OutputFormat, int] = {"png": 2**31 - 1, "jpeg": 65_500, "webp": 16_383}
"""Pixels along a side."""
BLOCK_BYTES = 2**26
"""What Pillow allocates at a time: twice what glibc's malloc, which has a heap for each thread, ever keeps in these."""
FORMATS = tuple("AVIF BMP DDS DIB GIF HEIF JPEG2000 PCX PNG PPM QOI SGI TGA TIFF WEBP".split())  # noqa: SIM905
"""What Pillow opens for us beside JPEG; of its other formats one starts a program (EPS), the rest hold no photos."""
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".avif", ".avifs", ".gif", ".bmp", ".dib"}
    | {".heic", ".heif", ".hif", ".heics", ".heifs", ".tif", ".tiff", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".tga", ".icb", ".vda", ".vst", ".qoi"}
    | {".dds", ".pcx", ".sgi", ".rgb", ".rgba", ".bw"}
)
"""File endings taken for images when a folder is listed."""
UNREADABLE = {
    f".{ending}": f"{what}; export it as JPEG or PNG"
    for what, endings in {
        "a raw photo, which is not read": (
            "dng cr2 cr3 crw nef nrw arw srf sr2 orf rw2 raf pef ptx raw rwl srw x3f 3fr fff iiq erf kdc dcr mrw mos "
            "mef gpr"
        ),
        "JPEG XL, which is not read": "jxl",
        "JPEG XR, which is not read": "jxr wdp hdp",
        "an image in layers, which is not read": "psd psb xcf kra ora afphoto procreate",
        "a drawing, which is not read": "svg svgz eps ai ps wmf emf",
        "a document, which is not read": "pdf djvu",
        "a high dynamic range image, which is not read": "exr hdr",
        "an icon, which is not read": "ico cur icns",
        "a scientific image, which is not read": "fit fits fts dcm dicom nii grib bufr hdf",
        "an image of a rare kind, which is not read": (
            "blp dcx ftc ftu gbr iim im msp palm pcd pct pict pxr ras wbmp xbm xpm xwd"
        ),
        "a video, which is not read": "mp4 m4v mov avi mkv webm mpg mpeg wmv flv 3gp mts m2ts ogv fli flc",
    }.items()
    for ending in endings.split()
}
"""Endings of what stands beside images and is not read, with the reason and the remedy: set aside, not passed over."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF's Orientation."""
SIDEWAYS = [turn for orientation, turn in TURNS.items() if orientation >= 5]
"""Those that make the width the height."""
EXIF_IGNORED = "its EXIF data are damaged and were ignored: it was taken as it lies"
POINTERS = {
    b"version https://git-lfs": "a pointer of Git LFS whose content is not here; git lfs pull brings it",
    b"/annex/objects/": "a pointer of git-annex whose content is not here; git annex get brings it",
}
"""How text files begin that stand for images, with the reason and the remedy."""
CUT = "truncated or corrupt (a part of its data is missing); copy or save it again"
SCALED_DOWN = f"it counts as more than {MAX_PIXELS:,} pixels and was scaled down"
PROFILE_IGNORED = "its colour profile cannot be used and was ignored"


class Budget:
    """So much of something at once over the threads of a process; who wants more than there is gets it alone."""

    def __init__(self, total: int) -> None:
        self.total, self.used = total, 0
        self.turn, self.changed = threading.Lock(), threading.Condition()

    @contextlib.contextmanager
    def take(self, amount: int) -> Iterator[None]:
        with self.turn, self.changed:  # in turn: a large one would wait for ever behind small ones
            self.changed.wait_for(lambda: not self.used or self.used + amount <= self.total)
            self.used += amount
        try:
            yield
        finally:
            with self.changed:
                self.used -= amount
                self.changed.notify_all()


reading = Budget(MAX_BYTES)
"""Bytes of image files that are held at once."""
_decoding = Budget(MAX_PIXELS)
"""Pixels that are decoded at once."""


def check_kind(name: str, first_bytes: bytes) -> None:
    """Raises InputError for a file that ends like one of UNREADABLE and does not begin like an image that is read.

    Raw photos are known by their ending alone: many begin like a TIFF.
    """
    reason = UNREADABLE.get(posixpath.splitext(name)[1].lower())
    if reason and (reason == UNREADABLE[".dng"] or not looks_like_image(first_bytes)):
        raise InputError(f"{name}: {reason}")


def looks_like_image(first_bytes: bytes) -> bool:
    """Whether a file that begins like this (32 bytes will do) is an image that `decode` may take, whatever its name."""
    return bool(containers.MAGIC.match(first_bytes[:1000]))


def decode(data: bytes, *, name: str = "image", square: int | None = None) -> Image.Image:
    """Any still image as upright 8-bit sRGB; what was done that its owner should know is a tuple of texts in its
    `info["notes"]`, and `info["size"]` is the width and height that the file has, upright.

    It is turned as EXIF or the container says; CMYK, palette, grey, 16-bit and float are converted, as are the colours
    of a profile; transparency is laid over white. Of several pages the first is taken.
    With `square`, the side of what `to_square` is to make of it, a JPEG twice as large or larger comes out as that
    square: the decoder leaves out detail that shrinking would lose, in half the time. Of other very large images comes
    their centred square, shrunk.

    Over all threads no more than MAX_PIXELS are decoded at once, at 4 bytes a pixel (PNG, JPEG, TIFF) to 9 (HEIF, AVIF)
    and 19 (WebP, JPEG 2000), and without `square` 4 to 8 more for the result. What the decoder of a progressive JPEG
    holds beside its pixels counts as further pixels.

    Raises:
        InputError: one line naming the image: empty, not an image, truncated, animated, too small, too large,
            fully transparent.
    """
    if not data:
        raise InputError(f"{name}: the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's bomb and EXIF warnings: checked and handled here
            return _decode(data, square)
    except InputError as error:
        reason = str(error)
    except UnidentifiedImageError:
        reason = next(
            (why for begins, why in POINTERS.items() if data.startswith(begins)),
            "not an image, or of a kind that is not supported; convert it to PNG or JPEG",
        )
    except Image.DecompressionBombError:
        reason = f"more than {MAX_PIXELS:,} pixels: scale it down"
    except MemoryError:
        reason = "too large for this machine's memory: scale it down"
    except Exception as error:  # decoders raise anything, and whatever it is, it is this one file's fault
        what = " ".join(str(error).split())[:200] or type(error).__name__
        reason = f"truncated or corrupt ({what}); copy or save it again"
    raise InputError(f"{name}: {reason}")


def _decode(data: bytes, square: int | None) -> Image.Image:
    """See `decode`, which names the image in the InputError and makes one of everything else."""
    notes: list[str] = []
    image, chunks = _open(data, notes)
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise InputError(f"{width} x {height} pixels; at least {MIN_SIDE} x {MIN_SIDE} are needed")
    too_large = f"{width} x {height} pixels; at most {MAX_PIXELS:,} are taken: scale it down"
    if width * height > MAX_JPEG_PIXELS:
        raise InputError(too_large)
    scans, held = [], 0
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        scans = _scans(image, data)
        if image.info.get("progressive") or len(scans[0].components) < image.layers:
            # Until the last scan is read its decoder holds all coefficients, however small the image comes out.
            held = 32 * _blocks(image)  # 64 of 2 bytes each are as much as 32 pixels
    extent = _draft(image, square, MAX_PIXELS - held)
    if extent is not None and square is None:
        notes.append(SCALED_DOWN)
    pixels = image.width * image.height + held
    if pixels > MAX_PIXELS:
        whole = f", or save it as a baseline JPEG: as a progressive one it counts as {pixels:,}" if held else ""
        raise InputError(too_large + whole)
    if pixels > MAX_SLOW_PIXELS and any(tile[0] in Image.DECODERS for tile in getattr(image, "tile", ())):
        raise InputError(
            f"{width} x {height} pixels; at most {MAX_SLOW_PIXELS:,} are taken of this format: save it as PNG"
        )
    with _decoding.take(pixels):
        image.load()
        if isinstance(image, JpegImagePlugin.JpegImageFile):
            _check_whole(image, data, scans)
        turn = _turn(image, notes)
        transform = _transform(image, data, chunks, notes)
        if extent is not None and square is not None:
            image = _middle(image, extent, square)
        image = _to_srgb(image, transform, square)
        if turn is not None:
            image = image.transpose(turn)
    image.info = {"notes": tuple(notes), "size": (height, width) if turn in SIDEWAYS else (width, height)}
    return image


# ---------------------------------------------------------------------------------------------- opening


def _open(data: bytes, notes: list[str]) -> tuple[Image.Image, dict[bytes, bytes]]:
    """The image without its pixels, and a PNG's chunks of colour.

    Raises:
        InputError: an animation, or a raw photo.
    """
    chunks: dict[bytes, bytes] = {}
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        data, chunks = containers.png_parts(data)
    data = containers.checked(data)
    try:
        if data.count(b"Exif\0\0") > MAX_EXIF_PARTS:
            raise ValueError("more EXIF data than any camera writes")
        image = _open_as_it_is(data)
    except Exception:
        if b"Exif" not in data:
            raise
        image = _open_as_it_is(data.replace(b"Exif", b"void"))  # some decoders read EXIF at once, and stumble over it
        notes.append(EXIF_IGNORED)
    if len(image.info.get("exif") or b"") > MAX_EXIF_BYTES:
        del image.info["exif"]
        notes.append(EXIF_IGNORED)
    several = getattr(image, "is_animated", False)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _skip_thumbnails(image)
        if several:
            notes.append("of its pages the first was taken")
    elif several and (image.format != "HEIF" or getattr(image, "custom_mimetype", "").endswith("sequence")):
        raise InputError("an animation; save one of its images as PNG or JPEG")
    elif several:
        notes.append("of its images the main one was taken")
    return image, chunks


def _open_as_it_is(data: bytes) -> Image.Image:
    _set_up_pillow()
    if data.startswith(b"\xff\xd8\xff"):
        # Not by Image.open: it counts the pixels before they are scaled, and takes a phone's previews for an animation.
        return JpegImagePlugin.JpegImageFile(io.BytesIO(data))
    return Image.open(io.BytesIO(data), formats=FORMATS)


@functools.cache
def _set_up_pillow() -> None:
    """Once a process: Pillow opens HEIF from now on, of a file only its images, no thumbnails and maps of depth; and it
    gives the memory of large images back."""
    pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)
    Image.core.set_block_size(BLOCK_BYTES)


def _skip_thumbnails(image: TiffImagePlugin.TiffImageFile) -> None:
    """On to the first page that is an image itself (TIFF 6.0, NewSubfileType)."""
    with contextlib.suppress(EOFError):
        for page in range(1, MAX_THUMBNAILS + 2):
            if not image.tag_v2.get(254, 0) & 1:
                return
            image.seek(page)
    raise InputError(UNREADABLE[".dng"])


def _scans(image: JpegImagePlugin.JpegImageFile, data: bytes) -> list[containers.Scan]:
    """A JPEG's.

    Raises:
        InputError: some, or their data, are missing: of 1 kB libjpeg makes whatever size it announces.
    """
    scans = list(containers.jpeg_scans(data))
    if containers.jpeg_misses_scans(scans, bytes(layer[0] for layer in image.layer)):
        raise InputError(CUT)
    if scans[0].frame < 0xC8 and 8 * len(data) < _blocks(image):  # of Huffman's code a block takes a bit or more
        raise InputError(CUT)
    return scans


def _blocks(image: JpegImagePlugin.JpegImageFile) -> int:
    """Of 64 coefficients, over all components (ITU-T T.81, A.1.1)."""
    most = [max(layer[side] for layer in image.layer) for side in (1, 2)]
    counts = (
        math.prod(-(-image.size[side] * layer[1 + side] // (8 * most[side])) for side in (0, 1))
        for layer in image.layer
    )
    return sum(counts)


def _draft(image: Image.Image, square: int | None, room: int) -> tuple[float, float] | None:
    """Has a JPEG's decoder scale it down, to twice `square` or, without that, to `room` pixels: what is then of the
    image, a width and a height that need not be whole; None where it stays as large as it is."""
    if image.format != "JPEG":
        return None
    before = image.size
    wanted = (square, square) if square is not None else before
    if square is None:
        scale = next((n for n in (1, 2, 4) if before[0] * before[1] <= room * n**2), 8)
        wanted = (before[0] // scale, before[1] // scale)
    drafted = image.draft(None, (max(wanted[0], 1), max(wanted[1], 1)))
    return None if drafted is None or image.size == before else drafted[1][2:]


def _check_whole(image: JpegImagePlugin.JpegImageFile, data: bytes, scans: list[containers.Scan]) -> None:
    """Raises InputError for a JPEG that was cut and then closed with an end marker.

    libjpeg fills what is missing with grey and says nothing.
    """
    last = image.getpixel((image.width - 1, image.height - 1))
    grey = all(value in (127, 128) for value in (last if isinstance(last, tuple) else (last,)))
    if grey or (len(scans) > 1 and not image.info.get("progressive")):
        # The last block is what is filled in, or may be what was drawn: only the former changes with more data.
        drawn = [_small(each) for each in (data, containers.with_more_data(data, scans[-1]))]
        if drawn[0] != drawn[1]:
            raise InputError(CUT)


def _small(data: bytes) -> bytes:
    """The pixels of a JPEG at an eighth of its size."""
    image = _open_as_it_is(data.replace(b"Exif", b"void"))  # which tells nothing of pixels, and may be huge
    image.draft(None, (max(image.width // 8, 1), max(image.height // 8, 1)))
    return image.tobytes()


def _turn(image: Image.Image, notes: list[str]) -> Image.Transpose | None:
    """How EXIF says that the image is to be turned. What makes no sense as a whole is not believed in a part."""
    if image.format in ("TIFF", "HEIF"):
        return None  # their decoders turned it
    try:
        exif = image.getexif()
        turn = TURNS.get(exif.get(0x0112, 1))
        if turn is not None:
            exif.tobytes()
        return turn
    except Exception:  # of all kinds: struct.error, AttributeError, ...
        notes.append(EXIF_IGNORED)
        return None


# ---------------------------------------------------------------------------------------------- colours


def _transform(
    image: Image.Image, data: bytes, chunks: dict[bytes, bytes], notes: list[str]
) -> ImageCms.ImageCmsTransform | None:
    """How the image's colours become sRGB; None where they are, as far as the file says."""
    if image.mode == "LAB":
        return colour.lab()
    grey = image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")
    try:
        profile = _profile(image, data, chunks)
        return (
            colour.transform(profile, "L" if grey else "CMYK" if image.mode == "CMYK" else "RGB") if profile else None
        )
    except Exception:  # littlecms, zlib or arithmetic: the profile is at fault, whatever it was
        notes.append(PROFILE_IGNORED)
        return None


def _profile(image: Image.Image, data: bytes, chunks: dict[bytes, bytes]) -> bytes:
    """The colour profile that the file holds or describes; b"" for sRGB.

    Raises:
        Exception: there is one that makes no sense.
    """
    if b"cICP" in chunks:  # the first of these that is there counts (PNG, third edition, 4.3)
        return colour.numbered_profile(chunks[b"cICP"][0], chunks[b"cICP"][1])
    if b"iCCP" in chunks:
        packed = chunks[b"iCCP"].split(b"\0", 1)[1][1:]
        profile = containers.unpacked(packed, containers.MAX_PROFILE_BYTES)
        if not profile:
            raise ValueError("damaged or too large")
        return profile
    if b"sRGB" in chunks:
        return b""
    if b"gAMA" in chunks or b"cHRM" in chunks:
        return colour.png_profile(chunks.get(b"gAMA", b""), chunks.get(b"cHRM", b""))
    if profile := image.info.get("icc_profile"):
        return profile
    if image.format in ("HEIF", "AVIF") and (at := data.find(b"colrnclx")) >= 0:
        return colour.numbered_profile(*struct.unpack_from(">HH", data, at + 8))
    with contextlib.suppress(Exception):  # damaged EXIF is spoken of elsewhere
        if image.format != "TIFF" and image.getexif().get_ifd(0xA005).get(1) == "R03":  # DCF's optional colour space
            return colour.adobe_rgb_profile()
    return b""


def _to_srgb(image: Image.Image, transform: ImageCms.ImageCmsTransform | None, square: int | None) -> Image.Image:
    """8-bit sRGB over white; of a large image where a square is wanted that square, shrunk.

    Raises:
        InputError: it is transparent all over.
    """
    box, factor = (0, 0, *image.size), 1
    if square is not None and image.width * image.height > LARGE_PIXELS:
        factor = max(min(image.size) // (4 * square), 1)
        side = min(image.size) // factor * factor
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
    if image.mode == "RGB" and "transparency" not in image.info and transform is None and factor == 1:
        return image
    scale = Scale.of(image) if image.mode == "F" or image.mode.startswith("I") else None
    result = Image.new("RGB", ((box[2] - box[0]) // factor, (box[3] - box[1]) // factor))
    rows = max(STRIP_PIXELS // (box[2] - box[0]) // factor, 1) * factor
    seen = False
    for top in range(box[1], box[3], rows):
        strip = image.crop((box[0], top, box[2], min(top + rows, box[3])))
        strip = _strip_to_srgb(strip if scale is None else scale(strip), transform)
        if strip.mode == "RGBA":
            alpha = strip.getchannel("A")
            seen |= bool(alpha.getextrema()[1])
            flat = Image.new("RGB", strip.size, BACKGROUND)
            flat.paste(strip, mask=alpha)
            strip = flat
        else:
            seen = True
        result.paste(strip.reduce(factor) if factor > 1 else strip, (0, (top - box[1]) // factor))
    if not seen:
        raise InputError("fully transparent: there is nothing to see")
    return result


def _strip_to_srgb(strip: Image.Image, transform: ImageCms.ImageCmsTransform | None) -> Image.Image:
    """RGB, or RGBA where there is transparency: colours are converted before anything is mixed with white."""
    alpha = strip.convert("RGBA").getchannel("A") if strip.has_transparency_data else None
    if strip.mode in ("RGBa", "La"):
        strip = strip.convert("RGBA" if strip.mode == "RGBa" else "LA")
    if transform is None:
        rgb = strip.convert("RGB")
    else:
        rgb = transform.apply(strip.convert(transform.input_mode))
    rgb.info.pop("transparency", None)
    if alpha is not None:
        rgb.putalpha(alpha)
    return rgb


class Scale(NamedTuple):
    """Wide grey levels to 8 bits."""

    white: float
    """The value that becomes 255; 0 becomes 0."""
    inverted: bool = False
    """Whether 0 is white."""
    unsigned: bool = False
    """Whether 32-bit integers, which Pillow takes for signed, are not."""
    key: int | None = None
    """The value that is transparent."""

    @classmethod
    def of(cls, image: Image.Image) -> "Scale":
        """By the type of the values where that tells, else by the values."""
        bits, kind, inverted = 16, 1, False
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            bits, kind = image.tag_v2.get(258, (16,))[0], image.tag_v2.get(339, (1,))[0]
            inverted = image.tag_v2.get(262) == 0
        unsigned = image.mode == "I" and (bits, kind) == (32, 1)
        key = image.info.get("transparency")
        scale = cls(65535.0, inverted, unsigned, key if isinstance(key, int) else None)
        if image.mode != "F" and bits <= 16:
            return scale._replace(white=2.0 ** (bits - (kind == 2)) - 1)
        sample = scale.values(image.resize([min(side, 1024) for side in image.size], Image.Resampling.NEAREST))
        return scale._replace(white=_white(sample))

    def values(self, image: Image.Image) -> np.ndarray:
        values = np.asarray(image)
        return (values.view(np.uint32) if self.unsigned else values).astype(np.float64)

    def __call__(self, image: Image.Image) -> Image.Image:
        """L, or LA where a value is transparent."""
        values = self.values(image)
        levels = np.nan_to_num(values / self.white, nan=0, posinf=1, neginf=0).clip(0, 1) * 255
        grey = Image.fromarray((255 - levels if self.inverted else levels).round().astype(np.uint8))
        if self.key is not None:
            grey.putalpha(Image.fromarray((values != self.key).astype(np.uint8) * 255))
        return grey


def _white(values: np.ndarray) -> float:
    """The white of values whose type does not tell: 1, or the largest integer of 8, 16 or 32 bits.

    Of fractions a few may lie above white, as highlights do; whole numbers are levels.
    """
    values = values[np.isfinite(values)]
    if not values.size or (high := float(np.quantile(values, 0.99))) <= 0:
        return 1.0
    whole = bool((values == values.round()).all() and values.max() > 1)
    whites = (1.0, 255.0, 65535.0, 2.0**32 - 1)[whole:]
    return next((white for white in whites if high <= 2 * white), whites[-1])


def _middle(image: Image.Image, extent: tuple[float, float], side: int) -> Image.Image:
    """`to_square` of a JPEG that the decoder shrank: the last of its pixels stand for fewer than the others, so that
    only `extent` of it, a width and a height that need not be whole, is the image."""
    half = min(extent) / 2
    left, top = extent[0] / 2 - half, extent[1] / 2 - half
    return image.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + 2 * half, top + 2 * half))


def read_square(data: bytes, size: int, *, name: str = "image") -> UInt8[np.ndarray, "size size 3"]:
    """An image file as training stored it: decoded, cut to the largest centred square, resized.

    Raises:
        InputError: as `decode`.
    """
    return to_square(decode(data, name=name, square=size), size)


def to_square(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The largest centred square, resized with antialiasing: what training did to every image.

    Raises:
        ValueError: `image` is not as `decode` returns them.
    """
    check_photo(image)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return squeezed(image.crop((left, top, left + side, top + side)), size)


def squeezed(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The whole image as a square, resized with antialiasing.

    By PyTorch's bicubic kernel for uint8, which took a fifth of the time that Pillow's takes, for the same pixels.

    Raises:
        ValueError: `image` is not as `decode` returns them.
    """
    check_photo(image)
    channels_last = torch.from_numpy(np.array(image))[None].permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(channels_last, (size, size), mode="bicubic", antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def check_photo(image: Image.Image) -> None:
    """Raises ValueError unless this is an RGB image of Pillow's, with pixels."""
    if not isinstance(image, Image.Image) or image.mode != "RGB" or not min(image.size):
        what = f"{image.mode}, {image.size}" if isinstance(image, Image.Image) else type(image).__name__
        raise ValueError(f"a Pillow image of mode RGB is needed, as ddpm_core.images.decode returns it, not {what}")


def to_tensor(images: UInt8[np.ndarray, "b h w 3"], device: torch.device | str = "cpu") -> Float[Tensor, "b 3 h w"]:
    """uint8 pixels to [-1, 1]."""
    return to_float(torch.tensor(images, dtype=torch.uint8, device=device))


def to_float(pictures: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b 3 h w"]:
    """uint8 pixels on a device to [-1, 1] there."""
    return pictures.permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1)


def to_uint8(images: Float[Tensor, "b 3 h w"]) -> UInt8[np.ndarray, "b h w 3"]:
    """[-1, 1] to uint8 pixels, rounded and clipped; the inverse of `to_tensor`."""
    pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def content_hash(image: UInt8[np.ndarray, "h w 3"]) -> int:
    """63-bit hash of an image's pixels and shape: what its sampling noise is drawn from."""
    digest = hashlib.blake2b(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes(), digest_size=8)
    return int.from_bytes(digest.digest(), "little") >> 1


def encode(
    image: UInt8[np.ndarray, "h w 3"],
    kind: OutputFormat,
    *,
    xmp: str = "",
    text: Mapping[str, str] = MappingProxyType({}),
) -> bytes:
    """One image as a file of `kind` with an XMP packet, "" for none; `text` is for PNG, as `encode_png` takes it.

    Raises:
        InputError: it has more pixels along a side than such a file can have.
    """
    if max(image.shape[:2]) > MAX_SIDE[kind]:
        raise InputError(
            f"a result of {image.shape[1]} x {image.shape[0]} pixels is too large for {kind}, which has at most "
            f"{MAX_SIDE[kind]} along a side; take png, or results of the model's size"
        )
    if kind == "png":
        return encode_png(image, text={**({"XML:com.adobe.xmp": xmp} if xmp else {}), **text})
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind.upper(), quality=QUALITY, **({"xmp": xmp.encode()} if xmp else {}))
    return buffer.getvalue()


def encode_png(image: UInt8[np.ndarray, "h w 3"], *, text: Mapping[str, str] = MappingProxyType({})) -> bytes:
    """One image as PNG bytes; `text` by keyword in iTXt chunks."""
    buffer, chunks = io.BytesIO(), PngImagePlugin.PngInfo()
    for keyword, value in text.items():
        chunks.add_itxt(keyword, value)
    quick = {"compress_level": 1} if image.shape[0] * image.shape[1] > QUICK_PIXELS else {}
    Image.fromarray(image).save(buffer, "PNG", pnginfo=chunks, **quick)
    return buffer.getvalue()


def grid(rows: list[list[UInt8[np.ndarray, "h w 3"]]], *, gap: int = 2, scale: int = 1) -> UInt8[np.ndarray, "H W 3"]:
    """Rows of equally sized images as one image on white, enlarged `scale` times without smoothing."""
    if not rows or not rows[0]:
        raise ValueError("a grid needs at least one image")
    height, width = rows[0][0].shape[0] * scale, rows[0][0].shape[1] * scale
    columns = max(len(row) for row in rows)
    canvas = np.full((len(rows) * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            top, left = i * (height + gap), j * (width + gap)
            canvas[top : top + height, left : left + width] = picture.repeat(scale, 0).repeat(scale, 1)
    return canvas
