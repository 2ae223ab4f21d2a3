"""Plots with a row for each subject: latency by stage, ratios, and every run."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from tiue_cli.bench.report.plot_frame import (
    Plot,
    Width,
    bar_thickness,
    batch_words,
    make_plot,
    name_rows,
    panels_of,
    paper_box,
    plain_log_ticks,
    row_offset,
    rows_height_px,
    slug,
    thousands,
)
from tiue_cli.bench.report.schema import LatencyRecord, RatioRecord
from tiue_cli.bench.report.svg import colour
from tiue_cli.bench.report.view import MANY_STEPS, STAGE_NAMES, Place, ReportView, as_multiple, as_speedup
from tiue_cli.text import number, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MUCH_LONGER: Final = 3.0
"""Subjects that take so many times as long get a panel with a scale of their own."""
NEAR_ONE: Final = 5.0
"""Ratios below this (and above its inverse) are seen against 1."""
STRIP_POINTS: Final = 150


# --- latency by stage ----------------------------------------------------------------------------------------------


def stage_plot(view: ReportView, place: Place) -> Plot | None:
    """Medians of the stages as stacked bars; what takes many steps has a panel and a scale of its own."""
    records = view.records(place)
    if not records:
        return None
    groups = _by_scale(view, records)

    def draw(figure: Figure, width: Width) -> None:
        panels = panels_of(figure, [len(group) for _, group in groups])
        for axes, (title, group) in zip(panels, groups, strict=True):
            axes.set_title(title)
            _stage_bars(view, axes, group, width)
        panels[-1].set_xlabel(batch_words(place, "median time"))
        _stage_legend(view, figure, records, width)

    return make_plot(
        f"stages-{slug(place)}",
        f"Latency by stage, {place.words}",
        "Median wall clock, prompts to pixels, divided by the stages' mean shares."
        + (" The two panels have different scales." if len(groups) > 1 else ""),
        lambda width: rows_height_px(
            [[view.label(record.subject) for record in group] for _, group in groups],
            width,
            extra_px=24 if width == "wide" else 44,
        ),
        draw,
    )


def _by_scale(view: ReportView, records: Sequence[LatencyRecord]) -> list[tuple[str, list[LatencyRecord]]]:
    many = [record for record in records if view.subjects[record.subject].kind in MANY_STEPS]
    few = [record for record in records if view.subjects[record.subject].kind not in MANY_STEPS]
    if not many or not few:
        return [("", list(records))]
    longest = [max(view.summary(record).median for record in group) for group in (few, many)]
    if longest[1] < MUCH_LONGER * longest[0]:
        return [("", list(records))]
    return [("One pass", few), ("Many steps (another scale)", many)]


def _stage_bars(view: ReportView, axes: Axes, records: Sequence[LatencyRecord], width: Width) -> None:
    name_rows(axes, [view.label(record.subject) for record in records], width)
    for row, record in enumerate(records):
        y, left = row + row_offset(width), 0.0
        median_ms = view.summary(record).median
        for stage, stage_ms in view.stage_parts(record).items():
            axes.barh(y, stage_ms, bar_thickness(width), left=left, color=colour(stage), linewidth=0)
            left += stage_ms
        if median_ms > left:
            axes.barh(y, median_ms - left, bar_thickness(width), left=left, color=colour("rest"), linewidth=0)
        axes.annotate(f"{number(median_ms)} ms", (median_ms, y), (5, 0), textcoords="offset points", va="center")
    longest = max(view.summary(record).median for record in records)
    axes.set_xlim(0, longest * (1.14 if width == "wide" else 1.3))
    thousands(axes.xaxis)


def _stage_legend(view: ReportView, figure: Figure, records: Sequence[LatencyRecord], width: Width) -> None:
    from matplotlib.patches import Patch

    medians = [view.stage_medians(record) for record in records]
    used = [stage for stage in STAGE_NAMES if any(stage in stages for stages in medians)]
    handles = [Patch(color=colour(stage), label=STAGE_NAMES[stage]) for stage in used]
    handles.append(Patch(color=colour("rest"), label="rest" if used else "whole"))
    columns = len(handles) if width == "wide" else 3
    figure.legend(
        handles=handles, loc="outside upper left", ncols=columns, handlelength=0.9, columnspacing=1.2, borderaxespad=0
    )


# --- ratios --------------------------------------------------------------------------------------------------------


def ratio_plot(view: ReportView, place: Place) -> Plot | None:
    """Speed-ups over each teacher, and UNet times in plain UNet passes: dots with their intervals."""
    panels: list[tuple[str, str, list[RatioRecord]]] = []
    for teacher in view.teachers:
        ratios = [view.ratio(key, teacher, place, "image") for key in view.subjects]
        panels.append((f"Whole image: times as fast as {plain(view.label(teacher))}", "speed", _given(ratios)))
    plain_ratios = [view.plain_ratio(key, place, "unet") for key in view.subjects]
    panels.append(("UNet alone: time in plain UNet passes", "passes", _given(plain_ratios)))
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return None

    def draw(figure: Figure, width: Width) -> None:
        for axes, (title, form, ratios) in zip(panels_of(figure, [len(p[2]) for p in panels]), panels, strict=True):
            axes.set_title("\n".join(textwrap.wrap(title, 100 if width == "wide" else 44)))
            _ratio_rows(view, axes, ratios, form, width)

    confidence = max(ratio.confidence for _, _, ratios in panels for ratio in ratios)
    return make_plot(
        f"ratios-{slug(place)}",
        f"Ratios, {place.words}",
        f"Ratios of medians with {100 * confidence:g} % intervals (bootstrap over paired rounds); logarithmic axes. "
        "Where 1 is near, a line marks it: there both take the same time.",
        lambda width: rows_height_px(
            [[view.label(ratio.subject) for ratio in ratios] for _, _, ratios in panels], width, extra_px=8
        ),
        draw,
    )


def _given(ratios: Sequence[RatioRecord | None]) -> list[RatioRecord]:
    return [ratio for ratio in ratios if ratio is not None]


def _ratio_rows(view: ReportView, axes: Axes, ratios: Sequence[RatioRecord], form: str, width: Width) -> None:
    name_rows(axes, [view.label(ratio.subject) for ratio in ratios], width)
    shown = [as_speedup(ratio) if form == "speed" else as_multiple(ratio) for ratio in ratios]
    values = [value for item in shown for value in (item.value, item.low, item.high) if value is not None]
    axes.set_xscale("log")
    low, high = (min(values), max(values)) if values else (0.5, 2.0)
    if low < NEAR_ONE and high > 1 / NEAR_ONE:
        low, high = min(low, 1.0), max(high, 1.0)
        axes.axvline(1.0, color=colour("muted"), linewidth=1, zorder=1)
    room = (high / low) ** (0.42 if width == "wide" else 0.6)
    axes.set_xlim(low / max((high / low) ** 0.04, 1.05), high * max(room, 1.6))
    unit = "×" if form == "speed" else ""
    for row, (ratio, item) in enumerate(zip(ratios, shown, strict=True)):
        y = row + row_offset(width)
        if item.value is None:
            axes.annotate(
                "withheld: the reason is in the table", (0, y), (4, 0), xycoords=axes.get_yaxis_transform(),
                textcoords="offset points", va="center", color=colour("muted"), style="italic", bbox=paper_box(),
            )  # fmt: skip
            continue
        ink = colour(view.subjects[ratio.subject].kind)
        if item.low is not None and item.high is not None:
            axes.plot([item.low, item.high], [y, y], "|-", color=ink, linewidth=2, markersize=11, zorder=2)
        axes.plot(item.value, y, "o", color=ink, markersize=5.5, zorder=3)
        text = f"{number(item.value)}{unit}" + (f"  [{item.interval}]" if item.interval else "")
        end = item.value if item.high is None else item.high
        axes.annotate(text, (end, y), (8, 0), textcoords="offset points", va="center", bbox=paper_box(), zorder=2)
    plain_log_ticks(axes.xaxis, low, high, unit=unit)


# --- raw samples ---------------------------------------------------------------------------------------------------


def spread_plot(view: ReportView, place: Place) -> Plot | None:
    """Every sample, as its distance from the subject's median: a strip a subject."""
    records = [record for record in view.records(place) if len(record.samples_ms) > 1]
    if not records:
        return None
    spreads = [100 * (np.asarray(record.samples_ms) / np.median(record.samples_ms) - 1) for record in records]
    low = min(-1.0, *(float(np.percentile(spread, 0.5)) for spread in spreads))
    high = max(1.0, *(float(np.percentile(spread, 95)) for spread in spreads)) * 1.25
    thinned = any(len(spread) > STRIP_POINTS for spread in spreads)

    def draw(figure: Figure, width: Width) -> None:
        (axes,) = panels_of(figure, [len(records)])
        name_rows(axes, [view.label(record.subject) for record in records], width)
        axes.axvline(0, color=colour("muted"), linewidth=1, zorder=1)
        room = 0.24 if width == "wide" else 0.42
        axes.set_xlim(low * 1.05, high + room * (high - low))
        for row, (record, spread) in enumerate(zip(records, spreads, strict=True)):
            _strip(axes, row + row_offset(width), spread, high, colour(view.subjects[record.subject].kind), width)
        axes.set_xlabel("distance from the subject's median, %")

    return make_plot(
        f"spread-{slug(place)}",
        f"Every run, {place.words}",
        "Each point is a run; the bar spans the middle half, the tick is the 90th percentile; at the right what lies "
        f"beyond the axis.{f' Of more than {STRIP_POINTS} runs, so many evenly chosen ones.' if thinned else ''}",
        lambda width: rows_height_px([[view.label(record.subject) for record in records]], width, extra_px=6),
        draw,
    )


def _strip(axes: Axes, y: float, spread: np.ndarray, high: float, ink: str, width: Width) -> None:
    half = bar_thickness(width) / 2
    p25, p75, p90 = np.percentile(spread, [25, 75, 90]).tolist()
    axes.barh(y, p75 - p25, 2 * half, left=p25, color=ink, alpha=0.22, linewidth=0, zorder=1)
    axes.plot([p90, p90], [y - half, y + half], color=ink, linewidth=1.5, zorder=2)
    points = np.sort(spread)
    if len(points) > STRIP_POINTS:
        points = points[np.linspace(0, len(points) - 1, STRIP_POINTS).round().astype(int)]
    # Golden-ratio steps spread neighbours evenly over the strip's height, the same way each time.
    heights = y + half * 1.5 * ((np.arange(len(points)) * 0.618033988749895) % 1 - 0.5)
    inside = points <= high
    axes.plot(points[inside], heights[inside], "o", color=ink, markersize=3.2, alpha=0.75, markeredgewidth=0, zorder=3)
    beyond = spread[spread > high]
    if len(beyond):
        axes.annotate(
            f"{len(beyond)} more, to +{number(float(beyond.max()), 2)} %", (high, y), (4, 0),
            textcoords="offset points", va="center", color=colour("muted"),
        )  # fmt: skip
