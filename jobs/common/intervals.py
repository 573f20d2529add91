"""Intervals of means, rates and differences, over images and over training seeds.

    values     one an image (n), or one a training seed and image (seeds n)
    ENOUGH     images, trials or rows below which nothing is claimed, whatever an interval says
    subsets    KID on random halves of the images; their spread is the standard error of the whole
    level      0.95 means 95 %; `bonferroni` gives the level at which several are true together

The metrics themselves are in `jobs.evaluation.metrics`.
"""

import dataclasses
import math
import statistics

import numpy as np
from jaxtyping import Float

ENOUGH = 20
"""On fewer images, rows or trials nothing is claimed and nothing is coloured: the spread itself is hardly known."""
NUM_RESAMPLES, MAX_RESAMPLES = 2000, 20_000
"""Of a bootstrap at 95 %, and at most at levels closer to 1."""
RESAMPLED_AT_ONCE = 2**20
"""Values that a bootstrap holds in memory."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate and its interval."""

    mean: float
    low: float
    high: float


def bonferroni(num_comparisons: int, *, level: float = 0.95) -> float:
    """The level of each of several intervals at which all of them hold together with probability `level`."""
    return 1 - (1 - level) / num_comparisons


def significant(interval: Interval, num: int) -> bool:
    """Whether the interval of a difference over `num` images tells which side is ahead."""
    return num >= ENOUGH and (interval.low > 0 or interval.high < 0)


def rests_on(num: int, what: str = "image", *, subject: str = "This") -> str:
    """What is said beside figures that rest on so few, "" of enough."""
    if num >= ENOUGH:
        return ""
    return f"{subject} rests on {num:,} {what}{'s' * (num != 1)}: too few to tell good from bad, or gain from luck."


def bootstrap(
    values: Float[np.ndarray, " n"], *, seed: int = 0, num_resamples: int = NUM_RESAMPLES, level: float = 0.95
) -> Interval:
    """Mean of per-image values with its percentile bootstrap interval; of rates (0 and 1 only), Wilson's.

    Where every image succeeds, or none, a bootstrap has no spread at all and would be certain. Of a few values it is
    too narrow, and Student's interval is taken where that is wider. A single value has none: low = mean = high.

    Raises:
        ValueError: no values.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        raise ValueError("an interval needs at least one value")
    if _is_rate(values):
        return _wilson(float(values.mean()), len(values), level)
    found = _resampled(values, seed, num_resamples, level)
    return _hull(found, found, within=(0.0, math.inf)) if values.min() >= 0 else found  # no negative distances


def _resampled(values: np.ndarray, seed: int, num_resamples: int, level: float) -> Interval:
    draw = np.random.default_rng(seed)
    count = max(num_resamples, min(math.ceil(40 / (1 - level)), MAX_RESAMPLES))  # twenty in either tail
    rows = max(RESAMPLED_AT_ONCE // len(values), 1)
    sizes = [(min(rows, count - first), len(values)) for first in range(0, count, rows)]
    means = np.concatenate([values[draw.integers(len(values), size=size)].mean(axis=1) for size in sizes])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    found = Interval(float(values.mean()), float(low), float(high))
    if not 1 < len(values) < ENOUGH:
        return found
    half = student_half(values, level=level)
    return _hull(found, Interval(found.mean, found.mean - half, found.mean + half), within=(-math.inf, math.inf))


def student_half(values: Float[np.ndarray, " n"], *, level: float = 0.95) -> float:
    """Half the width of Student's interval of the mean of two values or more."""
    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return student_quantile((1 + level) / 2, float(len(values) - 1)) * spread


def difference(
    ours: Float[np.ndarray, " n"], theirs: Float[np.ndarray, " n"], *, seed: int = 0, level: float = 0.95
) -> Interval:
    """Mean of ours minus theirs on the same images: the bootstrap over images; of two rates, Agresti and Min's."""
    if _is_rate(ours) and _is_rate(theirs):
        return _paired_rates(float((ours > theirs).sum()), float((ours < theirs).sum()), len(ours), level)
    return _resampled(np.asarray(ours - theirs, dtype=np.float64), seed, NUM_RESAMPLES, level)


def _is_rate(values: np.ndarray) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def _wilson(rate: float, num: int, level: float) -> Interval:
    """The score interval of a binomial rate (Wilson 1927); scipy's takes whole numbers only, a mean over training seeds
    is none."""
    z2 = _normal_quantile(level) ** 2
    centre = (rate + z2 / (2 * num)) / (1 + z2 / num)
    half = math.sqrt(z2 * rate * (1 - rate) / num + (z2 / (2 * num)) ** 2) / (1 + z2 / num)
    return Interval(rate, min(max(centre - half, 0.0), rate), max(min(centre + half, 1.0), rate))


def _paired_rates(wins: float, losses: float, num: int, level: float) -> Interval:
    """The difference of two rates on the same images, half an image added to each of the four outcomes.

    Agresti & Min 2005, "Simple improved confidence intervals for comparing matched proportions".
    """
    mean = (wins - losses) / num
    centre = (wins - losses) / (num + 2)
    spread = max((wins + losses + 1) / (num + 2) - centre**2, 0.0)
    half = _normal_quantile(level) * math.sqrt(spread / (num + 2))
    return Interval(mean, min(centre - half, mean), max(centre + half, mean))


def _normal_quantile(level: float) -> float:
    return statistics.NormalDist().inv_cdf((1 + level) / 2)


def subsets_interval(values: Float[np.ndarray, " subsets"], *, level: float = 0.95) -> Interval:
    """Mean over the subsets, and the range that holds 95 % of them (at another level, that of a normal law)."""
    mean = float(values.mean())
    if level == 0.95:
        low, high = np.percentile(values, [2.5, 97.5])
        return Interval(mean, float(low), float(high))
    half = _normal_quantile(level) * float(values.std())  # two hundred subsets have no tails to count
    return Interval(mean, mean - half, mean + half)


# -- intervals over training seeds and images -----------------------------------------------------------------


def two_level(
    values: Float[np.ndarray, "seeds n"], *, seed: int = 0, level: float = 0.95, subsets: bool = False
) -> Interval:
    """Mean over training seeds and images, with the interval that other seeds and other images would fall into.

    Crossed random effects: each value is the mean + its seed's part + its image's part + what is its own. The
    variance of the mean is taken from the spread of the seeds' means and that of the images' means, what is in both
    counted once; the interval is Student's with Satterthwaite's degrees of freedom (Satterthwaite 1946). In simulations
    with three seeds it holds the truth in 93 to 97 of 100 cases, with two in 89 to 98; a bootstrap over seeds and
    images in 72 where the seeds differ more than images do.

    `subsets`: the second axis are KIDs of random subsets, the same subsets for every seed. Their spread is the standard
    error of the whole already (delete-half jackknife) and is not divided by their number.
    A single seed has no spread: its interval is over images, and says nothing about another training.
    """
    if len(values) == 1:
        return subsets_interval(values[0], level=level) if subsets else bootstrap(values[0], seed=seed, level=level)
    found = _student(float(values.mean()), _spread(values, subsets), level)
    if subsets or not _is_rate(values):
        return found
    return _hull(found, _wilson(found.mean, values.shape[1], level), within=(0.0, 1.0))


def two_level_difference(
    ours: Float[np.ndarray, "seeds n"],
    theirs: Float[np.ndarray, "others m"],
    *,
    paired_seeds: bool,
    seed: int = 0,
    level: float = 0.95,
    subsets: bool = False,
) -> Interval:
    """Mean of ours minus theirs over training seeds and images, as `two_level`; column i is the same image in both.

    `paired_seeds`: row k of both is the same network (two samplings of it), so that the network's own part cancels;
    else the rows are trainings of their own. A side of one row is taken as fixed: a baseline that is not trained, or
    the one network there is.

    Raises:
        ValueError: other images on one side, or paired seeds of different numbers.
    """
    if ours.shape[1] != theirs.shape[1] or (paired_seeds and len(ours) != len(theirs)):
        raise ValueError(f"a difference needs the same images, and paired seeds: {ours.shape} against {theirs.shape}")
    if len(ours) == len(theirs) == 1:
        if subsets:
            return subsets_interval(ours[0] - theirs[0], level=level)
        return difference(ours[0], theirs[0], seed=seed, level=level)
    if paired_seeds:
        spread = _spread(ours - theirs, subsets)
    else:
        of_seeds = [_spread(side, subsets) for side in (ours, theirs)]
        of_images = _spread((ours.mean(0) - theirs.mean(0))[None], subsets)
        spread = _Spread(
            [each for side in of_seeds for each in side.seeds], of_images.images, sum(s.shared for s in of_seeds)
        )
    found = _student(float(ours.mean() - theirs.mean()), spread, level)
    if subsets or not _is_rate(ours):
        return found
    if not _is_rate(theirs):  # a threshold, or a rate on another scale: the rate alone
        alone, shift = _wilson(float(ours.mean()), ours.shape[1], level), float(theirs.mean())
        return _hull(found, Interval(found.mean, alone.low - shift, alone.high - shift), within=(-math.inf, math.inf))
    if paired_seeds:
        wins, losses = (ours > theirs).mean(0).sum(), (ours < theirs).mean(0).sum()
    else:
        rates = ours.mean(0), theirs.mean(0)
        wins, losses = (rates[0] * (1 - rates[1])).sum(), ((1 - rates[0]) * rates[1]).sum()
    return _hull(found, _paired_rates(float(wins), float(losses), ours.shape[1], level), within=(-1.0, 1.0))


@dataclasses.dataclass(frozen=True)
class _Spread:
    """What the variance of a mean is made of."""

    seeds: list[tuple[float, int]]
    """(variance, degrees of freedom) from the seeds' means."""
    images: list[tuple[float, int]]
    """Likewise from the images'."""
    shared: float
    """The variance that is in both."""


def _spread(values: np.ndarray, subsets: bool) -> _Spread:
    num_seeds, num = values.shape
    weight = 1 if subsets else num
    of_images = [(float(values.mean(0).var(ddof=1)) / weight, num - 1)] if num > 1 else []
    if num_seeds == 1:
        return _Spread([], of_images, 0.0)
    of_seeds = [(float(values.mean(1).var(ddof=1)) / num_seeds, num_seeds - 1)]
    if num == 1:
        return _Spread(of_seeds, [], 0.0)
    own = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    variance = float(np.square(own).sum()) / ((num_seeds - 1) * (num - 1))
    return _Spread(of_seeds, of_images, variance / num_seeds / weight)


def _student(mean: float, spread: _Spread, level: float) -> Interval:
    parts = [*spread.seeds, *spread.images]
    sums = [sum(variance for variance, _ in side) for side in (spread.seeds, spread.images)]
    variance = max(sum(sums) - spread.shared, *sums)
    if variance == 0:
        return Interval(mean, mean, mean)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    half = student_quantile((1 + level) / 2, freedom) * math.sqrt(variance)
    return Interval(mean, mean - half, mean + half)


def student_quantile(probability: float, freedom: float) -> float:
    """Where Student's distribution of `freedom` (any positive number) reaches `probability`."""
    from scipy.special import stdtrit  # on use: no `--help` needs it

    return float(stdtrit(freedom, probability))


def _hull(one: Interval, other: Interval, *, within: tuple[float, float]) -> Interval:
    """The shortest interval around both."""
    return Interval(one.mean, max(min(one.low, other.low), within[0]), min(max(one.high, other.high), within[1]))
