"""Losses: exact values on both sides of Huber's corner."""

import pytest
import torch

from ddpm_core.config import DiffusionConfig
from ddpm_core.diffusion import q_sample, seeded, training_target
from ddpm_core.losses import per_image_loss, timestep_weight
from ddpm_core.schedule import alphas_cumprod


@pytest.mark.parametrize(
    ("loss", "delta", "error", "expected"),
    [
        ("huber", 1.0, 0.5, 0.125),
        ("huber", 1.0, 3.0, 2.5),
        ("huber", 0.1, 0.3, 0.1 * (0.3 - 0.05)),
        ("mse", 1.0, 3.0, 9.0),
    ],
)
def test_exact_values(loss, delta, error, expected):
    output = torch.zeros(2, 3, 4, 4)
    target = torch.zeros(2, 3, 4, 4)
    target[1] = error
    values = per_image_loss(DiffusionConfig(loss=loss, huber_delta=delta), output, target)
    assert values.tolist() == pytest.approx([0.0, expected])


@pytest.mark.parametrize("prediction", ["eps", "v", "x_0"])
def test_snr_weighting_is_the_same_loss_on_x_0_whatever_is_predicted(prediction):
    config = DiffusionConfig(loss="mse", prediction=prediction, loss_weighting="snr", max_snr=5.0)
    abar, t = alphas_cumprod(config), torch.tensor([3, 200, 400, 900])
    x_0, error = torch.randn(2, 4, 3, 8, 8, generator=seeded("snr"), dtype=torch.float64)
    noise = torch.randn(4, 3, 8, 8, generator=seeded("noise"), dtype=torch.float64)
    x_t = q_sample(x_0, t, noise, abar)
    a, s = abar[t].sqrt().reshape(-1, 1, 1, 1), (1 - abar[t]).sqrt().reshape(-1, 1, 1, 1)
    wrong = x_0 + 0.01 * error  # a guess of x_0, and what it implies for the noise
    output = training_target(prediction, wrong, t, (x_t - a * wrong) / s, abar)
    target = training_target(prediction, x_0, t, noise, abar)
    loss = timestep_weight(config, t, abar) * per_image_loss(config, output, target)
    snr = abar[t] / (1 - abar[t])
    assert snr[0] > 5 > snr[1] > 1 > snr[3]
    expected = snr.clamp(1, 5) * (0.01 * error).square().flatten(1).mean(1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=0)


def test_uniform_weighting_is_one():
    t = torch.tensor([0, 999])
    assert timestep_weight(DiffusionConfig(), t, alphas_cumprod(DiffusionConfig())).tolist() == [1, 1]
