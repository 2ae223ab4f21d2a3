"""A report as one HTML page that asks for nothing: styles, plots and pictures are inside it.

Jinja escapes whatever is put into the page; only the style sheet and the plots, which are ours, go in as they are.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from PIL import Image

from tiue_cli.base.text import plain
from tiue_cli.bench.report.plots import ratio_plot, spread_plot, stage_plot
from tiue_cli.bench.report.schema import BenchReport, GridRecord
from tiue_cli.bench.report.svg import css_variables, dark_css
from tiue_cli.bench.report.tables import (
    Table,
    latency_tables,
    load_table,
    machine_facts,
    quality_facts,
    quality_tables,
    ratio_tables,
    run_facts,
    subject_table,
)
from tiue_cli.bench.report.trend_plots import quality_plot, throughput_plot
from tiue_cli.bench.report.view import ReportView

SMALL_PX = 160
"""Pictures below this side are shown larger, by a whole factor."""


def render_html(report: BenchReport) -> str:
    """The whole report, warnings first. Plots are drawn here (Matplotlib), a few seconds for a large report."""
    view = ReportView(report)
    light, dark = css_variables()
    environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=_clean)
    template = environment.from_string(_page("report.html.jinja"))
    settings = view.settings
    sizes = list(dict.fromkeys(setting.size for setting in settings))
    return template.render(
        title=f"tiue bench: {report.name}",
        css=_page("report.css"),
        light=light,
        dark=dark,
        dark_figures=dark_css(),
        name=report.name,
        where=_where(report),
        speed_only=bool(report.subjects) and all(subject.random_weights for subject in report.subjects),
        warnings=report.warnings,
        subject="" if view.headline_subject is None else view.subjects[view.headline_subject].label,
        headlines=view.headlines(),
        stage_plots=[plot for setting in settings if (plot := stage_plot(view, setting)) is not None],
        ratio_plots=[plot for setting in settings if (plot := ratio_plot(view, setting)) is not None],
        throughput_plots=[plot for size in sizes if (plot := throughput_plot(view, size)) is not None],
        quality_plot=quality_plot(view),
        spread_plots=[plot for setting in settings if (plot := spread_plot(view, setting)) is not None],
        quality_tables=quality_tables(view),
        quality_facts=quality_facts(view),
        grid=None if report.grid is None else _grid(view, report.grid),
        tables=_tables(view),
        machine_facts=machine_facts(view),
        run_facts=run_facts(view),
        command=report.command,
    )


def _clean(value: Any) -> Any:
    """What Jinja is about to escape, without control characters; markup of ours passes as it is."""
    return plain(value) if type(value) is str else value


def _page(name: str) -> str:
    return resources.files("tiue_cli.bench.report").joinpath("page", name).read_text(encoding="utf-8")


def _where(report: BenchReport) -> str:
    machine = report.machine
    parts = [machine.gpu or machine.cpu, f"tiue {report.tiue_version}"]
    if report.commit is not None:
        parts.append(f"commit {report.commit[:12]}")
    return " · ".join([*parts, report.created])


def _tables(view: ReportView) -> list[Table]:
    return [*latency_tables(view), *ratio_tables(view), load_table(view), subject_table(view)]


# --- pictures ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    prompt: str
    seed: int
    pictures: tuple[str, ...]


@dataclass(frozen=True)
class _Grid:
    columns: tuple[str, ...]
    rows: tuple[_Row, ...]
    cell_px: int
    enlarged: bool


def _grid(view: ReportView, grid: GridRecord) -> _Grid:
    """The picture cut into its cells, each with words of its own: readable on a phone and by a screen reader."""
    height, width = grid.cell
    with Image.open(io.BytesIO(base64.b64decode(grid.png_base64, validate=True)), formats=["PNG"]) as image:
        across, down = _step(image.width, len(grid.columns), width), _step(image.height, len(grid.prompts), height)
        rows = tuple(
            _Row(
                prompt,
                seed,
                tuple(_cell(image, column * across, row * down, width, height) for column in range(len(grid.columns))),
            )
            for row, (prompt, seed) in enumerate(zip(grid.prompts, grid.seeds, strict=True))
        )
    factor = max(1, SMALL_PX // width)
    return _Grid(tuple(view.label(key) for key in grid.columns), rows, cell_px=width * factor, enlarged=factor > 1)


def _step(total: int, count: int, side: int) -> int:
    """Pixels from one cell to the next: the cells, and equal gaps between them, fill the picture."""
    return side if count == 1 else side + (total - count * side) // (count - 1)


def _cell(image: Image.Image, left: int, top: int, width: int, height: int) -> str:
    stream = io.BytesIO()
    image.crop((left, top, left + width, top + height)).save(stream, format="PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode("ascii")
