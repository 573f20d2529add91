"""Noise schedules: how much of the image is left at each timestep.

    t                int64 in [0, T); t = 0 is the least noisy step
    betas            (T,)  variance added at step t
    alphas_cumprod   (T,)  abar_t = prod_{s<=t} (1 - beta_s): signal power left after step t
    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise

Kept in float64; cast where used.
"""

import math

import torch
from jaxtyping import Float64
from torch import Tensor

from ddpm_core.config import DiffusionConfig
from ddpm_core.errors import InputError


def linear_betas(num_timesteps: int) -> Float64[Tensor, " T"]:
    """Ho et al. 2020: 1e-4 to 0.02 over 1000 steps; other lengths are scaled to end at the same noise level."""
    scale = 1000 / num_timesteps
    betas = torch.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=torch.float64)
    return betas.clamp(max=0.999)


def cosine_betas(num_timesteps: int) -> Float64[Tensor, " T"]:
    """Nichol & Dhariwal 2021, eq. 17: sqrt(abar) falls as a quarter of a cosine; the last betas are held to 0.999."""
    offset = 0.008  # keeps the first betas from vanishing
    share = torch.linspace(0, 1, num_timesteps + 1, dtype=torch.float64)
    abar = torch.cos((share + offset) / (1 + offset) * math.pi / 2) ** 2
    return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)


SCHEDULES = {"linear": linear_betas, "cosine": cosine_betas}


def rescale_to_zero_terminal_snr(alphas_cumprod: Float64[Tensor, " T"]) -> Float64[Tensor, " T"]:
    """Lin et al. 2024, algorithm 1: sqrt(abar) shifted and scaled so that the first is kept and the last is 0.

    Raises:
        InputError: a chain of one step, whose first and last are the same.
    """
    if len(alphas_cumprod) < 2:
        raise InputError("diffusion.zero-terminal-snr needs diffusion.num-timesteps of at least 2")
    a = alphas_cumprod.sqrt()
    return ((a - a[-1]) * a[0] / (a[0] - a[-1])) ** 2


def alphas_cumprod(config: DiffusionConfig) -> Float64[Tensor, " T"]:
    """abar_t of the configured schedule."""
    abar = torch.cumprod(1 - SCHEDULES[config.schedule](config.num_timesteps), dim=0)
    return rescale_to_zero_terminal_snr(abar) if config.zero_terminal_snr else abar
