"""What a translation should keep: losses that compare the x_0 a network predicts with the image it should be like.

    x_0_pred   b c h w    in [-1, 1]; gradients flow into it and into nothing else
    loss       b          0 = alike; weighted by abar_t, the share of x_t that is signal: at high noise x_0_pred is
                          an average over many images, and its likeness to any one of them means nothing.
                          Without pairs x_t shows somebody else than the source, and at low noise the loss could only
                          be met by spoiling that image: there identity is weighted by 1 - abar_t, where the source
                          alone decides (docs/log.md has the figures)

The nets are any callables: ours (`ddpm_core.encoders`) or another's.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

Embed = Callable[[Tensor], Tensor]
"""b 3 h w in [-1, 1] to b d; only the direction of an embedding counts."""
Features = Callable[[Tensor], list[Tensor]]
"""b 3 h w in [-1, 1] to feature maps, each b c h w."""
Box = tuple[float, ...]
"""x0 y0 x1 y1 in shares of the image's side, y downwards."""

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


def identity_loss(
    x_0_pred: Float[Tensor, "b c h w"],
    source: Float[Tensor, "b c h w"],
    embed: Embed,
    *,
    crop_box: Box = WHOLE,
    t: Int64[Tensor, " b"],
    alphas_cumprod: Float[Tensor, " T"],
    unpaired: bool = False,
) -> Float[Tensor, " b"]:
    """abar_t (1 - cos(embed(x_0_pred), embed(source))): 0 for the same person, 2 abar_t for the opposite.

    `unpaired`: x_t is not made from an image of the source's person; 1 - abar_t instead of abar_t.
    `crop_box` is what `embed` gets to see of the images, enlarged to their own side; our encoders crop for
    themselves.
    """
    with torch.no_grad():
        wanted = embed(crop(source, crop_box, source.shape[-1]))
    drawn = embed(crop(x_0_pred, crop_box, source.shape[-1]))
    signal = _signal_power(alphas_cumprod, t)
    weight = 1 - signal if unpaired else signal
    return weight * (1 - F.cosine_similarity(drawn.float(), wanted.float(), dim=1))


def perceptual_loss(
    x_0_pred: Float[Tensor, "b c h w"],
    x_0: Float[Tensor, "b c h w"],
    features: Features,
    *,
    t: Int64[Tensor, " b"],
    alphas_cumprod: Float[Tensor, " T"],
) -> Float[Tensor, " b"]:
    """abar_t times `perceptual_distance`; within [0, 4 abar_t]."""
    with torch.no_grad():
        wanted = features(x_0)
    return _signal_power(alphas_cumprod, t) * perceptual_distance(features(x_0_pred), wanted)


def perceptual_distance(
    maps: list[Float[Tensor, "b _ _ _"]], others: list[Float[Tensor, "b _ _ _"]]
) -> Float[Tensor, " b"]:
    """Squared distance of feature vectors of length 1, averaged over positions and maps; 0 to 4.

    Zhang et al. 2018, eq. 1, with every channel's weight 1 and the mean over layers in place of the sum.
    """
    distances = [
        (F.normalize(one.float(), dim=1) - F.normalize(other.float(), dim=1)).square().sum(1).mean((1, 2))
        for one, other in zip(maps, others, strict=True)
    ]
    return torch.stack(distances).mean(0)


def crop(images: Float[Tensor, "b c h w"], box: Box, side: int) -> Float[Tensor, "b c s s"]:
    """The part of `images` inside `box`, brought to `side` x `side` pixels.

    Bilinear with antialiasing, as Pillow's `resize(box=...)`; the box may fall between pixels. Two matrix products,
    so that gradients are exact and the same on every run (those of `grid_sample` on a GPU are not).
    """
    height, width = images.shape[-2:]
    if box == WHOLE and (height, width) == (side, side):
        return images
    x0, y0, x1, y1 = box
    rows = _resampling(height, y0 * height, y1 * height, side).to(images)
    columns = _resampling(width, x0 * width, x1 * width, side).to(images)
    return rows @ images @ columns.T


def _resampling(size: int, low: float, high: float, side: int) -> Float[Tensor, "side size"]:
    """Weights of `size` pixels in each of `side` pixels spread over [low, high]: triangles, each summing to 1."""
    scale = (high - low) / side
    centres = low + (torch.arange(side, dtype=torch.float64) + 0.5) * scale
    pixels = torch.arange(size, dtype=torch.float64) + 0.5
    # Below one source pixel a result, the triangle is a source pixel wide: interpolation.
    weights = (1 - (pixels - centres[:, None]).abs() / max(scale, 1.0)).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def _signal_power(alphas_cumprod: Float[Tensor, " T"], t: Int64[Tensor, " b"]) -> Float[Tensor, " b"]:
    return alphas_cumprod.to(t.device)[t].float()
