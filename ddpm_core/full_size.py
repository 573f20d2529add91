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

Of several views, one a face, each has its share of a pixel by how deep within it that lies (a partition of unity): what
two faces close to each other change runs into one another without a border.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from ddpm_core import faces, images
from ddpm_core.config import Faces, OutputSize

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
    data: bytes,
    side: int,
    template: Sequence[float] = (),
    *,
    output_size: OutputSize,
    which: Faces = "largest",
    name: str = "image",
) -> list[View]:
    """An image file as a network sees it: one view, or one for each of several faces.

    With `template`, landmarks as `faces.template_for` gives them, a view is a face, brought to where they lie. Without,
    it is the whole photo squeezed to a square, nothing cut away, or for `output_size` model the largest centred square,
    as training had it. All of them have the photo's notes.

    Raises:
        InputError: as `images.decode`; NoFaceError: a face is wanted and there is none.
    """
    if template or output_size == "own":
        photo = images.decode(data, name=name)
        square = functools.partial(images.read_square, data, side, name=name)
        return views_of(photo, side, template, square=square, which=which, name=name)
    photo = images.decode(data, name=name, square=side)
    size = photo.info["size"]
    scale, (left, top) = side / min(size), (np.array(size) - min(size)) // 2
    transform = scale * np.array([[1.0, 0.0, -left], [0.0, 1.0, -top]])
    return [View(pixels=images.to_square(photo, side), transform=transform, size=size, notes=photo.info["notes"])]


def views_of(
    photo: Image.Image,
    side: int,
    template: Sequence[float] = (),
    *,
    square: Callable[[], UInt8[np.ndarray, "side side 3"]],
    which: Faces = "largest",
    name: str = "image",
) -> list[View]:
    """A photo, as `images.decode` returns it, as `look` sees its file where the result is to have its own size.

    `square`: as `faces.portraits` takes it.

    Raises:
        NoFaceError: a face is wanted and there is none.
    """
    if not template:
        return [whole(photo, side)]
    portraits = faces.portraits(photo, side, template, square=square, which=which, name=name)
    notes = tuple(dict.fromkeys(note for each in portraits for note in each.notes))
    return [View(pixels=each.pixels, transform=each.transform, size=each.photo_size, notes=notes) for each in portraits]


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
    return carry_all(photo, [view], [result])


def carry_all(
    photo: Image.Image, views: Sequence[View], results: Sequence[UInt8[np.ndarray, "s s 3"]]
) -> UInt8[np.ndarray, "h w 3"]:
    """As `carry`, of several views of one photo and what came of each; where they overlap each has its share.

    Raises:
        ValueError: as `carry`.
    """
    images.check_photo(photo)
    for view, result in zip(views, results, strict=True):
        if photo.size != view.size or result.shape != view.pixels.shape:
            raise ValueError(
                f"a photo of {photo.size} and a result of {result.shape} to a view of {view.size}, {view.pixels.shape}"
            )
    changes = [_Change(view, result) for view, result in zip(views, results, strict=True)]
    pixels = np.array(photo)
    left, top = (min(each.box[i] for each in changes) for i in (0, 1))
    right, bottom = (max(each.box[i] for each in changes) for i in (2, 3))
    rows = max(STRIPE_PIXELS // max(right - left, 1), 1)
    for first in range(top, bottom, rows):
        last = min(first + rows, bottom)
        stripe = torch.from_numpy(pixels[first:last, left:right])
        colours = stripe.permute(2, 0, 1)
        parts = [part for each in changes if (part := each.within(colours, left, first)) is not None]
        total = torch.zeros(colours.shape[1:])
        for part in parts:
            total[part.place] += part.depth
        change = torch.zeros(colours.shape)
        for part in parts:
            share = part.depth / total[part.place].clamp(min=torch.finfo().tiny)
            change[:, *part.place] += part.change * share
        changed = (colours + (255 * change).round()).clamp(0, 255)
        stripe.copy_(changed.permute(1, 2, 0))
    return pixels


class _Part(NamedTuple):
    """What a view changes in a part of the photo."""

    place: tuple[slice, slice]
    """Rows and columns of that part that it reaches."""
    change: Float[Tensor, "3 h w"]
    depth: Float[Tensor, "h w"]
    """How deep within the view a pixel lies: the square of its distance to the next border, 0 outside."""


class _Change:
    """What changed from a view to its result, ready to be carried to its photo."""

    def __init__(self, view: View, result: UInt8[np.ndarray, "s s 3"]) -> None:
        self.view, self.side = view, len(view.pixels)
        size = (FINER * self.side, FINER * self.side)
        fitted = torch.cat(fit(view.pixels, result))[None]
        self.finer = F.interpolate(fitted, size, mode="bicubic", antialias=True)
        corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], dtype=np.float64) * self.side
        back = faces.inverse(view.transform)
        self.fading = _within(view, back, corners)
        places = faces.apply(back, corners)
        low = np.clip(np.floor(places.min(axis=0)), 0, view.size).astype(int).tolist()
        high = np.clip(np.ceil(places.max(axis=0)), 0, view.size).astype(int).tolist()
        self.box = (*low, *high)
        """Left, top, right, bottom of what it reaches, in pixels of the photo."""

    def within(self, colours: Float[Tensor, "3 h w"] | UInt8[Tensor, "3 h w"], left: int, top: int) -> _Part | None:
        """What it changes in a part of the photo, whose upper left corner lies there; None: nothing."""
        height, width = colours.shape[1:]
        x0, y0 = max(self.box[0], left), max(self.box[1], top)
        x1, y1 = min(self.box[2], left + width), min(self.box[3], top + height)
        if x0 >= x1 or y0 >= y1:
            return None
        x, y = torch.arange(x0, x1) + 0.5, torch.arange(y0, y1)[:, None] + 0.5
        (a, b, p), (c, d, q) = self.view.transform.tolist()
        seen = torch.stack([a * x + b * y + p, c * x + d * y + q], dim=-1)
        grid = (seen * (2 / self.side) - 1)[None]
        matrix, rest = F.grid_sample(self.finer, grid, "bilinear", "border", align_corners=False)[0].split([9, 3])
        place = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
        change = torch.einsum("ijhw,jhw->ihw", matrix.unflatten(0, (3, 3)), colours[:, *place] / 255) + rest
        if self.fading:
            change *= _fade(seen, self.side, self.fading)
        return _Part(place, change, torch.minimum(seen, self.side - seen).amin(-1).clamp(min=0).square())


def finish(
    data: bytes,
    views: Sequence[View],
    results: Sequence[UInt8[np.ndarray, "s s 3"]],
    encode: Callable[[UInt8[np.ndarray, "h w 3"]], bytes],
) -> bytes:
    """The file that `encode` makes of a photo, the image file `data`, with what changed from `views` to `results`.

    Over all threads no more than `images.MAX_PIXELS` are worked on at once, at about 10 bytes each.

    Raises:
        InputError: as `images.decode` or `encode`.
    """
    with working.take(views[0].size[0] * views[0].size[1]):
        return encode(carry_all(images.decode(data), views, results))


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
