"""From samples to figures: medians, percentiles, and intervals that say how far a ratio can be believed. NumPy only.

Latency has a floor and a long tail, so the middle is the median and the spread the interquartile range; a mean would
follow the outliers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

CONFIDENCE: Final = 0.95
RESAMPLES: Final = 4000
OUTLIER_FACTOR: Final = 1.5
"""A sample above so many medians is an outlier: something else ran."""

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
    minimum: float
    maximum: float
    outlier_share: float
    """Of the samples above OUTLIER_FACTOR medians."""


@dataclass(frozen=True)
class Interval:
    """An estimate and its two-sided bootstrap interval."""

    estimate: float
    low: float
    high: float


def summarize(samples: _Values) -> Summary:
    """Figures of at least one sample; percentiles interpolate linearly between the order statistics."""
    values = _checked(samples)
    p25, median, p75, p90, p99 = np.percentile(values, [25, 50, 75, 90, 99]).tolist()
    return Summary(
        count=values.size,
        median=median,
        p90=p90,
        p99=p99,
        iqr=p75 - p25,
        minimum=float(values.min()),
        maximum=float(values.max()),
        outlier_share=float(np.mean(values > OUTLIER_FACTOR * median)),
    )


def images_per_s(samples_ms: _Values, batch: int) -> float:
    """Throughput of runs of ``batch`` images, at the median latency."""
    return batch / float(np.median(_checked(samples_ms))) * 1000.0


def ratio_of_medians(
    samples: _Values,
    baseline: _Values,
    *,
    seed: int = 0,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
) -> Interval:
    """median(samples) / median(baseline) of paired samples, with a percentile bootstrap interval.

    Sample i of both belongs to the same round, and rounds are drawn with replacement, so that what slows a whole round
    does not widen the interval (Efron and Tibshirani 1993, chapter 13). With few rounds the interval is
    coarse: 5 rounds cannot say more than about 94 %.
    """
    above, below = _checked(samples), _checked(baseline)
    assert above.size == below.size, "one sample a round of each"
    generator = np.random.Generator(np.random.Philox(key=seed))
    rounds = generator.integers(above.size, size=(resamples, above.size))
    ratios = np.median(above[rounds], axis=1) / np.median(below[rounds], axis=1)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(ratios, [tail, 1.0 - tail]).tolist()
    return Interval(float(np.median(above) / np.median(below)), low, high)


def drift(samples: _Values) -> float:
    """Relative change of the median from the first third of the samples to the last; 0 with fewer than 6."""
    values = _checked(samples)
    third = values.size // 3
    if third < 2:
        return 0.0
    return float(np.median(values[-third:]) / np.median(values[:third]) - 1.0)


def _checked(samples: _Values) -> npt.NDArray[np.float64]:
    values = np.asarray(samples, dtype=np.float64)
    assert values.ndim == 1 and values.size > 0, "at least one sample"
    return values
