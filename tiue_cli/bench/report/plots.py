"""The plots of a report: latency by stage, ratios, throughput, quality, and how steady the runs were."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from tiue_cli.base.text import number, plain
from tiue_cli.bench.report.figure import (
    Plot,
    beside,
    colour,
    linear_ticks,
    log_ticks,
    make_plot,
    row_panels,
    rows_height_px,
)
from tiue_cli.bench.report.schema import LatencyRecord
from tiue_cli.bench.report.tables import metric_name
from tiue_cli.bench.report.view import (
    MANY_STEPS,
    REFERENCE,
    STAGE_NAMES,
    ReportView,
    Setting,
    Shown,
    as_multiple,
    as_speedup,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAR: Final = 0.62
"""Height of a bar, in rows."""
MUCH_LONGER: Final = 3.0
"""Subjects that take so many times as long get a panel with a scale of their own."""
NEAR_ONE: Final = 5.0
"""Ratios below this (and above its inverse) are seen against 1."""
LEGEND_ROW_PX: Final = 19


# --- latency by stage ----------------------------------------------------------------------------------------------


def stage_plot(view: ReportView, setting: Setting) -> Plot | None:
    """Medians of the stages as stacked bars; what takes many steps has a panel and a scale of its own."""
    records = view.records(setting)
    if not records:
        return None
    groups = _by_scale(view, records)
    labels = [[view.label(record.subject) for record in group] for group in groups.values()]

    def draw(figure: Figure) -> None:
        panels = row_panels(figure, labels)
        for axes, (title, group) in zip(panels, groups.items(), strict=True):
            axes.set_title(title)
            _stage_bars(view, axes, group)
        panels[-1].set_xlabel(_batch_words(setting, "median time"))
        handles: dict[str, Any] = {}
        for axes in panels:
            handles |= {label: bar for bar, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        names = [name for name in (*STAGE_NAMES.values(), "rest", "whole") if name in handles]
        figure.legend([handles[name] for name in names], names, loc="outside upper left", ncols=6, handlelength=0.9)

    return make_plot(
        f"stages-{_id(setting)}",
        f"Latency by stage, {setting.words}",
        "Median wall clock, prompts to pixels, divided by the stages' mean shares."
        + (" The two panels have different scales." if len(groups) > 1 else ""),
        height_px=rows_height_px(labels) + 24,
        draw=draw,
    )


def _by_scale(view: ReportView, records: Sequence[LatencyRecord]) -> dict[str, list[LatencyRecord]]:
    """Records by the title of their panel."""
    groups: dict[str, list[LatencyRecord]] = {"One pass": [], "Many steps (another scale)": []}
    few, many = groups.values()
    for record in records:
        (many if view.subjects[record.subject].kind in MANY_STEPS else few).append(record)
    if few and many:
        longest_few, longest_many = (max(view.summary(record).median for record in group) for group in (few, many))
        if longest_many >= MUCH_LONGER * longest_few:
            return groups
    return {"": list(records)}


def _stage_bars(view: ReportView, axes: Axes, records: Sequence[LatencyRecord]) -> None:
    for row, record in enumerate(records):
        left, median_ms = 0.0, view.summary(record).median
        for stage, stage_ms in view.stage_parts(record).items():
            axes.barh(row, stage_ms, BAR, left=left, color=colour(stage), linewidth=0, label=STAGE_NAMES[stage])
            left += stage_ms
        if median_ms > left:
            label = "rest" if left else "whole"
            axes.barh(row, median_ms - left, BAR, left=left, color=colour("rest"), linewidth=0, label=label)
        beside(axes, f"{number(median_ms)} ms", median_ms, row)
    axes.set_xlim(0, 1.14 * max(view.summary(record).median for record in records))
    linear_ticks(axes.xaxis)


# --- ratios --------------------------------------------------------------------------------------------------------


def ratio_plot(view: ReportView, setting: Setting) -> Plot | None:
    """Speed-ups over each teacher, and UNet times in plain UNet passes: dots with their intervals."""
    panels: list[tuple[str, list[tuple[str, Shown]]]] = []
    for teacher in view.teachers:
        ratios = [(key, view.ratio(key, teacher, setting, "image")) for key in view.subjects]
        title = f"Whole image: times as fast as {plain(view.label(teacher))}"
        panels.append((title, [(key, as_speedup(ratio)) for key, ratio in ratios if ratio is not None]))
    passes = [(key, view.plain_ratio(key, setting, "unet")) for key in view.subjects]
    multiples = [(key, as_multiple(ratio)) for key, ratio in passes if ratio is not None]
    panels = [panel for panel in (*panels, ("UNet alone: time in plain UNet passes", multiples)) if panel[1]]
    if not panels:
        return None
    labels = [[view.label(key) for key, _ in rows] for _, rows in panels]

    def draw(figure: Figure) -> None:
        for axes, (title, rows) in zip(row_panels(figure, labels), panels, strict=True):
            axes.set_title("\n".join(textwrap.wrap(title, 100)))
            _ratio_rows(view, axes, rows)

    confidence = max(ratio.confidence for ratio in view.report.ratios)
    return make_plot(
        f"ratios-{_id(setting)}",
        f"Ratios, {setting.words}",
        f"Ratios of medians with {100 * confidence:g} % intervals (bootstrap over paired rounds); logarithmic axes. "
        "Where 1 is near, a line marks it: there both take the same time.",
        height_px=rows_height_px(labels) + 8,
        draw=draw,
    )


def _ratio_rows(view: ReportView, axes: Axes, rows: Sequence[tuple[str, Shown]]) -> None:
    values = [value for _, shown in rows for value in (shown.value, shown.low, shown.high) if value is not None]
    paper = {"facecolor": colour("paper"), "edgecolor": "none", "pad": 1.0}  # so that no line runs through a text
    axes.set_xscale("log")
    low, high = (min(values), max(values)) if values else (0.5, 2.0)
    if low < NEAR_ONE and high > 1 / NEAR_ONE:
        low, high = min(low, 1.0), max(high, 1.0)
        axes.axvline(1.0, color=colour("muted"), linewidth=1, zorder=1)
    axes.set_xlim(low / max((high / low) ** 0.04, 1.05), high * max((high / low) ** 0.42, 1.6))
    for row, (key, shown) in enumerate(rows):
        if shown.value is None:
            style: dict[str, Any] = {"color": colour("muted"), "style": "italic", "bbox": paper}
            beside(axes, "withheld: the reason is in the table", 0, row, xycoords=axes.get_yaxis_transform(), **style)
            continue
        ink = colour(view.subjects[key].kind)
        if shown.low is not None and shown.high is not None:
            axes.plot([shown.low, shown.high], [row, row], "|-", color=ink, linewidth=2, markersize=11, zorder=2)
        axes.plot(shown.value, row, "o", color=ink, markersize=5.5, zorder=3)
        beside(axes, shown.text, shown.high or shown.value, row, gap_px=8, bbox=paper, zorder=2)
    log_ticks(axes.xaxis, unit=rows[0][1].unit)


# --- throughput, quality -------------------------------------------------------------------------------------------


def throughput_plot(view: ReportView, size: tuple[int, int]) -> Plot | None:
    """Images a second over the batch; None with fewer than two batches."""
    settings = [setting for setting in view.settings if setting.size == size]
    lines = {
        key: [(record.batch, view.images_per_s(record)) for at in settings if (record := view.latency(key, at))]
        for key in view.subjects
    }
    lines = {key: points for key, points in lines.items() if len(points) > 1}
    if not lines:
        return None
    fastest_first = sorted(lines, key=lambda key: lines[key][-1][1], reverse=True)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.grid(visible=False, axis="x")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for key, style in zip(fastest_first, _styles(view, fastest_first), strict=True):
            label = f"{number(lines[key][-1][1])}  {style.pop('label')}"
            axes.plot(*zip(*lines[key], strict=True), linewidth=1.6, markersize=5, label=label, **style)
        axes.set_xticks([setting.batch for setting in settings], [str(setting.batch) for setting in settings])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("images in a batch")
        axes.set_title("images/s at the median", fontweight="normal", color=colour("muted"))
        log_ticks(axes.yaxis)
        figure.legend(loc="outside right center", title=f"at batch {settings[-1].batch}", alignment="left")

    return make_plot(
        f"throughput-{size[0]}x{size[1]}",
        "Throughput over the batch",
        "Images a second at the median latency, fastest first; both axes are logarithmic.",
        height_px=max(340, len(lines) * LEGEND_ROW_PX + 60),
        draw=draw,
    )


def quality_plot(view: ReportView) -> Plot | None:
    """Metrics against the latency at the first setting; whiskers are the range of the repetitions."""
    if not view.settings:
        return None
    setting = view.settings[0]
    keys = [key for key in view.quality if view.latency(key, setting) is not None]
    metrics = [name for name in view.main_metrics if any(name in view.quality[key].metrics for key in keys)]
    if not metrics:
        return None
    columns = min(2, len(metrics))
    rows = -(-len(metrics) // columns)

    def draw(figure: Figure) -> None:
        for index, metric in enumerate(metrics):
            axes = figure.add_subplot(rows, columns, index + 1)
            axes.set_title(metric_name(metric))
            _quality_points(view, axes, metric, keys, setting)
            if index >= len(metrics) - columns:
                axes.set_xlabel(_batch_words(setting, "median latency"))
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=2, handlelength=1)

    comparable = view.report.quality_protocol is not None and view.report.quality_protocol.comparable
    return make_plot(
        "quality",
        "Quality against latency",
        f"Each mark is a subject; whiskers span the repetitions; latency at {setting.words}, logarithmic."
        + (" The dashed line: references measured against references." if REFERENCE in view.quality else "")
        + ("" if comparable else " Not comparable with published figures."),
        height_px=rows * 230 + 30 + LEGEND_ROW_PX * len(keys) / 2,
        draw=draw,
    )


def _quality_points(view: ReportView, axes: Axes, metric: str, keys: Sequence[str], setting: Setting) -> None:
    reference = view.quality.get(REFERENCE)
    if reference is not None and metric in reference.metrics:
        best = reference.metrics[metric]
        axes.axhline(best, color=colour("muted"), linewidth=1, linestyle=(0, (4, 3)))
        style: dict[str, Any] = {"color": colour("muted"), "annotation_clip": False}
        style["xycoords"] = axes.get_yaxis_transform()
        beside(axes, "reference", 1, best, gap_px=4, **style)
    for key, style in zip(keys, _styles(view, keys), strict=True):
        record, quality = view.latency(key, setting), view.quality[key]
        assert record is not None, "keys are of what was timed"
        x, values = view.summary(record).median, quality.repetitions.get(metric, ())
        if len(values) > 1:
            axes.plot([x, x], [min(values), max(values)], color=style["color"], linewidth=1.5, zorder=2)
        # A subject without the metric is in the legend all the same.
        axes.plot(x, quality.metrics.get(metric, np.nan), linestyle="", markersize=7, zorder=3, **style)
    axes.set_xscale("log")
    axes.margins(x=0.2, y=0.15)
    axes.autoscale_view()
    log_ticks(axes.xaxis)


def _styles(view: ReportView, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Colour by kind, marker by subject, label for the legend."""
    return [
        {
            "color": colour(view.subjects[key].kind),
            "marker": marker,
            "label": textwrap.shorten(plain(view.label(key)), 46, placeholder=" …"),
        }
        for key, marker in zip(keys, itertools.cycle("os^Dv<>pXP*h"), strict=False)
    ]


# --- spread --------------------------------------------------------------------------------------------------------


def spread_plot(view: ReportView, setting: Setting) -> Plot | None:
    """How far the runs are from their subject's median: a box a subject."""
    records = [record for record in view.records(setting) if len(record.samples_ms) > 1]
    if not records:
        return None
    spreads = [100 * (np.asarray(record.samples_ms) / np.median(record.samples_ms) - 1) for record in records]
    low = min(-1.0, *(float(np.percentile(spread, 0.5)) for spread in spreads))
    high = max(1.0, *(float(np.percentile(spread, 95)) for spread in spreads)) * 1.25
    labels = [view.label(record.subject) for record in records]

    def draw(figure: Figure) -> None:
        (axes,) = row_panels(figure, [labels])
        axes.axvline(0, color=colour("muted"), linewidth=1, zorder=1)
        axes.set_xlim(low * 1.05, high + 0.24 * (high - low))
        for row, (record, spread) in enumerate(zip(records, spreads, strict=True)):
            _box(axes, row, spread, high, colour(view.subjects[record.subject].kind))
        axes.set_xlabel("distance from the subject's median, %")

    return make_plot(
        f"spread-{_id(setting)}",
        f"Spread of the runs, {setting.words}",
        "The box spans the middle half of a subject's runs, the whiskers 95 % of them; points are the runs beyond, and "
        "at the right stands what is beyond the axis.",
        height_px=rows_height_px([labels]) + 6,
        draw=draw,
    )


def _box(axes: Axes, row: int, spread: np.ndarray, high: float, ink: str) -> None:
    line = {"color": ink, "linewidth": 1.5}
    lines: dict[str, Any] = dict.fromkeys(("boxprops", "medianprops", "whiskerprops", "capprops"), line)
    axes.boxplot(
        spread,
        positions=[row],
        widths=BAR,
        orientation="horizontal",
        whis=(2.5, 97.5),
        manage_ticks=False,
        **lines,
        flierprops={"marker": "o", "markersize": 3.2, "markerfacecolor": ink, "markeredgewidth": 0},
    )
    beyond = spread[spread > high]
    if len(beyond):
        beside(axes, f"{len(beyond)} more, to +{number(float(beyond.max()), 2)} %", high, row, color=colour("muted"))


def _batch_words(setting: Setting, what: str) -> str:
    """E.g. ``median time of a batch of 4 images, ms``."""
    return f"{what} of {'an image' if setting.batch == 1 else f'a batch of {setting.batch} images'}, ms"


def _id(setting: Setting) -> str:
    return f"{setting.size[0]}x{setting.size[1]}-b{setting.batch}"
