"""Samplers: from pure noise to a picture. Each is a function of a denoiser; none knows the network.

denoiser(x_t, t)   the network's output (eps, v or x_0), b c h w
timesteps          the visited t, descending
abar               alphas_cumprod at the visited step; the step after the last has abar = 1 (clean)
generators         one for each picture: a picture's result does not depend on its batch
"""

from collections.abc import Callable
from typing import Protocol

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ddpm_core.config import Prediction
from ddpm_core.diffusion import draw_noise, predicted
from ddpm_core.guidance import Denoiser

Callback = Callable[[int, Float[Tensor, "b c h w"]], None]
"""Called after each step with the number of steps done and the current x_0 prediction."""


class SamplerFunction(Protocol):
    def __call__(
        self,
        denoiser: Denoiser,
        x_T: Float[Tensor, "b c h w"],
        *,
        timesteps: Int64[Tensor, " n"],
        alphas_cumprod: Float[Tensor, " T"],
        prediction: Prediction,
        generators: list[torch.Generator],
        clip: bool = True,
        callback: Callback | None = None,
    ) -> Float[Tensor, "b c h w"]: ...


def trailing_timesteps(num_timesteps: int, num_steps: int) -> Int64[Tensor, " n"]:
    """`num_steps` timesteps from T - 1 downwards, evenly spaced, the noisiest one included.

    Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed", section 3.3: sampling starts
    where the chain really ends.

    Raises:
        ValueError: more steps than timesteps, or none.
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"num_steps is {num_steps}; it must lie in [1, {num_timesteps}]")
    steps = torch.arange(num_steps, 0, -1, dtype=torch.float64) * (num_timesteps / num_steps)
    return steps.round().long() - 1


def ddim(
    denoiser: Denoiser,
    x_T: Float[Tensor, "b c h w"],
    *,
    timesteps: Int64[Tensor, " n"],
    alphas_cumprod: Float[Tensor, " T"],
    prediction: Prediction,
    generators: list[torch.Generator],
    clip: bool = True,
    callback: Callback | None = None,
    eta: float = 0.0,
) -> Float[Tensor, "b c h w"]:
    """DDIM (Song et al. 2021, eq. 12 and 16): eta 0 is deterministic, eta 1 is ancestral sampling.

    Between visited steps any spacing is right, because the previous abar is that of the next visited step.
    """
    x_t = x_T
    abars = [float(alphas_cumprod[t]) for t in timesteps] + [1.0]
    for i, t in enumerate(timesteps.tolist()):
        abar, abar_prev = abars[i], abars[i + 1]
        t_batch = torch.full((x_t.shape[0],), t, dtype=torch.int64, device=x_t.device)
        output = denoiser(x_t, t_batch).to(x_t)
        pred = predicted(prediction, output, x_t, t_batch, alphas_cumprod, clip=clip)
        sigma = eta * ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)) ** 0.5
        x_t = abar_prev**0.5 * pred.x_0 + max(1 - abar_prev - sigma**2, 0.0) ** 0.5 * pred.eps
        if sigma > 0:
            x_t = x_t + sigma * draw_noise(generators, x_t)
        if callback:
            callback(i + 1, pred.x_0)
    return x_t


def ddpm(
    denoiser: Denoiser,
    x_T: Float[Tensor, "b c h w"],
    *,
    timesteps: Int64[Tensor, " n"],
    alphas_cumprod: Float[Tensor, " T"],
    prediction: Prediction,
    generators: list[torch.Generator],
    clip: bool = True,
    callback: Callback | None = None,
) -> Float[Tensor, "b c h w"]:
    """Ancestral sampling (Ho et al. 2020, algorithm 2) with the posterior variance beta-tilde.

    The posterior q(x_prev | x_t, x_0) of eq. 6 and 7, between any two visited steps.
    """
    x_t = x_T
    abars = [float(alphas_cumprod[t]) for t in timesteps] + [1.0]
    for i, t in enumerate(timesteps.tolist()):
        abar, abar_prev = abars[i], abars[i + 1]
        alpha = abar / abar_prev
        t_batch = torch.full((x_t.shape[0],), t, dtype=torch.int64, device=x_t.device)
        output = denoiser(x_t, t_batch).to(x_t)
        pred = predicted(prediction, output, x_t, t_batch, alphas_cumprod, clip=clip)
        x_t = abar_prev**0.5 * (1 - alpha) / (1 - abar) * pred.x_0 + alpha**0.5 * (1 - abar_prev) / (1 - abar) * x_t
        variance = (1 - abar_prev) / (1 - abar) * (1 - alpha)
        if variance > 0:
            x_t = x_t + variance**0.5 * draw_noise(generators, x_t)
        if callback:
            callback(i + 1, pred.x_0)
    return x_t


SAMPLERS: dict[str, SamplerFunction] = {"ddpm": ddpm, "ddim": ddim}
