"""From what was measured to what a report keeps, and what its reader must be warned of."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tiue_cli.bench.measure.machine import machine_warnings
from tiue_cli.bench.ratios import compare_images
from tiue_cli.bench.report.schema import GridRecord, LatencyRecord, ParityRecord, SubjectRecord
from tiue_cli.bench.report.view import REFERENCE
from tiue_cli.bench.rounds import SLOW_ROUNDS, SLOW_S, BatchTiming
from tiue_cli.bench.stats import OUTLIER_FACTOR, summarize
from tiue_cli.bench.subjects.opening import OpenedSubjects
from tiue_cli.files.sheet import ContactSheet
from tiue_cli.papercut.captions import SceneSpec
from tiue_cli.papercut.scenes import SIZE, render

MANY_OUTLIERS: Final = 0.1
"""Share of a subject's runs: more of them are said."""
GRID_ROWS: Final = 6
GRID_GAP_PX: Final = 2
MAX_CELL_PX: Final = 192
"""Longer side of a picture in the grid; larger ones are scaled down, smaller ones stay."""

Timings = Mapping[int, BatchTiming]
"""By batch."""


def parities(opened: OpenedSubjects, timings: Timings) -> dict[str, ParityRecord]:
    """Of every subject that has a reference, over all batches."""
    found = {}
    for subject in opened.subjects:
        if subject.reference is not None and timings:
            pairs = [
                (timing.measured[subject.key].images, timing.measured[subject.reference].images)
                for timing in timings.values()
            ]
            found[subject.key] = compare_images(pairs, reference=subject.reference, precision=subject.record.precision)
    return found


def subject_records(
    opened: OpenedSubjects, timings: Timings, parity: Mapping[str, ParityRecord]
) -> tuple[SubjectRecord, ...]:
    """Every subject's record with what became known on the way: its build time and its parity."""
    records = []
    for subject in opened.subjects:
        built = [subject.record.build_s, *(timing.measured[subject.key].build_s for timing in timings.values())]
        seconds = [value for value in built if value is not None]
        update = {"build_s": sum(seconds) if seconds else None, "parity": parity.get(subject.key)}
        records.append(subject.record.model_copy(update=update))
    return tuple(records)


def latency_records(opened: OpenedSubjects, timings: Timings) -> tuple[LatencyRecord, ...]:
    """The samples of every subject that was timed, at every batch."""
    records = []
    for subject in opened.subjects:
        for batch, timing in timings.items():
            measured = timing.measured[subject.key]
            if len(measured.samples_ms) < SLOW_ROUNDS:  # not timed, or interrupted before
                continue
            records.append(
                LatencyRecord(
                    subject=subject.key,
                    batch=batch,
                    size=opened.size,
                    first_call_ms=measured.first_call_ms,
                    warm_up=measured.warm_up,
                    clock=subject.clock.kind,
                    samples_ms=tuple(measured.samples_ms),
                    rounds=tuple(measured.rounds),
                    stage_samples_ms={stage: tuple(values) for stage, values in measured.stage_samples_ms.items()},
                    flops=subject.flops(batch),
                    peak_memory_bytes=measured.memory.peak_bytes,
                    memory_kind=measured.memory.kind,
                    driver_memory_bytes=measured.memory.driver_bytes,
                )
            )
    return tuple(records)


def control_samples(timings: Timings) -> tuple[float, ...]:
    """The control product of every round, in order."""
    return tuple(value for timing in timings.values() for value in timing.control_ms)


def grid_record(
    opened: OpenedSubjects, timings: Timings, prompts: Sequence[str], *, keys: Sequence[str], seed: int
) -> GridRecord | None:
    """The pictures of the largest batch, side by side, of the subjects ``keys``; None where there are none.

    Prompts in papercut's language have a rendered scene in front, at papercut's size.
    """
    if not timings or not keys:
        return None
    measured = timings[max(timings)].measured
    rows = min(max(timings), GRID_ROWS)
    columns: dict[str, NDArray[np.uint8]] = {key: measured[key].images[:rows] for key in keys}
    specs = [SceneSpec.parse(prompt) for prompt in prompts[:rows]]
    scenes = [spec for spec in specs if spec is not None]
    if len(scenes) == rows and opened.size == (SIZE, SIZE):
        columns = {REFERENCE: render(scenes, seed), **columns}
    return picture_grid(columns, prompts[:rows], range(seed, seed + rows))


def picture_grid(columns: Mapping[str, NDArray[np.uint8]], prompts: Sequence[str], seeds: Sequence[int]) -> GridRecord:
    """Pictures (rows, H, W, 3) by the key of their column, GRID_GAP_PX apart on white without a border.

    A cell's place follows from ``cell``; pictures of more than MAX_CELL_PX are scaled down.
    """
    sizes = [picture.shape[:2] for column in columns.values() for picture in column]
    sheet = ContactSheet(
        sizes, columns=len(columns), gap_px=GRID_GAP_PX, border_px=0, paper=255, largest_cell_px=MAX_CELL_PX
    )
    for number, column in enumerate(columns.values()):
        for row, picture in enumerate(column):
            sheet.place(row * len(columns) + number, picture)
    png = io.BytesIO()
    Image.fromarray(sheet.pixels).save(png, format="PNG", optimize=True)
    return GridRecord(
        columns=tuple(columns),
        prompts=tuple(prompts),
        seeds=tuple(seeds),
        png_base64=base64.b64encode(png.getvalue()).decode("ascii"),
        cell=sheet.cell,
    )


# --- warnings ------------------------------------------------------------------------------------------------------


def timing_warnings(opened: OpenedSubjects, timings: Timings) -> list[str]:
    """What made the figures of a batch less believable than they look."""
    found = []
    labels = {subject.key: subject.record.label for subject in opened.subjects}
    for batch, timing in timings.items():
        found += machine_warnings(timing.use, timing.control_ms, where=f"batch {batch}")
        timed = {key: measured for key, measured in timing.measured.items() if measured.samples_ms}
        if not timed:
            continue
        shares = {key: summarize(measured.samples_ms).outlier_share for key, measured in timed.items()}
        worst = max(shares, key=lambda key: shares[key])
        many = sum(share > MANY_OUTLIERS for share in shares.values())
        if many:
            found.append(
                f"batch {batch}: of {many} subject{'' if many == 1 else 's'} more than {MANY_OUTLIERS:.0%} of the runs"
                f" took over {OUTLIER_FACTOR:g} times their median; {shares[worst]:.0%} of {labels[worst]}"
            )
        slow = [labels[key] for key, measured in timed.items() if len(measured.samples_ms) <= SLOW_ROUNDS]
        if slow and timing.stopped_by is None:
            found.append(
                f"batch {batch}: {SLOW_ROUNDS} samples only, as a run takes over {SLOW_S:.0f} s, of {'; '.join(slow)}"
            )
    return found


def parity_warnings(records: Sequence[SubjectRecord]) -> list[str]:
    """Subjects that draw other pictures than they should."""
    return [
        f"{record.label}: its pictures are not those of {record.parity.reference}; no ratio is given for it"
        for record in records
        if record.parity is not None and not record.parity.passed
    ]
