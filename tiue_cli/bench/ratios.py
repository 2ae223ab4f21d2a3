"""How many times faster or slower: ratios to the teacher and to one plain UNet pass, with intervals, or not at all.

The baselines are every teacher that was measured, at each of its numbers of steps, and the plain UNet pass of the
subject's own model, with merged upsamplers where the subject has them. A subject whose pictures are not its
reference's gets no figure: being wrong fast is no speed. Nor is it a speed-up over a teacher whose pictures it does not
come near.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from tiue_cli.bench.report.schema import UNET_STAGES, LatencyRecord, ParityRecord, QualityRecord, RatioRecord, Scope
from tiue_cli.bench.rounds import SLOW_ROUNDS
from tiue_cli.bench.stats import ratio_of_medians
from tiue_cli.bench.subjects.subject import Subject
from tiue_cli.export.tolerance import IDENTICAL_DB, REQUIRED_PSNR_DB, psnr_db

LEAST_QUALITY: Final = 0.5
"""Share of its teacher's precision and coverage that a student must reach for a speed-up over it to be given."""
JUDGED: Final = ("precision", "coverage")
"""Whether its pictures look like real ones, and whether they are of all kinds."""


def quality_failures(subjects: Sequence[Subject], records: Sequence[QualityRecord]) -> dict[str, str]:
    """Why subjects are no substitute for their teacher, by key: only where both were measured.

    A subject that only draws another's pictures in another way shares that one's verdict.
    """
    metrics = {record.subject: record.metrics for record in records}
    teacher = next((one for one in subjects if one.record.kind == "teacher" and one.key in metrics), None)
    if teacher is None:
        return {}
    found = {}
    for subject in subjects:
        own = metrics.get(subject.reference or subject.key)
        if own is None or subject.record.kind == "teacher":
            continue
        for name in JUDGED:
            needed = LEAST_QUALITY * metrics[teacher.key].get(name, 0.0)
            if own.get(name, needed) < needed:
                found[subject.key] = (
                    f"its pictures did not pass: {name} {own[name]:.2f}, and {metrics[teacher.key][name]:.2f} of"
                    f" {teacher.record.label}"
                )
    return found


def all_ratios(
    subjects: Sequence[Subject],
    latency: Sequence[LatencyRecord],
    parities: Mapping[str, ParityRecord],
    failures: Mapping[str, str],
    *,
    seed: int,
) -> tuple[RatioRecord, ...]:
    """Ratios of every subject at every batch, prompt to pixels and of the UNet's stages alone.

    ``failures`` are of quality: they speak against a teacher's replacement, not against a cost in UNet passes.
    """
    found = []
    by_key = {(record.subject, record.batch): record for record in latency}
    teachers = [subject.key for subject in subjects if subject.record.kind == "teacher"]
    for subject in subjects:
        baselines = [] if subject.record.kind == "teacher" else list(teachers)
        if subject.plain_pass is not None:
            baselines.append(subject.plain_pass)
        wrong = _reason(subject, parities)
        for batch in sorted({record.batch for record in latency}):
            record = by_key.get((subject.key, batch))
            for baseline in baselines:
                against = by_key.get((baseline, batch))
                withheld = wrong or (failures.get(subject.key) if baseline in teachers else None)
                if record is not None and against is not None:
                    found += _ratios(record, against, withheld=withheld, seed=seed)
    return tuple(found)


def _reason(subject: Subject, parities: Mapping[str, ParityRecord]) -> str | None:
    parity = parities.get(subject.key)
    if parity is None:
        return subject.unverified
    if parity.passed:
        return None
    if parity.psnr_db is None:
        return f"its pictures have one colour only, so that they show nothing of {parity.reference}"
    return (
        f"its pictures are not those of {parity.reference}: PSNR {parity.psnr_db:.1f} dB,"
        f" and {parity.required_db:.0f} are needed"
    )


def _ratios(record: LatencyRecord, baseline: LatencyRecord, *, withheld: str | None, seed: int) -> list[RatioRecord]:
    found = []
    for scope in ("image", "unet"):
        pair = _paired(record, baseline, scope)
        if pair is None or len(pair[0]) < SLOW_ROUNDS:
            continue
        interval = None if withheld is not None else ratio_of_medians(*pair, seed=seed)
        found.append(
            RatioRecord(
                subject=record.subject,
                baseline=baseline.subject,
                batch=record.batch,
                size=record.size,
                scope=scope,
                ratio=None if interval is None else interval.value,
                low=None if interval is None else interval.low,
                high=None if interval is None else interval.high,
                withheld=withheld,
            )
        )
    return found


def _paired(record: LatencyRecord, baseline: LatencyRecord, scope: Scope) -> tuple[list[float], list[float]] | None:
    """Samples of the rounds that both took part in; None where one has no times of its UNet."""
    both = [_by_round(record, scope), _by_round(baseline, scope)]
    if not all(both):
        return None
    rounds = sorted(both[0].keys() & both[1].keys())
    return [both[0][index] for index in rounds], [both[1][index] for index in rounds]


def _by_round(record: LatencyRecord, scope: Scope) -> dict[int, float]:
    samples: Sequence[float] = record.samples_ms
    if scope == "unet":
        stages = [record.stage_samples_ms[stage] for stage in UNET_STAGES if stage in record.stage_samples_ms]
        samples = [sum(values) for values in zip(*stages, strict=True)]
    rounds = record.rounds or tuple(range(len(samples)))
    return dict(zip(rounds, samples, strict=False))


REQUIRED_DB: Final[dict[str, float]] = {
    "fp32": REQUIRED_PSNR_DB["fp32"],
    "fp16": REQUIRED_PSNR_DB["fp16"],
    "bf16": REQUIRED_PSNR_DB["fp16"],
    "int8": REQUIRED_PSNR_DB["int8"],
}
"""The export's bars; bf16 has fewer digits than fp16 and is held to the same."""


def compare_images(pairs: Sequence[tuple[np.ndarray, np.ndarray]], *, reference: str, precision: str) -> ParityRecord:
    """The worst picture of all batches; each pair holds (B, H, W, 3) uint8 of the subject and of its reference.

    A picture of one colour only shows nothing, and does not pass.
    """
    worst_db, passed = IDENTICAL_DB, True
    for images, expected in pairs:
        if images.shape != expected.shape:
            return ParityRecord(reference=reference, psnr_db=0.0, required_db=REQUIRED_DB[precision], passed=False)
        for image, wanted in zip(images, expected, strict=True):
            worst_db = min(worst_db, psnr_db(image, wanted))
            passed = passed and image.std() > 0
    return ParityRecord(
        reference=reference,
        psnr_db=None if worst_db >= IDENTICAL_DB else worst_db,
        required_db=REQUIRED_DB[precision],
        passed=passed and worst_db >= REQUIRED_DB[precision],
    )
