"""What the network is told: the condition image, the domain to produce, and their null forms.

The null condition is an image of zeros (mid-grey, no information) and the null domain is the label
`num_domains`. Training drops to them with probabilities `p_uncond` and `p_uncond_domain`, each on its own; guidance
compares against them.
"""

import functools

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from ddpm_core.norms import GroupNorm
from ddpm_core.sums import Conv2d


def drop(
    condition: Float[Tensor, "b 3 h w"],
    domain: Int64[Tensor, " b"],
    dropped: Bool[Tensor, " b"],
    domain_dropped: Bool[Tensor, " b"],
    num_domains: int,
) -> tuple[Float[Tensor, "b 3 h w"], Int64[Tensor, " b"]]:
    """Replace the condition by its null form where `dropped`, the domain where `domain_dropped`."""
    return (
        torch.where(dropped[:, None, None, None], torch.zeros_like(condition), condition),
        torch.where(domain_dropped, torch.full_like(domain, num_domains), domain),
    )


def structure(pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """Shapes without colour and brightness: what an image keeps when its domain is taken away, in [-1, 1].

    Local contrast normalisation (Jarrett et al. 2009, section 2.1) of the grey level: its difference from the mean of
    its surroundings in units of their standard deviation, three of which are 1. Surroundings are a Gaussian of an
    eighth of the side; plain areas, where the deviation is noise, stay near 0.
    """
    side = pictures.shape[-1]
    sigma = side / 8
    reach = min(int(2 * sigma + 0.5), side - 1)  # mirrored edges reach no further
    offsets = torch.arange(-reach, reach + 1, device=pictures.device, dtype=pictures.dtype)
    window = torch.softmax(-0.5 * (offsets / sigma) ** 2, dim=0)

    def surroundings(values: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b 1 h w"]:
        padded = nn.functional.pad(values, (reach,) * 4, mode="reflect")
        return nn.functional.conv2d(nn.functional.conv2d(padded, window[None, None, None]), window[None, None, :, None])

    grey = pictures.mean(dim=1, keepdim=True)
    centred = grey - surroundings(grey)
    deviation = surroundings(centred.square()).sqrt()
    return (centred / (3 * (deviation + 0.02))).clamp(-1, 1).expand_as(pictures)


def shown(what: str, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """What a network is shown of images, by `ModelConfig.shown`: themselves, their structure, or nothing."""
    return {"source": lambda x: x, "structure": structure, "nothing": torch.zeros_like}[what](pictures)


class ConditionEncoder(nn.Module):
    """A light pyramid over the condition: one feature map a level, which the skip connections attend to."""

    def __init__(self, in_channels: int, channels: int, num_levels: int) -> None:
        super().__init__()
        self.stem = Conv2d(in_channels, channels, 3, padding=1)
        self.levels = nn.ModuleList(
            nn.Sequential(
                GroupNorm(8, channels, silu=True),
                nn.Identity(),  # older checkpoints count it
                Conv2d(channels, channels, 3, stride=1 if level == 0 else 2, padding=1),
            )
            for level in range(num_levels)
        )

    def forward(self, condition: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b k _ _"]]:
        h = self.stem(condition)
        features = []
        for level in self.levels:
            h = level(h)
            features.append(h)
        return features


class Anchor(nn.Module):
    """What the condition's encoder writes into the reserved channels of one level's feature maps.

    With `landmarks` it writes around these places only and the reserved channels are zero elsewhere.
    """

    def __init__(self, condition_channels: int, channels: int, landmarks: tuple[float, ...], radius: float) -> None:
        super().__init__()
        self.landmarks, self.radius = landmarks, radius
        self.project = nn.Conv2d(condition_channels, channels, 1)

    def forward(self, features: Float[Tensor, "b k h w"]) -> Float[Tensor, "b c h w"]:
        written = self.project(features)
        if self.landmarks:
            written = written * _mask(self.landmarks, self.radius, *written.shape[2:], written.dtype, written.device)
        return written


@functools.lru_cache(64)
def _mask(
    landmarks: tuple[float, ...], radius: float, h: int, w: int, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "1 1 h w"]:
    """`landmark_mask` where it is needed, once."""
    with torch.inference_mode(False):  # it serves training too
        return landmark_mask(landmarks, radius, h, w).to(device, dtype)


def landmark_mask(landmarks: tuple[float, ...], radius: float, h: int, w: int) -> Float[Tensor, "1 1 h w"]:
    """1 at places within `radius` of a landmark (x0, y0, x1, y1, ...; both in shares of the side), else 0.

    The place that holds the landmark always counts, however coarse the map is.
    """
    x, y = torch.tensor(landmarks).reshape(-1, 2).T[:, :, None, None]
    columns, rows = (torch.arange(w) + 0.5) / w, (torch.arange(h)[:, None] + 0.5) / h
    near = (columns - x) ** 2 + (rows - y) ** 2 <= radius**2
    holds = ((columns - x).abs() * w <= 0.5) & ((rows - y).abs() * h <= 0.5)
    return (near | holds).any(dim=0).float()[None, None]
