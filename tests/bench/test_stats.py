"""Figures of samples, and intervals that hold as often as they say."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from scipy.stats.mstats import mquantiles

from tiue_cli.bench.stats import (
    block_bootstrap,
    drift,
    exact,
    mean_interval,
    ratio_of_medians,
    summarize,
    welch_difference,
)


@pytest.mark.parametrize("count", [1, 2, 5, 64, 101])
def test_percentiles_equal_those_of_the_sorted_samples(count: int) -> None:
    samples = np.random.default_rng(count).gamma(3.0, size=count)
    by_scipy = partial(mquantiles, samples, alphap=1, betap=1)
    figures = summarize(samples)
    assert (figures.median, figures.p90, figures.p99) == pytest.approx(by_scipy([0.5, 0.9, 0.99]).tolist(), rel=1e-12)
    low, high = by_scipy([0.25, 0.75])
    assert figures.iqr == pytest.approx(high - low, rel=1e-12, abs=1e-12)
    assert figures.count == count


def test_outliers_are_samples_far_above_the_median() -> None:
    assert summarize([10.0] * 9 + [15.1]).outlier_share == pytest.approx(0.1)
    assert summarize([10.0] * 9 + [14.9]).outlier_share == 0.0


def test_interval_of_a_ratio_covers_the_truth_as_often_as_it_says() -> None:
    # Brute force: many runs of two subjects whose true ratio of medians is 2, with noise that both share in a round.
    generator = np.random.default_rng(5)
    truth, runs, rounds, covered = 2.0, 300, 30, 0
    for run in range(runs):
        shared = generator.lognormal(0.0, 0.3, size=rounds)
        slow = 2.0 * shared * generator.lognormal(0.0, 0.1, size=rounds)
        fast = shared * generator.lognormal(0.0, 0.1, size=rounds)
        interval = ratio_of_medians(slow, fast, seed=run, resamples=500)
        covered += interval.low <= truth <= interval.high
    # 0.95 ± three standard errors; the percentile bootstrap of a median is a little conservative.
    assert 0.91 <= covered / runs <= 1.0


def test_pairing_makes_the_interval_narrower_where_rounds_differ() -> None:
    generator = np.random.default_rng(1)
    rounds = generator.lognormal(0.0, 0.5, size=40)
    slow, fast = 3.0 * rounds, rounds
    paired = ratio_of_medians(slow, fast)
    mixed = ratio_of_medians(slow, generator.permutation(fast))
    assert (paired.low, paired.value, paired.high) == pytest.approx((3.0, 3.0, 3.0))
    assert mixed.high - mixed.low > 0.5


def test_a_mean_has_students_interval() -> None:
    values = [3.1, 2.7, 4.4, 3.9]
    found = mean_interval(values, confidence=0.95)
    assert found is not None and found.low is not None and found.high is not None
    margin = 3.182446 * np.std(values, ddof=1) / 2  # the table's t for 3 degrees of freedom
    assert (found.value, found.low, found.high) == pytest.approx((3.525, 3.525 - margin, 3.525 + margin), rel=1e-6)
    assert mean_interval([1.0], confidence=0.95) is None
    assert mean_interval([2.0, 2.0], confidence=0.95) == exact(2.0)


def test_welch_equals_a_worked_example() -> None:
    """Equal variances and sizes: Welch is the two-sample t with 2n - 2 degrees of freedom."""
    old, new = (1.0, 2.0, 3.0), (4.0, 5.0, 6.0)
    found = welch_difference(old, new, confidence=0.95)
    margin = 2.776445 * (2 / 3) ** 0.5
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((3.0, 3.0 - margin, 3.0 + margin), rel=1e-6)
    assert welch_difference((1.0,), new, confidence=0.95) is None
    assert welch_difference((1.0, 1.0), (3.0, 3.0), confidence=0.95) == exact(2.0)


def test_block_bootstrap_of_equal_blocks_gives_numpys_percentiles() -> None:
    """Two alternating values in blocks of two: every resampled series holds both equally often."""
    samples, percentiles = [1.0, 3.0] * 8, [10.0, 50.0, 90.0]
    drawn = block_bootstrap(samples, percentiles, np.random.default_rng(0))
    expected = np.percentile(samples, percentiles)
    assert drawn.shape[0] == 3
    assert np.abs(drawn - expected[:, None]).max() == 0


def test_block_bootstrap_is_wider_where_neighbours_are_alike() -> None:
    slow = np.repeat(np.random.default_rng(0).normal(100, 5, 10), 10)
    shuffled = np.random.default_rng(1).permutation(slow)
    spread = [
        float(np.std(block_bootstrap(series.tolist(), [50.0], np.random.default_rng(2))[0]))
        for series in (slow, shuffled)
    ]
    assert spread[0] > 1.3 * spread[1]


def test_drift_compares_the_last_third_with_the_first() -> None:
    assert drift([1.0, 1.0, 1.0, 5.0, 5.0, 5.0, 1.2, 1.2, 1.2]) == pytest.approx(0.2)
    assert drift([1.0, 2.0, 3.0]) == 0.0
