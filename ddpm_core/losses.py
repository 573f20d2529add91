"""Training losses: each takes prediction and target, b c h w, and returns one value a picture, b."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ddpm_core.config import DiffusionConfig


def per_image_loss(
    config: DiffusionConfig, output: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"]
) -> Float[Tensor, " b"]:
    """The configured loss in float32, averaged over each picture's pixels and channels.

    Huber (1964) is 0.5 e^2 below `huber_delta`, delta (|e| - 0.5 delta) above it; mse is e^2.
    """
    output, target = output.float(), target.float()
    if config.loss == "huber":
        loss = F.huber_loss(output, target, delta=config.huber_delta, reduction="none")
    else:
        loss = F.mse_loss(output, target, reduction="none")
    return loss.flatten(1).mean(1)
