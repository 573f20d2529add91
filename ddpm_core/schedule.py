"""Noise schedules: how much of the image is left at each timestep.

    t                int64 in [0, T); t = 0 is the least noisy step
    betas            (T,)  variance added at step t
    alphas_cumprod   (T,)  abar_t = prod_{s<=t} (1 - beta_s): signal power left after step t
    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise

Kept in float64; cast where used.
"""

import torch
from jaxtyping import Float64
from torch import Tensor

from ddpm_core.config import DiffusionConfig


def linear_betas(num_timesteps: int) -> Float64[Tensor, " T"]:
    """Ho et al. 2020: 1e-4 to 0.02 over 1000 steps; other lengths are scaled to end at the same noise level."""
    scale = 1000 / num_timesteps
    betas = torch.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=torch.float64)
    return betas.clamp(max=0.999)


SCHEDULES = {"linear": linear_betas}


def alphas_cumprod(config: DiffusionConfig) -> Float64[Tensor, " T"]:
    """abar_t of the configured schedule."""
    return torch.cumprod(1 - SCHEDULES[config.schedule](config.num_timesteps), dim=0)
