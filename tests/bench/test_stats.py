"""Figures of samples, and intervals that hold as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from tiue_cli.bench.stats import drift, images_per_s, ratio_of_medians, summarize


@pytest.mark.parametrize("count", [1, 2, 5, 64, 101])
def test_percentiles_equal_those_of_the_sorted_samples(count: int) -> None:
    samples = np.random.default_rng(count).gamma(3.0, size=count)
    ordered = sorted(samples)

    def by_hand(share: float) -> float:
        position = share * (count - 1)
        low = int(position)
        high = min(low + 1, count - 1)
        return float(ordered[low] + (position - low) * (ordered[high] - ordered[low]))

    figures = summarize(samples)
    assert figures.median == pytest.approx(by_hand(0.5), rel=1e-12)
    assert figures.p90 == pytest.approx(by_hand(0.9), rel=1e-12)
    assert figures.p99 == pytest.approx(by_hand(0.99), rel=1e-12)
    assert figures.iqr == pytest.approx(by_hand(0.75) - by_hand(0.25), rel=1e-12, abs=1e-12)
    assert (figures.count, figures.minimum, figures.maximum) == (count, ordered[0], ordered[-1])


def test_outliers_are_samples_far_above_the_median() -> None:
    assert summarize([10.0] * 9 + [15.1]).outlier_share == pytest.approx(0.1)
    assert summarize([10.0] * 9 + [14.9]).outlier_share == 0.0


def test_throughput_is_images_over_the_median_second() -> None:
    assert images_per_s([100.0, 200.0, 9000.0], 8) == pytest.approx(40.0)


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
    assert (paired.low, paired.estimate, paired.high) == pytest.approx((3.0, 3.0, 3.0))
    assert mixed.high - mixed.low > 0.5


def test_interval_equals_a_bootstrap_in_plain_loops() -> None:
    above, below = [3.0, 4.0, 5.0, 9.0, 4.5], [1.0, 2.0, 1.5, 2.5, 1.1]
    found = ratio_of_medians(above, below, seed=7, resamples=200)
    generator = np.random.Generator(np.random.Philox(key=7))
    ratios = []
    for draw in generator.integers(5, size=(200, 5)):
        drawn = [sorted(values[index] for index in draw)[2] for values in (above, below)]
        ratios.append(drawn[0] / drawn[1])
    assert (found.low, found.high) == pytest.approx((np.quantile(ratios, 0.025), np.quantile(ratios, 0.975)))
    assert found.estimate == pytest.approx(4.5 / 1.5)


def test_drift_compares_the_last_third_with_the_first() -> None:
    assert drift([1.0, 1.0, 1.0, 5.0, 5.0, 5.0, 1.2, 1.2, 1.2]) == pytest.approx(0.2)
    assert drift([1.0, 2.0, 3.0]) == 0.0
