"""Guidance: denoisers made from denoisers.

A denoiser is what samplers call: (x_t, t) → the network's output, b c h w, be it eps, v or x_0. The three are linear
in one another at a given x_t (see `diffusion`), so a combination of outputs whose weights add up to 1 has the same
formula for all.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from ddpm_core.config import Prediction
from ddpm_core.diffusion import predicted, signal_and_noise

Network = Callable[..., Float[Tensor, "b c h w"]]
"""(x_t, t, condition, domain) → what it was trained to predict. One with a source mask m, asked with `show_mask`, adds
m as a further channel."""
Denoiser = Callable[[Float[Tensor, "b c h w"], Int64[Tensor, " b"]], Float[Tensor, "b c h w"]]
LogProb = Callable[[Float[Tensor, "b c h w"], Int64[Tensor, " b"]], Float[Tensor, " b"]]
"""log p(y | x_t) of the wanted y for each image: a classifier trained on noisy images."""


def classifier_free(
    network: Network,
    condition: Float[Tensor, "b 3 h w"],
    domain: Int64[Tensor, " b"],
    *,
    num_domains: int,
    guidance_scale: float,
    domain_guidance_scale: float | None = None,
    guidance_rescale: float = 0.0,
    source_mask: bool = False,
) -> Denoiser:
    """Guidance towards `condition` and `domain` (Ho & Salimans 2022):

        eps = eps(∅, ∅) + s (eps(c, d) - eps(∅, ∅))       s = 0 unconditional, 1 plain, > 1 guided

    and with a weight of the domain's own (Brooks et al. 2023, eq. 3):

        eps = eps(∅, ∅) + s_I (eps(c, ∅) - eps(∅, ∅)) + s_D (eps(c, d) - eps(c, ∅))

    One batched forward pass over the terms whose weight is not 0, the unconditional one first: of scale 0 or 1 there
    is only one, of two equal scales two.

    `source_mask`: the network has one, m. What it keeps of the source is known, and more than all of it would be
    contrast; so scales above 1 act on what is drawn only:

        eps(c, d) + (1 - m) (eps - eps(c, d))

    `guidance_rescale` moves each image's spread that far back to that of eps(c, d) (Lin et al. 2024, section 3.4).
    """
    domain_scale = guidance_scale if domain_guidance_scale is None else domain_guidance_scale
    null_condition, null_domain = torch.zeros_like(condition), torch.full_like(domain, num_domains)
    plain = (domain_scale, condition, domain)
    others = [
        (1 - guidance_scale, null_condition, null_domain),
        (guidance_scale - domain_scale, condition, null_domain),
    ]
    terms = [term for term in others if term[0] != 0]
    rescaled = guidance_rescale > 0 and bool(terms)
    if domain_scale != 0 or rescaled:
        terms.append(plain)
    weights, conditions, domains = zip(*terms, strict=True)
    n, all_conditions, all_domains = len(terms), torch.cat(conditions), torch.cat(domains)
    held = source_mask and n > 1 and domains[-1] is domain and max(guidance_scale, domain_scale) > 1
    shown = {"show_mask": True} if held else {}

    def guided(x_t: Float[Tensor, "b c h w"], t: Int64[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
        inputs = x_t.repeat(n, 1, 1, 1), t.to(x_t.device).repeat(n), all_conditions, all_domains
        outputs = network(*inputs, **shown).to(x_t).chunk(n)
        mixed = torch.stack([weight * output for weight, output in zip(weights, outputs, strict=True)]).sum(0)
        if held:
            mixed, own, m = mixed[:, :-1], outputs[-1][:, :-1], outputs[-1][:, -1:]
            mixed = own + (1 - m) * (mixed - own)
        if not rescaled:
            return mixed
        own = outputs[-1][:, : x_t.shape[1]]
        ratio = own.std((1, 2, 3), keepdim=True) / mixed.std((1, 2, 3), keepdim=True).clamp(min=1e-12)
        return guidance_rescale * ratio * mixed + (1 - guidance_rescale) * mixed

    return guided


def autoguidance(denoiser: Denoiser, weak_denoiser: Denoiser, scale: float) -> Denoiser:
    """Away from what a weaker network does worse: weak + s (strong - weak) (Karras et al. 2024b)."""
    if scale == 1:
        return denoiser

    def guided(x_t: Float[Tensor, "b c h w"], t: Int64[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
        weak = weak_denoiser(x_t, t)
        return weak + scale * (denoiser(x_t, t) - weak)

    return guided


def limited(guided: Denoiser, plain: Denoiser, interval: tuple[float, float], num_timesteps: int) -> Denoiser:
    """`guided` at the timesteps whose share of the chain, (t + 1) / T, lies in `interval`; `plain` at the others
    (Kynkäänniemi et al. 2024). Which is which is seen without waiting for a GPU where t is on the CPU."""
    low, high = interval
    if (low, high) == (0, 1):
        return guided

    def denoiser(x_t: Float[Tensor, "b c h w"], t: Int64[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
        share = (t + 1) / num_timesteps
        inside = (low <= share) & (share <= high)
        if inside.all():
            return guided(x_t, t)
        if not inside.any():
            return plain(x_t, t)
        return torch.where(inside.to(x_t.device)[:, None, None, None], guided(x_t, t), plain(x_t, t))

    return denoiser


def classifier_guidance(
    denoiser: Denoiser,
    log_prob: LogProb,
    scale: float,
    *,
    prediction: Prediction,
    alphas_cumprod: Float[Tensor, " T"],
) -> Denoiser:
    """Towards what a classifier takes for y (Dhariwal & Nichol 2021, algorithm 2):

        eps - scale sqrt(1 - abar) grad log p(y | x_t)

    which moves x_0 by scale (1 - abar) / sqrt(abar) grad log p. Pure noise tells nothing of y: the gradient, and the
    move, are 0 there.
    """

    def guided(x_t: Float[Tensor, "b c h w"], t: Int64[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
        a, s = signal_and_noise(alphas_cumprod, t, x_t)
        gradient = _gradient(lambda x: log_prob(x, t.to(x.device, copy=True)), x_t)
        move = torch.where(a > 0, scale * s**2 / a, 0) * gradient
        return _with_x_0_moved(denoiser(x_t, t), move, prediction, a, s)

    return guided


def identity_guidance(
    denoiser: Denoiser,
    embed: Callable[[Float[Tensor, "b c h w"]], Float[Tensor, "b d"]],
    reference: Float[Tensor, "b c h w"],
    scale: float,
    *,
    prediction: Prediction,
    alphas_cumprod: Float[Tensor, " T"],
) -> Denoiser:
    """Towards images whose embedding points where `reference`'s does, for a net that knows clean images only
    (Bansal et al. 2023):

        x_0 + scale (1 - abar) grad cos(embed(x_0), embed(reference))

    The gradient is that at the x_0 prediction and does not go back through the denoiser, which would double the cost
    of a step. What it would bring is a product with Cov(x_0 | x_t), for which (1 - abar) I stands (exact for x_0 from
    N(0, I); Song et al. 2023, PiGDM).
    """
    with torch.no_grad():
        wanted = embed(reference)

    def guided(x_t: Float[Tensor, "b c h w"], t: Int64[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
        a, s = signal_and_noise(alphas_cumprod, t, x_t)
        output = denoiser(x_t, t).to(x_t)
        x_0 = predicted(prediction, output, x_t, t, alphas_cumprod).x_0
        gradient = _gradient(lambda x: F.cosine_similarity(embed(x), wanted.clone(), dim=1), x_0)
        return _with_x_0_moved(output, scale * s**2 * gradient, prediction, a, s)

    return guided


def _gradient(
    value: Callable[[Float[Tensor, "b c h w"]], Float[Tensor, " b"]], x: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b c h w"]:
    """Of each image's value, also where the caller has switched gradients off."""
    with torch.inference_mode(False):  # ends no_grad too
        x = x.clone().detach().requires_grad_()
        return torch.autograd.grad(value(x).sum(), x)[0]


def _with_x_0_moved(
    output: Float[Tensor, "b c h w"],
    move: Float[Tensor, "b c h w"],
    prediction: Prediction,
    a: Float[Tensor, "b 1 1 1"],
    s: Float[Tensor, "b 1 1 1"],
) -> Float[Tensor, "b c h w"]:
    """The output that stands for x_0 + move at the same x_t: eps = (x_t - a x_0) / s, v = (a x_t - x_0) / s."""
    per_x_0 = {"x_0": torch.ones_like(s), "eps": -a / s, "v": -1 / s}[prediction]
    return output + per_x_0 * move
