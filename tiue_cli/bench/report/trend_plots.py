"""Plots of one figure over another: throughput over the batch, quality against latency."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tiue_cli.bench.report.plot_frame import (
    Plot,
    Width,
    batch_words,
    make_plot,
    no_ticks,
    plain_log_ticks,
)
from tiue_cli.bench.report.svg import colour
from tiue_cli.bench.report.tables import metric_name
from tiue_cli.bench.report.view import REFERENCE, Place, ReportView
from tiue_cli.text import number, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# --- throughput ----------------------------------------------------------------------------------------------------


def throughput_plot(view: ReportView, size: tuple[int, int]) -> Plot | None:
    """Images a second over the batch, labelled at the end of each line; None with fewer than two batches."""
    places = [place for place in view.places if place.size == size]
    lines = {
        key: [(record.batch, view.images_per_s(record)) for place in places if (record := view.latency(key, place))]
        for key in view.subjects
    }
    lines = {key: points for key, points in lines.items() if len(points) > 1}
    if not lines:
        return None

    def draw(figure: Figure, width: Width) -> None:
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
        axes.xaxis.set_minor_locator(no_ticks())
        axes.set_xlabel("images in a batch")
        axes.set_title("images/s at the median", fontweight="normal", color=colour("muted"))
        values = [value for points in lines.values() for _, value in points]
        axes.set_ylim(min(values) / 1.25, max(values) * 1.25)
        plain_log_ticks(axes.yaxis, min(values), max(values))
        _label_ends(axes, batches[-1], ends, width)

    rows = len(lines)
    return make_plot(
        f"throughput-{size[0]}x{size[1]}",
        "Throughput over the batch",
        "Images a second at the median latency; both axes are logarithmic.",
        lambda width: max(340.0, rows * 19 + 90) if width == "wide" else max(330.0, 260 + rows * 19),
        draw,
    )


def _label_ends(axes: Axes, x: float, ends: Sequence[tuple[float, str, str]], width: Width) -> None:
    """Labels beside the ends of the lines, moved apart where they would overlap; on a phone a list below."""
    ordered = sorted(ends, reverse=True)
    if width == "narrow":
        text = axes.get_figure()
        assert text is not None
        for row, (_, label, ink) in enumerate(ordered):
            axes.annotate(
                textwrap.shorten(label, 52, placeholder=" …"), (0, 0), (0, -48 - 18 * row), xycoords="axes fraction",
                textcoords="offset points", va="top", color=ink, annotation_clip=False,
            )  # fmt: skip
        return
    low, high = axes.get_ylim()
    leader = {
        "arrowstyle": "-", "color": colour("rule"), "linewidth": 0.8, "shrinkA": 1, "shrinkB": 5, "relpos": (0, 0.5)
    }  # fmt: skip
    wanted = [float((np.log(value) - np.log(low)) / (np.log(high) - np.log(low))) for value, _, _ in ordered]
    for (value, label, ink), height in zip(ordered, _apart(wanted, 1 / max(17, len(ordered))), strict=True):
        axes.annotate(
            textwrap.shorten(label, 46, placeholder=" …"), (x, value), (1.04, height), xycoords="data",
            textcoords="axes fraction", va="center", color=ink, annotation_clip=False,
            arrowprops=leader,
        )  # fmt: skip


def _apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions in [0, 1], descending as given, at least ``gap`` from each other and near what was wanted."""
    placed = list(wanted)
    for index in range(1, len(placed)):
        placed[index] = min(placed[index], placed[index - 1] - gap)
    if placed and placed[-1] < 0:
        placed[-1] = 0.0
        for index in range(len(placed) - 2, -1, -1):
            placed[index] = max(placed[index], placed[index + 1] + gap)
    return placed


# --- quality against latency ---------------------------------------------------------------------------------------


def quality_plot(view: ReportView) -> Plot | None:
    """Metrics against the latency at the first place; whiskers are the range of the repetitions."""
    if not view.places or not view.report.quality:
        return None
    place = view.places[0]
    keys = [record.subject for record in view.report.quality if view.latency(record.subject, place) is not None]
    metrics = [name for name in view.main_metrics if any(name in view.quality[key].metrics for key in keys)]
    if not metrics:
        return None

    def draw(figure: Figure, width: Width) -> None:
        columns = 2 if width == "wide" and len(metrics) > 1 else 1
        rows = -(-len(metrics) // columns)
        for index, metric in enumerate(metrics):
            axes = figure.add_subplot(rows, columns, index + 1)
            _quality_points(view, axes, metric, keys, place)
            if index >= len(metrics) - columns:
                axes.set_xlabel(batch_words(place, "median latency"))
        _number_legend(figure, [plain(view.label(key)) for key in keys], width)

    rows = {"wide": -(-len(metrics) // 2), "narrow": len(metrics)}
    protocol = view.report.quality_protocol
    comparable = protocol is not None and protocol.comparable
    return make_plot(
        "quality",
        "Quality against latency",
        f"Each number is a subject; whiskers span the repetitions; latency at {place.words}, logarithmic."
        + (" The dashed line: references measured against references." if REFERENCE in view.quality else "")
        + ("" if comparable else " Not comparable with published figures."),
        lambda width: rows[width] * 230 + 30 + 19 * len(keys) / (2 if width == "wide" else 1),
        draw,
    )


def _quality_points(view: ReportView, axes: Axes, metric: str, keys: Sequence[str], place: Place) -> None:
    axes.grid(axis="both")
    axes.set_xscale("log")
    axes.set_title(metric_name(metric))
    reference = view.quality.get(REFERENCE)
    if reference is not None and metric in reference.metrics:
        axes.axhline(reference.metrics[metric], color=colour("muted"), linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            "reference", (1, reference.metrics[metric]), (4, 0), xycoords=axes.get_yaxis_transform(),
            textcoords="offset points", va="center", color=colour("muted"), annotation_clip=False,
        )  # fmt: skip
    times = []
    for index, key in enumerate(keys, 1):
        record, quality = view.latency(key, place), view.quality[key]
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


def _number_legend(figure: Figure, labels: Sequence[str], width: Width) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linestyle="", label=f"{index}  {textwrap.shorten(label, 46, placeholder=' …')}")
        for index, label in enumerate(labels, 1)
    ]
    figure.legend(
        handles=handles, loc="outside lower left", ncols=2 if width == "wide" else 1, handlelength=0, handletextpad=0
    )
