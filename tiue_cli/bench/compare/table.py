"""The table of a comparison of two reports, and its rows in sentences."""

from __future__ import annotations

from collections.abc import Mapping

from tiue_cli.base.text import bytes_text, number
from tiue_cli.bench.compare.reports import Comparison, Row
from tiue_cli.bench.report.tables import Column, Table, metric_name
from tiue_cli.bench.report.view import STAGE_NAMES
from tiue_cli.bench.stats import LEAST_SAMPLES


def comparison_table(comparison: Comparison) -> Table:
    """The medians of whole images, and whatever else changed; each subject's rows stand under its name."""
    columns = (Column("", "left"), Column("old"), Column("new"), Column("change"), Column("verdict", "left"))
    shown = [row for row in comparison.rows if _is_shown(row)]
    rows: list[tuple[str, ...]] = []
    for subject in dict.fromkeys(row.subject for row in shown):
        rows.append((subject, "", "", "", ""))
        rows += [_comparison_row(row) for row in shown if row.subject == subject]
    notes = [
        f"Changes with {100 * comparison.confidence:g} % intervals; faster or slower: all of it, and by more than 1 %."
    ]
    if len(shown) < len(comparison.rows):
        notes.append(f"{len(comparison.rows) - len(shown)} more figures are in --format json.")
    if comparison.quality_obstacle is not None:
        notes.append(f"Quality is not compared: {comparison.quality_obstacle}")
    return Table(f"{comparison.old} → {comparison.new}", columns, tuple(rows), tuple(notes))


def offender_text(row: Row) -> str:
    """A row in a sentence: where, and what changed from what to what."""
    _, old, new, change, _ = _comparison_row(row)
    return f"{row.where}: {_figure_name(row)} {old} → {new}{f', {change}' if change else ''}"


def _is_shown(row: Row) -> bool:
    """Medians of whole images; of the rest what changed, less what follows from another row."""
    if (row.scope, row.figure) == ("image", "p50"):
        return True
    follows = row.figure == "images_per_s" or (row.scope != "image" and row.figure != "p50")
    return row.verdict not in ("within noise", "not judged") and not follows


def _comparison_row(row: Row) -> tuple[str, ...]:
    relative = row.relative
    change = "" if relative is None else signed_percent(relative.value)
    if relative is not None and relative.low is not None and relative.high is not None and relative.low < relative.high:
        change += f" [{signed_percent(relative.low)}, {signed_percent(relative.high)}]".replace(" %", "")
    stages: Mapping[str, str] = {str(stage): name for stage, name in STAGE_NAMES.items()}
    what = _figure_name(row) if row.scope == "image" else stages[row.scope]
    return (
        f"  {what}" if row.batch is None else f"  batch {row.batch}: {what}",
        _figure_text(row.figure, row.old),
        _figure_text(row.figure, row.new.value),
        change,
        row.verdict,
    )


def _figure_name(row: Row) -> str:
    if row.figure in LEAST_SAMPLES:
        return f"{'median' if row.figure == 'p50' else row.figure}, ms"
    if row.batch is None:
        return metric_name(row.figure)
    return {"images_per_s": "images/s"}.get(row.figure, row.figure)


def _figure_text(figure: str, value: float) -> str:
    return bytes_text(value) if figure == "memory" else number(value)


def signed_percent(share: float) -> str:
    """E.g. ``+4.2 %``; ``0 %`` for what rounds to nothing."""
    text = f"{100 * share:+.1f} %"
    return "0 %" if text in ("+0.0 %", "-0.0 %") else text
