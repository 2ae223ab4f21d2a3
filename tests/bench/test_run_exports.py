"""Exports in a bench: found where ``tiue export`` puts them, made where they were asked for, compared either way."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from exports import build_small_student, exported
from helpers import edit_json
from quick_bench import measure_small_peak

from tiue_cli.base.events import Event, Note
from tiue_cli.bench.config import BenchConfig
from tiue_cli.bench.report.schema import BenchReport
from tiue_cli.bench.run import run_bench
from tiue_cli.bench.subjects import opening
from tiue_cli.errors import DeviceError, UsageError
from tiue_cli.files.exports import EXPORT_MANIFEST, read_export_manifest
from tiue_cli.generate.target import ExportInfo

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def small_peak() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        measure_small_peak(patch)
        yield


@pytest.fixture(scope="module")
def student(tiny_student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_small_student(tiny_student_folder, tmp_path_factory.mktemp("small") / "student")


@pytest.fixture
def place(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with the student's export where ``tiue export`` would have put it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(exported(student), tmp_path / "engines" / student.name)
    return tmp_path / "engines" / student.name


def config(model: Path, **options: Any) -> BenchConfig:
    return BenchConfig(
        models=(str(model),), teacher="none", batches=(2,), device="cpu", duration_s=0.001, **{"steps": (2,), **options}
    )


def run(config: BenchConfig) -> tuple[BenchReport, str]:
    events: list[Event] = []
    report = run_bench(config, emit=events.append)
    assert report is not None
    return report, "\n".join(event.text for event in events if isinstance(event, Note))


def test_a_ready_export_is_measured_and_compared_without_being_asked_for(student: Path, place: Path) -> None:
    report, notes = run(config(student))
    (onnx,) = [subject for subject in report.subjects if subject.backend == "onnx"]
    assert onnx.build_s is None
    assert onnx.parity is not None and onnx.parity.passed
    (record,) = [record for record in report.latency if record.subject == onnx.key]
    assert set(record.stage_samples_ms) == {"text", "unet_encoder", "unet_decoder", "vae"} == set(record.flops)
    ratios = {one.scope: one for one in report.ratios if one.subject == onnx.key}
    assert set(ratios) == {"image", "unet"} and all(one.ratio is not None for one in ratios.values())
    assert "trt is left out" in notes


def test_8_bits_are_compared_with_floats_by_their_own_bar(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    eight = exported(student, precision="int8", calibration="papercut", calibration_images=8, check=False)
    shutil.copytree(eight, tmp_path / "engines" / student.name)
    report, _ = run(config(student, precision="int8"))
    precisions = {subject.backend: subject.precision for subject in report.subjects}
    assert precisions == {"torch": "fp32", "onnx": "int8"}
    onnx = next(subject for subject in report.subjects if subject.backend == "onnx")
    assert onnx.parity is not None and onnx.parity.required_db == 25 and onnx.parity.passed
    with pytest.raises(UsageError, match="was exported in int8, and this run is in fp32"):
        run(config(tmp_path / "engines" / student.name))


def test_bf16_is_openvinos_alone(student: Path, place: Path) -> None:
    with pytest.raises(DeviceError, match="there are no exports in bf16 for ONNX Runtime"):
        run(config(student, precision="bf16", backends=("onnx",)))
    _, notes = run(config(student, precision="bf16"))
    assert "onnx is left out: there are no exports in bf16 for ONNX Runtime" in notes


@pytest.mark.parametrize(
    ("change", "reason"), [({"precision": "fp16"}, "exported in fp16"), ({"sha256": "0" * 64}, "another student")]
)
def test_an_export_that_is_not_this_students_is_left_out_with_the_reason(
    change: dict[str, str], reason: str, student: Path, place: Path
) -> None:
    source = read_export_manifest(place).student.model_dump()
    fields = change if "precision" in change else {"student": {**source, **change}}
    edit_json(place / EXPORT_MANIFEST, **fields)
    report, notes = run(config(student))
    assert all(subject.backend == "torch" for subject in report.subjects)
    assert "onnx is left out: " in notes and reason in notes


def test_an_export_as_the_model_brings_its_student_to_be_compared_with(student: Path, place: Path) -> None:
    source = read_export_manifest(place).student.model_dump()
    edit_json(place / EXPORT_MANIFEST, student={**source, "source": str(student)})
    report, _ = run(config(place))
    onnx = next(subject for subject in report.subjects if subject.backend == "onnx")
    assert onnx.parity is not None and onnx.parity.passed
    assert onnx.parity.reference in {subject.key for subject in report.subjects}
    with pytest.raises(UsageError, match="autoencoder"):
        run(config(place, vae="x"))


def test_an_export_that_was_asked_for_is_made_for_the_run(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ready = exported(student)
    asked: list[Path] = []

    def export_now(model: object, folder: Path, **_: object) -> tuple[ExportInfo, float]:
        assert folder.is_dir()
        asked.append(folder)
        return ExportInfo(ready, read_export_manifest(ready)), 7.0

    monkeypatch.setattr(opening, "export_now", export_now)
    report, _ = run(config(student, backends=("onnx",)))
    onnx = next(subject for subject in report.subjects if subject.backend == "onnx")
    assert onnx.build_s == 7.0
    assert onnx.parity is not None and onnx.parity.passed
    assert not asked[0].exists(), "what was made for the run goes with it"
    reference = next(subject for subject in report.subjects if subject.key == onnx.parity.reference)
    assert not [record for record in report.latency if record.subject == reference.key], "torch was not asked for"
