"""The forward process, and the three equivalent things a network can predict.

    x_t = a x_0 + s noise             a = sqrt(abar_t), s = sqrt(1 - abar_t); a^2 + s^2 = 1
    v   = a noise - s x_0             (Salimans & Ho 2022)

so that from x_t and any one of eps, v, x_0 the other two follow:

    x_0 = (x_t - s eps) / a = a x_t - s v
    eps = (x_t - a x_0) / s = a v + s x_t
"""

import dataclasses
import hashlib

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ddpm_core.config import Prediction


@dataclasses.dataclass(frozen=True)
class Predicted:
    """One prediction of the network, in both of the forms that samplers use."""

    x_0: Float[Tensor, "b c h w"]
    eps: Float[Tensor, "b c h w"]


def signal_and_noise(
    alphas_cumprod: Float[Tensor, " T"], t: Int64[Tensor, " b"], like: Float[Tensor, "b c h w"]
) -> tuple[Float[Tensor, "b 1 1 1"], Float[Tensor, "b 1 1 1"]]:
    """a and s at each image's timestep, shaped to multiply images."""
    abar = alphas_cumprod.to(t.device)[t].reshape(-1, 1, 1, 1)
    return abar.sqrt().to(like), (1 - abar).sqrt().to(like)


def q_sample(
    x_0: Float[Tensor, "b c h w"],
    t: Int64[Tensor, " b"],
    noise: Float[Tensor, "b c h w"],
    alphas_cumprod: Float[Tensor, " T"],
) -> Float[Tensor, "b c h w"]:
    """x_t ~ q(x_t | x_0) with the given noise (Ho et al. 2020, eq. 4)."""
    a, s = signal_and_noise(alphas_cumprod, t, x_0)
    return a * x_0 + s * noise


def training_target(
    prediction: Prediction,
    x_0: Float[Tensor, "b c h w"],
    t: Int64[Tensor, " b"],
    noise: Float[Tensor, "b c h w"],
    alphas_cumprod: Float[Tensor, " T"],
) -> Float[Tensor, "b c h w"]:
    """What the network should output for x_t."""
    if prediction == "eps":
        return noise
    if prediction == "x_0":
        return x_0
    a, s = signal_and_noise(alphas_cumprod, t, x_0)
    return a * noise - s * x_0


def predicted(
    prediction: Prediction,
    output: Float[Tensor, "b c h w"],
    x_t: Float[Tensor, "b c h w"],
    t: Int64[Tensor, " b"],
    alphas_cumprod: Float[Tensor, " T"],
    *,
    clip: bool = True,
) -> Predicted:
    """x_0 and eps implied by the network's output at x_t.

    With `clip`, x_0 is held to [-1, 1] and eps recomputed from it: the one place where samplers clip.
    """
    a, s = signal_and_noise(alphas_cumprod, t, x_t)
    if prediction == "eps":
        x_0, eps = (x_t - s * output) / a, output
    elif prediction == "v":
        x_0, eps = a * x_t - s * output, s * x_t + a * output
    else:
        x_0, eps = output, (x_t - a * output) / s
    if clip:
        x_0 = x_0.clamp(-1, 1)
        eps = (x_t - a * x_0) / s
    return Predicted(x_0=x_0, eps=eps)


def seeded(*parts: int | str) -> torch.Generator:
    """A CPU generator that is a function of `parts` alone, such as (seed, epoch, sample id), on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draw_noise(generators: list[torch.Generator], like: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """N(0, I) for a batch, each image from its own generator, so that no image's draw depends on its batch."""
    noise = [torch.randn(like.shape[1:], generator=generator, dtype=torch.float32) for generator in generators]
    drawn = torch.stack(noise)
    # From pinned memory a copy waits for nothing that the GPU has still to do.
    return (drawn.pin_memory() if like.is_cuda else drawn).to(like, non_blocking=True)
