"""The measurements of `jobs.evaluate`, by torchmetrics: per picture, or over random halves of the pictures.

pictures   uint8 b h w 3
PSNR       dB, data range 255, at most 60 (rounding to 8 bits alone costs 58.9 dB; identical pictures have no PSNR)
SSIM       Gaussian window 11, sigma 1.5, data range 255
KID        unbiased squared MMD of features, cubic kernel: on 200 random halves of either side, the same
           halves for every method. The halves' spread is the standard error of the whole (delete-half jackknife).
"""

import dataclasses

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.kid import maximum_mean_discrepancy, poly_kernel

from ddpm_core.metrics import Interval, bootstrap

MAX_PSNR = 60.0
MIN_SSIM_SIDE = 16
"""The SSIM window does not fit smaller pictures."""
NUM_HALVES = 200
MIN_KID_IMAGES = 20
"""With fewer pictures a KID says nothing."""

Pictures = UInt8[np.ndarray, "b h w 3"]


def _tensor(pictures: Pictures) -> Tensor:
    return torch.tensor(pictures).permute(0, 3, 1, 2).float()


def psnr(pictures: Pictures, references: Pictures) -> Float[np.ndarray, "b"]:
    """Of each picture to its reference, in dB."""
    values = peak_signal_noise_ratio(
        _tensor(pictures), _tensor(references), data_range=255.0, reduction="none", dim=(1, 2, 3)
    )
    return values.clamp(max=MAX_PSNR).numpy().astype(np.float64)


def ssim(pictures: Pictures, references: Pictures, *, batch_size: int = 64) -> Float[np.ndarray, "b"]:
    """Of each picture to its reference, 1 = identical.

    Raises:
        ValueError: pictures smaller than the window.
    """
    if min(pictures.shape[1:3]) < MIN_SSIM_SIDE:
        raise ValueError(f"SSIM needs pictures of {MIN_SSIM_SIDE} px or more")
    parts = [
        structural_similarity_index_measure(
            _tensor(pictures[i : i + batch_size]),
            _tensor(references[i : i + batch_size]),
            data_range=255.0,
            reduction="none",
        )
        for i in range(0, len(pictures), batch_size)
    ]
    return torch.cat([part.reshape(-1) for part in parts]).numpy().astype(np.float64)


def kid(real: Float[Tensor, "n d"], made: Float[Tensor, "m d"], *, seed: int = 0) -> Float[np.ndarray, "halves"]:
    """KID of random halves, without replacement and of equal size; equal (n, m, seed) give the same halves.

    Raises:
        ValueError: fewer than MIN_KID_IMAGES pictures on a side.
    """
    size = min(len(real), len(made)) // 2
    if 2 * size < MIN_KID_IMAGES:
        raise ValueError(f"KID needs {MIN_KID_IMAGES} pictures or more on either side")
    real, made = real.double(), made.double()  # the estimate is a small difference of large sums
    k_rr, k_rm, k_mm = poly_kernel(real, real), poly_kernel(real, made), poly_kernel(made, made)
    draw = np.random.default_rng(seed)
    values = []
    for _ in range(NUM_HALVES):
        r = torch.from_numpy(draw.permutation(len(real))[:size])
        m = torch.from_numpy(draw.permutation(len(made))[:size])
        values.append(maximum_mean_discrepancy(k_rr[r][:, r], k_rm[r][:, m], k_mm[m][:, m]).item())
    return np.array(values)


def halves_interval(values: Float[np.ndarray, "halves"]) -> Interval:
    """Mean over the halves, and the range that holds 95 % of them."""
    low, high = np.percentile(values, [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One method against another in one metric."""

    metric: str
    against: str
    difference: Interval
    """Ours minus theirs, on the same pictures (or halves)."""
    better: bool | None
    """None where the interval holds zero: no clear difference."""
    text: str
    """In words, by how much."""
    figures: str
    """The interval of the difference and the two means."""


def verdict(
    metric: str, against: str, ours: Float[np.ndarray, "b"], theirs: Float[np.ndarray, "b"], *, seed: int = 0
) -> Verdict:
    """Compare per-picture values (psnr, ssim: larger is better) or halves (kid: smaller is better)."""
    lower_is_better = metric == "kid"
    change = ours - theirs
    gap = halves_interval(change) if lower_is_better else bootstrap(change, seed=seed)
    sign = -1 if lower_is_better else 1
    clear = gap.low > 0 or gap.high < 0
    better = (gap.mean * sign > 0) if clear else None
    unit, digits = {"psnr": (" dB", 2), "ssim": ("", 3), "kid": ("", 4)}[metric]
    low, high = sorted((abs(gap.low), abs(gap.high)))
    by = f"by {abs(gap.mean):.{digits}f}{unit}"
    outcome = {
        True: (f"better than {against} {by}", f"{low:.{digits}f} to {high:.{digits}f}"),
        False: (f"worse than {against} {by}", f"{low:.{digits}f} to {high:.{digits}f}"),
        None: (f"no clear difference to {against}", f"{gap.low:+.{digits}f} to {gap.high:+.{digits}f}"),
    }[better]
    means = f"{ours.mean():.{digits}f}{unit} against {theirs.mean():.{digits}f}{unit}"
    return Verdict(metric, against, gap, better, f"{metric.upper()}: {outcome[0]}", f"95 %: {outcome[1]}; {means}")
