"""Training losses: prediction and target, b c h w, to one value an image, b; and how timesteps are weighted."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from ddpm_core.config import DiffusionConfig


def per_image_loss(
    config: DiffusionConfig, output: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"]
) -> Float[Tensor, " b"]:
    """The configured loss in float32, averaged over each image's pixels and channels.

    Huber (1964) is 0.5 e^2 below `huber_delta`, delta (|e| - 0.5 delta) above it; mse is e^2.
    """
    output, target = output.float(), target.float()
    if config.loss == "huber":
        loss = F.huber_loss(output, target, delta=config.huber_delta, reduction="none")
    else:
        loss = F.mse_loss(output, target, reduction="none")
    return loss.flatten(1).mean(1)


def timestep_weight(
    config: DiffusionConfig, t: Int64[Tensor, " b"], alphas_cumprod: Float[Tensor, " T"]
) -> Float[Tensor, " b"]:
    """What each image's loss is multiplied by.

    With snr = abar / (1 - abar), an error e of x_0 is an error sqrt(snr) e of eps and sqrt(snr + 1) e of v; so the
    squared losses of the three are brought to the same weight of x_0 by dividing by 1, snr and snr + 1. That weight
    is min(snr, max_snr) for min_snr (Hang et al. 2023), which gives a step of pure noise none, and at
    least 1 for snr (Salimans & Ho 2022, section 4).
    """
    if config.loss_weighting == "uniform":
        return torch.ones(t.shape, device=t.device)
    abar = alphas_cumprod.to(t.device)[t]
    snr = abar / (1 - abar)
    of_prediction = {"x_0": torch.ones_like(snr), "eps": snr, "v": snr + 1}[config.prediction]
    floor = {"min_snr": 0.0, "snr": 1.0}[config.loss_weighting]
    return (snr.clamp(floor, config.max_snr) / of_prediction).float()
