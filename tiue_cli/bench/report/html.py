"""A report as one HTML page that asks for nothing: styles, plots and pictures are inside it.

Jinja escapes whatever is put into the page; only the style sheet and the plots, which are ours, go in as they are.
"""

from __future__ import annotations

import base64
import io
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from PIL import Image

from tiue_cli.base.text import plain
from tiue_cli.bench.report import tables
from tiue_cli.bench.report.figure import css_variables, dark_css
from tiue_cli.bench.report.plots import quality_plot, ratio_plot, spread_plot, stage_plot, throughput_plot
from tiue_cli.bench.report.schema import BenchReport, GridRecord
from tiue_cli.bench.report.view import ReportView

SMALL_PX = 160
"""Pictures below this side are shown larger, by a whole factor."""


def render_html(report: BenchReport) -> str:
    """The whole report, warnings first. Plots are drawn here (Matplotlib), a few seconds for a large report."""
    view = ReportView(report)
    light, dark = css_variables()
    environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=_clean)
    template = environment.from_string(_page("report.html.jinja"))
    sizes = dict.fromkeys(setting.size for setting in view.settings)
    machine, headline = report.machine, view.headline_subject
    commit = [f"commit {report.commit[:12]}"] if report.commit is not None else []
    return template.render(
        report=report,
        css=_page("report.css"),
        light=light,
        dark=dark,
        dark_figures=dark_css(),
        where=" · ".join([machine.gpu or machine.cpu, f"tiue {report.tiue_version}", *commit, report.created]),
        speed_only=bool(report.subjects) and all(subject.random_weights for subject in report.subjects),
        subject="" if headline is None else view.subjects[headline].label,
        headlines=list(view.headlines()),
        stage_plots=list(filter(None, (stage_plot(view, setting) for setting in view.settings))),
        ratio_plots=list(filter(None, (ratio_plot(view, setting) for setting in view.settings))),
        throughput_plots=list(filter(None, (throughput_plot(view, size) for size in sizes))),
        quality_plot=quality_plot(view),
        spread_plots=list(filter(None, (spread_plot(view, setting) for setting in view.settings))),
        quality_tables=tables.quality_tables(view),
        quality_facts=tables.quality_facts(view),
        columns=[] if report.grid is None else [view.label(key) for key in report.grid.columns],
        pictures=[] if report.grid is None else _pictures(report.grid),
        enlarged=1 if report.grid is None else max(1, SMALL_PX // report.grid.cell[1]),
        tables=[
            *tables.latency_tables(view),
            *tables.ratio_tables(view),
            tables.load_table(view),
            tables.subject_table(view),
        ],
        machine_facts=tables.machine_facts(view),
        run_facts=tables.run_facts(view),
    )


def _clean(value: Any) -> Any:
    """What Jinja is about to escape, without control characters; markup of ours passes as it is."""
    return plain(value) if type(value) is str else value


def _page(name: str) -> str:
    return resources.files("tiue_cli.bench.report").joinpath("page", name).read_text(encoding="utf-8")


def _pictures(grid: GridRecord) -> list[tuple[str, int, list[str]]]:
    """(prompt, seed, a PNG in base64 a column) of each row, each with words of its own: readable on a phone and by a
    screen reader."""
    height, width = grid.cell
    rows = []
    with Image.open(io.BytesIO(base64.b64decode(grid.png_base64, validate=True)), formats=["PNG"]) as image:
        across, down = _step(image.width, len(grid.columns), width), _step(image.height, len(grid.prompts), height)
        for row, (prompt, seed) in enumerate(zip(grid.prompts, grid.seeds, strict=True)):
            corners = [(column * across, row * down) for column in range(len(grid.columns))]
            cells = [image.crop((left, top, left + width, top + height)) for left, top in corners]
            rows.append((prompt, seed, [_as_base64(cell) for cell in cells]))
    return rows


def _step(total: int, count: int, side: int) -> int:
    """Pixels from one cell to the next: the cells, and equal gaps between them, fill the picture."""
    return side if count == 1 else side + (total - count * side) // (count - 1)


def _as_base64(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode("ascii")
