"""What the network is told: the condition picture, the domain to produce, and their null forms.

The null condition is a picture of zeros (mid-grey, no information) and the null domain is the label
`num_domains`. Training drops to them with probability `p_uncond`; guidance compares against them.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn


def drop(
    condition: Float[Tensor, "b 3 h w"],
    domain: Int64[Tensor, " b"],
    dropped: Bool[Tensor, " b"],
    num_domains: int,
) -> tuple[Float[Tensor, "b 3 h w"], Int64[Tensor, " b"]]:
    """Replace condition and domain by their null forms where `dropped`."""
    return (
        torch.where(dropped[:, None, None, None], torch.zeros_like(condition), condition),
        torch.where(dropped, torch.full_like(domain, num_domains), domain),
    )


class ConditionEncoder(nn.Module):
    """A light pyramid over the condition: one feature map a level, which the skip connections attend to."""

    def __init__(self, in_channels: int, channels: int, num_levels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.levels = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(8, channels),
                nn.SiLU(),
                nn.Conv2d(channels, channels, 3, stride=1 if level == 0 else 2, padding=1),
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
