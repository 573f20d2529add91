"""Images in and out: decoding what users really have, and the one preprocessing of training and use.

uint8   b h w 3   sRGB
float   b 3 h w   in [-1, 1]
"""

import functools
import hashlib
import io
import posixpath
import re
import warnings

import numpy as np
import pillow_heif
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor, nn

from ddpm_core.errors import InputError

MAX_PIXELS = 100_000_000
"""Larger images are refused before they are decoded (decompression bombs)."""
MIN_SIDE = 8
"""Smaller images are refused: there is nothing in them to translate."""
BACKGROUND = (255, 255, 255)
"""Transparent images are laid over this colour."""
MAX_BYTES = 4 * MAX_PIXELS
"""Larger files are set aside unread: the largest image needs no more, even uncompressed and with transparency."""
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".avif", ".avifs", ".gif", ".bmp", ".dib"}
    | {".heic", ".heif", ".hif", ".heics", ".heifs", ".tif", ".tiff", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".tga", ".qoi"}
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
        "a video, which is not read": "mp4 m4v mov avi mkv webm mpg mpeg wmv flv 3gp mts m2ts ogv",
    }.items()
    for ending in endings.split()
}
"""Endings of what stands beside images and is not read, with the reason and the remedy: set aside, not passed over."""
MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF.{4}WEBP|.{4}ftyp(?:avi[fs]|he[iv]\w|mi[af]\d|msf1)"
    rb"|(?:II[*+]\0|MM\0[*+])|BM.{12}[\x0c(48@l|]\0{3}|\0{3}\x0cjP  \r\n|\xff\x4f\xff\x51|qoif"
    rb"|P(?:[1-6]\s(?:\s|#[^\n]*\n)*\d+\s|[Ff]\s+\d+\s)",
    re.DOTALL,
)
"""How files begin that `decode` takes: JPEG, PNG, GIF, WebP, AVIF and HEIF, TIFF, BMP, JPEG 2000, QOI, PNM and PFM."""


def check_listed(name: str, num_bytes: int = 0) -> None:
    """What a folder's listing tells of a file, before it is read.

    Raises:
        InputError: its ending is one of UNREADABLE, or it is larger than MAX_BYTES.
    """
    if reason := UNREADABLE.get(posixpath.splitext(name)[1].lower()):
        raise InputError(f"{name}: {reason}")
    if num_bytes > MAX_BYTES:
        raise InputError(
            f"{name}: {num_bytes / 1e6:,.0f} MB; at most {MAX_BYTES / 1e6:,.0f} MB are read: scale it down"
        )


def looks_like_image(first_bytes: bytes) -> bool:
    """Whether a file that begins like this (32 bytes will do) is an image that `decode` may take, whatever its name."""
    return bool(MAGIC.match(first_bytes))


def decode(data: bytes, *, name: str = "image", square: int | None = None) -> Image.Image:
    """Any still image as upright 8-bit sRGB.

    EXIF orientation is applied; CMYK, palette, grey and 16-bit are converted; transparency is laid over white.
    With `square`, the side of what `to_square` is to make of it, a JPEG twice as large or larger comes out as that
    square: the decoder leaves out detail that shrinking would lose, in half the time.

    Raises:
        InputError: one line naming the image: empty, not an image, truncated, animated, too small, too large.
    """
    if not data:
        raise InputError(f"{name}: the file is empty")
    _open_heif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's bomb and EXIF warnings: checked and handled here
            image: Image.Image = Image.open(io.BytesIO(data))
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise InputError(f"{name}: {width} x {height} pixels; at most {MAX_PIXELS:,} are taken: scale it down")
            if min(width, height) < MIN_SIDE:
                raise InputError(f"{name}: {width} x {height} pixels; at least {MIN_SIDE} x {MIN_SIDE} are needed")
            # MPO is what many phones write: a JPEG with previews behind it, not an animation.
            if getattr(image, "n_frames", 1) > 1 and image.format not in ("MPO", "TIFF"):
                raise InputError(
                    f"{name}: an animation of {getattr(image, 'n_frames', 0)} frames; save one as PNG or JPEG"
                )
            drafted = None if square is None else image.draft(None, (square, square))  # of all kinds JPEG only
            image.load()
            if square is not None and drafted is not None and image.size != (width, height):
                image = _middle(image, drafted[1][2:], square)
            ImageOps.exif_transpose(image, in_place=True)
            return _to_srgb(image)
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(
            f"{name}: not an image, or of a kind that is not supported; convert it to PNG or JPEG"
        ) from None
    except Image.DecompressionBombError:
        raise InputError(f"{name}: more than {MAX_PIXELS:,} pixels: scale it down") from None
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        IndexError,
        TypeError,
        OverflowError,
        MemoryError,
    ) as error:
        raise InputError(f"{name}: truncated or corrupt ({error}); copy or save it again") from None


@functools.cache
def _open_heif() -> None:
    """Pillow opens HEIF from now on; of a file only its images, no thumbnails and maps of depth."""
    pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)


def _middle(image: Image.Image, extent: tuple[float, float], side: int) -> Image.Image:
    """`to_square` of a JPEG that the decoder shrank: the last of its pixels stand for fewer than the others, so that
    only `extent` of it, a width and a height that need not be whole, is the image."""
    half = min(extent) / 2
    left, top = extent[0] / 2 - half, extent[1] / 2 - half
    return image.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + 2 * half, top + 2 * half))


def _to_srgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        # 16-bit and float greys: Pillow's own conversion clips instead of scaling.
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        wide = image.mode.startswith("I;16") or values.max(initial=0) > 255
        top = 65535.0 if wide else (255.0 if values.max(initial=0) > 1 else 1.0)
        image = Image.fromarray((np.clip(values / top, 0, 1) * 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        flat = Image.new("RGBA", rgba.size, (*BACKGROUND, 255))
        flat.alpha_composite(rgba)
        image = flat.convert("RGB")
    if isinstance(profile, bytes) and profile and image.mode in ("RGB", "CMYK"):
        image = _from_profile(image, profile)
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """Colours of an embedded profile (phones: Display P3) as sRGB; a profile that cannot be used is ignored."""
    try:
        theirs = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(theirs):
            return image
        ours = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, theirs, ours, outputMode="RGB") or image
    except (ImageCms.PyCMSError, OSError):
        return image


def read_square(data: bytes, size: int, *, name: str = "image") -> UInt8[np.ndarray, "size size 3"]:
    """An image file as training stored it: decoded, cut to the largest centred square, resized.

    Raises:
        InputError: as `decode`.
    """
    return to_square(decode(data, name=name, square=size), size)


def to_square(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The largest centred square, resized with antialiasing: what training did to every image.

    By PyTorch's bicubic kernel for uint8, which took a fifth of the time that Pillow's takes, for the same pixels.

    Raises:
        ValueError: `image` is not as `decode` returns them.
    """
    check_photo(image)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = torch.from_numpy(np.array(image.crop((left, top, left + side, top + side))))
    channels_last = square[None].permute(0, 3, 1, 2)
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


def encode_png(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """One image as PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
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
