"""Plots with a row for each subject: latency by stage, ratios, and every run."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tiue_cli.bench.report.svg import colour
from tiue_cli.bench.report.tables import metric_name
from tiue_cli.bench.report.view import REFERENCE, Place, ReportView
from tiue_cli.text import number, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from tiue_cli.bench.report.svg import drawing, new_figure, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

from typing import TYPE_CHECKING

from tiue_cli.bench.report.schema import LatencyRecord, RatioRecord
from tiue_cli.bench.report.view import MANY_STEPS, STAGE_NAMES, as_multiple, as_speedup

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


Width = Literal["wide", "narrow"]


WIDTHS_PX: Final[dict[Width, int]] = {"wide": 760, "narrow": 350}


FONT_PX: Final = 12.5


ROW_PX: Final[dict[Width, int]] = {"wide": 26, "narrow": 42}


LABEL_CHARS: Final[dict[Width, int]] = {"wide": 34, "narrow": 46}


AXIS_PX: Final = 46
"""Height of a panel's title, ticks and axis label."""


TITLE_PX: Final = 24


@dataclass(frozen=True)
class Plot:
    """A plot in both widths; ``caption`` says what is seen and how to read it."""

    title: str
    caption: str
    wide: str
    narrow: str


Draw = Callable[["Figure", Width], None]


def make_plot(name: str, title: str, caption: str, height_px: Callable[[Width], float], draw: Draw) -> Plot:
    made: dict[Width, str] = {}
    for width, width_px in WIDTHS_PX.items():
        with drawing(font_px=FONT_PX if width == "wide" else FONT_PX - 1):
            figure = new_figure(width_px, height_px(width))
            draw(figure, width)
            made[width] = to_svg(figure, name=f"{name}-{width}", description=f"{title}. {caption}")
    return Plot(title, caption, made["wide"], made["narrow"])


def panels_of(figure: Figure, rows: Sequence[int]) -> list[Axes]:
    """One panel under the other, as high as their rows need."""
    grid = figure.add_gridspec(len(rows), 1, height_ratios=rows)
    return [figure.add_subplot(grid[index, 0]) for index in range(len(rows))]


def rows_height_px(panels: Sequence[Sequence[str]], width: Width, *, extra_px: float = 0) -> float:
    """Of panels with these labels; rows are equally high, as the longest label needs."""
    lines = max(len(_wrapped(label, width)) for labels in panels for label in labels)
    row_px = ROW_PX[width] + (lines - 1) * (8 if width == "wide" else 13)
    return sum(len(labels) * row_px + AXIS_PX + TITLE_PX for labels in panels) + extra_px


def _wrapped(label: str, width: Width) -> list[str]:
    return textwrap.wrap(plain(label), LABEL_CHARS[width]) or [""]


def name_rows(axes: Axes, labels: Sequence[str], width: Width) -> None:
    """Row i at y = i from the top: its label at the left of the panel, or on a phone above the row."""
    wrapped = ["\n".join(_wrapped(label, width)) for label in labels]
    axes.set_ylim(len(labels) - 0.5, -0.55)
    axes.spines["left"].set_visible(False)
    if width == "wide":
        axes.set_yticks(range(len(labels)), wrapped)
        axes.tick_params(axis="y", length=0, labelcolor=colour("ink"))
        return
    axes.set_yticks([])
    for row, label in enumerate(wrapped):
        above = axes.get_yaxis_transform()
        axes.text(0, row - 0.46, label, transform=above, va="top", linespacing=0.95, bbox=paper_box(), zorder=2)


def row_offset(width: Width) -> float:
    """Where in its row a mark is drawn: on a phone the label takes the upper half."""
    return 0.0 if width == "wide" else 0.22


def bar_thickness(width: Width) -> float:
    return 0.62 if width == "wide" else 0.36


def batch_words(place: Place, what: str) -> str:
    return f"{what} of an image, ms" if place.batch == 1 else f"{what} of a batch of {place.batch} images, ms"


def slug(place: Place) -> str:
    return f"{place.size[0]}x{place.size[1]}-b{place.batch}"


def no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def thousands(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6, min_n_ticks=2))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


_LOG_STEPS: Final = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7))


def plain_log_ticks(axis: Any, low: float, high: float, *, unit: str = "") -> None:
    """Few round numbers, written out: the coarsest steps that give three ticks, or evenly spaced ones in between."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    exponents = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    choices = [[step * 10.0**exponent for exponent in exponents for step in steps] for steps in _LOG_STEPS]
    choices.append([float(tick) for tick in MaxNLocator(nbins=4).tick_values(low, high)])
    inside = [[tick for tick in ticks if low * 0.999 <= tick <= high * 1.001] for ticks in choices]
    axis.set_major_locator(FixedLocator(next((ticks for ticks in inside if len(ticks) >= 3), inside[-1])))
    axis.set_minor_locator(no_ticks())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}{unit}"))


def paper_box() -> dict[str, Any]:
    """A box in the page's colour behind a text, so that no line runs through it."""
    return {"facecolor": colour("paper"), "edgecolor": "none", "pad": 1.0}


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
