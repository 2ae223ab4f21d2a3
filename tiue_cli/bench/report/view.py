"""A report as its readers look at it: lookups, short labels, derived figures, and what to take away.

Markdown, HTML, plots and the terminal all take their figures from here, so that they cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tiue_cli.base.text import number, size_text
from tiue_cli.bench.config import BACKEND_NAMES
from tiue_cli.bench.report.schema import (
    BenchReport,
    LatencyRecord,
    QualityRecord,
    RatioRecord,
    Scope,
    Stage,
    SubjectRecord,
)
from tiue_cli.bench.stats import Summary, summarize

STAGE_NAMES: dict[Stage, str] = {
    "text": "text encoder",
    "unet_encoder": "UNet encoder",
    "unet_decoder": "UNet decoder",
    "unet": "UNet",
    "vae": "VAE decoder",
}
METRIC_NAMES = {
    "fid": "Fréchet distance ↓",
    "kid": "KID ↓",
    "clip_score": "CLIP score ↑",
    "precision": "precision ↑",
    "recall": "recall ↑",
    "density": "density ↑",
    "coverage": "coverage ↑",
    "diversity": "diversity ↑",
}
MAIN_METRICS = ("fid", "clip_score", "recall", "precision", "kid", "coverage")
MAIN_METRIC_COUNT = 4
REFERENCE = "reference"
"""Key of the quality of references measured against references; it is no subject."""
MANY_STEPS = frozenset({"teacher", "peer"})
"""Kinds whose time is of another order."""


@dataclass(frozen=True)
class Setting:
    """What is measured together: a batch at a size, (height, width) in pixels."""

    batch: int
    size: tuple[int, int]

    @classmethod
    def of(cls, record: LatencyRecord | RatioRecord) -> Setting:
        """Where a record was measured."""
        return cls(record.batch, record.size)

    @property
    def words(self) -> str:
        """E.g. ``batch 4, 512 × 512``."""
        return f"batch {self.batch}, {size_text(self.size)}"


@dataclass(frozen=True)
class Headline:
    """One figure that a reader should take away."""

    figure: str
    what: str
    detail: str


class ReportView:
    """Lookups over one report; nothing is changed."""

    def __init__(self, report: BenchReport) -> None:
        self.report = report
        self.subjects: dict[str, SubjectRecord] = {subject.key: subject for subject in report.subjects}
        self.quality: dict[str, QualityRecord] = {record.subject: record for record in report.quality}
        self._latency = {(record.subject, Setting.of(record)): record for record in report.latency}
        self._ratios = {(one.subject, one.baseline, Setting.of(one), one.scope): one for one in report.ratios}

    # --- lookups ---

    @cached_property
    def settings(self) -> list[Setting]:
        """Every batch and size, smallest first."""
        found = {setting for _, setting in self._latency}
        return sorted(found, key=lambda setting: (math.prod(setting.size), setting.size, setting.batch))

    def latency(self, key: str, setting: Setting) -> LatencyRecord | None:
        """The samples of a subject at a setting."""
        return self._latency.get((key, setting))

    def records(self, setting: Setting) -> list[LatencyRecord]:
        """The samples of every subject at a setting, in the report's order of subjects."""
        return [self._latency[key, setting] for key in self.subjects if (key, setting) in self._latency]

    def ratio(self, key: str, baseline: str, setting: Setting, scope: Scope) -> RatioRecord | None:
        """One ratio."""
        return self._ratios.get((key, baseline, setting, scope))

    def plain_ratio(self, key: str, setting: Setting, scope: Scope) -> RatioRecord | None:
        """The ratio to the plain UNet pass of the subject's own model (with merged upsamplers, if it has them)."""
        plain = (baseline for baseline, subject in self.subjects.items() if subject.kind == "plain-unet")
        return next((ratio for one in plain if (ratio := self.ratio(key, one, setting, scope))), None)

    @cached_property
    def teachers(self) -> list[str]:
        """Keys of the many-step models that ratios refer to."""
        baselines = {ratio.baseline for ratio in self.report.ratios}
        return [key for key, subject in self.subjects.items() if subject.kind == "teacher" and key in baselines]

    @cached_property
    def metrics(self) -> list[str]:
        """Names of the quality metrics, known ones first."""
        found = dict.fromkeys(name for record in self.report.quality for name in record.metrics)
        return [name for name in METRIC_NAMES if name in found] + [name for name in found if name not in METRIC_NAMES]

    @cached_property
    def main_metrics(self) -> list[str]:
        """The few that say most, the checker's verdict beside the Fréchet distance."""
        checker = [name for name in self.metrics if name.startswith("checker_all")]
        ordered = [*MAIN_METRICS[:1], *checker, *MAIN_METRICS[1:]]
        return [name for name in ordered if name in self.metrics][:MAIN_METRIC_COUNT]

    @cached_property
    def _common_name(self) -> str | None:
        """The model's name before a comma, where all one-pass subjects are of one model: the title says it."""
        one_pass = [subject.label for subject in self.subjects.values() if subject.kind not in MANY_STEPS]
        names = {label.partition(", ")[0] for label in one_pass}
        return f"{names.pop()}, " if len(names) == 1 else None

    def label(self, key: str) -> str:
        """What to call a subject; the key itself where the report does not know it (``reference``)."""
        if key not in self.subjects:
            return key
        return self.subjects[key].label.removeprefix(self._common_name or "")

    # --- figures ---

    def floor_ms(self, record: LatencyRecord, stage: Stage | None = None) -> float | None:
        """What the counted FLOPs, of a stage or of all, take at the machine's peak; None where either is unknown."""
        peak, subject = self.report.peak, self.subjects[record.subject]
        flops = sum(record.flops.values()) if stage is None else record.flops.get(stage, 0.0)
        if peak is None or flops == 0 or (peak.precision, peak.device) != (subject.precision, subject.device):
            return None
        return 1000 * flops / peak.flops_per_s

    def share_of_peak(self, record: LatencyRecord, stage: Stage | None = None) -> float | None:
        """Floor over measured median, end to end or of a stage."""
        floor_ms = self.floor_ms(record, stage)
        samples = record.samples_ms if stage is None else record.stage_samples_ms.get(stage, ())
        median_ms = float(np.median(samples)) if samples else 0.0
        return None if floor_ms is None or median_ms == 0 else floor_ms / median_ms

    def summary(self, record: LatencyRecord) -> Summary:
        """Median, percentiles and spread of a record, in milliseconds."""
        return summarize(record.samples_ms)

    def stage_medians(self, record: LatencyRecord) -> dict[Stage, float]:
        """Milliseconds of each stage, in the order of the work."""
        samples = record.stage_samples_ms
        return {stage: float(np.median(samples[stage])) for stage in STAGE_NAMES if samples.get(stage)}

    def stage_parts(self, record: LatencyRecord) -> dict[Stage, float]:
        """The median divided among the stages by their mean shares of a run, in milliseconds; what is left is the rest.

        Medians of stages do not add up to the median of the whole; these do.
        """
        whole = np.asarray(record.samples_ms)
        shares = {
            stage: float(np.mean(np.asarray(record.stage_samples_ms[stage]) / whole))
            for stage in self.stage_medians(record)
            if len(record.stage_samples_ms[stage]) == len(whole) and whole.min() > 0
        }
        # Stages on another clock (CUDA events) may take a little more than the whole.
        scale = float(np.median(whole)) / max(1.0, sum(shares.values()))
        return {stage: share * scale for stage, share in shares.items()}

    def rest_ms(self, record: LatencyRecord) -> float | None:
        """What the whole takes beyond its stages (tokens, transfers, pixels): median over the runs, not below 0.

        None where the stages are unknown.
        """
        stages = [samples for samples in record.stage_samples_ms.values() if len(samples) == len(record.samples_ms)]
        if not stages:
            return None
        return max(0.0, float(np.median(np.asarray(record.samples_ms) - np.sum(stages, axis=0))))

    def images_per_s(self, record: LatencyRecord) -> float:
        """At the median."""
        return 1000 * record.batch / self.summary(record).median

    # --- what to take away ---

    @cached_property
    def headline_subject(self) -> str | None:
        """The student that the headline is about: of those with the most timesteps whose pictures are right, the
        fastest at the first setting. None where there is no student."""
        withheld = {ratio.subject for ratio in self.report.ratios if ratio.withheld}
        candidates = [
            (-subject.steps, self.summary(record).median, subject.key)
            for record in (self.records(self.settings[0]) if self.settings else ())
            if (subject := self.subjects[record.subject]).kind == "student"
            and (subject.parity is None or subject.parity.passed)
            and subject.key not in withheld
        ]
        return min(candidates)[2] if candidates else None

    def headlines(self) -> Iterator[Headline]:
        """Latency, speed-ups, UNet passes, throughput and quality of the headline's subject."""
        key = self.headline_subject
        if key is None:
            return
        setting = self.settings[0]
        summary = self.summary(self._latency[key, setting])
        yield Headline(
            f"{number(summary.median)} ms",
            f"for {'an image' if setting.batch == 1 else f'{setting.batch} images'}, prompt to pixels",
            f"median of {summary.count} runs; 90 % take at most {number(summary.p90)} ms",
        )
        yield from self._ratio_headlines(key, setting)
        records = [record for other in self.settings if (record := self.latency(key, other)) is not None]
        best = max(records, key=self.images_per_s)
        yield Headline(number(self.images_per_s(best)), "images a second at best", Setting.of(best).words)
        protocol, quality = self.report.quality_protocol, self.quality.get(key)
        if protocol is not None and quality is not None and "fid" in quality.metrics:
            comparable = "" if protocol.comparable else "; not comparable with published figures"
            detail = f"{protocol.images} images{comparable}"
            yield Headline(number(quality.metrics["fid"]), "Fréchet distance", detail)

    def _ratio_headlines(self, key: str, setting: Setting) -> Iterator[Headline]:
        """Ratios name both sides with what ran them. Those of one backend come first: what the method gives.

        The baselines run in torch. Where the fastest student is an export, the student that it was compared with
        stands for it; then come the export's own ratios, in which the runtime has its share.
        """
        parity = self.subjects[key].parity
        for subject in dict.fromkeys([key] if parity is None else [parity.reference, key]):
            for ratio in self.report.ratios:
                if ratio.subject != subject or Setting.of(ratio) != setting:
                    continue
                match ratio.scope, self.subjects[ratio.baseline].kind:
                    case "image", "teacher":
                        shown, what = as_speedup(ratio), "as fast"
                    case "unet", "plain-unet":
                        shown, what = as_multiple(ratio), "times the UNet time"
                    case _:
                        continue
                if shown.value is not None:
                    sides = f"{self.side(subject)} against {self.side(ratio.baseline)}"
                    detail = f"{100 * ratio.confidence:g} % interval: {shown.interval}"
                    yield Headline(f"{number(shown.value)}{shown.unit}", f"{what}: {sides}", detail)

    def side(self, key: str) -> str:
        """A side of a ratio: its label, and what ran it."""
        label, backend = self.label(key), BACKEND_NAMES[self.subjects[key].backend]
        return label if backend in label else f"{label}, {backend}"


@dataclass(frozen=True)
class Shown:
    """A ratio as it is shown: a speed-up, or a multiple of the baseline's time. ``None`` in all three: withheld."""

    value: float | None
    low: float | None
    high: float | None
    unit: str

    @property
    def interval(self) -> str:
        """E.g. ``2.58–2.64``; empty where there is none."""
        return "" if self.low is None or self.high is None else f"{number(self.low)}–{number(self.high)}"

    @property
    def text(self) -> str:
        """E.g. ``15.3× [15.1–15.5]``."""
        if self.value is None:
            return "withheld"
        return f"{number(self.value)}{self.unit}" + (f" [{self.interval}]" if self.interval else "")


def as_multiple(ratio: RatioRecord) -> Shown:
    """The baseline's time is 1: above 1 is slower."""
    return Shown(ratio.ratio, ratio.low, ratio.high, "")


def as_speedup(ratio: RatioRecord) -> Shown:
    """Upside down: above 1 is faster."""
    value, low, high = (
        1 / part if part is not None and part > 0 else None for part in (ratio.ratio, ratio.high, ratio.low)
    )
    return Shown(value, low, high, "×")
