"""An invisible mark that whoever has its key finds again in an image, at any size and after the usual changes.

    cell          the image is seen as CELLS x CELLS of them, whatever its size and shape
    block         4 x 4 cells, of which three cosines are looked at: across, down, both (4 to 6 waves an image)
    coefficient   luma projected on one of them, 192 in all
    phase         of each coefficient, uniform in [0, 1): what the key is stretched to

Each coefficient is moved to the nearest STEP * (whole number + phase) (quantisation index modulation: Chen & Wornell
2001, dithered); the image that is closest to the source and has these coefficients is the marked one. The score is the
sum of cos 2 pi (coefficient / STEP - phase), each weighted by how well the coefficient survives a small shift, in
standard deviations of what unmarked images have. As the phases of a key drawn at random are independent and uniform,
P(score >= z) <= exp(-z^2 / 2) for any image that was not marked by it (Chernoff's bound; I_0(x) <= exp(x^2 / 4)).

A crop moves the cells: as many places of the original are tried as `_crops` gives, and NEEDED counts them.
"""

import functools
import hashlib
import math

import numpy as np
from jaxtyping import Float, UInt8

from ddpm_core import storage
from ddpm_core.errors import InputError

CELLS, BLOCK = 32, 4
NUM_BLOCKS = CELLS // BLOCK
LOOKED_AT = np.kron([[False, True], [True, True]], np.ones((NUM_BLOCKS, NUM_BLOCKS), bool)).astype(bool)
"""Of the products of two `_cosines`: all but those of two means."""
MIN_SIDE = 64
"""Smaller images are not marked: what can be hidden there does not survive."""
STEP = 14.0
"""Of the coefficients, whose basis has length 1 in cells: 42 dB of PSNR between an image and itself marked."""
MOST_CROPPED, CROP_STEP = 0.1, 1 / 320
"""Shares of a side: how much may have been cut away of it, and how finely that is looked for."""
SHIFT = 0.05
"""Cells by which a coefficient may be off where a crop is found again."""
MOST_LOOKED_AT = 128
"""Larger images are looked at in so many pixels a side."""
FALSE_RATE = 1e-6
"""Bound of the rate at which images that were not marked with a key are taken for marked."""
PUBLIC = b"ddpm-translate"
"""The key where none is given. Everybody has it: the mark then tells honest people that an image was generated, and
keeps nobody from taking it away or from forging it."""
LEAST_KEY_BYTES = 16
STRIPE_PIXELS = 2**18
"""The image is worked on stripe by stripe, so that the steps between take no memory to speak of."""
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def read_key(mark_key: str, *, flag: str = "mark_key") -> bytes:
    """The key that an option means: b"" for none, PUBLIC for public, else what the file of that name holds.

    Raises:
        InputError: there is no such file, or it holds too little.
    """
    if mark_key in ("none", "public"):
        return b"" if mark_key == "none" else PUBLIC
    uri = storage.absolute(mark_key, flag=flag)
    try:
        key = storage.read_bytes(uri, max_bytes=2**16).strip()
    except FileNotFoundError:
        raise InputError(f"{flag} {uri}: no such file; give one that holds a key, or none or public") from None
    if len(key) < LEAST_KEY_BYTES:
        raise InputError(
            f"{flag} {uri}: the file holds {len(key)} bytes, at least {LEAST_KEY_BYTES} are needed "
            f"(openssl rand -hex 32 > {uri})"
        )
    return key


def name_of(key: bytes) -> str:
    """What records call a key: none, public, or a hash of it that tells it from others and not what it is."""
    if key in (b"", PUBLIC):
        return "public" if key else "none"
    return hashlib.blake2b(key, digest_size=6, person=b"ddpm mark name").hexdigest()


def can_be_marked(image: UInt8[np.ndarray, "h w 3"]) -> bool:
    """Whether it is large enough."""
    return min(image.shape[:2]) >= MIN_SIDE


def embed(image: UInt8[np.ndarray, "h w 3"], key: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """The image with the mark; one that is too small as it is."""
    if not can_be_marked(image):
        return image
    down, across = (_cosines(size) for size in image.shape[:2])
    back_down, back_across = (_inverse(size) for size in image.shape[:2])
    first, phases = _projected(image, down, across), _phases(key)
    wanted = STEP * (np.rint(first / STEP - phases) + phases)
    change = np.where(LOOKED_AT, wanted - first, 0)
    marked = _changed(image, back_down, change @ back_across.T)
    # What rounding, and colours that are at their limit, have taken of it is asked for again.
    change += np.where(LOOKED_AT, wanted - _projected(marked, down, across), 0)
    return _changed(image, back_down, change @ back_across.T)


def score(image: UInt8[np.ndarray, "h w 3"], key: bytes) -> float:
    """How much the image looks marked with the key: `NEEDED` and more are."""
    small = _projected(image, *(_reduction(size) for size in image.shape[:2]))
    height, width = small.shape
    weights = _weights(_cells(CELLS, height) @ small @ _cells(CELLS, width).T)[LOOKED_AT]
    weights /= math.sqrt((weights**2).sum() / 2)
    phases, best, size = _phases(key)[LOOKED_AT], -math.inf, 2 * NUM_BLOCKS
    for cut, places in _crops():
        original = [(-place / (1 - cut), 1 / (1 - cut)) for place in places]
        down, across = (np.concatenate([_cosines(side, *each) for each in original]) for side in small.shape)
        found = (down @ small @ across.T).reshape(len(places), size, len(places), size).transpose(0, 2, 1, 3)
        fits = np.cos(2 * np.pi * (found[:, :, LOOKED_AT] / STEP - phases)) @ weights
        best = max(best, float(fits.max()))
    return best


def is_marked(image: UInt8[np.ndarray, "h w 3"], key: bytes) -> bool:
    """Whether the image was marked with the key."""
    return score(image, key) >= NEEDED


@functools.cache
def _crops() -> tuple[tuple[float, tuple[float, ...]], ...]:
    """Shares of a side that may have been cut away, the same of either side, with the shares of it that lay before."""
    steps = round(MOST_CROPPED / CROP_STEP)
    return tuple((i * CROP_STEP, tuple(j * CROP_STEP for j in range(i + 1))) for i in range(steps + 1))


NEEDED = math.sqrt(2 * math.log(sum(len(places) ** 2 for _, places in _crops()) / FALSE_RATE))
"""The score from which an image counts as marked."""


def _phases(key: bytes) -> Float[np.ndarray, "n n"]:
    size = 2 * NUM_BLOCKS
    stretched = hashlib.shake_256(b"ddpm-translate mark 1\0" + key).digest(2 * size**2)
    return (np.frombuffer(stretched, "<u2") / 2**16).astype(np.float32).reshape(size, size)


def _cells(count: int, size: int, begin: float = 0.0, length: float = 1.0) -> Float[np.ndarray, "count size"]:
    """Cells that lie over the shares `begin` to `begin + length` of `size` pixels, as weights of these: antialiased;
    beyond the image its outermost pixels go on."""
    cell = size * length / count
    reach = max(cell, 1.0)
    centres = size * begin + (np.arange(count)[:, None] + 0.5) * cell
    pixels = np.arange(math.floor(centres[0, 0] - 2 * reach) - 1, math.ceil(centres[-1, 0] + 2 * reach) + 2)
    weights = _cubic((pixels + 0.5 - centres) / reach)
    weights /= weights.sum(axis=1, keepdims=True)
    cells = np.zeros((count, size))
    np.add.at(cells.T, pixels.clip(0, size - 1), weights.T)
    return cells.astype(np.float32)


def _cubic(x: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """Catmull and Rom's kernel."""
    x = np.abs(x)
    inner, outer = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))


@functools.lru_cache(maxsize=4096)
def _cosines(size: int, begin: float = 0.0, length: float = 1.0) -> Float[np.ndarray, "n size"]:
    """Each block's mean, then each block's half wave, of `_cells`, of length 1 there."""
    cells = _cells(CELLS, size, begin, length).reshape(NUM_BLOCKS, BLOCK, size)
    angles = np.pi * (2 * np.arange(BLOCK, dtype=np.float32) + 1) / (2 * BLOCK)
    waves = np.stack([np.full(BLOCK, 0.5, np.float32), np.cos(angles) / math.sqrt(2)])
    return np.einsum("wc,bcp->wbp", waves, cells).reshape(-1, size)


@functools.lru_cache(maxsize=16)
def _reduction(size: int) -> Float[np.ndarray, "n size"]:
    """To as many pixels as are looked at."""
    return _cells(MOST_LOOKED_AT, size) if size > MOST_LOOKED_AT else np.eye(size, dtype=np.float32)


@functools.lru_cache(maxsize=16)
def _inverse(size: int) -> Float[np.ndarray, "size n"]:
    """What has given coefficients and is smallest."""
    return np.linalg.pinv(_cosines(size).astype(np.float64)).astype(np.float32)


def _weights(cells: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "m m"]:
    """How far each coefficient can be trusted after a shift: the mean cosine of normal errors, exp(-2 pi^2 var)."""
    steps = np.square(np.gradient(cells)).sum(axis=0).reshape(NUM_BLOCKS, BLOCK, NUM_BLOCKS, BLOCK).mean(axis=(1, 3))
    return np.tile(np.exp(-2 * np.pi**2 * (SHIFT / STEP) ** 2 * steps) + 1e-3, (2, 2))


def _projected(
    image: UInt8[np.ndarray, "h w 3"], down: Float[np.ndarray, "n h"], across: Float[np.ndarray, "m w"]
) -> Float[np.ndarray, "n m"]:
    """Its luma, by weights of rows and of columns."""
    total = np.zeros((len(down), image.shape[1]), np.float32)
    for rows in _stripes(image):
        total += down[:, rows] @ (image[rows].astype(np.float32) @ LUMA)
    return total @ across.T


def _changed(
    image: UInt8[np.ndarray, "h w 3"], down: Float[np.ndarray, "h n"], columns: Float[np.ndarray, "n w"]
) -> UInt8[np.ndarray, "h w 3"]:
    """All three colours by the same: hue and saturation stay."""
    changed = np.empty_like(image)
    for rows in _stripes(image):
        change = np.rint(down[rows] @ columns).astype(np.int16)
        changed[rows] = (image[rows] + change[:, :, None]).clip(0, 255)
    return changed


def _stripes(image: UInt8[np.ndarray, "h w 3"]) -> list[slice]:
    height, width = image.shape[:2]
    rows = max(STRIPE_PIXELS // width, 1)
    return [slice(first, min(first + rows, height)) for first in range(0, height, rows)]
