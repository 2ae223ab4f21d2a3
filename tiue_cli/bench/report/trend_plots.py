"""Plots of one figure against another: throughput over the batch, quality against latency."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tiue_cli.base.text import number, plain
from tiue_cli.bench.report.plot_parts import Plot, batch_words, beside, make_plot, plain_log_ticks
from tiue_cli.bench.report.svg import colour
from tiue_cli.bench.report.tables import metric_name
from tiue_cli.bench.report.view import REFERENCE, ReportView, Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def throughput_plot(view: ReportView, size: tuple[int, int]) -> Plot | None:
    """Images a second over the batch, labelled at the end of each line; None with fewer than two batches."""
    settings = [setting for setting in view.settings if setting.size == size]
    lines = {
        key: [(record.batch, view.images_per_s(record)) for at in settings if (record := view.latency(key, at))]
        for key in view.subjects
    }
    lines = {key: points for key, points in lines.items() if len(points) > 1}
    if not lines:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.grid(axis="y")
        axes.grid(axis="x", visible=False)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ends = []
        for key, points in lines.items():
            ink = colour(view.subjects[key].kind)
            axes.plot(*zip(*points, strict=True), "o-", color=ink, linewidth=1.6, markersize=5)
            ends.append((points[-1][1], f"{number(points[-1][1])}  {plain(view.label(key))}", ink))
        batches = sorted({batch for points in lines.values() for batch, _ in points})
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("images in a batch")
        axes.set_title("images/s at the median", fontweight="normal", color=colour("muted"))
        values = [value for points in lines.values() for _, value in points]
        axes.set_ylim(min(values) / 1.25, max(values) * 1.25)
        plain_log_ticks(axes.yaxis, min(values), max(values))
        _label_ends(axes, batches[-1], ends)

    return make_plot(
        f"throughput-{size[0]}x{size[1]}",
        "Throughput over the batch",
        "Images a second at the median latency; both axes are logarithmic.",
        height_px=max(340.0, len(lines) * 19 + 90),
        draw=draw,
    )


def _label_ends(axes: Axes, x: float, ends: Sequence[tuple[float, str, str]]) -> None:
    """Labels beside the ends of the lines, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    ordered = sorted(ends, reverse=True)
    wanted = [float(np.log(value / low) / np.log(high / low)) for value, _, _ in ordered]
    leader = {"arrowstyle": "-", "color": colour("rule"), "linewidth": 0.8, "shrinkA": 1, "shrinkB": 5}
    for (value, label, ink), height in zip(ordered, spaced(wanted, 1 / max(17, len(ordered))), strict=True):
        axes.annotate(
            textwrap.shorten(label, 46, placeholder=" …"),
            (x, value),
            (1.04, height),
            xycoords="data",
            textcoords="axes fraction",
            va="center",
            color=ink,
            annotation_clip=False,
            arrowprops={**leader, "relpos": (0, 0.5)},
        )


def spaced(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions in [0, 1], descending as given, at least ``gap`` from each other and near what was wanted."""
    placed = list(wanted)
    for index in range(1, len(placed)):
        placed[index] = min(placed[index], placed[index - 1] - gap)
    if placed and placed[-1] < 0:
        placed[-1] = 0.0
        for index in range(len(placed) - 2, -1, -1):
            placed[index] = max(placed[index], placed[index + 1] + gap)
    return placed


def quality_plot(view: ReportView) -> Plot | None:
    """Metrics against the latency at the first setting; whiskers are the range of the repetitions."""
    if not view.settings or not view.report.quality:
        return None
    setting = view.settings[0]
    keys = [record.subject for record in view.report.quality if view.latency(record.subject, setting) is not None]
    metrics = [name for name in view.main_metrics if any(name in view.quality[key].metrics for key in keys)]
    if not metrics:
        return None
    columns = min(2, len(metrics))
    rows = -(-len(metrics) // columns)

    def draw(figure: Figure) -> None:
        for index, metric in enumerate(metrics):
            axes = figure.add_subplot(rows, columns, index + 1)
            _quality_points(view, axes, metric, keys, setting)
            if index >= len(metrics) - columns:
                axes.set_xlabel(batch_words(setting, "median latency"))
        _number_legend(figure, [plain(view.label(key)) for key in keys])

    protocol = view.report.quality_protocol
    comparable = protocol is not None and protocol.comparable
    return make_plot(
        "quality",
        "Quality against latency",
        f"Each number is a subject; whiskers span the repetitions; latency at {setting.words}, logarithmic."
        + (" The dashed line: references measured against references." if REFERENCE in view.quality else "")
        + ("" if comparable else " Not comparable with published figures."),
        height_px=rows * 230 + 30 + 19 * len(keys) / 2,
        draw=draw,
    )


def _quality_points(view: ReportView, axes: Axes, metric: str, keys: Sequence[str], setting: Setting) -> None:
    axes.grid(axis="both")
    axes.set_xscale("log")
    axes.set_title(metric_name(metric))
    reference = view.quality.get(REFERENCE)
    if reference is not None and metric in reference.metrics:
        best, edge = reference.metrics[metric], axes.get_yaxis_transform()
        axes.axhline(best, color=colour("muted"), linewidth=1, linestyle=(0, (4, 3)))
        beside(axes, "reference", 1, best, gap_px=4, xycoords=edge, color=colour("muted"), annotation_clip=False)
    times = []
    for index, key in enumerate(keys, 1):
        record, quality = view.latency(key, setting), view.quality[key]
        if record is None or metric not in quality.metrics:
            continue
        x, y = view.summary(record).median, quality.metrics[metric]
        ink = colour(view.subjects[key].kind)
        values = quality.repetitions.get(metric, ())
        if len(values) > 1:
            axes.plot([x, x], [min(values), max(values)], color=ink, linewidth=1.5, zorder=2)
        axes.plot(x, y, "o", color=ink, markersize=7, zorder=3)
        axes.annotate(str(index), (x, y), (6, 5), textcoords="offset points", fontweight="bold", color=ink)
        times.append(x)
    if times:
        axes.set_xlim(min(times) / 1.4, max(times) * 1.6)
        plain_log_ticks(axes.xaxis, min(times) / 1.4, max(times) * 1.6)
    axes.margins(y=0.15)


def _number_legend(figure: Figure, labels: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    texts = [f"{index}  {textwrap.shorten(label, 46, placeholder=' …')}" for index, label in enumerate(labels, 1)]
    handles = [Line2D([], [], linestyle="", label=text) for text in texts]
    figure.legend(handles=handles, loc="outside lower left", ncols=2, handlelength=0, handletextpad=0)
