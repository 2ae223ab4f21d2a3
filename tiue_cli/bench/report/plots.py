"""Plots with a row for each subject: latency by stage, ratios, and how steady the runs were."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from tiue_cli.base.text import number, plain
from tiue_cli.bench.report.plot_parts import (
    BAR,
    Plot,
    batch_words,
    beside,
    make_plot,
    name_rows,
    panels_of,
    paper_box,
    plain_log_ticks,
    rows_height_px,
    slug,
    thousands,
)
from tiue_cli.bench.report.schema import LatencyRecord, RatioRecord
from tiue_cli.bench.report.svg import colour
from tiue_cli.bench.report.view import MANY_STEPS, STAGE_NAMES, ReportView, Setting, as_multiple, as_speedup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MUCH_LONGER: Final = 3.0
"""Subjects that take so many times as long get a panel with a scale of their own."""
NEAR_ONE: Final = 5.0
"""Ratios below this (and above its inverse) are seen against 1."""
STRIP_POINTS: Final = 20
"""Of a subject's runs: a plot with every run of every subject has thousands of marks that nobody tells apart."""


# --- latency by stage ----------------------------------------------------------------------------------------------


def stage_plot(view: ReportView, setting: Setting) -> Plot | None:
    """Medians of the stages as stacked bars; what takes many steps has a panel and a scale of its own."""
    records = view.records(setting)
    if not records:
        return None
    groups = _by_scale(view, records)

    def draw(figure: Figure) -> None:
        panels = panels_of(figure, [len(group) for _, group in groups])
        for axes, (title, group) in zip(panels, groups, strict=True):
            axes.set_title(title)
            _stage_bars(view, axes, group)
        panels[-1].set_xlabel(batch_words(setting, "median time"))
        _stage_legend(view, figure, records)

    return make_plot(
        f"stages-{slug(setting)}",
        f"Latency by stage, {setting.words}",
        "Median wall clock, prompts to pixels, divided by the stages' mean shares."
        + (" The two panels have different scales." if len(groups) > 1 else ""),
        height_px=rows_height_px([[view.label(record.subject) for record in group] for _, group in groups]) + 24,
        draw=draw,
    )


def _by_scale(view: ReportView, records: Sequence[LatencyRecord]) -> list[tuple[str, list[LatencyRecord]]]:
    many = [record for record in records if view.subjects[record.subject].kind in MANY_STEPS]
    few = [record for record in records if view.subjects[record.subject].kind not in MANY_STEPS]
    if many and few:
        longest = [max(view.summary(record).median for record in group) for group in (few, many)]
        if longest[1] >= MUCH_LONGER * longest[0]:
            return [("One pass", few), ("Many steps (another scale)", many)]
    return [("", list(records))]


def _stage_bars(view: ReportView, axes: Axes, records: Sequence[LatencyRecord]) -> None:
    name_rows(axes, [view.label(record.subject) for record in records])
    for row, record in enumerate(records):
        left, median_ms = 0.0, view.summary(record).median
        for stage, stage_ms in view.stage_parts(record).items():
            axes.barh(row, stage_ms, BAR, left=left, color=colour(stage), linewidth=0)
            left += stage_ms
        if median_ms > left:
            axes.barh(row, median_ms - left, BAR, left=left, color=colour("rest"), linewidth=0)
        beside(axes, f"{number(median_ms)} ms", median_ms, row)
    axes.set_xlim(0, 1.14 * max(view.summary(record).median for record in records))
    thousands(axes.xaxis)


def _stage_legend(view: ReportView, figure: Figure, records: Sequence[LatencyRecord]) -> None:
    from matplotlib.patches import Patch

    medians = [view.stage_medians(record) for record in records]
    used = [stage for stage in STAGE_NAMES if any(stage in stages for stages in medians)]
    handles = [Patch(color=colour(stage), label=STAGE_NAMES[stage]) for stage in used]
    handles.append(Patch(color=colour("rest"), label="rest" if used else "whole"))
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=len(handles),
        handlelength=0.9,
        columnspacing=1.2,
        borderaxespad=0,
    )


# --- ratios --------------------------------------------------------------------------------------------------------


def ratio_plot(view: ReportView, setting: Setting) -> Plot | None:
    """Speed-ups over each teacher, and UNet times in plain UNet passes: dots with their intervals."""
    panels: list[tuple[str, str, list[RatioRecord]]] = []
    for teacher in view.teachers:
        title = f"Whole image: times as fast as {plain(view.label(teacher))}"
        panels.append((title, "×", _given([view.ratio(key, teacher, setting, "image") for key in view.subjects])))
    passes = [view.plain_ratio(key, setting, "unet") for key in view.subjects]
    panels.append(("UNet alone: time in plain UNet passes", "", _given(passes)))
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return None

    def draw(figure: Figure) -> None:
        for axes, (title, unit, ratios) in zip(panels_of(figure, [len(p[2]) for p in panels]), panels, strict=True):
            axes.set_title("\n".join(textwrap.wrap(title, 100)))
            _ratio_rows(view, axes, ratios, unit)

    confidence = max(ratio.confidence for _, _, ratios in panels for ratio in ratios)
    return make_plot(
        f"ratios-{slug(setting)}",
        f"Ratios, {setting.words}",
        f"Ratios of medians with {100 * confidence:g} % intervals (bootstrap over paired rounds); logarithmic axes. "
        "Where 1 is near, a line marks it: there both take the same time.",
        height_px=rows_height_px([[view.label(ratio.subject) for ratio in ratios] for *_, ratios in panels]) + 8,
        draw=draw,
    )


def _given(ratios: Sequence[RatioRecord | None]) -> list[RatioRecord]:
    return [ratio for ratio in ratios if ratio is not None]


def _ratio_rows(view: ReportView, axes: Axes, ratios: Sequence[RatioRecord], unit: str) -> None:
    """Rows of ratios: with ``unit`` × speed-ups, without one multiples."""
    name_rows(axes, [view.label(ratio.subject) for ratio in ratios])
    shown = [as_speedup(ratio) if unit else as_multiple(ratio) for ratio in ratios]
    values = [value for item in shown for value in (item.value, item.low, item.high) if value is not None]
    axes.set_xscale("log")
    low, high = (min(values), max(values)) if values else (0.5, 2.0)
    if low < NEAR_ONE and high > 1 / NEAR_ONE:
        low, high = min(low, 1.0), max(high, 1.0)
        axes.axvline(1.0, color=colour("muted"), linewidth=1, zorder=1)
    axes.set_xlim(low / max((high / low) ** 0.04, 1.05), high * max((high / low) ** 0.42, 1.6))
    for row, (ratio, item) in enumerate(zip(ratios, shown, strict=True)):
        if item.value is None:
            style = {"color": colour("muted"), "style": "italic", "bbox": paper_box()}
            edge = axes.get_yaxis_transform()
            beside(axes, "withheld: the reason is in the table", 0, row, gap_px=4, xycoords=edge, **style)
            continue
        ink = colour(view.subjects[ratio.subject].kind)
        if item.low is not None and item.high is not None:
            axes.plot([item.low, item.high], [row, row], "|-", color=ink, linewidth=2, markersize=11, zorder=2)
        axes.plot(item.value, row, "o", color=ink, markersize=5.5, zorder=3)
        text = f"{number(item.value)}{unit}" + (f"  [{item.interval}]" if item.interval else "")
        end = item.value if item.high is None else item.high
        beside(axes, text, end, row, gap_px=8, bbox=paper_box(), zorder=2)
    plain_log_ticks(axes.xaxis, low, high, unit=unit)


# --- spread --------------------------------------------------------------------------------------------------------


def spread_plot(view: ReportView, setting: Setting) -> Plot | None:
    """How far the runs are from their subject's median: a strip a subject."""
    records = [record for record in view.records(setting) if len(record.samples_ms) > 1]
    if not records:
        return None
    spreads = [100 * (np.asarray(record.samples_ms) / np.median(record.samples_ms) - 1) for record in records]
    low = min(-1.0, *(float(np.percentile(spread, 0.5)) for spread in spreads))
    high = max(1.0, *(float(np.percentile(spread, 95)) for spread in spreads)) * 1.25
    labels = [view.label(record.subject) for record in records]
    thinned = any(len(spread) > STRIP_POINTS for spread in spreads)

    def draw(figure: Figure) -> None:
        (axes,) = panels_of(figure, [len(records)])
        name_rows(axes, labels)
        axes.axvline(0, color=colour("muted"), linewidth=1, zorder=1)
        axes.set_xlim(low * 1.05, high + 0.24 * (high - low))
        for row, (record, spread) in enumerate(zip(records, spreads, strict=True)):
            _strip(axes, row, spread, high, colour(view.subjects[record.subject].kind))
        axes.set_xlabel("distance from the subject's median, %")

    return make_plot(
        f"spread-{slug(setting)}",
        f"Every run, {setting.words}",
        "Each point is a run; the bar spans the middle half, the tick is the 90th percentile; at the right what lies "
        f"beyond the axis.{f' Of more than {STRIP_POINTS} runs, so many evenly chosen ones.' if thinned else ''}",
        height_px=rows_height_px([labels]) + 6,
        draw=draw,
    )


def _strip(axes: Axes, row: int, spread: np.ndarray, high: float, ink: str) -> None:
    p25, p75, p90 = np.percentile(spread, [25, 75, 90]).tolist()
    axes.barh(row, p75 - p25, BAR, left=p25, color=ink, alpha=0.22, linewidth=0, zorder=1)
    axes.plot([p90, p90], [row - BAR / 2, row + BAR / 2], color=ink, linewidth=1.5, zorder=2)
    points = np.sort(spread)
    if len(points) > STRIP_POINTS:
        points = points[np.linspace(0, len(points) - 1, STRIP_POINTS).round().astype(int)]
    # Golden-ratio steps spread neighbours evenly over the strip's height, the same way each time.
    heights = row + 0.75 * BAR * ((np.arange(len(points)) * 0.618033988749895) % 1 - 0.5)
    inside = points <= high
    axes.plot(points[inside], heights[inside], "o", color=ink, markersize=3.2, alpha=0.75, markeredgewidth=0, zorder=3)
    beyond = spread[spread > high]
    if len(beyond):
        most = number(float(beyond.max()), 2)
        beside(axes, f"{len(beyond)} more, to +{most} %", high, row, gap_px=4, color=colour("muted"))
