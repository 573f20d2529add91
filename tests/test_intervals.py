"""Intervals: against exact ones, and by how often they hold the truth. The colour map: against exact answers."""

import numpy as np
import pytest
from pictures import noise
from scipy import stats

from jobs.common import intervals
from jobs.evaluation import baselines

# -- intervals


def test_bootstrap_interval_is_the_normal_one_for_many_values() -> None:
    values = np.random.default_rng(1).normal(5, 2, 400)
    found = intervals.bootstrap(values)
    assert found.mean == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert found.high - found.mean == pytest.approx(half, rel=0.15)
    assert found.mean - found.low == pytest.approx(half, rel=0.15)


def test_bootstrap_is_seeded_and_refuses_nothing_at_all() -> None:
    values = np.arange(30.0)
    assert intervals.bootstrap(values, seed=3) == intervals.bootstrap(values, seed=3)
    assert intervals.bootstrap(values, seed=3) != intervals.bootstrap(values, seed=4)
    with pytest.raises(ValueError, match="at least one"):
        intervals.bootstrap(np.array([]))


def coverage(held: list[bool]) -> float:
    return float(np.mean(held))


def holds(interval: intervals.Interval, truth: float) -> bool:
    return interval.low <= truth <= interval.high


def test_bootstrap_intervals_hold_the_truth_as_often_as_they_say() -> None:
    draw = np.random.default_rng(0)
    skewed = [intervals.bootstrap(draw.exponential(1, 60), num_resamples=400) for _ in range(250)]
    assert 0.90 <= coverage([holds(each, 1.0) for each in skewed]) <= 0.98
    wide = [intervals.bootstrap(draw.normal(size=60), level=0.99) for _ in range(40)]
    narrow = [intervals.bootstrap(draw.normal(size=60), level=0.5) for _ in range(150)]
    assert coverage([holds(each, 0) for each in wide]) >= 0.95
    assert 0.40 <= coverage([holds(each, 0) for each in narrow]) <= 0.60


def test_rates_have_wilsons_interval_even_where_all_succeed() -> None:
    """9 of 10: 0.5958 to 0.9821 (Newcombe 1998's formula 3, by hand); 10 of 10: 1 / (1 + z^2 / 10) to 1."""
    found = intervals.bootstrap(np.array([1.0] * 9 + [0.0]))
    assert (found.mean, found.low, found.high) == pytest.approx((0.9, 0.5958, 0.9821), abs=1e-4)
    found = intervals.bootstrap(np.ones(10))
    assert (found.mean, found.low, found.high) == pytest.approx((1, 1 / (1 + 1.959964**2 / 10), 1), abs=1e-6)
    draw = np.random.default_rng(0)
    for rate in (0.5, 0.95, 0.99):
        held = [holds(intervals.bootstrap((draw.random(200) < rate).astype(float)), rate) for _ in range(1000)]
        assert 0.90 <= coverage(held) <= 0.98


def test_a_paired_difference_sees_what_two_intervals_do_not() -> None:
    draw = np.random.default_rng(0)
    theirs = draw.normal(0, 10, 200)
    found = intervals.difference(theirs + 0.5 + draw.normal(0, 1, 200), theirs)
    assert intervals.significant(found, 200)
    assert found.mean == pytest.approx(0.5, abs=0.2)
    assert found.high - found.low == pytest.approx(2 * 1.96 / 200**0.5, rel=0.2)
    assert intervals.difference(theirs, theirs) == intervals.Interval(0.0, 0.0, 0.0)
    assert not intervals.significant(intervals.Interval(0.0, 0.0, 0.0), 200)
    assert intervals.significant(intervals.Interval(-2.0, -3.0, -1.0), intervals.ENOUGH)


def test_a_few_values_have_students_interval_and_claim_nothing() -> None:
    """Of -1 and 1: the quantile tan(0.475 pi) times the standard error 1; of a single value there is none."""
    two = intervals.bootstrap(np.array([-1.0, 1.0]))
    assert (two.low, two.high) == pytest.approx((-np.tan(0.475 * np.pi), np.tan(0.475 * np.pi)))
    assert intervals.bootstrap(np.array([7.0])) == intervals.Interval(7.0, 7.0, 7.0)
    draw = np.random.default_rng(0)
    for num in (2, 3, 5, 10):
        held = [holds(intervals.bootstrap(draw.normal(size=num), num_resamples=200), 0.0) for _ in range(400)]
        assert 0.92 <= coverage(held) <= 0.985, num
    few = intervals.ENOUGH - 1
    assert not intervals.significant(intervals.Interval(-2.0, -3.0, -1.0), few)
    assert intervals.rests_on(few).startswith("This rests on 19 images: too few")
    assert intervals.rests_on(1, "validation row").startswith("This rests on 1 validation row: ")
    assert intervals.rests_on(intervals.ENOUGH) == ""


def test_the_difference_of_two_rates_is_never_certain() -> None:
    """15 wins and 5 losses of 100, by hand: 10 / 102 +- 1.96 sqrt((21 / 102 - (10 / 102)^2) / 102)."""
    ours, theirs = np.zeros(100), np.zeros(100)
    ours[:15], theirs[15:20] = 1, 1
    found = intervals.difference(ours, theirs)
    assert (found.mean, found.low, found.high) == pytest.approx((0.1, 0.01205, 0.18403), abs=1e-4)
    both = np.ones(50)
    found = intervals.difference(both, both)
    assert found.mean == 0
    assert found.low == -found.high == pytest.approx(-1.96 * (1 / 52 / 52) ** 0.5, rel=1e-3)


def test_students_quantile() -> None:
    """Of one degree of freedom it is Cauchy's, tan(pi (p - 1 / 2)); of two (2 p - 1) sqrt(2 / (4 p (1 - p)))."""
    for probability in (0.6, 0.975, 0.9995):
        one = np.tan(np.pi * (probability - 0.5))
        two = (2 * probability - 1) * np.sqrt(2 / (4 * probability * (1 - probability)))
        assert intervals.student_quantile(probability, 1.0) == pytest.approx(one)
        assert intervals.student_quantile(probability, 2.0) == pytest.approx(two)
        assert one > intervals.student_quantile(probability, 1.7) > two
    assert intervals.student_quantile(0.975, 1e6) == pytest.approx(1.959964, rel=1e-5)


def test_wilsons_interval_is_scipys_where_that_has_one() -> None:
    for wins, num in ((0, 7), (3, 8), (90, 100)):
        exact = stats.binomtest(wins, num).proportion_ci(0.9, method="wilson")
        found = intervals.bootstrap(np.arange(num) < wins, level=0.9)
        assert (found.low, found.high) == pytest.approx((exact.low, exact.high))


def test_a_bootstrap_does_not_depend_on_what_fits_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).exponential(1, 300)
    whole = intervals.bootstrap(values, seed=5)
    monkeypatch.setattr(intervals, "RESAMPLED_AT_ONCE", 1000)
    assert intervals.bootstrap(values, seed=5) == whole


def test_bonferroni_keeps_all_comparisons_right_at_once() -> None:
    assert intervals.bonferroni(1) == pytest.approx(0.95)
    assert intervals.bonferroni(10) == pytest.approx(0.995)
    draw = np.random.default_rng(0)
    single, together = [], []
    for _ in range(80):  # eight comparisons without a difference
        values = draw.normal(size=(3, 8, 20))
        for level, told in ((0.95, single), (intervals.bonferroni(8), together)):
            told.append(
                any(intervals.significant(intervals.two_level(values[:, i], level=level), 20) for i in range(8))
            )
    assert coverage(single) > 0.1
    assert coverage(together) <= 0.06


# -- intervals over training seeds and images


def crossed(draw: np.random.Generator, seeds: int, num: int, spread: tuple[float, float, float]) -> np.ndarray:
    """Truth 0; `spread` of the seeds' part, of the images' and of what is a value's own."""
    of_seeds, of_images, own = spread
    return (
        of_seeds * draw.normal(size=(seeds, 1))
        + of_images * draw.normal(size=num)
        + own * draw.normal(size=(seeds, num))
    )


@pytest.mark.parametrize("spread", [(0, 1, 1), (0.1, 1, 0.5), (0.3, 1, 1), (1, 1, 1), (1, 0.1, 0.1)])
def test_two_level_intervals_hold_the_truth_with_three_seeds(spread: tuple[float, float, float]) -> None:
    draw = np.random.default_rng(0)
    held = [holds(intervals.two_level(crossed(draw, 3, 80, spread)), 0) for _ in range(800)]
    assert 0.91 <= coverage(held) <= 0.98


def test_two_seeds_cover_less_and_a_plain_bootstrap_far_less() -> None:
    """What the docstring says of the alternatives."""
    draw = np.random.default_rng(0)
    two = [holds(intervals.two_level(crossed(draw, 2, 80, (0.3, 1, 1))), 0) for _ in range(800)]
    assert 0.86 <= coverage(two) <= 0.95

    def plain(values: np.ndarray) -> bool:
        means = [values[draw.integers(3, size=3)][:, draw.integers(80, size=80)].mean() for _ in range(200)]
        return bool(np.percentile(means, 2.5) <= 0 <= np.percentile(means, 97.5))

    assert coverage([plain(crossed(draw, 3, 80, (1, 1, 1))) for _ in range(200)]) < 0.82


def test_where_only_seeds_differ_the_interval_is_students_of_their_means() -> None:
    values = np.repeat(np.array([[1.0], [2.0], [4.0]]), 50, axis=1)
    found = intervals.two_level(values)
    half = stats.t.ppf(0.975, 2) * np.std([1, 2, 4], ddof=1) / 3**0.5
    assert (found.mean, found.high - found.mean) == pytest.approx((7 / 3, half))


def test_where_only_images_differ_seeds_add_nothing() -> None:
    pictures = np.random.default_rng(0).normal(size=50)
    found = intervals.two_level(np.stack([pictures] * 3))
    half = stats.t.ppf(0.975, 49) * pictures.std(ddof=1) / 50**0.5
    assert found.high - found.mean == pytest.approx(half)
    assert intervals.two_level(pictures[None], seed=3) == intervals.bootstrap(pictures, seed=3)


def test_two_level_rates_stay_within_0_and_1_and_are_never_certain() -> None:
    found = intervals.two_level(np.ones((3, 100)))
    assert (found.mean, found.high) == (1, 1)
    assert found.low == pytest.approx(1 / (1 + 1.959964**2 / 100), abs=1e-6)
    draw = np.random.default_rng(0)
    held = []
    for _ in range(500):
        hard = draw.random(100) < 0.1  # images that no seed can do
        held.append(holds(intervals.two_level((~hard[None] & (draw.random((3, 100)) < 0.95)).astype(float)), 0.855))
    assert 0.91 <= coverage(held) <= 0.995


@pytest.mark.parametrize("others", [1, 3])
def test_two_level_differences_of_trainings_hold_the_truth(others: int) -> None:
    draw = np.random.default_rng(0)
    held = []
    for _ in range(600):
        pictures = draw.normal(size=60)
        ours = 0.5 + pictures + crossed(draw, 3, 60, (0.2, 0.3, 0.5))
        theirs = pictures + crossed(draw, others, 60, (0.2 if others > 1 else 0, 0.3, 0.5))
        held.append(holds(intervals.two_level_difference(ours, theirs, paired_seeds=False), 0.5))
    assert 0.90 <= coverage(held) <= 0.985


def test_two_samplings_of_the_same_networks_are_told_apart_where_two_trainings_are_not() -> None:
    draw = np.random.default_rng(0)
    theirs = crossed(draw, 3, 100, (2, 1, 0.1))
    ours = theirs + 0.1 + 0.1 * draw.normal(size=theirs.shape)
    assert intervals.significant(intervals.two_level_difference(ours, theirs, paired_seeds=True), 100)
    assert not intervals.significant(intervals.two_level_difference(ours, theirs, paired_seeds=False), 100)
    same = intervals.two_level_difference(ours, theirs, paired_seeds=True)
    alone = intervals.two_level(ours - theirs)
    assert (same.mean, same.low, same.high) == pytest.approx((alone.mean, alone.low, alone.high))
    one = intervals.two_level_difference(ours[:1], theirs[:1], paired_seeds=True, seed=4)
    assert one == intervals.difference(ours[0], theirs[0], seed=4)


def test_a_difference_of_other_images_or_other_seeds_is_refused() -> None:
    with pytest.raises(ValueError, match="same images"):
        intervals.two_level_difference(np.zeros((3, 5)), np.zeros((3, 6)), paired_seeds=False)
    with pytest.raises(ValueError, match="paired seeds"):
        intervals.two_level_difference(np.zeros((3, 5)), np.zeros((2, 5)), paired_seeds=True)


def test_rates_of_trainings_that_never_differ_leave_room_for_what_was_not_seen() -> None:
    ones = np.ones((3, 100))
    for paired in (True, False):
        found = intervals.two_level_difference(ones, ones, paired_seeds=paired)
        assert found.low == -found.high == pytest.approx(-1.96 / 102, rel=1e-3)
    found = intervals.two_level_difference(ones, np.full((3, 100), 0.95), paired_seeds=False)  # a threshold
    assert found.mean == pytest.approx(0.05)
    assert found.low == pytest.approx(1 / (1 + 1.959964**2 / 100) - 0.95, abs=1e-6)


def test_the_halves_spread_is_not_divided_by_their_number() -> None:
    halves = np.random.default_rng(0).normal(0.5, 0.1, 200)
    found = intervals.two_level(np.stack([halves] * 3), subsets=True)
    assert found.high - found.mean == pytest.approx(stats.t.ppf(0.975, 199) * halves.std(ddof=1))
    apart = intervals.two_level(np.stack([halves - 1, halves, halves + 1]), subsets=True)
    half = stats.t.ppf(0.975, 2) / 3**0.5
    assert apart.high - apart.mean == pytest.approx(half, rel=0.1)  # the seeds outweigh the images
    assert intervals.two_level(halves[None], subsets=True) == intervals.subsets_interval(halves)
    moved = intervals.two_level_difference(halves[None] + 0.2, halves[None], paired_seeds=True, subsets=True)
    assert (moved.low, moved.high) == pytest.approx((0.2, 0.2))
    wide = intervals.subsets_interval(halves, level=0.999)
    assert wide.high - wide.mean == pytest.approx(3.2905 * halves.std(), rel=1e-4)


# -- the colour map


def linear_color_map(sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return baselines.solve_color_map(baselines.color_moments(sources, targets))


def test_an_affine_change_of_colours_is_found_exactly() -> None:
    sources = (noise(4) // 2 + 40).astype(np.uint8)
    true_map = np.array([[0.5, 0.1, 0.0, 0.1], [0.0, 0.6, 0.2, 0.0], [0.2, 0.0, 0.4, 0.05]])
    targets = baselines.apply_color_map(true_map, sources)
    found = linear_color_map(sources, targets)
    assert np.abs(found - true_map).max() < 2e-3  # the targets are rounded to 8 bits
    assert np.abs(baselines.apply_color_map(found, sources).astype(int) - targets).max() <= 1


def test_the_map_is_the_best_one_and_moments_add_up() -> None:
    sources, targets = noise(6, seed=1), noise(6, seed=2)
    best = linear_color_map(sources, targets)

    def error(color_map: np.ndarray) -> float:
        x = sources.reshape(-1, 3) / 255 @ color_map[:, :3].T + color_map[:, 3]
        return float(((x - targets.reshape(-1, 3) / 255) ** 2).sum())

    for row, column in np.ndindex(3, 4):
        for step in (-0.01, 0.01):
            moved = best.copy()
            moved[row, column] += step
            assert error(moved) > error(best)
    parts = baselines.color_moments(sources[:2], targets[:2]) + baselines.color_moments(sources[2:], targets[2:])
    assert np.allclose(baselines.solve_color_map(parts), best)


def test_images_of_one_colour_still_give_a_map() -> None:
    sources = np.full((2, 8, 8, 3), 100, np.uint8)
    targets = np.full((2, 8, 8, 3), 30, np.uint8)
    assert (baselines.apply_color_map(linear_color_map(sources, targets), sources) == 30).all()
