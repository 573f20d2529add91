"""The forward process and the change between eps, v and x_0, in float64 against the formulas."""

import pytest
import torch

from ddpm_core.config import DiffusionConfig
from ddpm_core.diffusion import draw_noise, predicted, q_sample, seeded, training_target
from ddpm_core.schedule import alphas_cumprod

ABAR = alphas_cumprod(DiffusionConfig())
T = torch.tensor([0, 1, 250, 500, 998, 999])


def pictures(seed: int) -> torch.Tensor:
    return torch.randn(len(T), 3, 4, 4, generator=seeded(seed), dtype=torch.float64)


def test_q_sample_is_exact_for_each_image():
    x_0, noise = pictures(0), pictures(1)
    x_t = q_sample(x_0, T, noise, ABAR)
    for i, t in enumerate(T.tolist()):
        abar = ABAR[t].item()
        torch.testing.assert_close(x_t[i], abar**0.5 * x_0[i] + (1 - abar) ** 0.5 * noise[i], rtol=1e-12, atol=1e-12)


def test_q_sample_has_the_moments_of_eq_4():
    x_0 = torch.full((1, 1, 400, 500), 0.7, dtype=torch.float64)
    noise = torch.randn(x_0.shape, generator=seeded(2), dtype=torch.float64)
    x_t = q_sample(x_0, torch.tensor([300]), noise, ABAR)
    abar = ABAR[300].item()
    assert x_t.mean().item() == pytest.approx(0.7 * abar**0.5, abs=5e-3)
    assert x_t.var().item() == pytest.approx(1 - abar, rel=2e-2)


@pytest.mark.parametrize("prediction", ["eps", "v", "x_0"])
def test_a_perfect_prediction_gives_back_x_0_and_noise(prediction):
    x_0, noise = pictures(0), pictures(1)
    x_t = q_sample(x_0, T, noise, ABAR)
    target = training_target(prediction, x_0, T, noise, ABAR)
    pred = predicted(prediction, target, x_t, T, ABAR, clip=False)
    torch.testing.assert_close(pred.x_0, x_0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(pred.eps, noise, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", ["eps", "v", "x_0"])
def test_clipping_holds_x_0_in_range_and_eps_in_step_with_it(prediction):
    x_0, noise = 3 * pictures(0), pictures(1)
    x_t = q_sample(x_0, T, noise, ABAR)
    pred = predicted(prediction, training_target(prediction, x_0, T, noise, ABAR), x_t, T, ABAR)
    torch.testing.assert_close(pred.x_0, x_0.clamp(-1, 1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(q_sample(pred.x_0, T, pred.eps, ABAR), x_t, rtol=1e-9, atol=1e-9)


def test_noise_depends_on_the_generator_and_not_on_the_batch():
    like = torch.zeros(3, 3, 8, 8)
    together = draw_noise([seeded("a"), seeded("b"), seeded("c")], like)
    alone = draw_noise([seeded("b")], like[:1])
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together[0], together[1])


def test_seeds_of_different_parts_differ():
    assert seeded(1, 23).initial_seed() != seeded(12, 3).initial_seed()
    assert seeded(0, 1, "x").initial_seed() == seeded(0, 1, "x").initial_seed()


ZERO_ABAR = alphas_cumprod(DiffusionConfig(zero_terminal_snr=True, prediction="v"))


@pytest.mark.parametrize("prediction", ["v", "x_0"])
@pytest.mark.parametrize("clip", [False, True])
def test_pure_noise_is_noise_and_its_prediction_goes_round(prediction, clip):
    x_0, noise = 0.1 * pictures(0), pictures(1)
    t = torch.full_like(T, 999)
    x_t = q_sample(x_0, t, noise, ZERO_ABAR)
    assert torch.equal(x_t, noise)
    target = training_target(prediction, x_0, t, noise, ZERO_ABAR)
    pred = predicted(prediction, target, x_t, t, ZERO_ABAR, clip=clip)
    torch.testing.assert_close(pred.x_0, x_0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pred.eps, noise, rtol=1e-12, atol=1e-12)


def test_v_is_the_velocity_of_the_angle():
    """v = d x_t / d phi with a = cos phi, s = sin phi (Salimans & Ho 2022, appendix D)."""
    x_0, noise = pictures(0), pictures(1)
    for i, t in enumerate(T.tolist()):
        a, s = ABAR[t].item() ** 0.5, (1 - ABAR[t].item()) ** 0.5
        v = training_target("v", x_0, T, noise, ABAR)[i]
        torch.testing.assert_close(v, a * noise[i] - s * x_0[i], rtol=1e-12, atol=1e-12)


def test_drawn_noise_is_standard_normal_and_goes_on():
    generator, like = seeded("moments"), torch.zeros(1, 1, 400, 500, dtype=torch.float64)
    first, second = draw_noise([generator], like), draw_noise([generator], like)
    assert first.dtype == torch.float64
    assert first.mean().item() == pytest.approx(0, abs=0.01)
    assert first.std().item() == pytest.approx(1, rel=0.01)
    assert not torch.equal(first, second)
    assert torch.equal(first[0], torch.randn(1, 400, 500, generator=seeded("moments")).double())
