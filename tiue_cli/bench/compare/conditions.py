"""Conditions that fail a comparison: ``[SUBJECT:]FIGURE(>|<)VALUE``, several with commas.

    p50>+5%                    the median end to end grew by more than 5 %, of any subject at any batch
    papercut/torch/k4:p99>+3   grew by more than 3 ms (a sign makes it a change, in ms, images/s or bytes)
    memory>2GiB                is more than that in the new report (no sign: the figure itself)
    fid>+2, recall<0.4         a quality metric, by its name in the report

FIGURE is p50, p90, p99, images_per_s, memory or a metric. Noise alone does not fail: a condition is met only where the
estimate and the whole of its interval (``compare.CONFIDENCE``) are beyond the value. So a gate at +5 % says "surely
more than 5 % slower", and one at +0 % "surely slower".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tiue_cli.bench.compare.reports import Comparison, Row
from tiue_cli.bench.stats import LEAST_SAMPLES, Estimate
from tiue_cli.errors import UsageError

_PATTERN = re.compile(
    r"(?:(?P<subject>.+):)?(?P<figure>[A-Za-z_]\w*)(?P<sign_of>[<>])"
    r"(?P<sign>[+-]?)(?P<number>\d+(?:\.\d*)?|\.\d+)(?P<unit>%|[A-Za-z]*)"
)
_TIME_UNITS = {"": 1.0, "ms": 1.0, "s": 1000.0}
_MEMORY_UNITS = {"B": 1.0, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "KB": 1e3, "MB": 1e6, "GB": 1e9}
_PLAIN_UNITS = {"": 1.0}
_EXAMPLE = "for example --fail-if 'p50>+5%', 'SUBJECT:p90>40ms', 'memory>+100MiB' or 'fid>+2'"


@dataclass(frozen=True)
class Condition:
    """``of`` says what ``value`` bounds: the change as a fraction, the change in the unit, or the new figure."""

    text: str
    subject: str | None
    figure: str
    above: bool
    of: Literal["relative", "difference", "new"]
    value: float

    def applies_to(self, row: Row) -> bool:
        """Whether the row is of the figure and of the subject, or of one below it (``papercut/torch``)."""
        if row.figure != self.figure or row.scope != "image":
            return False
        return self.subject is None or row.subject == self.subject or row.subject.startswith(f"{self.subject}/")

    def is_met_by(self, estimate: Estimate) -> bool:
        """Whether the estimate and its whole interval are beyond the value."""
        values = (estimate.value, estimate.low, estimate.high)
        return all(value is not None and (value > self.value if self.above else value < self.value) for value in values)


@dataclass(frozen=True)
class Check:
    """A condition, how many rows it was held against, and those that meet it."""

    condition: Condition
    judged: int
    offenders: tuple[Row, ...]

    @property
    def failed(self) -> bool:
        """Whether any row meets the condition."""
        return len(self.offenders) > 0

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for ``--format json``."""
        offenders = [asdict(row) for row in self.offenders]
        return {"condition": self.condition.text, "judged": self.judged, "failed": self.failed, "offenders": offenders}


def parse_conditions(texts: Sequence[str]) -> tuple[Condition, ...]:
    """Read what ``--fail-if`` was given, before anything is measured. Raises UsageError."""
    return tuple(_parsed(part.strip()) for text in texts for part in text.split(","))


def _parsed(text: str) -> Condition:
    match = _PATTERN.fullmatch(re.sub(r"\s*([<>])\s*", r"\1", text))
    if match is None:
        raise UsageError(f"{text!r} is not a condition", hint=_EXAMPLE)
    figure, sign, unit = match["figure"], match["sign"], match["unit"]
    number = float(match["number"]) * (-1 if sign == "-" else 1)
    of: Literal["relative", "difference", "new"] = "difference" if sign else "new"
    if unit == "%":
        if not sign:
            raise UsageError(f"{text!r}: a change in percent has a sign", hint=f"say +{number:g}% or -{number:g}%")
        value, of = number / 100, "relative"
    else:
        units = _units(figure)
        if unit not in units:
            known = ", ".join(name for name in units if name) or "none"
            raise UsageError(f"{text!r}: {figure} has units {known}, not {unit or 'none'}", hint=_EXAMPLE)
        value = number * units[unit]
    return Condition(
        text=text, subject=match["subject"], figure=figure, above=match["sign_of"] == ">", of=of, value=value
    )


def _units(figure: str) -> Mapping[str, float]:
    if figure in LEAST_SAMPLES:
        return _TIME_UNITS
    return _MEMORY_UNITS if figure == "memory" else _PLAIN_UNITS


def check_conditions(comparison: Comparison, conditions: Sequence[Condition]) -> tuple[Check, ...]:
    """Hold each condition against every row that it is about.

    Raises UsageError where there is none, or where a row cannot be judged: a gate that judges nothing must not pass.
    """
    return tuple(_check(comparison, condition) for condition in conditions)


def _check(comparison: Comparison, condition: Condition) -> Check:
    rows = [row for row in comparison.rows if condition.applies_to(row)]
    if not rows:
        raise UsageError(
            f"{condition.text!r} matches no figure that both reports have{_reason(comparison, condition)}",
            hint=f"there are: {_listing(comparison)}",
        )
    offenders = []
    for row in rows:
        estimate: Estimate | None = getattr(row, condition.of)
        if estimate is None or estimate.low is None:
            raise UsageError(
                f"{condition.text!r} cannot be judged for {row.where}: {_why_not(row, estimate)}",
                hint="measure both with --repetitions 3 or more, or leave this condition out",
            )
        if condition.is_met_by(estimate):
            offenders.append(row)
    return Check(condition, len(rows), tuple(offenders))


def _why_not(row: Row, estimate: Estimate | None) -> str:
    if estimate is None:
        return "the old figure is 0, so there is no change in percent"
    return f"with fewer than two repetitions of {row.figure} nothing tells its spread"


def _reason(comparison: Comparison, condition: Condition) -> str:
    if condition.figure in LEAST_SAMPLES:
        return f" ({condition.figure} takes {LEAST_SAMPLES[condition.figure]} samples in each)"
    if condition.figure not in ("images_per_s", "memory") and comparison.quality_obstacle is not None:
        return f" (quality is not compared: {comparison.quality_obstacle})"
    return ""


def _listing(comparison: Comparison) -> str:
    subjects = dict.fromkeys(row.subject for row in comparison.rows)
    figures = dict.fromkeys(row.figure for row in comparison.rows if row.scope == "image")
    if not subjects:
        return "no subjects in common"
    return f"{', '.join(figures)} of {', '.join(subjects)}"
