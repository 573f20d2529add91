"""The noise schedule against the paper's numbers and closed forms."""

import pytest
import torch

from ddpm_core.config import DiffusionConfig
from ddpm_core.schedule import alphas_cumprod, linear_betas


def test_linear_schedule_has_the_papers_endpoints():
    betas = linear_betas(1000)
    assert betas.dtype == torch.float64
    assert betas[0].item() == pytest.approx(1e-4, rel=1e-12)
    assert betas[-1].item() == pytest.approx(0.02, rel=1e-12)
    assert betas[500].item() == pytest.approx(1e-4 + (0.02 - 1e-4) * 500 / 999, rel=1e-12)


def test_alphas_cumprod_is_the_running_product():
    abar = alphas_cumprod(DiffusionConfig(num_timesteps=10))
    product = 1.0
    for beta, value in zip(linear_betas(10).tolist(), abar.tolist(), strict=True):
        product *= 1 - beta
        assert value == pytest.approx(product, rel=1e-12)


@pytest.mark.parametrize("num_timesteps", [50, 200, 1000, 4000])
def test_every_length_falls_monotonically_to_noise(num_timesteps: int):
    abar = alphas_cumprod(DiffusionConfig(num_timesteps=num_timesteps))
    assert (abar[1:] < abar[:-1]).all()
    assert abar[0] > 0.99
    assert abar[-1] < 1e-4
