"""Scores: closed forms, direct sums, planted answers, and the 999 images of CelebA where they are there."""

import numpy as np
import pytest
import torch
from celeba999 import celeba, centre_crops
from pictures import noise, smooth
from torch import nn

from ddpm_core import nets
from ddpm_core.errors import InputError
from ddpm_core.identity import perceptual_distance
from jobs.evaluation import metrics
from jobs.reports.metric_table import METRICS, lower_is_better

# -- PSNR, SSIM


def test_psnr_of_a_known_error() -> None:
    one = np.full((2, 16, 16, 3), 100, np.uint8)
    two = one.copy()
    two[0] += 10
    two[1, :8] += 20  # half of the pixels
    assert metrics.psnr(one, two) == pytest.approx([20 * np.log10(255 / 10), 10 * np.log10(255**2 / 200)])


def test_identical_images_have_the_capped_psnr_and_ssim_one() -> None:
    pictures = noise(2)
    assert metrics.psnr(pictures, pictures).tolist() == [metrics.MAX_PSNR] * 2
    assert metrics.ssim(pictures, pictures) == pytest.approx([1, 1])


def test_ssim_of_constant_images_is_its_luminance_term() -> None:
    one, two = np.full((1, 32, 32, 3), 100, np.uint8), np.full((1, 32, 32, 3), 150, np.uint8)
    c1 = (0.01 * 255) ** 2
    assert metrics.ssim(one, two) == pytest.approx([(2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)], abs=5e-4)


def test_psnr_and_ssim_agree_with_torchmetrics_own_metrics() -> None:
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    one, two = smooth(5), (smooth(5) * 0.7 + noise(5) * 0.3).astype(np.uint8)
    given = [torch.tensor(each).permute(0, 3, 1, 2).float() for each in (one, two)]
    psnr = peak_signal_noise_ratio(*given, data_range=255.0, reduction="none", dim=(1, 2, 3))
    assert metrics.psnr(one, two) == pytest.approx(psnr.numpy(), rel=1e-6)
    ssim = structural_similarity_index_measure(*given, data_range=255.0, reduction="none")
    assert metrics.ssim(one, two) == pytest.approx(ssim.numpy(), abs=1e-5)


def test_ssim_does_not_depend_on_the_batch_and_names_its_limit() -> None:
    one, two = noise(5), smooth(5)
    assert metrics.ssim(one, two) == pytest.approx(metrics.ssim(one, two, batch_size=2), abs=1e-6)
    with pytest.raises(ValueError, match="16 px"):
        metrics.ssim(noise(1, side=8), noise(1, side=8))


# -- perceptual distance


def blurred(pictures: np.ndarray, width: int) -> np.ndarray:
    x = torch.tensor(pictures).permute(0, 3, 1, 2).float()
    x = nn.functional.avg_pool2d(nn.functional.pad(x, [width // 2] * 4, mode="reflect"), width, 1)
    return x.permute(0, 2, 3, 1).round().byte().numpy()


@pytest.fixture(scope="module")
def net() -> nets.Net:
    return nets.feature_net()


@torch.no_grad()
def perceptual(net: nets.Net, pictures: np.ndarray, references: np.ndarray) -> np.ndarray:
    assert isinstance(net.module, nets.EfficientNetLite0)
    maps = [net.module.perceive(torch.tensor(each).permute(0, 3, 1, 2))[1] for each in (pictures, references)]
    return perceptual_distance(*maps).numpy()


def test_perceptual_distance_is_0_for_itself_and_grows_with_the_damage(net: nets.Net) -> None:
    pictures = ((noise(4, side=40) // 2) + smooth(4, side=40) // 2).astype(np.uint8)
    assert (perceptual(net, pictures, pictures) == 0).all()
    shifted = [perceptual(net, np.roll(pictures, by, axis=2), pictures) for by in (1, 6)]
    soft = [perceptual(net, blurred(pictures, width), pictures) for width in (3, 7)]
    for less, more in (shifted, soft):
        assert (less > 0).all()
        assert (less < more).all()


def test_perceptual_distance_of_known_maps() -> None:
    """Directions at a right angle lie sqrt(2) apart, opposite ones 2: squared and averaged over places and maps."""
    one, two = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    one[:, 0], two[:, 0] = 9, 200  # all along the first channel, whatever the length
    two[0, :, 0, 0] = torch.tensor([0.0, 7.0])  # but one place of four, which is the only place of the second map
    maps = [[x, 5 * x[:, :, :1, :1]] for x in (one, two)]
    assert perceptual_distance(*maps).tolist() == pytest.approx([(2 / 4 + 2) / 2])


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
    assert metrics.kid(real, made, seed=7)[0] == pytest.approx(direct(real[first[0]], made[first[1]]))


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")
def test_kid_agrees_with_torchmetrics_own_metric() -> None:
    from torchmetrics.image.kid import KernelInceptionDistance

    real, made = torch.randn(60, 8), 1.2 * torch.randn(60, 8) + 0.3
    metric = KernelInceptionDistance(feature=nn.Flatten(), subsets=400, subset_size=30)
    metric.update(real, real=True)
    metric.update(made, real=False)
    mean, spread = metric.compute()
    ours = metrics.kid(real, made)
    assert ours.mean() == pytest.approx(mean.item(), abs=4 * spread.item() / 200**0.5)
    assert ours.std() == pytest.approx(spread.item(), rel=0.3)


def test_kid_of_one_distribution_is_about_zero_and_its_interval_holds_it() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(20):
        real, made = torch.randn(2, 50, 6, generator=generator)
        interval = metrics.subsets_interval(metrics.kid(real, made, seed=trial))
        covered += interval.low <= 0 <= interval.high
    assert covered >= 16  # 95 % intervals of 20 trials


def test_kid_needs_enough_images() -> None:
    with pytest.raises(ValueError, match="20 images"):
        metrics.kid(torch.randn(19, 4), torch.randn(100, 4))


def test_kid_of_a_known_kernel_mean() -> None:
    """Features at two points: E k(x, x') is a sum over two values, and no choice of subsets changes them."""
    real, made = torch.zeros(40, 2), torch.zeros(40, 2)
    real[:, 0], made[:, 1] = 1, 2
    kernel = {"rr": (1 / 2 + 1) ** 3, "mm": (4 / 2 + 1) ** 3, "rm": 1.0}
    assert metrics.kid(real, made) == pytest.approx(kernel["rr"] + kernel["mm"] - 2 * kernel["rm"])


def test_kid_of_one_set_of_images_against_itself_is_below_0_by_the_images_that_meet_themselves() -> None:
    """2 / n (E k(x, y) - E k(x, x)) over y other than x: subsets are not drawn apart, as the estimate wants them."""
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kernel = (x @ x.T / 6 + 1) ** 3
    same = kernel.diagonal().mean()
    other = (kernel.sum() - kernel.diagonal().sum()) / (400 * 399)
    found = metrics.kid(x, x)
    assert found.mean() == pytest.approx(float(2 / 400 * (other - same)), abs=4 * found.std() / 200**0.5)
    assert abs(found.mean()) < 0.1
    one, two = x.chunk(2)  # drawn apart
    interval = metrics.subsets_interval(metrics.kid(one, two))
    assert interval.low < 0 < interval.high


def test_kid_takes_so_many_images_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(2, 90, 4, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(metrics, "MAX_KID_IMAGES", 30)
    rows = torch.linspace(0, 89, 30, dtype=torch.float64).round().long()
    assert (rows[0], rows[-1]) == (0, 89)
    assert (metrics.kid(x, y) == metrics.kid(x[rows], y[rows])).all()
    assert (metrics.kid(x[:30], y) == metrics.kid(x[:30], y[rows])).all()


# -- Fréchet distance


def gaussian(num: int, mean: torch.Tensor, spread: torch.Tensor, seed: int) -> torch.Tensor:
    """Exactly of that mean and that diagonal covariance, in any finite number."""
    x = torch.randn(num, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(0)
    whitened = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
    return whitened * spread.double() + mean.double()


def test_the_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    """|mu1 - mu2|^2 + sum (s1 - s2)^2 where the covariances commute (Dowson & Landau 1982, eq. 10)."""
    zero, one = torch.zeros(3), torch.ones(3)
    mean, spread = torch.tensor([0.5, 0.0, -2.0]), torch.tensor([1.0, 2.0, 0.5])
    real, made = gaussian(2048, zero, one, 0), gaussian(2100, mean, spread, 1)
    found = metrics.frechet(real, made)
    assert found.mean == pytest.approx(4.25 + 1 + 0.25, rel=1e-6)
    assert found.low < found.mean < found.high
    assert found.high - found.low < 0.7
    assert metrics.frechet(real, real).mean == pytest.approx(0, abs=1e-6)


def test_the_frechet_interval_holds_the_truth() -> None:
    held = []
    for trial in range(40):
        real, made = torch.randn(2, 2048, 2, generator=torch.Generator().manual_seed(trial))
        found = metrics.frechet(real, made + torch.tensor([0.3, 0.0]))
        held.append(found.low <= 0.09 <= found.high)
    assert np.mean(held) >= 0.85


def test_the_frechet_distance_needs_enough_images() -> None:
    with pytest.raises(ValueError, match="2048 images"):
        metrics.frechet(torch.randn(2047, 2), torch.randn(4000, 2))


# -- what nets say


def test_flips_are_counted_and_ties_are_none() -> None:
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])
    assert metrics.flipped(probabilities, 1).tolist() == [0, 1, 0]
    assert metrics.flipped(probabilities, 0).tolist() == [1, 0, 0]
    assert metrics.flipped(np.array([[0.3, 0.3, 0.4], [0.4, 0.4, 0.2]]), 2).tolist() == [1, 0]


def test_cosines_are_known() -> None:
    a = np.array([[1.0, 0.0], [3.0, 4.0], [2.0, 0.0], [0.0, 0.0]])
    b = np.array([[0.0, 2.0], [3.0, 4.0], [-1.0, 0.0], [1.0, 0.0]])
    assert metrics.cosine(a, b) == pytest.approx([0, 1, -1, 0])


def test_two_swapped_people_are_missed_and_nobody_else() -> None:
    gallery = np.random.default_rng(0).normal(size=(50, 16))
    queries = gallery + 0.01
    assert metrics.rank_1(queries, gallery).tolist() == [1] * 50
    queries[[3, 7]] = queries[[7, 3]]
    found = metrics.rank_1(queries, gallery)
    assert np.flatnonzero(found == 0).tolist() == [3, 7]
    expected = gallery[3] @ queries[3] / np.linalg.norm(gallery[3]) / np.linalg.norm(queries[3])
    assert metrics.cosine(queries, gallery)[3] == pytest.approx(expected)


def test_a_tie_is_a_miss_and_another_image_of_the_same_person_no_rival() -> None:
    gallery = np.random.default_rng(0).normal(size=(4, 8))
    gallery[2] = 3 * gallery[1]  # the same direction
    assert metrics.rank_1(gallery, gallery).tolist() == [1, 0, 0, 1]
    assert metrics.rank_1(gallery, gallery, people=np.array([0, 5, 5, 3])).tolist() == [1, 1, 1, 1]
    same = np.ones((3, 4))
    assert metrics.rank_1(same, same).tolist() == [0, 0, 0]  # an encoder that gives everybody the same vector


def test_diversity_is_the_mean_distance_of_samples() -> None:
    corners = np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    found = metrics.diversity(np.stack([corners, np.ones((3, 2))]))
    assert found == pytest.approx([(3 + 4 + 5) / 3, 0])
    with pytest.raises(ValueError, match="two samples"):
        metrics.diversity(corners[:, None])


def test_memorised_images_are_found_and_new_ones_pass() -> None:
    draw = np.random.default_rng(0)
    train, real, new = (draw.normal(size=(num, 8)).astype(np.float32) for num in (600, 999, 4000))
    found = metrics.nearest(new, train, real)
    assert found.copied.mean() == pytest.approx(0.01, abs=0.008)
    brute = np.linalg.norm(new[:50, None].astype(float) - train[None], axis=2).min(axis=1)
    assert found.distances[:50] == pytest.approx(brute)
    memorised = metrics.nearest(np.concatenate([train[:30], train[30:60] + 1e-3, new[:60]]), train, real)
    assert (memorised.distances[:30] == 0).all()
    assert memorised.copied[:60].all()
    assert memorised.copied[60:].mean() < 0.1


def test_the_share_of_copies_is_right_on_average() -> None:
    draw = np.random.default_rng(0)
    shares = []
    for _ in range(300):
        train, real, new = (draw.normal(size=(num, 2)) for num in (50, 199, 100))
        shares.append(metrics.nearest(new, train, real).copied.mean())
    assert np.mean(shares) == pytest.approx(0.01, abs=0.0025)


# -- verdicts


def test_verdicts_say_better_worse_and_unclear() -> None:
    draw = np.random.default_rng(0)
    ours = draw.normal(20, 1, 100)
    better = metrics.verdict("psnr", "a copy", ours, ours - 3 + draw.normal(0, 0.1, 100))
    assert better.better is True
    assert "better than a copy by 3.0" in better.text
    assert better.difference.low > 2.9
    worse = metrics.verdict("kid", "a copy", ours, ours - 3)  # smaller is better
    assert worse.better is False
    assert "worse than a copy by 3.0" in worse.text
    unclear = metrics.verdict("ssim", "a copy", ours, draw.permutation(ours))
    assert unclear.better is None
    assert "no clear difference" in unclear.text


@pytest.mark.parametrize("num", [1, 2, metrics.MIN_KID_IMAGES - 1])
def test_a_few_images_make_no_verdict(num: int) -> None:
    ours = np.linspace(30, 31, num)
    found = metrics.verdict("psnr", "a copy", ours, ours - 20)
    assert (found.better, found.figures) == (None, f"{ours.mean():.2f} dB against {ours.mean() - 20:.2f} dB")
    assert found.text == f"PSNR: {num} image{'s' * (num > 1)}, too few to compare with a copy"


def test_verdicts_know_each_metrics_direction_and_the_level() -> None:
    draw = np.random.default_rng(0)
    ours = draw.random(200)
    lower = metrics.verdict("perceptual_to_source", "a copy", ours, ours + 0.1 + draw.normal(0, 0.01, 200))
    assert lower.better is True
    flips = metrics.verdict("flip_rate", "a copy", np.ones(50), np.zeros(50))
    assert flips.better is True
    assert "flip rate: better than a copy by 1.000" in flips.text
    noisy = ours + draw.normal(0.02, 0.12, 200)
    plain, strict = (metrics.verdict("ssim", "x", noisy, ours, level=level) for level in (0.95, 0.9999))
    assert (plain.better, strict.better) == (True, None)
    assert "99.99 %" in strict.figures
    assert [name for name in METRICS if lower_is_better(name)] == ["perceptual", "kid", "fd", "nfe", "train_s"]


# -- Inception


def test_inception_without_its_package_is_one_clear_line() -> None:
    with pytest.raises(
        InputError, match=r"^the feature net inception needs torch-fidelity: pip install torch-fidelity$"
    ):
        metrics.feature_net("inception")


def test_inception_without_its_weights_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(**options: object) -> nn.Module:
        raise OSError("no route to host")

    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", unreachable)
    with pytest.raises(
        InputError, match=r"has no weights here and fetching them failed \(no route to host\); put weights-inception"
    ) as told:
        metrics.feature_net("inception")
    assert "\n" not in str(told.value)


def test_other_feature_nets_are_the_cores() -> None:
    assert metrics.feature_net().fingerprint == nets.feature_net().fingerprint


# -- real faces


@celeba
@pytest.mark.slow
def test_kid_of_real_faces_knows_the_same_from_the_other() -> None:
    """Random halves are one distribution, men and women two. Every third image, for time."""
    pictures, male = centre_crops(64, every=3)
    net = nets.feature_net()
    features = nets.features(net.module, pictures)
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))
    halves = metrics.subsets_interval(metrics.kid(features[order[::2]], features[order[1::2]]))
    assert halves.low < 0 < halves.high
    sexes = metrics.subsets_interval(metrics.kid(features[male], features[~male]))
    assert sexes.low > 20 * abs(halves.mean)
    if "efficientnet" in net.name:
        assert sexes.mean == pytest.approx(0.55, abs=0.1)
    train, real, new = features[order[:100]], features[order[100:200]], features[order[200:]]
    made = torch.cat([train[:10], new])
    found = metrics.nearest(made.numpy(), train.numpy(), real.numpy())
    assert found.copied[:10].all()
    assert found.copied[10:].mean() < 0.06
    soft = perceptual(net, blurred(pictures[:20], 5), pictures[:20])
    other = perceptual(net, pictures[20:40], pictures[:20])
    assert 0 < soft.mean() < 0.5 * other.mean()
