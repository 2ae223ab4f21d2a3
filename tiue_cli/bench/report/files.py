"""Bench reports on the disk: ``<name>.json`` with everything, ``.md`` and ``.html`` made from it, at any time again."""

from __future__ import annotations

import base64
import io
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from tiue_cli.bench.report.html import render_html
from tiue_cli.bench.report.markdown import render_markdown
from tiue_cli.bench.report.schema import BenchReport, GridRecord
from tiue_cli.bench.report.view import REFERENCE
from tiue_cli.errors import ManifestError, OutputError
from tiue_cli.files.atomic import atomic_file, output_error
from tiue_cli.files.manifests import read_manifest

SUFFIXES = (".json", ".md", ".html")


class ReportFiles(NamedTuple):
    """Where a report lies."""

    json: Path
    markdown: Path
    html: Path


def write_report(report: BenchReport, out_folder: Path) -> ReportFiles:
    """Write the three files; where the name is taken, the report is named ``…-2``, ``…-3`` and so on.

    Nothing is overwritten, also where several benches end at once. Raises OutputError.
    """
    if not report.name or report.name.startswith(".") or Path(report.name).name != report.name:
        raise OutputError(f"{report.name!r} cannot be a file's name", hint="leave slashes and leading dots out")
    path = _reserve(out_folder, report.name)
    try:
        # The samples first: they took hours, and the pages can be made from them again.
        with atomic_file(path) as temporary:
            temporary.write_text(as_json(report.model_copy(update={"name": path.stem})), encoding="utf-8")
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return render_report(path)


def render_report(path: Path, out_folder: Path | None = None) -> ReportFiles:
    """Make the Markdown and the page of a report's JSON again, beside it or in ``out_folder``.

    The same report gives the same bytes as when it was measured. Raises ManifestError, OutputError.
    """
    report = read_report(path)
    folder = path.parent if out_folder is None else out_folder
    files = ReportFiles(path, *(folder / f"{path.stem}{suffix}" for suffix in SUFFIXES[1:]))
    for page, render in ((files.markdown, render_markdown), (files.html, render_html)):
        text = render(report)
        with atomic_file(page) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return files


def _reserve(folder: Path, name: str) -> Path:
    """An empty ``.json`` of this run alone: creating it fails where another bench was first."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(folder, error) from error
    for number in itertools.count(1):
        path = folder / f"{name}{'' if number == 1 else f'-{number}'}.json"
        if any((folder / f"{path.stem}{suffix}").exists() for suffix in SUFFIXES):
            continue
        try:
            path.open("x").close()
        except FileExistsError:
            continue
        except OSError as error:
            raise output_error(path, error) from error
        break
    return path


def as_json(report: BenchReport) -> str:
    """The report as JSON without needless space, a record a line: so a difference shows what changed."""

    def dumped(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))

    lines = []
    for key, value in report.model_dump(mode="json").items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            records = ",\n".join(map(dumped, value))
            lines.append(f"{dumped(key)}:[\n{records}\n]")
        else:
            lines.append(f"{dumped(key)}:{dumped(value)}")
    return "{" + ",\n".join(lines) + "}\n"


# --- reading -------------------------------------------------------------------------------------------------------


def read_report(path: Path | str) -> BenchReport:
    """Read the JSON of a report. Raises ManifestError, also where its parts contradict each other."""
    path = Path(path)
    if path.suffix in SUFFIXES[1:]:
        raise ManifestError(f"{path} is a page made from a report", hint=f"give {path.with_suffix('.json')}")
    report = read_manifest(path, BenchReport)
    fault = next(_faults(report), None)
    if fault is not None:
        raise ManifestError(f"{path}: {fault}", hint="restore the file, or measure again")
    return report


def _faults(report: BenchReport) -> Iterator[str]:
    """What the types alone do not say."""
    for key, count in Counter(subject.key for subject in report.subjects).items():
        if count > 1:
            yield f"there are {count} subjects {key!r}"
    keys = {subject.key for subject in report.subjects}
    used = [record.subject for record in report.latency]
    used += [record.subject for record in report.quality if record.subject != REFERENCE]
    used += [key for ratio in report.ratios for key in (ratio.subject, ratio.baseline)]
    for key in used:
        if key not in keys:
            yield f"subject {key!r} is not described"
    settings = Counter((record.subject, record.batch, record.size) for record in report.latency)
    for (key, batch, _), count in settings.items():
        if count > 1:
            yield f"{key!r} was measured {count} times at batch {batch}"
    for record in report.latency:
        if not any(record.samples_ms):
            yield f"{record.subject!r} has no samples at batch {record.batch}"
        if record.rounds and len(record.rounds) != len(record.samples_ms):
            yield f"{record.subject!r} has {len(record.samples_ms)} samples of {len(record.rounds)} rounds"
    if report.grid is not None:
        yield from _grid_faults(report.grid)


def _grid_faults(grid: GridRecord) -> Iterator[str]:
    if not grid.columns or not grid.prompts or len(grid.prompts) != len(grid.seeds):
        yield f"the grid has {len(grid.columns)} columns, {len(grid.prompts)} prompts and {len(grid.seeds)} seeds"
    try:
        with Image.open(io.BytesIO(base64.b64decode(grid.png_base64, validate=True)), formats=["PNG"]) as image:
            image.load()
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        yield f"the grid's picture cannot be read: {error}"
        return
    rows, columns = len(grid.prompts), len(grid.columns)
    if image.height < rows * grid.cell[0] or image.width < columns * grid.cell[1]:
        yield f"the grid's picture is smaller than {rows} rows and {columns} columns of {grid.cell[0]} x {grid.cell[1]}"
