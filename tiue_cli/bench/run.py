"""The whole bench: load, time in interleaved rounds, compare pictures, measure quality, and make it one report."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch

from tiue_cli import __version__
from tiue_cli.backends.torch_backend import choose_device
from tiue_cli.base.allocator import keep_freed_memory
from tiue_cli.base.events import Emit, Note, Progress
from tiue_cli.bench.config import BenchConfig
from tiue_cli.bench.measure.machine import machine_record, measure_peak, report_name, source_commit
from tiue_cli.bench.quality.drawing import Processes
from tiue_cli.bench.quality.measure import QualityMeasurement, QualityResult, quality_subjects
from tiue_cli.bench.quality.plan import QualityConfig, plan_quality
from tiue_cli.bench.ratios import all_ratios, quality_failures
from tiue_cli.bench.records import (
    Timings,
    control_samples,
    grid_record,
    latency_records,
    parities,
    parity_warnings,
    subject_records,
    timing_warnings,
)
from tiue_cli.bench.report.schema import BenchReport, PeakRecord
from tiue_cli.bench.rounds import BatchTiming, measure_batch
from tiue_cli.bench.subjects.opening import OpenedSubjects, open_subjects
from tiue_cli.bench.subjects.subject import Subject
from tiue_cli.errors import TiueError, UsageError
from tiue_cli.generate.prompts import read_prompts
from tiue_cli.model.noise import draw_noise
from tiue_cli.papercut.captions import random_specs

INTERRUPTED = "interrupted: fewer rounds, batches or figures than the command asks for"

QUALITY_CACHE = ".quality"
"""In the report's folder: features of what is drawn, for a run that was interrupted; removed when all is measured."""


def run_bench(
    config: BenchConfig, *, emit: Emit, keep: Callable[[BenchReport], object] | None = None
) -> BenchReport | None:
    """Measure what ``config`` asks for; the report is not written. None in all but the first of several processes.

    Where Ctrl-C (KeyboardInterrupt), a signal (SystemExit) or an error (TiueError) ends it early, ``keep`` gets a
    report of the rounds that were measured, if there are any, before that goes on. Raises what loading and running
    raise, UsageError for what does not fit together.
    """
    config.validate()
    processes = Processes()
    if processes.count > 1 and config.latency:
        raise UsageError(
            f"{processes.count} processes would disturb each other's timing",
            hint="measure quality alone with several: --quality --no-latency",
        )
    prompts = bench_prompts(config)
    quality = _quality_config(config) if config.quality else None
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if choose_device(config.device) == "cpu":
        # As in a process that goes on drawing; else it is chance which subject pays for fresh pages.
        keep_freed_memory()
    with ExitStack() as stack:
        opened = open_subjects(config, stack, say=lambda text: emit(Progress("loading", 0, 1, text)))
        emit(Progress("loading", 1, 1))
        for text in opened.notes:
            emit(Note(text))
        peak = measure_peak(opened.device, opened.precision) if config.latency else None
        timings: dict[int, BatchTiming] = {}
        measure = None if quality is None else _prepared(quality, opened, processes, emit)
        try:
            if config.latency:
                _time(config, opened, prompts, emit, timings)
            result = None if measure is None else measure()
        except (KeyboardInterrupt, SystemExit, TiueError):
            report = _report(config, opened, prompts, timings, peak=peak, result=None, interrupted=True)
            if keep is not None and report.latency and processes.is_main:
                keep(report)
            raise
        if not processes.is_main:
            return None
        return _report(config, opened, prompts, timings, peak=peak, result=result)


def _report(
    config: BenchConfig,
    opened: OpenedSubjects,
    prompts: Sequence[str],
    timings: Timings,
    *,
    peak: PeakRecord | None,
    result: QualityResult | None,
    interrupted: bool = False,
) -> BenchReport:
    parity = parities(opened, timings)
    records = subject_records(opened, timings, parity)
    latency = latency_records(opened, timings)
    machine = machine_record(opened.device)
    quality = () if result is None else result.records
    failures = quality_failures(opened.subjects, quality)
    created = datetime.datetime.now(datetime.UTC)
    warnings = [*opened.warnings, *timing_warnings(opened, timings), *parity_warnings(records)]
    return BenchReport(
        name=report_name(opened.names, machine.name, created, random_weights=config.random_weights),
        created=created.isoformat(timespec="seconds"),
        command=config.command,
        tiue_version=__version__,
        commit=source_commit(),
        seed=config.seed,
        prompts=tuple(prompts),
        machine=machine,
        peak=peak,
        subjects=records,
        latency=latency,
        ratios=all_ratios(opened.subjects, latency, parity, failures, seed=config.seed),
        control_samples_ms=control_samples(timings),
        quality_protocol=None if result is None else result.protocol,
        quality=quality,
        grid=grid_record(opened, timings, prompts, keys=_picture_keys(opened), seed=config.seed),
        interrupted=interrupted,
        warnings=(*([INTERRUPTED] if interrupted else []), *warnings),
    )


def bench_prompts(config: BenchConfig) -> list[str]:
    """One prompt for each image of the largest batch: the file's, over and over, or papercut's scenes."""
    count = max(config.batches)
    if config.prompts is None:
        return [spec.caption for spec in random_specs(count, config.seed)]
    rows = read_prompts(config.prompts)
    return [rows[index % len(rows)].prompt for index in range(count)]


def _time(
    config: BenchConfig, opened: OpenedSubjects, prompts: Sequence[str], emit: Emit, timings: dict[int, BatchTiming]
) -> None:
    """Fill ``timings``, so that an interruption leaves there what was measured."""
    for batch in config.batches:
        timings[batch] = timing = measure_batch(
            opened.subjects,
            prompts[:batch],
            draw_noise(range(config.seed, config.seed + batch), opened.latent),
            device=opened.device,
            duration_s=config.duration_s,
            seed=config.seed,
            progress=lambda stage, done, total, detail: emit(Progress(stage, done, total, detail)),
        )
        if timing.stopped_by is not None:
            raise timing.stopped_by


# --- quality -------------------------------------------------------------------------------------------------------


def _quality_config(config: BenchConfig) -> QualityConfig:
    """Checked before anything is loaded. Raises UsageError, PromptError."""
    quality = QualityConfig(
        cache=config.out / QUALITY_CACHE,
        prompts=config.prompts,
        images=config.images,
        seeds=tuple(config.seed + number * 2**32 for number in range(config.repetitions)),
        reference=config.reference,
        extractor=config.extractor,
        clip=config.clip,
        resize=config.resize,
        keep_images=config.keep_images,
    )
    plan_quality(quality)
    return quality


def _prepared(
    quality: QualityConfig, opened: OpenedSubjects, processes: Processes, emit: Emit
) -> Callable[[], QualityResult | None]:
    """What measures quality; the reference is read here, so that a fault in it costs no hours of timing."""
    subjects = quality_subjects(_with_pictures(opened), size=opened.size, latent_shape=opened.latent)
    measurement = QualityMeasurement(quality, processes=processes, emit=emit)
    measurement.prepare(subjects)

    def measure() -> QualityResult | None:
        result = measurement.measure_all(subjects)
        if processes.is_main:
            shutil.rmtree(quality.cache, ignore_errors=True)
        return result

    return measure


def _with_pictures(opened: OpenedSubjects) -> list[Subject]:
    """Who is worth looking at: of a teacher the first of its numbers of steps, as each costs what all students do."""
    seen: set[str] = set()
    found = []
    for subject in opened.subjects:
        if subject.record.kind != "teacher" or subject.record.model not in seen:
            found.append(subject)
        if subject.record.kind == "teacher":
            seen.add(subject.record.model)
    return found


def _picture_keys(opened: OpenedSubjects) -> list[str]:
    """Columns of the grid."""
    shown = [subject for subject in _with_pictures(opened) if not subject.record.random_weights]
    return [subject.key for subject in quality_subjects(shown, size=opened.size, latent_shape=opened.latent)]
