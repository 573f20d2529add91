"""Our samplers beside diffusers': the same denoiser, the same noise, the same trajectory, in float64.

diffusers keeps its abar in float32; it is given ours. DPM-Solver++ rounds each step to float32 on its own, so 1e-5 is
what can be asked of it; the others agree to 1e-9. Where diffusers is wrong, the closed form decides.
"""

from typing import Any

import pytest
import torch

from ddpm_core.config import DiffusionConfig
from ddpm_core.diffusion import seeded, training_target
from ddpm_core.samplers import SPACINGS, ddim, ddpm, dpm_solver
from ddpm_core.schedule import alphas_cumprod

MEAN, SPREAD = 0.3, 0.2
ABAR = alphas_cumprod(DiffusionConfig())
ZERO_ABAR = alphas_cumprod(DiffusionConfig(zero_terminal_snr=True, prediction="v"))
THEIR_NAME = {"eps": "epsilon", "v": "v_prediction", "x_0": "sample"}
PREDICTIONS = pytest.mark.parametrize("prediction", THEIR_NAME)


def their(name: str) -> Any:
    """A scheduler of diffusers, which takes seconds to import: not before it is needed."""
    import diffusers

    return getattr(diffusers, name)


def optimal(prediction, abars):
    """The best denoiser for N(MEAN, SPREAD^2)."""

    def denoise(x_t, t):
        abar = abars[t].reshape(-1, 1, 1, 1)
        z = (x_t - abar.sqrt() * MEAN) / (abar * SPREAD**2 + 1 - abar)
        return training_target(prediction, MEAN + abar.sqrt() * SPREAD**2 * z, t, (1 - abar).sqrt() * z, abars)

    return denoise


def noise():
    return torch.randn(1, 3, 8, 8, generator=seeded("x_T"), dtype=torch.float64)


def draws(count):
    """What a sampler with the generator seeded(0) adds at its steps."""
    generator = seeded(0)
    return [torch.randn(3, 8, 8, generator=generator)[None].double() for _ in range(count)]


def our_trajectory(sampler, timesteps, prediction="eps", abars=ABAR, **options):
    """x_t at each visited step, and the result."""
    shown = []
    denoise = optimal(prediction, abars)
    result = sampler(
        lambda x_t, t: shown.append(x_t) or denoise(x_t, t),
        noise(),
        timesteps=timesteps,
        alphas_cumprod=abars,
        prediction=prediction,
        generators=[seeded(0)],
        **{"clip": False, **options},
    )
    return [*shown, result]


def their_trajectory(scheduler, prediction="eps", abars=ABAR, **options):
    """The same of a scheduler whose timesteps are set; `noises` go to its steps one by one."""
    noises = options.pop("noises", None)
    denoise, x_t = optimal(prediction, abars), noise()
    trajectory = [x_t]
    for i, t in enumerate(scheduler.timesteps):
        extra = {"variance_noise": noises[i]} if noises else {}
        x_t = scheduler.step(denoise(x_t, t[None]), t, x_t, **extra, **options).prev_sample
        trajectory.append(x_t)
    return trajectory


def assert_same(ours, theirs, tolerance):
    assert len(ours) == len(theirs)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def their_ddim(timesteps, prediction="eps", spacing="trailing", abars=ABAR, **options):
    scheduler = their("DDIMScheduler")(
        prediction_type=THEIR_NAME[prediction],
        timestep_spacing=spacing,
        **{"clip_sample": False, **options},
    )
    scheduler.alphas_cumprod = abars
    scheduler.set_timesteps(len(timesteps))
    return scheduler


@PREDICTIONS
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim(prediction, spacing, eta):
    timesteps = SPACINGS[spacing](1000, 20)
    scheduler = their_ddim(timesteps, prediction, spacing)
    assert scheduler.timesteps.tolist() == timesteps.tolist()
    ours = our_trajectory(ddim, timesteps, prediction, eta=eta)
    assert_same(ours, their_trajectory(scheduler, prediction, eta=eta, noises=draws(20)), 1e-9)


def test_clipped_ddim():
    timesteps = SPACINGS["trailing"](1000, 20)
    scheduler = their_ddim(timesteps, "x_0", clip_sample=True)
    x_t, ours = noise(), []

    def beyond(x_t, t):
        return 4 * optimal("x_0", ABAR)(x_t, t)

    ddim(
        lambda x, t: ours.append(x) or beyond(x, t),
        noise(),
        timesteps=timesteps,
        alphas_cumprod=ABAR,
        prediction="x_0",
        generators=[seeded(0)],
    )
    for t, x in zip(scheduler.timesteps, ours, strict=True):
        torch.testing.assert_close(x, x_t, rtol=1e-9, atol=1e-9)
        # use_clipped_model_output: eps follows the clipped x_0, as ours does and as a consistent x_t needs
        x_t = scheduler.step(beyond(x_t, t[None]), t, x_t, use_clipped_model_output=True).prev_sample


@pytest.mark.parametrize("prediction", ["v", "x_0"])
def test_ddim_from_pure_noise(prediction):
    timesteps = SPACINGS["trailing"](1000, 20)
    scheduler = their_ddim(timesteps, prediction, abars=ZERO_ABAR)
    theirs = their_trajectory(scheduler, prediction, ZERO_ABAR)
    assert_same(our_trajectory(ddim, timesteps, prediction, ZERO_ABAR), theirs, 1e-9)


@PREDICTIONS
@pytest.mark.parametrize("timesteps", [SPACINGS["trailing"](1000, 20), SPACINGS["linspace"](1000, 7)], ids=len)
def test_ddpm(prediction, timesteps, monkeypatch):
    scheduler = their("DDPMScheduler")(
        prediction_type=THEIR_NAME[prediction], clip_sample=False, variance_type="fixed_small"
    )
    scheduler.alphas_cumprod = ABAR
    scheduler.set_timesteps(timesteps=timesteps.tolist())
    left = draws(len(timesteps))
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, **kwargs: left.pop(0))
    theirs = their_trajectory(scheduler, prediction)
    # They add 1e-10 of noise at the last step, whose variance is 0.
    assert_same(our_trajectory(ddpm, timesteps, prediction), theirs, 1e-9)


@PREDICTIONS
@pytest.mark.parametrize(
    "timesteps",
    [SPACINGS["trailing"](1000, 20), SPACINGS["linspace"](1000, 20), SPACINGS["trailing"](1000, 7)],
    ids=["trailing", "linspace", "uneven"],
)
def test_dpm_solver(prediction, timesteps):
    scheduler = their("DPMSolverMultistepScheduler")(
        prediction_type=THEIR_NAME[prediction],
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        lower_order_final=True,
        final_sigmas_type="zero",
    )
    scheduler.alphas_cumprod = ABAR.numpy()
    scheduler.set_timesteps(timesteps=timesteps.tolist())
    assert_same(our_trajectory(dpm_solver, timesteps, prediction), their_trajectory(scheduler, prediction), 1e-5)


def test_schedules():
    cosine = alphas_cumprod(DiffusionConfig(schedule="cosine"))
    theirs = their("DDPMScheduler")(beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()
    torch.testing.assert_close(cosine, theirs, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(ABAR, their("DDPMScheduler")().alphas_cumprod.double(), rtol=1e-3, atol=1e-6)
    rescaled = their("DDIMScheduler")(rescale_betas_zero_snr=True).alphas_cumprod.double()
    torch.testing.assert_close(ZERO_ABAR, rescaled, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("spacing", "num_steps", "their_error"), [("trailing", 7, 0.011), ("linspace", 20, 0.066), ("linspace", 7, 0.262)]
)
def test_uneven_spacing_where_diffusers_ddim_is_wrong(spacing, num_steps, their_error):
    """diffusers takes t - T // n for the step before, whatever step it visits next.

    A perfect denoiser of a single point has an exact answer: DDIM keeps x_t on the line between the point and its
    noise, so that at each visited step x_t = a x_0 + s noise. Ours is there; theirs misses it.
    """
    point, eps, timesteps = 0.4, noise(), SPACINGS[spacing](1000, num_steps)
    scheduler = their_ddim(timesteps, "x_0", spacing)
    assert scheduler.timesteps.tolist() == timesteps.tolist()
    x_t = ABAR[timesteps[0]].sqrt() * point + (1 - ABAR[timesteps[0]]).sqrt() * eps
    x_0, ours, theirs = torch.full_like(eps, point), [], [x_t]
    ddim(
        lambda x_t, t: ours.append(x_t) or x_0,
        x_t,
        timesteps=timesteps,
        alphas_cumprod=ABAR,
        prediction="x_0",
        generators=[seeded(0)],
    )
    for t in scheduler.timesteps[:-1]:
        x_t = scheduler.step(x_0, t, x_t).prev_sample
        theirs.append(x_t)
    exact = [ABAR[t].sqrt() * x_0 + (1 - ABAR[t]).sqrt() * eps for t in timesteps]
    assert_same(ours, exact, 1e-9)
    missed = max((x - y).abs().max().item() for x, y in zip(theirs, exact, strict=True))
    assert missed == pytest.approx(their_error, rel=0.05)
