"""The noise schedules against the papers' numbers and closed forms."""

import math

import pytest
import torch

from ddpm_core.config import DiffusionConfig
from ddpm_core.errors import InputError
from ddpm_core.schedule import SCHEDULES, alphas_cumprod, cosine_betas, linear_betas, rescale_to_zero_terminal_snr

CHAINS = [
    DiffusionConfig(schedule=schedule, zero_terminal_snr=zero, prediction="v")
    for schedule in ("linear", "cosine")
    for zero in (False, True)
]


def test_linear_schedule_has_the_papers_endpoints():
    betas = linear_betas(1000)
    assert betas.dtype == torch.float64
    assert betas[0].item() == pytest.approx(1e-4, rel=1e-12)
    assert betas[-1].item() == pytest.approx(0.02, rel=1e-12)
    assert betas[500].item() == pytest.approx(1e-4 + (0.02 - 1e-4) * 500 / 999, rel=1e-12)


def test_linear_schedule_of_another_length_is_scaled_and_held_below_one():
    assert linear_betas(250)[-1].item() == pytest.approx(0.08, rel=1e-12)
    assert linear_betas(10).max().item() == 0.999


@pytest.mark.parametrize("num_timesteps", [10, 1000])
def test_cosine_schedule_is_eq_17(num_timesteps: int):
    def f(t):
        return math.cos((t / num_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2

    abar = alphas_cumprod(DiffusionConfig(schedule="cosine", num_timesteps=num_timesteps))
    for t in range(num_timesteps - 1):  # the last step would be all noise: clipped
        assert abar[t].item() == pytest.approx(f(t + 1) / f(0), rel=1e-9)
    assert cosine_betas(num_timesteps).dtype == torch.float64
    assert cosine_betas(num_timesteps)[-1].item() == 0.999


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_alphas_cumprod_is_the_running_product(schedule):
    abar = alphas_cumprod(DiffusionConfig(num_timesteps=10, schedule=schedule))
    product = 1.0
    for beta, value in zip(SCHEDULES[schedule](10).tolist(), abar.tolist(), strict=True):
        product *= 1 - beta
        assert value == pytest.approx(product, rel=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_timesteps", [50, 200, 1000, 4000])
def test_every_length_falls_monotonically_to_noise(num_timesteps: int, schedule):
    abar = alphas_cumprod(DiffusionConfig(num_timesteps=num_timesteps, schedule=schedule))
    assert (abar[1:] < abar[:-1]).all()
    assert abar[0] > 0.99
    assert 0 < abar[-1] < 1e-4


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_zero_terminal_snr_keeps_the_first_and_empties_the_last(schedule):
    plain = alphas_cumprod(DiffusionConfig(schedule=schedule))
    zero = alphas_cumprod(DiffusionConfig(schedule=schedule, zero_terminal_snr=True, prediction="v"))
    assert zero[-1].item() == 0
    assert zero[0].item() == pytest.approx(plain[0].item(), rel=1e-12)
    assert (zero[1:] < zero[:-1]).all()
    # sqrt(abar) is changed by one shift and one factor: its differences all shrink alike
    factors = zero.sqrt().diff() / plain.sqrt().diff()
    torch.testing.assert_close(factors, factors[:1].expand_as(factors), rtol=1e-9, atol=0)


def test_zero_terminal_snr_by_hand():
    abar = torch.tensor([0.81, 0.25, 0.01], dtype=torch.float64)  # sqrt: 0.9 0.5 0.1 → shift 0.1, factor 0.9 / 0.8
    expected = torch.tensor([0.9, 0.45, 0.0], dtype=torch.float64) ** 2
    torch.testing.assert_close(rescale_to_zero_terminal_snr(abar), expected, rtol=1e-12, atol=0)


def test_a_chain_of_one_step_cannot_end_in_zero_snr():
    with pytest.raises(InputError, match="num-timesteps"):
        alphas_cumprod(DiffusionConfig(num_timesteps=1, zero_terminal_snr=True, prediction="v"))


@pytest.mark.parametrize("config", CHAINS, ids=lambda c: f"{c.schedule}-{c.zero_terminal_snr}")
def test_every_chain_is_in_float64(config):
    assert alphas_cumprod(config).dtype == torch.float64
