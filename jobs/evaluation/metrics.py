"""The measurements of `jobs.evaluate`: of each image, or of two sets of images.

torchmetrics, whose import takes longer than PyTorch's, is loaded for Fréchet distances only.

images     uint8 b h w 3
PSNR         dB, data range 255, at most 60 (rounding to 8 bits alone costs 58.9 dB; identical images have no PSNR)
SSIM         Gaussian window 11, sigma 1.5, data range 255
perceptual   `ddpm_core.identity.perceptual_distance`, LPIPS without its learned weights, on maps of the feature net
KID          unbiased squared MMD of features, cubic kernel (Binkowski et al. 2018): on 200 random subsets of half of
             either side, the same for every method. The subsets' spread is the standard error of the whole
             (delete-half jackknife; too wide where both sides are one distribution)
FD           Fréchet distance of features (Heusel et al. 2017); FID where the net is Inception. It is biased upwards,
             the more the fewer the images: figures compare at one number of images and with one net
flip rate    share of images that a classifier puts on the wanted side
rank-1       share of images that are nearer to their own source than to every other one
diversity    mean distance of the features of samples of one source: 0 where all are the same
neighbours   distance of features to the nearest training image; copied: nearer than all but 1 % of real ones lie

What is of each image is float64 b; intervals are `jobs.common.intervals`'.
"""

import dataclasses
import math

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_core import nets
from ddpm_core.errors import InputError
from ddpm_core.nets import Net
from jobs.common import intervals
from jobs.common.intervals import ENOUGH, Interval, significant, student_quantile, subsets_interval
from jobs.reports import metric_table

MAX_PSNR = 60.0
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
MIN_SSIM_SIDE = 16
"""The SSIM window does not fit smaller images."""
NUM_SUBSETS = 200
MIN_COPIED_IMAGES = 99
"""Of fewer real images none marks off the nearest hundredth."""
MIN_KID_IMAGES = ENOUGH
"""With fewer images a KID says nothing."""
MAX_KID_IMAGES = 5000
"""Of more images, so many evenly spread ones are taken on either side: the time grows by the square."""
MIN_FRECHET_IMAGES = 2048
"""With fewer images the bias of a Fréchet distance is larger than what it is to show."""
NUM_GROUPS = 10
"""Groups of images that are left out in turn, for the interval of a Fréchet distance."""
COPIED_SHARE = 0.01
"""Of real held-out images, and so of new ones that are as unlike the training images."""
INCEPTION = "inception"

Images = UInt8[np.ndarray, "b h w 3"]
Values = Float[np.ndarray, "b"]


def feature_net(uri: str = "auto") -> Net:
    """`nets.feature_net`, and "inception": the net of the published FID, from torchmetrics and torch-fidelity.

    Raises:
        InputError: no such net, or its weights are not there and cannot be fetched.
    """
    if uri != INCEPTION:
        return nets.feature_net(uri)
    from torchmetrics.image import fid

    try:
        module = fid.NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"])
    except ModuleNotFoundError:
        raise InputError("the feature net inception needs torch-fidelity: pip install torch-fidelity") from None
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"the feature net inception has no weights here and fetching them failed ({error}); put "
            f"weights-inception-2015-12-05-6726825d.pth into {torch.hub.get_dir()}/checkpoints, or take another net"
        ) from None
    module = module.requires_grad_(False)
    return Net("Inception-v3 (FID's, torch-fidelity), 2048-d", nets.fingerprint(module), module)


# -- each image beside its reference --------------------------------------------------------------------------


def _tensor(images: Images) -> Tensor:
    return torch.tensor(images).permute(0, 3, 1, 2).float()


def psnr(images: Images, references: Images) -> Float[np.ndarray, " b"]:
    """Of each image to its reference, in dB."""
    error = (_tensor(images) - _tensor(references)).square().mean((1, 2, 3))
    return (10 * (255.0**2 / error).log10()).clamp(max=MAX_PSNR).numpy().astype(np.float64)


def ssim(images: Images, references: Images, *, batch_size: int = 64) -> Float[np.ndarray, " b"]:
    """Of each image to its reference, 1 = identical.

    Raises:
        ValueError: images smaller than the window.
    """
    if min(images.shape[1:3]) < MIN_SSIM_SIDE:
        raise ValueError(f"SSIM needs images of {MIN_SSIM_SIDE} px or more")
    parts = [
        _ssim(_tensor(images[i : i + batch_size]), _tensor(references[i : i + batch_size]))
        for i in range(0, len(images), batch_size)
    ]
    return torch.cat(parts).numpy().astype(np.float64)


def _ssim(x: Float[Tensor, "b 3 h w"], y: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """Wang et al. 2004, equation 13, averaged over the pixels; images are mirrored at their borders."""
    x, y = (F.pad(images, [SSIM_WINDOW // 2] * 4, mode="reflect") for images in (x, y))
    steps = torch.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    weights = (-(steps.float() ** 2) / (2 * SSIM_SIGMA**2)).exp()
    weights = weights / weights.sum()
    window = torch.outer(weights, weights)[None, None]

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(values, window.expand(3, 1, -1, -1), groups=3)

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = ((mean(z * z) - mean_z**2).clamp(min=0) for z, mean_z in ((x, mean_x), (y, mean_y)))
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * (2 * covariance + c2) / (var_x + var_y + c2)).mean((1, 2, 3))


# -- two sets of images ---------------------------------------------------------------------------------------


def kid(real: Float[Tensor, "n d"], made: Float[Tensor, "m d"], *, seed: int = 0) -> Float[np.ndarray, " subsets"]:
    """KID of random subsets of half of the images, without replacement and of equal size; equal (n, m, seed)
    give the same subsets.

    Raises:
        ValueError: fewer than MIN_KID_IMAGES images on a side.
    """
    real, made = (_evenly(side, MAX_KID_IMAGES).double() for side in (real, made))  # a small difference of large sums
    size = min(len(real), len(made)) // 2
    if 2 * size < MIN_KID_IMAGES:
        raise ValueError(f"KID needs {MIN_KID_IMAGES} images or more on either side")
    draw = np.random.default_rng(seed)
    r, m = torch.zeros(NUM_SUBSETS, len(real)).double(), torch.zeros(NUM_SUBSETS, len(made)).double()
    for subset in range(NUM_SUBSETS):  # which images are in it
        r[subset, draw.permutation(len(real))[:size]] = 1
        m[subset, draw.permutation(len(made))[:size]] = 1

    # All subsets at once: the sums over pairs are quadratic forms.
    k_rr, k_rm, k_mm = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((real, real), (real, made), (made, made)))
    within = [((of @ k) * of).sum(1) - of @ k.diagonal() for of, k in ((r, k_rr), (m, k_mm))]
    across = ((r @ k_rm) * m).sum(1)
    return ((within[0] + within[1]) / (size * (size - 1)) - 2 * across / size**2).numpy()


def _evenly(features: Tensor, most: int) -> Tensor:
    if len(features) <= most:
        return features
    return features[torch.linspace(0, len(features) - 1, most, dtype=torch.float64).round().long()]


def frechet(real: Float[Tensor, "n d"], made: Float[Tensor, "m d"], *, level: float = 0.95) -> Interval:
    """Fréchet distance, with the interval that leaving out a tenth of the images in turn gives (jackknife).

    The interval is around the value at this number of images, whose bias it does not know.

    Raises:
        ValueError: fewer than MIN_FRECHET_IMAGES images on a side.
    """
    if min(len(real), len(made)) < MIN_FRECHET_IMAGES:
        raise ValueError(f"a Fréchet distance needs {MIN_FRECHET_IMAGES} images or more on either side")
    value = _frechet(real, made)
    left_out = []
    for group in range(NUM_GROUPS):
        kept = [side[torch.arange(len(side)) % NUM_GROUPS != group] for side in (real, made)]
        left_out.append(_frechet(kept[0], kept[1]))
    spread = math.sqrt((NUM_GROUPS - 1) * float(np.var(left_out)))
    half = student_quantile((1 + level) / 2, float(NUM_GROUPS - 1)) * spread
    return Interval(value, max(value - half, 0.0), value + half)


def _frechet(real: Tensor, made: Tensor) -> float:
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Given(real.shape[1]))
    metric.set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(made.double(), real=False)
    return max(metric.compute().item(), 0.0)


class _Given(nn.Module):
    """Stands where torchmetrics wants a feature net: the features are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


# -- what nets say of single images ---------------------------------------------------------------------------


def flipped(probabilities: Float[np.ndarray, "b k"], wanted: int) -> Values:
    """1 where the wanted domain is the likeliest; a tie is none."""
    others = np.delete(probabilities, wanted, axis=1)
    return (probabilities[:, wanted] > others.max(axis=1)).astype(np.float64)


def cosine(a: Float[np.ndarray, "b d"], b: Float[np.ndarray, "b d"]) -> Values:
    """Of each row to its counterpart."""
    return (_unit(a) * _unit(b)).sum(axis=1)


def rank_1(
    queries: Float[np.ndarray, "b d"], gallery: Float[np.ndarray, "b d"], *, people: np.ndarray | None = None
) -> Values:
    """1 where a row is nearer (by angle) to its own row of the gallery than to every other; a tie is a miss.

    `people`: whom each row shows; other images of the same person are then no rivals.
    """
    likeness = _unit(queries) @ _unit(gallery).T
    people = np.arange(len(queries)) if people is None else people
    own = likeness.diagonal()
    rivals = np.where(people[:, None] != people[None], likeness, -np.inf).max(axis=1)
    # Equal vectors differ in the last digits of their products.
    return (own > rivals + 1e-9).astype(np.float64)


def diversity(features: Float[np.ndarray, "n k d"]) -> Float[np.ndarray, " n"]:
    """Mean distance among k samples of each source.

    Raises:
        ValueError: fewer than two samples.
    """
    count = features.shape[1]
    if count < 2:
        raise ValueError("diversity needs two samples or more of each source")
    of_pairs = [
        np.linalg.norm(features[:, i].astype(np.float64) - features[:, j], axis=1)
        for i in range(count)
        for j in range(i)
    ]
    return np.mean(of_pairs, axis=0)


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


@dataclasses.dataclass(frozen=True)
class Neighbors:
    """How near made images lie to the training images."""

    distances: Values
    """Of each to its nearest training image, in the features' units."""
    copied: Values
    """1 where that is nearer than all but COPIED_SHARE of real held-out images lie. The mean is COPIED_SHARE for
    new images, up to the error of the threshold: from 512 real ones, the share may be 0.3 to 2 %."""
    threshold: float


def nearest(
    made: Float[np.ndarray, "b d"], train: Float[np.ndarray, "n d"], real: Float[np.ndarray, "m d"]
) -> Neighbors:
    """Whether made images are training images over again; `real` are held-out ones, MIN_COPIED_IMAGES or more."""
    distances, usual = _nearest(made, train), _nearest(real, train)
    # Weibull's quantile: of new images like the real ones this share lies below it, whatever their distribution.
    threshold = float(np.quantile(usual, COPIED_SHARE, method="weibull"))
    return Neighbors(distances, (distances <= threshold).astype(np.float64), threshold)


def _nearest(queries: np.ndarray, gallery: np.ndarray) -> Values:
    """Distance of each query to the nearest row of the gallery."""
    x, y = queries.astype(np.float64), gallery.astype(np.float64)
    lengths = np.square(y).sum(axis=1)
    found = np.concatenate([(lengths - 2 * part @ y.T).argmin(axis=1) for part in np.array_split(x, len(x) // 512 + 1)])
    # The products find it; the distance itself is taken from the difference, so that a copy's is 0.
    return np.linalg.norm(x - y[found], axis=1)


# -- estimates and verdicts -------------------------------------------------------------------------------------


def estimate(metric: str, values: Float[np.ndarray, " b"], *, seed: int = 0, level: float = 0.95) -> Interval:
    """Mean of values of each image, or of kid of each subset; NaN where it was not measured."""
    if metric == "kid":
        return subsets_interval(values, level=level)
    return intervals.bootstrap(values[~np.isnan(values)], seed=seed, level=level)


def difference(
    metric: str, ours: Float[np.ndarray, " b"], theirs: Float[np.ndarray, " b"], *, seed: int = 0, level: float = 0.95
) -> Interval:
    """Mean of ours minus theirs, on the same images or subsets."""
    if metric == "kid":
        return subsets_interval(ours - theirs, level=level)
    return intervals.difference(ours, theirs, seed=seed, level=level)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One method against another in one metric."""

    metric: str
    against: str
    difference: Interval
    """Ours minus theirs, on the same images (or subsets)."""
    better: bool | None
    """None where the interval holds zero, or the images are too few: no clear difference."""
    text: str
    """In words, by how much."""
    figures: str
    """The interval of the difference and the two means."""


def verdict(
    metric: str,
    against: str,
    ours: Float[np.ndarray, " b"],
    theirs: Float[np.ndarray, " b"],
    *,
    seed: int = 0,
    level: float = 0.95,
) -> Verdict:
    """Compare per-image values, or for kid the subsets."""
    gap = difference(metric, ours, theirs, seed=seed, level=level)
    sign = -1 if metric_table.lower_is_better(metric) else 1
    better = (gap.mean * sign > 0) if significant(gap, len(ours)) else None
    row = metric_table.of(metric)
    unit, digits = row.unit, row.digits
    low, high = sorted((abs(gap.low), abs(gap.high)))
    by = f"by {abs(gap.mean):.{digits}f}{unit}"
    outcome = {
        True: (f"better than {against} {by}", f"{low:.{digits}f} to {high:.{digits}f}"),
        False: (f"worse than {against} {by}", f"{low:.{digits}f} to {high:.{digits}f}"),
        None: (f"no clear difference to {against}", f"{gap.low:+.{digits}f} to {gap.high:+.{digits}f}"),
    }[better]
    means = f"{ours.mean():.{digits}f}{unit} against {theirs.mean():.{digits}f}{unit}"
    if len(ours) < ENOUGH:
        few = f"{len(ours)} image{'s' * (len(ours) != 1)}"
        return Verdict(metric, against, gap, None, f"{row.name}: {few}, too few to compare with {against}", means)
    return Verdict(
        metric, against, gap, better, f"{row.name}: {outcome[0]}", f"{100 * level:.4g} %: {outcome[1]}; {means}"
    )
