"""Photos larger than a network's square, drawn by it at their own size in overlapping windows (MultiDiffusion: Bar-Tal
et al. 2023).

    canvas    1 3 h w   the whole photo, or x_t of it
    window    s s       what the network sees of it at once; s is the side that it was trained at

At each step of the chain every window of the canvas is given to the network, and where windows overlap what it
predicts is averaged: eps, v and x_0 alike, which are linear in one another. A window's weight falls off from its middle
towards its borders, and the weights of all windows at a pixel add up to 1 (a partition of unity, the product of one of
rows and one of columns). The samplers see a denoiser as any other.
"""

import math
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ddpm_core.errors import InputError
from ddpm_core.guidance import Denoiser

MAX_PIXELS = 16_000_000
"""Larger photos are refused."""
BYTES_PER_PIXEL = 120
"""What a canvas and the sampler's steps between take, about."""


def starts(length: int, side: int) -> list[int]:
    """Where the windows along a side of the canvas begin: evenly, neighbours overlap by half or more."""
    count = math.ceil((length - side) / (side / 2)) + 1
    return [round(i * (length - side) / max(count - 1, 1)) for i in range(count)]


def shares(length: int, side: int) -> Float[Tensor, "n side"]:
    """The weight of each window at each of its pixels; those of all windows at a pixel add up to 1."""
    rises = torch.sin(math.pi * (torch.arange(side) + 0.5) / side).square()
    total = torch.zeros(length)
    places = starts(length, side)
    for start in places:
        total[start : start + side] += rises
    return torch.stack([rises / total[start : start + side] for start in places])


def check(width: int, height: int, side: int) -> None:
    """Raises InputError for a photo that cannot be drawn in windows of that side."""
    if min(width, height) < side:
        raise InputError(
            f"{width} x {height} pixels; tiles are for photos of {side} x {side} and more, the network's own size: "
            "leave tiles out"
        )
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{width} x {height} pixels in tiles would need about {width * height * BYTES_PER_PIXEL / 1e9:.1f} GB of "
            f"memory; at most {MAX_PIXELS:,} pixels are taken: scale it down, or leave tiles out"
        )


def count(width: int, height: int, side: int) -> int:
    """Windows of a photo."""
    return len(starts(width, side)) * len(starts(height, side))


def tiled(
    denoiser_of: Callable[[Float[Tensor, "b 3 s s"]], Denoiser],
    source: Float[Tensor, "1 3 h w"],
    side: int,
    *,
    batch_size: int,
    done: Callable[[int], None],
) -> Denoiser:
    """A denoiser of the whole canvas, made of one of windows.

    `denoiser_of`: gives the denoiser for so many windows of the source. `done`: called after each batch of windows with
    their number.
    """
    height, width = source.shape[2:]
    down, across = (shares(length, side).to(source) for length in (height, width))

    def batches() -> Iterator[list[tuple[int, int]]]:
        places = [(i, j) for i in range(len(down)) for j in range(len(across))]
        for first in range(0, len(places), batch_size):
            yield places[first : first + batch_size]

    rows, columns = starts(height, side), starts(width, side)

    def window(canvas: Tensor, i: int, j: int) -> Tensor:
        return canvas[0, :, rows[i] : rows[i] + side, columns[j] : columns[j] + side]

    def denoiser(x_t: Float[Tensor, "1 c h w"], t: Int64[Tensor, " 1"]) -> Float[Tensor, "1 c h w"]:
        whole = torch.zeros_like(x_t)
        for places in batches():
            seen = torch.stack([window(source, *place) for place in places])
            noised = torch.stack([window(x_t, *place) for place in places])
            predicted = denoiser_of(seen)(noised, t.expand(len(places)))
            for (i, j), each in zip(places, predicted, strict=True):
                window(whole, i, j).add_(each * down[i][:, None] * across[j])
            done(len(places))
        return whole

    return denoiser
