"""Colours as files have them, to sRGB: ICC profiles, and spaces that are named by numbers.

A space without a profile (PNG's gAMA and cHRM, the code points of ITU-T H.273 in PNG, HEIF and AVIF) is written as one,
so that littlecms does every conversion.
"""

import functools
import io
import struct
from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageCms

SAME = 1
"""Levels of 255 within which a profile is sRGB: rounding."""
D65 = (0.3127, 0.3290)
PRIMARIES: dict[int, tuple[tuple[float, float], ...]] = {
    1: (D65, (0.64, 0.33), (0.30, 0.60), (0.15, 0.06)),
    5: (D65, (0.64, 0.33), (0.29, 0.60), (0.15, 0.06)),
    6: (D65, (0.63, 0.34), (0.31, 0.595), (0.155, 0.07)),
    9: (D65, (0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    11: ((0.314, 0.351), (0.68, 0.32), (0.265, 0.69), (0.15, 0.06)),
    12: (D65, (0.68, 0.32), (0.265, 0.69), (0.15, 0.06)),
}
"""x, y of white, red, green and blue by H.273's ColourPrimaries."""
SRGB_GAMMA = 1 / 2.2
"""What PNG's gAMA says of an image in sRGB, whose curve is near."""
WHITE_NITS = 203.0
"""ITU-R BT.2408's luminance of diffuse white in a high dynamic range image; what is brighter is clipped."""

Curve = Callable[[np.ndarray], np.ndarray]
"""Of values in [0, 1] as they are stored, the light, in [0, 1]."""


def srgb_curve(stored: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1."""
    return np.where(stored <= 0.04045, stored / 12.92, ((stored + 0.055) / 1.055) ** 2.4)


def gamma_curve(gamma: float) -> Curve:
    """PNG's gAMA: stored = light ** gamma; sRGB's own curve where the file means that."""
    if not gamma > 0:
        raise ValueError(f"gamma is {gamma}")
    return srgb_curve if abs(gamma / SRGB_GAMMA - 1) < 0.01 else lambda stored: stored ** (1 / gamma)


def pq_curve(stored: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084, diffuse white as 1."""
    power = stored ** (1 / 78.84375)
    light = np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)
    return light ** (1 / 0.1593017578125) * 10_000 / WHITE_NITS


def hlg_curve(stored: np.ndarray) -> np.ndarray:
    """ITU-R BT.2100's HLG, diffuse white (75 % of the signal) as 1."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073

    def scene(e: np.ndarray) -> np.ndarray:
        return np.where(e <= 0.5, e**2 / 3, (np.exp((e - c) / a) + b) / 12)

    return scene(stored) / scene(np.array(0.75))


CURVES: dict[int, Curve] = {
    4: lambda stored: stored**2.2,
    5: lambda stored: stored**2.8,
    8: lambda stored: stored,
    16: pq_curve,
    18: hlg_curve,
}
"""By H.273's TransferCharacteristics; those of television are shown as sRGB's, as browsers do."""


def numbered_profile(primaries: int, transfer: int) -> bytes:
    """An ICC profile of H.273's ColourPrimaries and TransferCharacteristics; b"" for sRGB and what is not known."""
    if primaries not in PRIMARIES and transfer not in CURVES:
        return b""
    return rgb_profile(PRIMARIES.get(primaries, PRIMARIES[1]), CURVES.get(transfer, srgb_curve))


@functools.cache
def adobe_rgb_profile() -> bytes:
    """An ICC profile of Adobe RGB (1998)."""
    return rgb_profile((D65, (0.64, 0.33), (0.21, 0.71), (0.15, 0.06)), lambda stored: stored ** (563 / 256))


def png_profile(gamma: bytes, chromaticities: bytes) -> bytes:
    """An ICC profile of PNG's gAMA and cHRM (the chunks' content, b"" where there is none).

    Raises:
        ValueError, LinAlgError, struct.error: they make no sense.
    """
    curve = gamma_curve(struct.unpack(">I", gamma)[0] / 1e5) if gamma else srgb_curve
    points = PRIMARIES[1]
    if chromaticities:
        values = np.array(struct.unpack(">8I", chromaticities)).reshape(4, 2) / 1e5
        points = tuple((x, y) for x, y in values.tolist())
    return rgb_profile(points, curve)


def rgb_profile(primaries: tuple[tuple[float, float], ...], curve: Curve) -> bytes:
    """An ICC profile (version 2, matrix and curves; ICC.1:2001-04) of x, y of white, red, green, blue.

    Raises:
        ValueError, LinAlgError: these span no colours.
    """
    xyz = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    white, columns = xyz[:, 0], xyz[:, 1:]
    matrix = adaptation(white) @ columns * np.linalg.solve(columns, white)
    levels = (
        (np.clip(curve(np.linspace(0, 1, 4081)), 0, 1) * 65535).round().astype(">u2")
    )  # 255 x 16 + 1: exact at 8 bit
    if not np.isfinite(matrix).all() or np.abs(matrix).max() > 4:
        raise ValueError("these primaries span no colours")
    text = b"made of numbers\0"
    described = b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(78)
    tags = {
        b"desc": described,
        b"cprt": b"text" + bytes(4) + text,
        b"wtpt": _xyz(D50),
        **{name + b"XYZ": _xyz(matrix[:, i]) for i, name in enumerate((b"r", b"g", b"b"))},
        **{
            name + b"TRC": b"curv" + bytes(4) + struct.pack(">I", len(levels)) + levels.tobytes()
            for name in (b"r", b"g", b"b")
        },
    }
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += struct.pack(">4sII", name, 128 + 4 + 12 * len(tags) + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    header = struct.pack(
        ">I4sI4s4s4s12s4s4sIII8sI12s",
        128 + len(table) + len(body), b"", 0x02100000, b"mntr", b"RGB ", b"XYZ ", bytes(12), b"acsp", b"", 0, 0, 0,
        bytes(8), 0, _xyz(D50)[8:],
    )  # fmt: skip
    return header.ljust(128, b"\0") + table + body


D50 = np.array([0.9642, 1.0, 0.8249])


def adaptation(white: Float[np.ndarray, "3"]) -> Float[np.ndarray, "3 3"]:
    """Bradford's: XYZ under `white` to XYZ under D50."""
    cones = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    return np.linalg.solve(cones, np.diag((cones @ D50) / (cones @ white)) @ cones)


def _xyz(values: np.ndarray) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(np.asarray(values) * 65536).round().astype(int).tolist())


# ---------------------------------------------------------------------------------------------- to sRGB


@functools.lru_cache(maxsize=8)
def transform(profile: bytes, kind: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile's colours to sRGB for images of a kind (L, RGB or CMYK); None where they are sRGB's already.

    Its `input_mode` is the mode of the images that it takes: a grey image may have a profile for RGB.

    Raises:
        ImageCms.PyCMSError, OSError: the profile is damaged.
        ValueError: it is for another kind of image.
    """
    theirs, ours = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
    mode = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}.get(space := theirs.profile.xcolor_space.strip())
    if mode is None or (mode != kind and (mode, kind) != ("RGB", "L")):
        raise ValueError(f"it is for {space}")
    made = ImageCms.buildTransform(theirs, ours, mode, "RGB")
    return made if mode == "CMYK" or _changes(made, mode) else None


def _changes(made: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether it changes any of a grid of colours: its name says nothing."""
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    rgb = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 16, 3)
    grid = Image.fromarray(rgb) if mode == "RGB" else Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    change = np.asarray(made.apply(grid), dtype=int) - np.asarray(grid.convert("RGB"), dtype=int)
    return bool(np.abs(change).max() > SAME)


@functools.cache
def lab() -> ImageCms.ImageCmsTransform:
    """From CIE L*a*b* to sRGB."""
    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
