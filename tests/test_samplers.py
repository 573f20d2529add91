"""Samplers against data whose best denoiser is known in closed form.

For x_0 ~ N(m, c^2) independently for each pixel, E[noise | x_t] = s (x_t - a m) / (a^2 c^2 + s^2), with
a = sqrt(abar_t), s = sqrt(1 - abar_t). DDIM then solves a linear ODE whose exact end point is known.
"""

import itertools

import pytest
import torch

from ddpm_core.config import DiffusionConfig
from ddpm_core.diffusion import seeded, training_target
from ddpm_core.samplers import SAMPLERS, ddim, ddpm, trailing_timesteps
from ddpm_core.schedule import alphas_cumprod

MEAN, SPREAD = 0.3, 0.2
ABAR = alphas_cumprod(DiffusionConfig())


def optimal(prediction: str):
    """The best denoiser for N(MEAN, SPREAD^2), in the wanted form."""

    def denoise(x_t, t):
        abar = ABAR[t].reshape(-1, 1, 1, 1)
        a, s = abar.sqrt(), (1 - abar).sqrt()
        eps = s * (x_t - a * MEAN) / (abar * SPREAD**2 + 1 - abar)
        x_0 = (x_t - s * eps) / a
        return training_target(prediction, x_0, t, eps, ABAR)

    return denoise


def sample(sampler, num_steps, x_T, prediction="eps", **options):
    return sampler(
        optimal(prediction),
        x_T,
        timesteps=trailing_timesteps(1000, num_steps),
        alphas_cumprod=ABAR,
        prediction=prediction,
        generators=[seeded("sample", i) for i in range(len(x_T))],
        clip=False,
        **options,
    )


def noise(b=4, side=64):
    return torch.randn(b, 1, side, side, generator=seeded("x_T"), dtype=torch.float64)


@pytest.mark.parametrize("prediction", ["eps", "v", "x_0"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_gaussian_data_comes_back_with_its_mean_and_spread(name, prediction):
    x_0 = sample(SAMPLERS[name], 1000, noise(), prediction)
    assert x_0.mean().item() == pytest.approx(MEAN, abs=0.01)
    # DDPM's beta-tilde is the posterior variance for a single point, a lower bound: 2 % too narrow at 1000 steps
    assert x_0.std().item() == pytest.approx(SPREAD, rel=0.03)


def test_ddpm_is_too_narrow_by_an_error_of_order_one():
    missing = [SPREAD - sample(ddpm, n, noise(1, 256)).std().item() for n in (125, 250, 500)]
    ratios = [coarse / fine for coarse, fine in itertools.pairwise(missing)]
    assert all(1.6 < ratio < 2.4 for ratio in ratios), (missing, ratios)


def exact_ode_end(x_T):
    """The probability-flow ODE keeps (x_t - a m) / sqrt(a^2 c^2 + s^2) constant from t = T - 1 to clean."""
    abar = ABAR[-1].item()
    return MEAN + SPREAD * (x_T - abar**0.5 * MEAN) / (abar * SPREAD**2 + 1 - abar) ** 0.5


def test_ddim_converges_with_order_one():
    x_T = noise(1, 16)
    errors = [(sample(ddim, n, x_T) - exact_ode_end(x_T)).abs().mean().item() for n in (25, 50, 100, 200)]
    ratios = [coarse / fine for coarse, fine in itertools.pairwise(errors)]
    assert all(1.7 < ratio < 2.3 for ratio in ratios), (errors, ratios)


def test_one_ddim_step_is_exact():
    x_T, output = noise(2, 4), noise(2, 4) * 0.5
    result = ddim(
        lambda x_t, t: output,
        x_T,
        timesteps=torch.tensor([700, 300]),
        alphas_cumprod=ABAR,
        prediction="eps",
        generators=[seeded(0), seeded(1)],
        clip=False,
    )
    abar_700, abar_300 = ABAR[700].item(), ABAR[300].item()
    x_0 = (x_T - (1 - abar_700) ** 0.5 * output) / abar_700**0.5
    x_300 = abar_300**0.5 * x_0 + (1 - abar_300) ** 0.5 * output
    torch.testing.assert_close(result, (x_300 - (1 - abar_300) ** 0.5 * output) / abar_300**0.5)


def test_one_ddpm_step_is_the_posterior_of_eq_6_and_7():
    x_T, output = noise(1, 4), noise(1, 4) * 0.5
    t, prev = 500, 499
    seen = []
    ddpm(
        lambda x_t, t: seen.append(x_t) or output,
        x_T,
        timesteps=torch.tensor([t, prev]),
        alphas_cumprod=ABAR,
        prediction="eps",
        generators=[seeded("posterior")],
        clip=False,
    )
    beta = 1 - (ABAR[t] / ABAR[prev]).item()
    abar, abar_prev = ABAR[t].item(), ABAR[prev].item()
    mean = (x_T - beta / (1 - abar) ** 0.5 * output) / (1 - beta) ** 0.5  # Ho et al. 2020, eq. 11
    variance = (1 - abar_prev) / (1 - abar) * beta
    draw = torch.randn(1, 4, 4, generator=seeded("posterior"))[None].double()
    torch.testing.assert_close(seen[1], mean + variance**0.5 * draw, rtol=1e-9, atol=1e-9)


def test_ancestral_ddim_is_ddpm():
    x_T = noise(2, 8)
    torch.testing.assert_close(sample(ddim, 50, x_T, eta=1.0), sample(ddpm, 50, x_T), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_pictures_result_does_not_depend_on_its_batch(name):
    x_T = noise(3, 8)
    whole = sample(SAMPLERS[name], 10, x_T)
    first = sample(SAMPLERS[name], 10, x_T[:1])
    torch.testing.assert_close(whole[:1], first, rtol=1e-12, atol=1e-12)


def test_visited_timesteps_are_exact():
    assert trailing_timesteps(1000, 4).tolist() == [999, 749, 499, 249]
    assert trailing_timesteps(10, 10).tolist() == list(range(9, -1, -1))
    assert trailing_timesteps(10, 3).tolist() == [9, 6, 2]
    assert trailing_timesteps(10, 1).tolist() == [9]
    for bad in (0, 11):
        with pytest.raises(ValueError, match="num_steps"):
            trailing_timesteps(10, bad)


def test_the_callback_sees_each_step():
    seen = []
    sample(ddim, 5, noise(1, 4), callback=lambda done, x_0: seen.append((done, tuple(x_0.shape))))
    assert seen == [(i, (1, 1, 4, 4)) for i in range(1, 6)]
