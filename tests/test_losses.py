"""Losses: exact values on both sides of Huber's corner, and weights that are one weight of x_0 in three forms."""

import jaxtyping
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
        ("mse", 1.0, -0.5, 0.25),
    ],
)
def test_exact_values(loss, delta, error, expected):
    output = torch.zeros(2, 3, 4, 4)
    target = torch.zeros(2, 3, 4, 4)
    target[1] = error
    values = per_image_loss(DiffusionConfig(loss=loss, huber_delta=delta), output, target)
    assert values.tolist() == pytest.approx([0.0, expected])


def test_losses_are_float32_whatever_comes_in():
    output = torch.full((1, 3, 2, 2), 1.0, dtype=torch.bfloat16)
    target = torch.full((1, 3, 2, 2), 1.0 + 2**-10)  # lost in bfloat16
    value = per_image_loss(DiffusionConfig(loss="mse"), output, target)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(2**-20)


@pytest.mark.parametrize("prediction", ["eps", "v", "x_0"])
@pytest.mark.parametrize(("weighting", "least"), [("snr", 1.0), ("min_snr", 0.0)])
def test_snr_weighting_is_the_same_loss_on_x_0_whatever_is_predicted(prediction, weighting, least):
    config = DiffusionConfig(loss="mse", prediction=prediction, loss_weighting=weighting, max_snr=5.0)
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
    expected = snr.clamp(least, 5) * (0.01 * error).square().flatten(1).mean(1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("weighting", "prediction", "expected"),
    [  # abar 0.9, 0.75, 0.2: snr 9, 3, 0.25
        ("min_snr", "eps", [5 / 9, 1, 1]),
        ("min_snr", "v", [5 / 10, 3 / 4, 0.25 / 1.25]),
        ("min_snr", "x_0", [5, 3, 0.25]),
        ("snr", "eps", [5 / 9, 1, 1 / 0.25]),
        ("snr", "v", [5 / 10, 3 / 4, 1 / 1.25]),
        ("snr", "x_0", [5, 3, 1]),
    ],
)
def test_weights_by_hand(weighting, prediction, expected):
    config = DiffusionConfig(prediction=prediction, loss_weighting=weighting, max_snr=5.0)
    abar = torch.tensor([0.9, 0.75, 0.2], dtype=torch.float64)
    weight = timestep_weight(config, torch.tensor([0, 1, 2]), abar)
    assert weight.dtype == torch.float32
    assert weight.tolist() == pytest.approx(expected, rel=1e-6)


def test_a_ceiling_below_one_is_the_floor_too():
    config = DiffusionConfig(prediction="x_0", loss_weighting="snr", max_snr=0.5)
    abar = torch.tensor([0.9, 0.1], dtype=torch.float64)
    assert timestep_weight(config, torch.tensor([0, 1]), abar).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("weighting", "prediction", "expected"),
    [("snr", "v", 1.0), ("snr", "x_0", 1.0), ("min_snr", "v", 0.0), ("min_snr", "x_0", 0.0), ("uniform", "v", 1.0)],
)
def test_pure_noise_has_a_finite_weight(weighting, prediction, expected):
    config = DiffusionConfig(prediction=prediction, loss_weighting=weighting, zero_terminal_snr=True)
    assert timestep_weight(config, torch.tensor([999]), alphas_cumprod(config)).tolist() == [expected]


def test_uniform_weighting_is_one():
    t = torch.tensor([0, 999])
    assert timestep_weight(DiffusionConfig(), t, alphas_cumprod(DiffusionConfig())).tolist() == [1, 1]


def test_a_wrong_shape_is_noticed_after_a_right_one():
    """What tests/conftest.py checks once, it does not take for checked with other shapes."""
    one = torch.zeros(2, 3, 4, 4)
    for _ in range(2):
        per_image_loss(DiffusionConfig(), one, one)
    with pytest.raises(jaxtyping.TypeCheckError):
        per_image_loss(DiffusionConfig(), one, torch.zeros(2, 3, 4, 1))
