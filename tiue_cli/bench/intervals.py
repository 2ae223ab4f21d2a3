"""Estimates with intervals, for what one report cannot pair with another: series of two runs, means of repetitions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

REPLICATES = 2000
LEAST_SAMPLES = {"p50": 6, "p90": 20, "p99": 200}
"""Below it, fewer than two samples lie beyond the percentile (or the median's interval is the whole range)."""


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


def hull(series: Sequence[np.ndarray], *, confidence: float) -> tuple[float, float]:
    """The smallest (low, high) that holds the percentile interval of every series of replicates."""
    tails = [50 * (1 - confidence), 100 - 50 * (1 - confidence)]
    limits = [np.percentile(drawn, tails) for drawn in series]
    return float(min(low for low, _ in limits)), float(max(high for _, high in limits))


def mean_interval(values: Sequence[float], *, confidence: float) -> Estimate | None:
    """The mean with Student's interval; None for fewer than two values, which have no spread."""
    if len(values) < 2:
        return None
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    margin = student_t(confidence, len(values) - 1) * error
    return Estimate(mean, mean - margin, mean + margin)


def welch_difference(old: Sequence[float], new: Sequence[float], *, confidence: float) -> Estimate | None:
    """Difference of the means, new less old, with Welch's interval (1947); None where a side has fewer than two."""
    if min(len(old), len(new)) < 2:
        return None
    parts = [float(np.var(values, ddof=1)) / len(values) for values in (old, new)]
    value, error = float(np.mean(new) - np.mean(old)), math.sqrt(sum(parts))
    if error == 0:
        return exact(value)
    freedom = sum(parts) ** 2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, (old, new), strict=True))
    margin = student_t(confidence, freedom) * error
    return Estimate(value, value - margin, value + margin)


def student_t(confidence: float, freedom: float) -> float:
    """The t with P(|T| < t) = ``confidence`` for Student's distribution with ``freedom`` ≥ 1 degrees of freedom.

    With T = √ν·tan θ the density is cos(θ)^(ν-1) on (-π/2, π/2) up to a factor, smooth enough for the trapezoid rule.
    """
    freedom = min(freedom, 1e4)
    theta = np.linspace(0, math.pi / 2, 20001)
    density = np.clip(np.cos(theta), 0, None) ** (freedom - 1)
    cumulative = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(math.sqrt(freedom) * math.tan(np.interp(confidence, cumulative / cumulative[-1], theta)))
