"""Figures in the documentation are those of the committed reports; how a marker is written: ``readme_numbers``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from bench_reports import PLAIN, STUDENT, TEACHER, make_report
from readme_numbers import MarkerError, faults, find_markers, json_faults

from tiue_cli.bench.report.files import as_json, read_report
from tiue_cli.bench.report.markdown import render_markdown
from tiue_cli.files.manifests import write_json

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
REPORT = make_report(keys=(TEACHER, PLAIN, STUDENT), batches=(1, 4), rounds=12, grid=False)


def committed_reports() -> list[Path]:
    found = []
    for path in sorted(BENCHMARKS.rglob("*.json")):
        if "work" in path.relative_to(BENCHMARKS).parts:
            continue
        data = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, dict) and data.get("kind") == "bench":
            found.append(path)
    return found


def documents() -> list[Path]:
    """What people write; pages made from a report say what it says by construction."""
    pages = sorted(path for path in BENCHMARKS.rglob("*.md") if not path.with_suffix(".json").exists())
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *pages]


# --- the documentation


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_marked_figures_are_those_of_the_reports(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert faults(text, BENCHMARKS) == []
    assert json_faults(text, BENCHMARKS) == []
    # A line that begins with a comment is a block of HTML in Markdown, which ends the paragraph around it.
    assert re.findall(r"^\s*<!-- (?:bench|json):.*", text, re.MULTILINE) == []


def test_committed_reports_are_compact_and_their_markdown_is_what_they_render_to() -> None:
    for path in committed_reports():
        report = read_report(path)
        assert report.name == path.stem
        assert path.read_text(encoding="utf-8") == as_json(report)
        assert path.stat().st_size < 700_000
        assert path.with_suffix(".md").read_text(encoding="utf-8") == render_markdown(report)
        assert not path.with_suffix(".html").exists(), "tiue bench --render makes it"


def test_the_readme_takes_figures_from_the_reports() -> None:
    if not committed_reports():
        pytest.skip("no report is committed yet, so there is nothing to take figures from")
    assert find_markers((ROOT / "README.md").read_text(encoding="utf-8")), "no figure of the README is marked"


# --- the mechanism, on a made-up report


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    write_json(folder / "r.json", REPORT)
    return folder


def figures() -> dict[str, float]:
    """Words of a marker after the subject → the figure, worked out from the report itself."""
    record = next(record for record in REPORT.latency if (record.subject, record.batch) == (STUDENT, 4))
    ratio = next(
        ratio
        for ratio in REPORT.ratios
        if (ratio.subject, ratio.baseline, ratio.batch, ratio.scope) == (STUDENT, TEACHER, 4, "image")
    )
    passes = next(ratio for ratio in REPORT.ratios if (ratio.subject, ratio.batch, ratio.scope) == (STUDENT, 4, "unet"))
    quality = next(record for record in REPORT.quality if record.subject == STUDENT)
    ordered = sorted(record.samples_ms)
    median = (ordered[5] + ordered[6]) / 2
    assert ratio.ratio is not None and ratio.low is not None and passes.ratio is not None and REPORT.peak is not None
    assert record.peak_memory_bytes is not None
    return {
        "batch=4 p50": median,
        "p50 batch=4 size=64x64": median,
        "batch=4 p50 unit=s": median / 1000,
        "batch=4 p50 stage=vae": float(np.median(record.stage_samples_ms["vae"])),
        "batch=4 first_call": record.first_call_ms,
        "batch=4 images_per_s": 4000 / median,
        "batch=4 runs": 12,
        "batch=4 memory unit=MiB": record.peak_memory_bytes / 2**20,
        "batch=4 share unit=%": 100 * sum(record.flops.values()) / REPORT.peak.flops_per_s * 1000 / median,
        f"batch=4 speedup baseline={TEACHER}": 1 / ratio.ratio,
        f"batch=4 speedup_high baseline={TEACHER}": 1 / ratio.low,
        f"batch=4 ratio scope=unet baseline={PLAIN}": passes.ratio,
        "load": 0.8,
        "fid": quality.metrics["fid"],
        "checker_all unit=%": 100 * quality.metrics["checker_all"],
    }


@pytest.mark.parametrize("words", figures())
@pytest.mark.parametrize("decimals", [0, 1, 3])
def test_a_right_figure_passes_and_a_wrong_one_does_not(words: str, decimals: int, folder: Path) -> None:
    value, marker = figures()[words], f"<!-- bench: r.json#{STUDENT} {words} -->"
    right, wrong = f"{value:,.{decimals}f}", f"{value + 1.2 * 10**-decimals:,.{decimals}f}"
    assert faults(f"| it takes {marker} **{right}** ms |", folder) == []
    assert faults(f"one line\nit takes {marker}{wrong}", folder) == [
        f"line 2: {wrong} is {right.replace(',', '')} in r.json"
    ]


@pytest.mark.parametrize(
    "text",
    [
        "<!-- bench: r.json -->12",
        "<!-- bench r.json#a p50 -->12",
        "<!--bench: r.json#a p50 p90 -->12",
        "<!-- bench: r.json#a batch=1 -->12",
        "<!-- bench: r.json#a btach=1 p50 -->12",
        "<!-- bench: r.json#a batch=1 p50 --> about 12",
        "<!-- bench: r.json#a batch=1 p50 -->",
        "<!-- bench: r.json#a batch=1 p50",
    ],
)
def test_a_marker_that_is_not_understood_fails(text: str, folder: Path) -> None:
    with pytest.raises(MarkerError):
        find_markers(text)
    assert len(faults(text, folder)) == 1


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (f"r.json#{STUDENT} batch=2 p50", "has no p50"),
        (f"r.json#{STUDENT} batch=1 p51", "has no p51"),
        (f"r.json#{STUDENT} p50", "has no p50"),
        (f"r.json#{STUDENT} batch=1 p50 stage=unet", "has no p50"),
        (f"r.json#{STUDENT} batch=1 speedup", "needs baseline=KEY"),
        (f"r.json#{STUDENT} batch=1 p50 unit=h", "unit h"),
        (f"r.json#{STUDENT} batch=one p50", "batch=one"),
        (f"r.json#{STUDENT} batch=1 p50 size=big", "size=big"),
        ("r.json#nobody batch=1 p50", "has no subject nobody"),
        (f"other.json#{STUDENT} batch=1 p50", "does not exist"),
    ],
)
def test_a_marker_to_what_is_not_there_fails(words: str, fault: str, folder: Path) -> None:
    (found,) = faults(f"<!-- bench: {words} -->1", folder)
    assert fault in found


def test_a_figure_of_a_json_file_is_held(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"rows": [{"name": "x", "mean": 0.5}, {"name": "y-1", "mean": 2.25}]}')
    marker = "<!-- json: a.json#rows/y-1/mean -->"
    assert json_faults(f"| {marker}2.25 | {marker}**2.2** |", tmp_path) == []
    assert len(json_faults(f"{marker}2.26 and {marker}2.3", tmp_path)) == 2
    for wrong in ("b.json#rows/x/mean", "a.json#rows/z/mean", "a.json#rows/x", "a.json#row/x/mean"):
        assert json_faults(f"<!-- json: {wrong} -->0.5", tmp_path) == [f"line 1: {wrong.split('#')[1]} is not there"]
    assert json_faults("<!-- json:a.json#rows/x/mean -->0.5", tmp_path) != []
    assert json_faults(f"{marker} about 2.25", tmp_path) == ["line 1: no number"]


def test_several_markers_of_a_line_are_all_held(folder: Path) -> None:
    marker = f"<!-- bench: r.json#{STUDENT} batch=4 runs -->"
    assert len(find_markers(f"{marker}12 and {marker}12")) == 2
    assert len(faults(f"{marker}12 and {marker}13", folder)) == 1
