"""A report as Markdown: everything that can be said without pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tiue_cli.base.text import plain
from tiue_cli.bench.report import tables
from tiue_cli.bench.report.schema import BenchReport
from tiue_cli.bench.report.view import ReportView

_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def render_markdown(report: BenchReport) -> str:
    """The whole report, GitHub's dialect; warnings first. What comes from outside is shown as it is, never read as
    markup."""
    view = ReportView(report)
    parts = [f"# {escaped(report.name)}"]
    if report.warnings:
        parts.append("\n>\n".join(f"> **Warning:** {escaped(warning)}" for warning in report.warnings))
    parts += [_headlines(view), _facts(tables.machine_facts(view)), "## What was run", _facts(tables.run_facts(view))]
    parts += [_code(report.command), "## Latency", *map(_table, tables.latency_tables(view))]
    parts += ["## Ratios", *map(_table, tables.ratio_tables(view))]
    quality = tables.quality_tables(view)
    if quality:
        parts += ["## Quality", _facts(tables.quality_facts(view)), _table(quality[0], level=0)]
        parts += map(_table, quality[1:])
    parts += ["## Setting up", _table(tables.load_table(view)), _table(tables.subject_table(view))]
    return "\n\n".join(part for part in parts if part) + "\n"


def escaped(text: str) -> str:
    """Text from outside as Markdown that shows it, on one line, in a paragraph, a list or a table's cell."""
    text = re.sub(r"([\\`*_\[\]|~$!])", r"\\\1", plain(text))
    # At its begin a text could become a heading, a list or a rule.
    text = re.sub(r"^([#=+-]+)(?=\s|$)", r"\\\1", text)
    text = re.sub(r"^(\d+)(?=[.)](\s|$))", r"\1\\", text)
    return text.translate(_ENTITIES)


def _headlines(view: ReportView) -> str:
    if view.headline_subject is None:
        return ""
    lines = [f"**{escaped(view.subjects[view.headline_subject].label)}**", ""]
    for line in view.headlines():
        lines.append(f"- **{escaped(line.figure)}** {escaped(line.what)} ({escaped(line.detail)})")
    return "\n".join(lines)


def _facts(facts: tables.Facts) -> str:
    return "\n".join(f"- {escaped(name)}: {escaped(value)}" for name, value in facts)


def _code(text: str) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}sh\n{plain(text)}\n{fence}"


def _table(table: tables.Table, *, level: int = 3) -> str:
    """``level`` 0 leaves the title out."""
    rules = {"left": ":--", "right": "--:"}
    lines = [f"{'#' * level} {escaped(table.title)}", ""] if level else []
    lines += [
        _row([column.head for column in table.columns]),
        f"|{'|'.join(rules[column.align] for column in table.columns)}|",
        *(_row(row) for row in table.rows),
    ]
    for note in table.notes:
        lines += ["", escaped(note)]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(escaped(cell) for cell in cells)} |"
