"""Bench reports on the disk: ``<name>.json`` with everything, ``.md`` and ``.html`` made from it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tiue_cli.bench.report.html import render_html
from tiue_cli.bench.report.markdown import render_markdown
from tiue_cli.bench.report.schema import BenchReport
from tiue_cli.bench.report.view import REFERENCE
from tiue_cli.errors import ManifestError, OutputError
from tiue_cli.files.atomic import atomic_file
from tiue_cli.files.manifests import read_manifest, write_json

SUFFIXES = (".json", ".md", ".html")


class ReportFiles(NamedTuple):
    """Where a report lies."""

    json: Path
    markdown: Path
    html: Path


def write_report(report: BenchReport, out_folder: Path) -> ReportFiles:
    """Write the three files; where the name is taken, the report is named ``…-2``, ``…-3`` and so on.

    Nothing is overwritten. Raises OutputError.
    """
    if not report.name or report.name.startswith(".") or Path(report.name).name != report.name:
        raise OutputError(f"{report.name!r} is no name for a file", hint="leave slashes and leading dots out")
    name = _free_name(out_folder, report.name)
    report = report.model_copy(update={"name": name})
    files = ReportFiles(*(out_folder / f"{name}{suffix}" for suffix in SUFFIXES))
    # The samples first: they took hours, and the pages can be made from them again.
    write_json(files.json, report)
    for path, render in ((files.markdown, render_markdown), (files.html, render_html)):
        text = render(report)
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return files


def _free_name(folder: Path, name: str) -> str:
    for candidate in itertools.chain([name], (f"{name}-{count}" for count in itertools.count(2))):
        if not any((folder / f"{candidate}{suffix}").exists() for suffix in SUFFIXES):
            return candidate
    raise AssertionError("there is always another number")


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
    keys = {subject.key for subject in report.subjects} | {REFERENCE}
    used = [record.subject for record in report.latency] + [record.subject for record in report.quality]
    used += [key for ratio in report.ratios for key in (ratio.subject, ratio.baseline)]
    for key in used:
        if key not in keys:
            yield f"subject {key!r} is not described"
    places = Counter((record.subject, record.batch, record.size) for record in report.latency)
    for (key, batch, _), count in places.items():
        if count > 1:
            yield f"{key!r} was measured {count} times at batch {batch}"
    for record in report.latency:
        if not record.samples_ms:
            yield f"{record.subject!r} has no samples at batch {record.batch}"
        if record.rounds and len(record.rounds) != len(record.samples_ms):
            yield f"{record.subject!r} has {len(record.samples_ms)} samples of {len(record.rounds)} rounds"
