"""Samplers: from pure noise to an image. Each is a function of a denoiser; none knows the network.

denoiser(x_t, t)   the network's output (eps, v or x_0), b c h w
timesteps          the visited t, descending
abar, abar_prev    alphas_cumprod at a visited step and at the next one, which is less noisy; after the last step
                   comes the clean image, abar_prev = 1. The first abar may be 0 (pure noise)
a, s               sqrt(abar), sqrt(1 - abar): x_t = a x_0 + s noise
t                  of a denoiser: on the CPU, as alphas_cumprod had best be
generators         one for each image: an image's result does not depend on its batch
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ddpm_core.config import Prediction
from ddpm_core.diffusion import Predicted, draw_noise, predicted, q_sample, training_target
from ddpm_core.errors import InputError
from ddpm_core.guidance import Denoiser

Callback = Callable[[int, Float[Tensor, "b c h w"]], None]
"""Called after each step with the number of steps done and the current x_0 prediction."""


class SamplerFunction(Protocol):
    """What every sampler is called like; `ddim` also takes `eta`."""

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


def trailing(num_timesteps: int, num_steps: int) -> Int64[Tensor, " n"]:
    """round(T i / n) - 1 for i = n ... 1: from T - 1 down; 3 of 10 are 9 6 2.

    Lin et al. 2024, section 3.3: sampling starts where the chain ends, at all noise.

    Raises:
        ValueError: more steps than timesteps, or none; as the other spacings.
    """
    _check_num_steps(num_timesteps, num_steps)
    return (torch.arange(num_steps, 0, -1, dtype=torch.float64) * num_timesteps / num_steps).round().long() - 1


def leading(num_timesteps: int, num_steps: int) -> Int64[Tensor, " n"]:
    """floor(T i / n) for i = n - 1 ... 0: down to 0, the noisiest left out (Song et al. 2021); 3 of 10 are 6 3 0."""
    _check_num_steps(num_timesteps, num_steps)
    return torch.arange(num_steps - 1, -1, -1) * num_timesteps // num_steps


def linspace(num_timesteps: int, num_steps: int) -> Int64[Tensor, " n"]:
    """round((T - 1) i / (n - 1)) for i = n - 1 ... 0: both ends (Nichol & Dhariwal 2021); 3 of 10 are 9 4 0.

    A single step is at T - 1.
    """
    _check_num_steps(num_timesteps, num_steps)
    return torch.linspace(num_timesteps - 1, 0, num_steps, dtype=torch.float64).round().long()


def _check_num_steps(num_timesteps: int, num_steps: int) -> None:
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"num_steps is {num_steps}; it must lie in [1, {num_timesteps}]")


SPACINGS = {"trailing": trailing, "leading": leading, "linspace": linspace}


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

    Any spacing is right, because the previous abar is that of the next visited step.
    """
    x_t = x_T
    for i, (t, abar, abar_prev) in enumerate(_steps(timesteps, alphas_cumprod)):
        pred = _predict(denoiser, x_t, t, alphas_cumprod, prediction, clip=clip)
        sigma = eta * math.sqrt((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev))
        x_t = math.sqrt(abar_prev) * pred.x_0 + math.sqrt(max(1 - abar_prev - sigma**2, 0.0)) * pred.eps
        if sigma > 0:
            x_t = x_t + sigma * draw_noise(generators, x_t)
        if callback:
            callback(i + 1, pred.x_0)
    return x_t


ddpm: SamplerFunction = functools.partial(ddim, eta=1.0)
"""Ancestral sampling (Ho et al. 2020, algorithm 2) from the posterior q(x_prev | x_t, x_0) of eq. 6 and 7, whose
variance is beta-tilde: DDIM with eta 1 (Song et al. 2021, section 4.1)."""


def dpm_solver(
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
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2): deterministic, second order, one evaluation a step.

    The exact solution in lambda = log(a / s), with x_0 continued along the line through its last two predictions.
    First order, which is DDIM, where there is no line: at the first step, and at the last, where lambda is infinite.
    """
    x_t = x_T
    x_0_last, h_last = x_T, math.inf  # a line through a point infinitely far away has no slope
    for i, (t, abar, abar_prev) in enumerate(_steps(timesteps, alphas_cumprod)):
        x_0 = _predict(denoiser, x_t, t, alphas_cumprod, prediction, clip=clip).x_0
        h = _half_log_snr(abar_prev) - _half_log_snr(abar)
        slope = h / (2 * h_last) if math.isfinite(h) else 0.0
        shrink = math.sqrt((1 - abar_prev) / (1 - abar))
        x_t = shrink * x_t - math.sqrt(abar_prev) * math.expm1(-h) * (x_0 + slope * (x_0 - x_0_last))
        x_0_last, h_last = x_0, h
        if callback:
            callback(i + 1, x_0)
    return x_t


SAMPLERS: dict[str, SamplerFunction] = {"ddpm": ddpm, "ddim": ddim, "dpm_solver": dpm_solver}


def invert(
    denoiser: Denoiser,
    x_0: Float[Tensor, "b c h w"],
    *,
    timesteps: Int64[Tensor, " n"],
    alphas_cumprod: Float[Tensor, " T"],
    prediction: Prediction,
    num_fixed_point_steps: int = 1,
) -> Float[Tensor, "b c h w"]:
    """The x_T from which `ddim` over the same `timesteps`, unclipped and with eta 0, comes back to x_0.

    A DDIM step turns x_t by the angle d between two noise levels, x_prev = cos(d) x_t - sin(d) v(x_t, t) (Salimans &
    Ho 2022, appendix D). Its inverse x_t = (x_prev + sin(d) v(x_t, t)) / cos(d) holds x_t on both sides; it is iterated
    from x_t = x_prev (Pan et al. 2023). One iteration is DDIM inversion as usual (Song et al. 2021, section 4.3);
    more converge to the exact inverse as long as tan(d) |dv/dx_t| < 1, which many steps make sure of.

    Costs `num_fixed_point_steps` evaluations a step.

    Raises:
        ValueError: fewer than one of them.
        InputError: one step from pure noise to the clean image, which has no inverse.
    """
    if num_fixed_point_steps < 1:
        raise ValueError(f"num_fixed_point_steps is {num_fixed_point_steps}; it must be at least 1")
    check_invertible(timesteps, alphas_cumprod)
    x_t = x_0
    for t, abar, abar_prev in reversed(_steps(timesteps, alphas_cumprod)):
        x_prev = x_t
        d = math.atan2(math.sqrt(1 - abar), math.sqrt(abar)) - math.atan2(
            math.sqrt(1 - abar_prev), math.sqrt(abar_prev)
        )
        for _ in range(num_fixed_point_steps):
            pred = _predict(denoiser, x_t, t, alphas_cumprod, prediction, clip=False)
            v = training_target("v", pred.x_0, _batch(t, x_t), pred.eps, alphas_cumprod)
            x_t = (x_prev + math.sin(d) * v) / math.cos(d)
    return x_t


def check_invertible(timesteps: Int64[Tensor, " n"], alphas_cumprod: Float[Tensor, " T"]) -> None:
    """Raises InputError where the only step goes from pure noise to the clean image, which has no inverse."""
    if len(timesteps) == 1 and alphas_cumprod[timesteps[0]] == 0:
        raise InputError("sampling.num-steps is 1: one step from pure noise cannot be inverted; take at least 2")


def residual_edit(
    denoiser: Denoiser,
    both: Denoiser,
    x_0: Float[Tensor, "b c h w"],
    *,
    timesteps: Int64[Tensor, " n"],
    alphas_cumprod: Float[Tensor, " T"],
    prediction: Prediction,
    num_fixed_point_steps: int = 1,
    callback: Callback | None = None,
) -> Float[Tensor, "b c h w"]:
    """x_0 + (x_0 drawn as the wanted side - x_0 drawn as its own), both by DDIM from the noise that `invert` finds.

    What the network blurs it blurs in both, and the difference cancels it; equal sides give back x_0 to the last bit.
    `denoiser` knows x_0's own side; `both`, called with 2b images, the own side in the first b and the wanted in the
    others. Costs `num_fixed_point_steps` evaluations of the one and one of the other a step.

    Raises:
        ValueError, InputError: as `invert`.
    """
    chain: Any = {"timesteps": timesteps, "alphas_cumprod": alphas_cumprod, "prediction": prediction}
    x_t = invert(denoiser, x_0, num_fixed_point_steps=num_fixed_point_steps, **chain)

    def changed(drawn: Float[Tensor, "n c h w"]) -> Float[Tensor, "b c h w"]:
        own, wanted = drawn.chunk(2)
        return x_0 + (wanted - own)

    told = (lambda done, drawn: callback(done, changed(drawn))) if callback else None
    return changed(ddim(both, torch.cat([x_t, x_t]), generators=[], clip=False, callback=told, **chain))


def flow_edit(
    both: Denoiser,
    x_0: Float[Tensor, "b c h w"],
    *,
    timesteps: Int64[Tensor, " n"],
    alphas_cumprod: Float[Tensor, " T"],
    prediction: Prediction,
    generators: list[torch.Generator],
    callback: Callback | None = None,
) -> Float[Tensor, "b c h w"]:
    """x_0 + delta without inversion (FlowEdit, Kulikov et al. 2024, algorithm 1), for any schedule.

    With tau = s / (a + s), which is FlowEdit's time, and fresh noise at each step:

        D     = x_0 predicted as the wanted side at a (x_0 + delta) + s noise - as its own at a x_0 + s noise
        delta = delta + (tau - tau_prev) / tau (D - delta)

    `both` as in `residual_edit`; one evaluation of it a step.
    """
    delta = torch.zeros_like(x_0)
    for i, (t, abar, abar_prev) in enumerate(_steps(timesteps, alphas_cumprod)):
        noise = math.sqrt(1 - abar) * draw_noise(generators, x_0)
        x_t = torch.cat([math.sqrt(abar) * x_0 + noise, math.sqrt(abar) * (x_0 + delta) + noise])
        own, wanted = _predict(both, x_t, t, alphas_cumprod, prediction, clip=False).x_0.chunk(2)
        delta = delta + (1 - _flow_time(abar_prev) / _flow_time(abar)) * (wanted - own - delta)
        if callback:
            callback(i + 1, x_0 + delta)
    return x_0 + delta


def sdedit_start(
    x_0: Float[Tensor, "b c h w"],
    timesteps: Int64[Tensor, " n"],
    strength: float,
    *,
    noise: Float[Tensor, "b c h w"],
    alphas_cumprod: Float[Tensor, " T"],
) -> tuple[Float[Tensor, "b c h w"], Int64[Tensor, " m"]]:
    """SDEdit (Meng et al. 2022): x_0 noised to where the last `strength` of the chain begins, and the visited timesteps
    from there on. Strength 1 leaves of x_0 what the chain leaves.

    Raises:
        InputError: no visited timestep is that little noisy.
    """
    remaining = sdedit_timesteps(timesteps, strength, len(alphas_cumprod))
    return q_sample(x_0, _batch(int(remaining[0]), x_0), noise, alphas_cumprod), remaining


def sdedit_timesteps(timesteps: Int64[Tensor, " n"], strength: float, num_timesteps: int) -> Int64[Tensor, " m"]:
    """Of the visited timesteps those in the last `strength` of the chain.

    Raises:
        InputError: there is none.
    """
    remaining = timesteps[timesteps < round(strength * num_timesteps)]
    if len(remaining) == 0:
        least = (int(timesteps[-1]) + 1) / num_timesteps
        raise InputError(
            f"sampling.strength is {strength}: none of the {len(timesteps)} steps is left; "
            f"give at least {least:g}, or more sampling.num-steps"
        )
    return remaining


def _steps(timesteps: Int64[Tensor, " n"], alphas_cumprod: Float[Tensor, " T"]) -> list[tuple[int, float, float]]:
    """t, abar, abar_prev of each step."""
    abars = [*alphas_cumprod[timesteps.to(alphas_cumprod.device)].tolist(), 1.0]
    return list(zip(timesteps.tolist(), abars[:-1], abars[1:], strict=True))


def _predict(
    denoiser: Denoiser,
    x_t: Float[Tensor, "b c h w"],
    t: int,
    alphas_cumprod: Float[Tensor, " T"],
    prediction: Prediction,
    *,
    clip: bool,
) -> Predicted:
    t_batch = _batch(t, x_t)
    return predicted(prediction, denoiser(x_t, t_batch).to(x_t), x_t, t_batch, alphas_cumprod, clip=clip)


def _batch(t: int, like: Float[Tensor, "b c h w"]) -> Int64[Tensor, " b"]:
    """On the CPU: what depends on it is decided, and small tables looked up, without waiting for a GPU."""
    return torch.full((len(like),), t, dtype=torch.int64)


def _flow_time(abar: float) -> float:
    """tau = s / (a + s), from 0 for the clean image to 1 for pure noise."""
    a, s = math.sqrt(abar), math.sqrt(1 - abar)
    return s / (a + s)


def _half_log_snr(abar: float) -> float:
    """lambda = log(a / s), from -inf for pure noise to inf for the clean image."""
    if abar in (0.0, 1.0):
        return math.inf if abar else -math.inf
    return 0.5 * math.log(abar / (1 - abar))
