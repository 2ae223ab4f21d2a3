"""From samples to figures: medians, percentiles, and intervals that say how far a ratio can be believed.

Latency has a floor and a long tail, so the middle is the median and the spread the interquartile range; a mean would
follow the outliers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

CONFIDENCE: Final = 0.95
RESAMPLES: Final = 4000
OUTLIER_FACTOR: Final = 1.5
"""A sample above so many medians is an outlier: something else ran."""
REPLICATES: Final = 2000
LEAST_SAMPLES: Final = {"p50": 6, "p90": 20, "p99": 200}
"""Below it, fewer than two samples lie beyond the percentile (or the median's interval is the whole range)."""

_Values = Sequence[float] | npt.NDArray[np.float64]


@dataclass(frozen=True)
class Summary:
    """Figures of one subject's samples, in the samples' unit. ``count`` says how far a p99 can be believed."""

    count: int
    median: float
    p90: float
    p99: float
    iqr: float
    """Interquartile range, p75 - p25."""
    outlier_share: float
    """Of the samples above OUTLIER_FACTOR medians."""


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval; ``low`` and ``high`` are None where nothing tells the spread."""

    value: float
    low: float | None = None
    high: float | None = None

    def scaled(self, factor: float) -> Estimate:
        """All three times a positive factor."""
        return Estimate(
            self.value * factor,
            None if self.low is None else self.low * factor,
            None if self.high is None else self.high * factor,
        )


def exact(value: float) -> Estimate:
    """A figure that has no spread."""
    return Estimate(value, value, value)


def summarize(samples: _Values) -> Summary:
    """Figures of at least one sample; percentiles interpolate linearly between the order statistics."""
    values = np.asarray(samples, dtype=np.float64)
    p25, median, p75, p90, p99 = np.percentile(values, [25, 50, 75, 90, 99]).tolist()
    return Summary(values.size, median, p90, p99, p75 - p25, float(np.mean(values > OUTLIER_FACTOR * median)))


def drift(samples: _Values) -> float:
    """Relative change of the median from the first third of the samples to the last; 0 with fewer than 6."""
    third = len(samples) // 3
    return float(np.median(samples[-third:]) / np.median(samples[:third]) - 1.0) if third >= 2 else 0.0


# --- intervals; scipy.stats takes a second to load, and is wanted at the end of a bench only -------------------------


def ratio_of_medians(samples: _Values, baseline: _Values, *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """median(samples) / median(baseline) of paired samples, with a percentile bootstrap interval of CONFIDENCE.

    Sample i of both belongs to the same round, and rounds are drawn with replacement, so that what slows a whole round
    does not widen the interval (Efron and Tibshirani 1993, chapter 13). With few rounds the interval is
    coarse: 5 rounds cannot say more than about 94 %.
    """
    import scipy.stats

    def ratio(
        above: npt.NDArray[np.float64], below: npt.NDArray[np.float64], axis: int = -1
    ) -> npt.NDArray[np.float64]:
        quotient: npt.NDArray[np.float64] = np.median(above, axis=axis) / np.median(below, axis=axis)
        return quotient

    found = scipy.stats.bootstrap(
        (samples, baseline),
        ratio,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        confidence_level=CONFIDENCE,
        method="percentile",
        random_state=np.random.Generator(np.random.Philox(key=seed)),
    ).confidence_interval
    return Estimate(float(np.median(samples) / np.median(baseline)), float(found.low), float(found.high))


def block_bootstrap(
    samples: Sequence[float], percentiles: Sequence[float], generator: np.random.Generator
) -> np.ndarray:
    """Percentiles of resampled series, (percentiles, REPLICATES): circular block bootstrap (Politis, Romano 1992).

    Blocks, because neighbouring samples of a run resemble each other (a warm cache, a clock that sinks): drawn one by
    one they would promise too narrow an interval.
    """
    values = np.asarray(samples, dtype=np.float64)
    block = max(1, round(math.sqrt(len(values))))
    blocks = math.ceil(len(values) / block)
    starts = generator.integers(len(values), size=(REPLICATES, blocks, 1))
    indices = (starts + np.arange(block)) % len(values)
    resampled = np.sort(values[indices.reshape(REPLICATES, -1)[:, : len(values)]], axis=1)
    # As numpy.percentile interpolates, which takes ten times as long for thousands of short rows.
    positions = np.asarray(percentiles) / 100 * (len(values) - 1)
    lower = np.floor(positions).astype(int)
    upper = np.minimum(lower + 1, len(values) - 1)
    drawn: np.ndarray = (resampled[:, lower] + (positions - lower) * (resampled[:, upper] - resampled[:, lower])).T
    return drawn


def hull(value: float, series: Sequence[np.ndarray], *, confidence: float) -> Estimate:
    """``value`` with the smallest interval that holds the percentile interval of every series of replicates."""
    tails = [50 * (1 - confidence), 100 - 50 * (1 - confidence)]
    limits = np.array([np.percentile(drawn, tails) for drawn in series])
    return Estimate(value, float(limits[:, 0].min()), float(limits[:, 1].max()))


def mean_interval(values: Sequence[float], *, confidence: float) -> Estimate | None:
    """The mean with Student's interval; None for fewer than two values, which have no spread."""
    if len(values) < 2:
        return None
    import scipy.stats

    mean = float(np.mean(values))
    if np.ptp(values) == 0:
        return exact(mean)
    low, high = scipy.stats.t.interval(confidence, len(values) - 1, loc=mean, scale=scipy.stats.sem(values))
    return Estimate(mean, float(low), float(high))


def welch_difference(old: Sequence[float], new: Sequence[float], *, confidence: float) -> Estimate | None:
    """Difference of the means, new less old, with Welch's interval (1947); None where a side has fewer than two."""
    if min(len(old), len(new)) < 2:
        return None
    import scipy.stats

    value = float(np.mean(new) - np.mean(old))
    if np.ptp(old) == 0 == np.ptp(new):
        return exact(value)
    interval = scipy.stats.ttest_ind(new, old, equal_var=False).confidence_interval(confidence)
    return Estimate(value, float(interval.low), float(interval.high))
