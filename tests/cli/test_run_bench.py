"""``tiue bench`` from the command line: files, formats, comparisons, exit statuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from bench_reports import PLAIN, STUDENT, TEACHER, make_report

from tiue_cli.base.events import Emit
from tiue_cli.bench import run
from tiue_cli.bench.config import BenchConfig
from tiue_cli.bench.report.files import read_report, write_report
from tiue_cli.bench.report.schema import BenchReport
from tiue_cli.cli.app import main

KEYS = (TEACHER, PLAIN, STUDENT)


def made(*, slower: float = 1.0, seed: int = 0) -> BenchReport:
    return make_report(
        keys=KEYS, batches=(1,), rounds=40, quality=False, grid=False, seed=seed, slower={STUDENT: slower}
    )


@pytest.fixture(autouse=True)
def quick_page(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page without plots, where the test is not about them."""
    if "render" not in request.node.name:
        monkeypatch.setattr("tiue_cli.bench.report.files.render_html", lambda report: f"<h1>{report.name}</h1>")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return write_report(made(), tmp_path / "old").json


def measured(monkeypatch: pytest.MonkeyPatch, report: BenchReport) -> list[BenchConfig]:
    """Let the command measure nothing and get ``report``; returns the configs that it was called with."""
    configs: list[BenchConfig] = []

    def measure(config: BenchConfig, *, emit: Emit, keep: object) -> BenchReport:
        configs.append(config)
        return report

    monkeypatch.setattr(run, "run_bench", measure)
    return configs


def test_three_files_are_written_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = measured(monkeypatch, made())
    words = ["bench", "papercut", "--batch", "2,1", "--steps", "4", "--out", str(tmp_path), "--duration", "0.5"]
    assert main([*words, "--peer", "a=b/c:4:1.5", "--size", "64x32", "--format", "quiet"]) == 0
    paths = capsys.readouterr().out.splitlines()
    assert [Path(path).suffix for path in paths] == [".json", ".md", ".html"]
    assert read_report(paths[0]) == made()
    (config,) = configs
    assert (config.models, config.batches, config.steps, config.size) == (("papercut",), (2, 1), (4,), (64, 32))
    assert (config.peers[0].name, config.peers[0].guidance, config.duration_s) == ("a", 1.5, 0.5)


def test_json_format_is_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(monkeypatch, made())
    assert main(["bench", "papercut", "--out", str(tmp_path), "--format", "json"]) == 0
    assert BenchReport.model_validate_json(capsys.readouterr().out) == made()


@pytest.mark.parametrize(("slower", "status"), [(1.0, 0), (1.5, 1)])
def test_a_planted_slowdown_fails_the_gate(slower: float, status: int, old: Path, tmp_path: Path) -> None:
    new = write_report(made(slower=slower, seed=1), tmp_path / "new").json
    assert main(["bench", "--compare", str(old), str(new), "--fail-if", "p50>+5%"]) == status


def test_a_gate_after_measuring_writes_the_report_all_the_same(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(monkeypatch, made(slower=1.5, seed=1))
    words = ["bench", "papercut", "--compare", str(old), "--fail-if", "p50>+5%", "--out", str(tmp_path / "new")]
    assert main([*words, "--format", "json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["checks"][0]["failed"] is True
    assert len(list((tmp_path / "new").iterdir())) == 3


def test_a_wrong_gate_is_refused_before_anything_is_measured(
    old: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "run_bench", lambda *_, **__: pytest.fail("measured"))
    assert main(["bench", "papercut", "--compare", str(old), "--fail-if", "speed>5"]) == 2
    assert main(["bench", "papercut", "--compare", str(old.with_name("missing.json"))]) == 1
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no model was given"),
        (["papercut", "--fail-if", "p50>+5%"], "--compare"),
        (["sd15"], "--random-weights"),
        (["papercut", "--batch", "1;4"], "--batch"),
        (["papercut", "--backend", "tflite"], "tflite"),
        (["papercut", "--peer", "x"], "--peer"),
        (["papercut", "--no-latency"], "--no-latency"),
        (["papercut", "--size", "big"], "size"),
    ],
)
def test_bad_input_is_one_error_with_a_hint(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 2 and lines[0].startswith("error: ") and lines[1].startswith("hint: ")
    assert message in captured.err


def test_interrupted_bench_says_that_nothing_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(config: BenchConfig, *, emit: Emit, keep: object) -> BenchReport:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_bench", stopped)
    status = main(["bench", "papercut", "--out", str(tmp_path / "out")])
    assert status == 130
    assert "stopped: no report was written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_interrupted_bench_writes_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(config: BenchConfig, *, emit: Emit, keep: Callable[[BenchReport], object]) -> BenchReport:
        keep(made().model_copy(update={"interrupted": True}))
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_bench", stopped)
    assert main(["bench", "papercut", "--out", str(tmp_path)]) == 130
    captured = capsys.readouterr()
    assert "stopped: the report holds what was measured" in captured.err
    assert read_report(tmp_path / f"{made().name}.json").interrupted
    assert f"{made().name}.html" in captured.out


def test_an_out_that_cannot_be_written_is_said_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "run_bench", lambda *_, **__: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    assert main(["bench", "papercut", "--out", str(tmp_path / "file" / "reports")]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_render_makes_the_same_pages_again(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "run_bench", lambda *_, **__: pytest.fail("measured"))
    assert main(["bench", "--render", str(old), "--out", str(tmp_path / "pages"), "--format", "quiet"]) == 0
    pages = [tmp_path / "pages" / f"{old.stem}{suffix}" for suffix in (".md", ".html")]
    assert capsys.readouterr().out.splitlines() == [str(old), *map(str, pages)]
    for page in pages:
        assert page.read_bytes() == old.with_suffix(page.suffix).read_bytes()
        old.with_suffix(page.suffix).unlink()
    assert main(["bench", "--render", str(old)]) == 0
    assert all(page.read_bytes() == old.with_suffix(page.suffix).read_bytes() for page in pages)
    assert main(["bench", "papercut", "--render", str(old)]) == 2


def test_the_table_names_subjects_and_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    measured(monkeypatch, made())
    assert main(["bench", "papercut", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "Latency, batch 1, 64 × 64" in shown
    assert "images/s" in shown and "plain UNet pass" in shown
    assert ".html" in shown
