"""Results at the photo's own size and shape: what a network changed in a small view of a photo, carried over to it.

    view      what the network sees: s s 3 uint8, and which pixels of the photo they are
    result    what it made of that: s s 3 uint8
    change    result - view = A view + c at each of its pixels, colours in [0, 1]: A a 3 x 3 matrix, c a colour

A is fitted to the pixels around by least squares (the guided filter: He et al. 2013, eqs. 19 to 21); c is what A
leaves. Both are enlarged and meet the photo's own colours (the fast guided filter: He & Sun 2015; bilateral guided
upsampling: Chen et al. 2016):

    photo + A photo + c

So the photo's detail stays, recoloured as its surroundings are; where something new was drawn, A takes out what was
there before and c brings what was drawn, no sharper than the network drew it. Where the network changed nothing the
photo stays as it is, to the bit.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from ddpm_core import faces, images
from ddpm_core.config import OutputSize

RADIUS = 2
"""A is fitted to the 5 x 5 pixels around each, and then averaged over as many."""
LEAST_VARIANCE = 1e-3
"""Of colours in [0, 1]: where they vary less, A tends to 0, and detail too fine for the network stays as it is."""
FINER = 5
"""A and c are first enlarged so many times by Catmull-Rom's cubics, then linearly: sharper cubics show the network's
pixels as a grid. An odd number, so that the network's pixels lie on finer ones."""
FADE = 0.12
"""Share of the view's side over which the change fades out towards a border that lies within the photo."""
STRIPE_PIXELS = 2**18
"""The photo is worked on stripe by stripe, so that the steps between take no memory to speak of."""


working = images.Budget(images.MAX_PIXELS)
"""Pixels of photos that `finish` works on at once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """What a network sees of a photo."""

    pixels: UInt8[np.ndarray, "s s 3"]
    transform: Float[np.ndarray, "2 3"]
    """Where it lies: from places in the photo (x right, y down, in pixels from its corner) to places in the view."""
    size: tuple[int, int]
    """Width and height of the photo."""
    notes: tuple[str, ...] = ()
    """What the photo's owner should know; mostly nothing."""


def look(
    data: bytes, side: int, template: Sequence[float] = (), *, output_size: OutputSize, name: str = "image"
) -> View:
    """An image file as a network sees it.

    With `template`, landmarks as `faces.template_for` gives them, that is its largest face, brought to where they lie.
    Without, it is the whole photo squeezed to a square, nothing cut away, or for `output_size` model the largest
    centred square, as training had it.

    Raises:
        InputError: as `images.decode`; NoFaceError: a face is wanted and there is none.
    """
    if template:
        portrait = faces.read_portrait(data, side, template, name=name)
        notes = (portrait.note,) if portrait.note else ()
        return View(pixels=portrait.pixels, transform=portrait.transform, size=portrait.photo_size, notes=notes)
    if output_size == "own":
        photo = images.decode(data, name=name)
        return whole(photo, side)
    photo = images.decode(data, name=name, square=side)
    size = photo.info["size"]
    scale, (left, top) = side / min(size), (np.array(size) - min(size)) // 2
    transform = scale * np.array([[1.0, 0.0, -left], [0.0, 1.0, -top]])
    return View(pixels=images.to_square(photo, side), transform=transform, size=size, notes=photo.info["notes"])


def whole(photo: Image.Image, side: int) -> View:
    """The whole of a photo, as `images.decode` returns it, squeezed to a square."""
    transform = np.array([[side / photo.width, 0.0, 0.0], [0.0, side / photo.height, 0.0]])
    notes = photo.info.get("notes", ())
    return View(pixels=images.squeezed(photo, side), transform=transform, size=photo.size, notes=notes)


def carry(photo: Image.Image, view: View, result: UInt8[np.ndarray, "s s 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """The photo with what changed from `view`, which is of it, to `result`.

    Towards borders of the view that lie within the photo the change fades out; beyond the view nothing changes.

    Raises:
        ValueError: the photo is not as `images.decode` returns them, or not what the view is of.
    """
    images.check_photo(photo)
    if photo.size != view.size or result.shape != view.pixels.shape:
        raise ValueError(
            f"a photo of {photo.size} and a result of {result.shape} to a view of {view.size}, {view.pixels.shape}"
        )
    pixels = np.array(photo)
    side = len(view.pixels)
    fitted = torch.cat(fit(view.pixels, result))[None]
    finer = F.interpolate(fitted, (FINER * side, FINER * side), mode="bicubic", antialias=True)
    corners = np.array([[0, 0], [side, 0], [side, side], [0, side]], dtype=np.float64)
    back = faces.inverse(view.transform)
    fading = _within(view, back, corners)
    places = faces.apply(back, corners)
    left, top = np.clip(np.floor(places.min(axis=0)), 0, photo.size).astype(int).tolist()
    right, bottom = np.clip(np.ceil(places.max(axis=0)), 0, photo.size).astype(int).tolist()
    rows = max(STRIPE_PIXELS // max(right - left, 1), 1)
    for first in range(top, bottom if left < right else top, rows):
        last = min(first + rows, bottom)
        stripe = torch.from_numpy(pixels[first:last, left:right])
        x, y = torch.arange(left, right) + 0.5, torch.arange(first, last)[:, None] + 0.5
        (a, b, p), (c, d, q) = view.transform.tolist()
        seen = torch.stack([a * x + b * y + p, c * x + d * y + q], dim=-1)
        grid = (seen * (2 / side) - 1)[None]
        matrix, rest = F.grid_sample(finer, grid, "bilinear", "border", align_corners=False)[0].split([9, 3])
        colours = stripe.permute(2, 0, 1)
        change = torch.einsum("ijhw,jhw->ihw", matrix.unflatten(0, (3, 3)), colours / 255) + rest
        if fading:
            change *= _fade(seen, side, fading)
        changed = (colours + (255 * change).round()).clamp(0, 255)
        stripe.copy_(changed.permute(1, 2, 0))
    return pixels


def finish(
    data: bytes,
    view: View,
    result: UInt8[np.ndarray, "s s 3"],
    encode: Callable[[UInt8[np.ndarray, "h w 3"]], bytes],
) -> bytes:
    """The file that `encode` makes of a photo, the image file `data`, with what changed from `view` to `result`.

    Over all threads no more than `images.MAX_PIXELS` are worked on at once, at about 10 bytes each.

    Raises:
        InputError: as `images.decode` or `encode`.
    """
    with working.take(view.size[0] * view.size[1]):
        return encode(carry(images.decode(data), view, result))


def fit(
    view: UInt8[np.ndarray, "h w 3"], result: UInt8[np.ndarray, "h w 3"]
) -> tuple[Float[Tensor, "9 h w"], Float[Tensor, "3 h w"]]:
    """A, row by row, and c of each pixel: result - view = A view + c. Both are exactly 0 where nothing changed within
    twice RADIUS."""
    source, target = (torch.tensor(each).permute(2, 0, 1).double() / 255 for each in (view, result))
    change = target - source

    def mean(values: Float[Tensor, "... h w"]) -> Float[Tensor, "... h w"]:
        flat = values.flatten(0, -3)
        return F.avg_pool2d(flat, 2 * RADIUS + 1, 1, RADIUS, count_include_pad=False).reshape(values.shape)

    def covariance(one: Float[Tensor, "3 h w"], other: Float[Tensor, "3 h w"]) -> Float[Tensor, "h w 3 3"]:
        return (mean(one[:, None] * other) - mean(one)[:, None] * mean(other)).permute(2, 3, 0, 1)

    ridge = LEAST_VARIANCE * torch.eye(3, dtype=torch.float64)
    fitted = torch.linalg.solve(covariance(source, source) + ridge, covariance(source, change))
    matrix = mean(fitted.permute(3, 2, 0, 1))
    rest = change - torch.einsum("ijhw,jhw->ihw", matrix, source)
    return matrix.flatten(0, 1).float(), rest.float()


def _within(view: View, back: Float[np.ndarray, "2 3"], corners: Float[np.ndarray, "4 2"]) -> list[int]:
    """Which of the view's borders (0 top, 1 right, 2 bottom, 3 left) lie within the photo, somewhere."""
    share = np.linspace(0.02, 0.98, 33)[:, None]
    found = []
    for border in range(4):
        places = faces.apply(back, corners[border] * (1 - share) + corners[(border + 1) % 4] * share)
        if ((places > 1) & (places < np.array(view.size) - 1)).all(axis=1).any():
            found.append(border)
    return found


def _fade(seen: Float[Tensor, "h w 2"], side: int, borders: Sequence[int]) -> Float[Tensor, "h w"]:
    """1 inside, 0 at `borders` of the view and beyond, smooth between."""
    x, y = seen.unbind(-1)
    distances = (y, side - x, side - y, x)
    near = torch.stack([distances[border] for border in borders]).amin(0) / (FADE * side)
    near = near.clamp(0, 1)
    return near * near * (3 - 2 * near)
