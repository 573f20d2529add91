"""Classifier-free guidance (Ho & Salimans 2022).

    eps = eps_uncond + s (eps_cond - eps_uncond)      s = 0 unconditional, 1 plain, > 1 guided

The combination is linear and x_t is shared, so the same formula holds for v and x_0 predictions.
A denoiser is what samplers call: (x_t, t) → the network's output, b c h w, whatever it predicts.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

Denoiser = Callable[[Float[Tensor, "b c h w"], Int64[Tensor, " b"]], Float[Tensor, "b c h w"]]


def classifier_free(
    model: nn.Module,
    condition: Float[Tensor, "b 3 h w"],
    domain: Int64[Tensor, " b"],
    *,
    num_domains: int,
    guidance_scale: float,
) -> Denoiser:
    """A denoiser for `condition` and `domain`: one batched forward pass, unconditional half first.

    Scales 0 and 1 need only one of the halves and pay for only one.
    """
    null_condition = torch.zeros_like(condition)
    null_domain = torch.full_like(domain, num_domains)
    if guidance_scale == 0:
        return lambda x_t, t: model(x_t, t, null_condition, null_domain)
    if guidance_scale == 1:
        return lambda x_t, t: model(x_t, t, condition, domain)
    both_conditions = torch.cat([null_condition, condition])
    both_domains = torch.cat([null_domain, domain])

    def guided(x_t: Float[Tensor, "b c h w"], t: Int64[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
        output = model(torch.cat([x_t, x_t]), torch.cat([t, t]), both_conditions, both_domains)
        uncond, cond = output.float().chunk(2)
        return uncond + guidance_scale * (cond - uncond)

    return guided
