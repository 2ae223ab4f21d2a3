"""The whole bench: load, time in interleaved rounds, compare pictures, and put it all into one report."""

from __future__ import annotations

import datetime
import re
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import torch

from tiue_cli import __version__
from tiue_cli.bench.config import BenchConfig
from tiue_cli.bench.events import Emit, Note, Progress
from tiue_cli.bench.lineup import Lineup, open_lineup
from tiue_cli.bench.machine_state import machine_warnings
from tiue_cli.bench.parity import compare_images
from tiue_cli.bench.peak import measure_peak
from tiue_cli.bench.ratios import all_ratios
from tiue_cli.bench.schema import BenchReport, LatencyRecord, MachineRecord, ParityRecord, SubjectRecord
from tiue_cli.bench.stats import OUTLIER_FACTOR, summarize
from tiue_cli.bench.subjects import Subject
from tiue_cli.bench.timing import SLOW_ROUNDS, SLOW_S, BatchTiming, Measured, measure_batch
from tiue_cli.machine import machine_info, package_version
from tiue_cli.noise import draw_noise
from tiue_cli.papercut.captions import random_specs
from tiue_cli.prompts import read_prompts

PACKAGES: Final = ("onnxruntime-gpu", "onnxruntime", "tensorrt", "accelerate", "torchmetrics")
"""Whose versions a bench shows beside those that can change a picture."""

MANY_OUTLIERS: Final = 0.1
"""Share of a subject's runs: more of them are said."""


def run_bench(config: BenchConfig, *, emit: Emit) -> BenchReport:
    """Measure what ``config`` asks for. Raises what loading and running raise; nothing is written."""
    config.validate()
    prompts = bench_prompts(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with ExitStack() as stack:
        lineup = open_lineup(config, stack, say=lambda text: emit(Progress("loading", 0, 1, text)))
        emit(Progress("loading", 1, 1))
        for text in (*lineup.warnings, *lineup.notes):
            emit(Note(text))
        peak = measure_peak(lineup.device, lineup.precision)
        timings = {}
        for batch in config.batches:
            timings[batch] = measure_batch(
                lineup.subjects,
                prompts[:batch],
                draw_noise(range(config.seed, config.seed + batch), lineup.latent),
                device=lineup.device,
                duration_s=config.duration_s,
                seed=config.seed,
                progress=lambda stage, done, total, detail: emit(Progress(stage, done, total, detail)),
            )
        parities = _parities(lineup, timings)
        records = _subject_records(lineup, timings, parities)
        latency = [_latency(subject, timings, batch, lineup) for subject in lineup.subjects for batch in timings]
    warnings = [*lineup.warnings, *_timing_warnings(lineup, timings), *_parity_warnings(records)]
    for warning in warnings[len(lineup.warnings) :]:
        emit(Note(warning))
    machine = _machine()
    created = datetime.datetime.now(datetime.UTC)
    kept = [record for record in latency if record is not None]
    return BenchReport(
        name=report_name(config, machine.name, created),
        created=created.isoformat(timespec="seconds"),
        command=config.command,
        tiue_version=__version__,
        commit=_commit(),
        seed=config.seed,
        prompts=tuple(prompts),
        machine=machine,
        peak=peak,
        subjects=records,
        latency=tuple(kept),
        ratios=all_ratios(lineup.subjects, kept, parities, seed=config.seed),
        control_samples_ms=tuple(value for timing in timings.values() for value in timing.control_ms),
        warnings=tuple(warnings),
    )


def bench_prompts(config: BenchConfig) -> list[str]:
    """One prompt for each image of the largest batch: the file's, over and over, or papercut's scenes."""
    count = max(config.batches)
    if config.prompts is None:
        return [spec.caption for spec in random_specs(count, config.seed)]
    rows = read_prompts(config.prompts)
    return [rows[index % len(rows)].prompt for index in range(count)]


def report_name(config: BenchConfig, machine: str, created: datetime.datetime) -> str:
    """``<model>_<machine>_<date>``, in letters that every file system takes."""
    models = "+".join(_slug(Path(model).name or model) for model in config.models)
    if config.random_weights:
        models += "-random"
    return f"{models[:80]}_{machine}_{created:%Y-%m-%d}"


# --- from samples to records ---------------------------------------------------------------------------------------


def _parities(lineup: Lineup, timings: Mapping[int, BatchTiming]) -> dict[str, ParityRecord]:
    """Of every subject that has a reference, over all batches."""
    found = {}
    for subject in lineup.subjects:
        if subject.reference is not None:
            pairs = [
                (timing.measured[subject.key].images, timing.measured[subject.reference].images)
                for timing in timings.values()
                if subject.key in timing.measured
            ]
            found[subject.key] = compare_images(pairs, reference=subject.reference, precision=lineup.precision)
    return found


def _subject_records(
    lineup: Lineup, timings: Mapping[int, BatchTiming], parities: Mapping[str, ParityRecord]
) -> tuple[SubjectRecord, ...]:
    records = []
    for subject in lineup.subjects:
        built = [timing.measured[subject.key].build_s for timing in timings.values() if subject.key in timing.measured]
        seconds = [value for value in (subject.record.build_s, *built) if value is not None]
        update = {"build_s": sum(seconds) if seconds else None, "parity": parities.get(subject.key)}
        records.append(subject.record.model_copy(update=update))
    return tuple(records)


def _latency(subject: Subject, timings: Mapping[int, BatchTiming], batch: int, lineup: Lineup) -> LatencyRecord | None:
    """None for what served as a reference only."""
    measured: Measured | None = timings[batch].measured.get(subject.key)
    if measured is None or not measured.samples_ms:
        return None
    return LatencyRecord(
        subject=subject.key,
        batch=batch,
        size=lineup.size,
        first_call_ms=measured.first_call_ms,
        warm_up=measured.warm_up,
        clock=subject.clock_kind,
        samples_ms=tuple(measured.samples_ms),
        rounds=tuple(measured.rounds),
        stage_samples_ms={stage: tuple(values) for stage, values in measured.stage_samples_ms.items()},
        flops=subject.flops(batch),
        peak_memory_bytes=measured.memory.peak_bytes,
        memory_kind=measured.memory.kind,
        driver_memory_bytes=measured.memory.driver_bytes,
    )


# --- warnings ------------------------------------------------------------------------------------------------------


def _timing_warnings(lineup: Lineup, timings: Mapping[int, BatchTiming]) -> list[str]:
    found = []
    labels = {subject.key: subject.record.label for subject in lineup.subjects}
    for batch, timing in timings.items():
        found += machine_warnings(timing.use, timing.control_ms, where=f"batch {batch}")
        timed = {key: measured for key, measured in timing.measured.items() if measured.samples_ms}
        shares = {key: summarize(measured.samples_ms).outlier_share for key, measured in timed.items()}
        worst = max(shares, key=lambda key: shares[key])
        many = sum(share > MANY_OUTLIERS for share in shares.values())
        if many:
            found.append(
                f"batch {batch}: of {many} subjects more than {MANY_OUTLIERS:.0%} of the runs took over"
                f" {OUTLIER_FACTOR:g} times their median; {shares[worst]:.0%} of {labels[worst]}"
            )
        slow = [labels[key] for key, measured in timed.items() if len(measured.samples_ms) <= SLOW_ROUNDS]
        if slow:
            found.append(
                f"batch {batch}: {SLOW_ROUNDS} samples only, as a run takes over {SLOW_S:.0f} s, of {'; '.join(slow)}"
            )
    return found


def _parity_warnings(records: Sequence[SubjectRecord]) -> list[str]:
    return [
        f"{record.label}: its pictures are not those of {record.parity.reference}"
        f" ({parity_text(record.parity)}); no ratio is given for it"
        for record in records
        if record.parity is not None and not record.parity.passed
    ]


def parity_text(parity: ParityRecord) -> str:
    """E.g. ``42.0 dB, and 60 are needed``."""
    if parity.psnr_db is None:
        return "equal, but of one colour only"
    return f"PSNR {parity.psnr_db:.1f} dB, and {parity.required_db:.0f} are needed"


# --- where it ran --------------------------------------------------------------------------------------------------


def _machine() -> MachineRecord:
    info = machine_info()
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    extra = {name: package_version(name) for name in PACKAGES}
    return MachineRecord(
        name=_slug(gpu) if gpu is not None else f"{_slug(_short_cpu(info.cpu))}-{info.cores}-cores",
        system=info.system,
        cpu=info.cpu,
        cores=info.cores,
        threads=torch.get_num_threads(),
        memory_bytes=info.memory_bytes,
        gpu=gpu,
        driver=info.gpus[0].driver if info.gpus else None,
        python=info.python,
        packages={**info.packages, **{name: version for name, version in extra.items() if version is not None}},
    )


def _short_cpu(name: str) -> str:
    """``Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz`` → ``intel xeon platinum 8481c``."""
    bare = re.sub(r"\((R|TM|r|tm)\)|\bCPU\b|\bProcessor\b|@.*$|\d+-Core", " ", name)
    return " ".join(bare.split()[:4])


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "model"


def _commit() -> str | None:
    """The commit of the source tree that runs, with ``+`` where it was changed; None outside of one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", "tiue_cli")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}+" if changed else head


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=15)
    return done.stdout.strip()
