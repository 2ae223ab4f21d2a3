"""The whole bench on tiny models: what is in the report, and what is kept out of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from quick_bench import measure_small_peak
from tiny_export import write_tiny_export

from tiue_cli.base.events import Event, Progress
from tiue_cli.bench.config import BenchConfig, PeerSpec
from tiue_cli.bench.measure.machine import report_name, slug
from tiue_cli.bench.quality.measure import QualityMeasurement
from tiue_cli.bench.ratios import quality_failures
from tiue_cli.bench.report.files import read_report, write_report
from tiue_cli.bench.report.schema import UNET_STAGES, BenchReport, LatencyRecord, QualityRecord, RatioRecord
from tiue_cli.bench.run import bench_prompts, run_bench
from tiue_cli.errors import DeviceError, MissingDependencyError, QualityError, TiueError, UsageError
from tiue_cli.files.exports import EXPORT_MANIFEST
from tiue_cli.model.fast import layers


def run(config: BenchConfig, events: list[Event] | None = None) -> BenchReport:
    report = run_bench(config, emit=(lambda event: None) if events is None else events.append)
    assert report is not None
    return report


@pytest.fixture(scope="module", autouse=True)
def small_peak() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        measure_small_peak(patch)
        yield


@pytest.fixture(scope="module")
def config(tiny_student_folder: Path, tiny_teacher_folder: Path) -> BenchConfig:
    return BenchConfig(
        models=(str(tiny_student_folder),),
        teacher=str(tiny_teacher_folder),
        teacher_steps=(2, 3),
        batches=(1, 2),
        steps=(1, 3),
        duration_s=0.001,
        peers=(PeerSpec("other", str(tiny_teacher_folder), 2, 1.0),),
    )


@pytest.fixture(scope="module")
def events() -> list[Event]:
    return []


@pytest.fixture(scope="module")
def report(config: BenchConfig, events: list[Event]) -> BenchReport:
    return run(config, events)


def latency(report: BenchReport, key: str, batch: int) -> LatencyRecord:
    return next(record for record in report.latency if (record.subject, record.batch) == (key, batch))


def ratio(report: BenchReport, key: str, baseline: str, scope: str, batch: int = 1) -> RatioRecord:
    wanted = (key, baseline, scope, batch)
    return next(one for one in report.ratios if (one.subject, one.baseline, one.scope, one.batch) == wanted)


def key(report: BenchReport, ending: str) -> str:
    (found,) = [subject.key for subject in report.subjects if subject.key.endswith(ending)]
    return found


def test_everything_that_was_asked_for_is_measured_at_every_batch(report: BenchReport) -> None:
    endings = [subject.key.partition("/")[2] for subject in report.subjects]
    assert endings == [
        "torch/2-steps",
        "torch/3-steps",
        "torch/unet",
        "torch/unet-merged",
        "torch/k1",
        "torch/k3",
        "torch/k3-plain",
        "torch/k3-merged",
        "diffusers/2-steps",
    ]
    assert {(record.subject, record.batch) for record in report.latency} == {
        (subject.key, batch) for subject in report.subjects for batch in (1, 2)
    }
    assert len({subject.key for subject in report.subjects}) == len(report.subjects)


def test_samples_are_paired_whole_and_have_stages_within_them(report: BenchReport) -> None:
    for record in report.latency:
        assert len(record.samples_ms) == len(record.rounds) >= 6
        assert record.rounds[0] == 0 and list(record.rounds) == sorted(set(record.rounds))
        for values in record.stage_samples_ms.values():
            assert len(values) == len(record.samples_ms)
        total = np.sum(list(record.stage_samples_ms.values()), axis=0)
        assert (total <= np.asarray(record.samples_ms)).all()
    assert len(report.control_samples_ms) == sum(
        max(record.rounds[-1] for record in report.latency if record.batch == batch) + 1 for batch in (1, 2)
    )


def test_flops_grow_with_batch_and_steps(report: BenchReport) -> None:
    plain, student = key(report, "torch/unet"), key(report, "torch/k3")
    assert latency(report, plain, 2).flops["unet"] == 2 * latency(report, plain, 1).flops["unet"]
    three, one = (latency(report, key(report, ending), 1).flops for ending in ("torch/k3", "torch/k1"))
    assert three["unet_encoder"] == one["unet_encoder"]
    assert one["unet_decoder"] < three["unet_decoder"] < 3 * one["unet_decoder"]
    teacher = latency(report, key(report, "torch/2-steps"), 1)
    assert teacher.flops["unet"] == 2 * 2 * latency(report, plain, 1).flops["unet"], "two steps, guidance"
    assert latency(report, student, 1).flops["vae"] == teacher.flops["vae"]


def test_ratios_are_of_medians_over_shared_rounds(report: BenchReport) -> None:
    student, teacher = key(report, "torch/k3"), key(report, "torch/3-steps")
    above, below = latency(report, student, 2), latency(report, teacher, 2)
    rounds = sorted(set(above.rounds) & set(below.rounds))

    def median(record: LatencyRecord, samples: list[float]) -> float:
        return float(np.median([samples[record.rounds.index(number)] for number in rounds]))

    def unet(record: LatencyRecord) -> list[float]:
        stages = [record.stage_samples_ms[stage] for stage in UNET_STAGES if stage in record.stage_samples_ms]
        return [sum(values) for values in zip(*stages, strict=True)]

    image = ratio(report, student, teacher, "image", batch=2)
    assert image.ratio == pytest.approx(median(above, list(above.samples_ms)) / median(below, list(below.samples_ms)))
    alone = ratio(report, student, teacher, "unet", batch=2)
    assert alone.ratio == pytest.approx(median(above, unet(above)) / median(below, unet(below)))
    assert image.low is not None and image.high is not None and image.low <= image.ratio <= image.high


def test_merged_upsamplers_are_compared_with_merged_ones_only(report: BenchReport) -> None:
    kinds = {subject.key: subject.kind for subject in report.subjects}
    plain_of = {
        one.subject.partition("/")[2]: one.baseline.partition("/")[2]
        for one in report.ratios
        if one.baseline.endswith(("/unet", "/unet-merged")) and kinds[one.subject].startswith("student")
    }
    assert plain_of == {
        "torch/k1": "torch/unet",
        "torch/k3": "torch/unet",
        "torch/k3-plain": "torch/unet",
        "torch/k3-merged": "torch/unet-merged",
    }


def test_many_step_models_are_counted_in_plain_passes_too(report: BenchReport) -> None:
    for ending in ("torch/2-steps", "torch/3-steps", "diffusers/2-steps"):
        assert ratio(report, key(report, ending), key(report, "torch/unet"), "unet").ratio is not None


def test_ways_to_run_one_student_draw_the_same(report: BenchReport) -> None:
    found = {subject.key.partition("/")[2]: subject.parity for subject in report.subjects if subject.parity is not None}
    assert set(found) == {"torch/k3-plain", "torch/k3-merged"}
    for parity in found.values():
        assert parity.passed and parity.required_db == 60.0
        assert parity.reference == key(report, "torch/k3")


def test_the_report_says_where_with_what_and_on_which_prompts(report: BenchReport, config: BenchConfig) -> None:
    assert report.prompts == tuple(bench_prompts(config)) and len(report.prompts) == 2
    assert report.machine.packages["torch"] is not None
    assert report.machine.threads >= 1
    assert report.peak is not None and report.peak.flops_per_s > 1e8
    name = report.subjects[4].key.partition("/")[0]
    assert report.name == f"{slug(name)}_{report.machine.name}_{report.created[:10]}"
    assert all(subject.model_sha256 for subject in report.subjects if subject.kind != "peer")
    assert report.grid is not None
    assert report.grid.seeds == (0, 1)
    assert [column.partition("/")[2] for column in report.grid.columns] == [
        "torch/2-steps",
        "torch/k1",
        "torch/k3",
        "diffusers/2-steps",
    ]


def test_progress_reaches_the_whole_of_every_stage(report: BenchReport, events: list[Event]) -> None:
    last = {event.stage: event for event in events if isinstance(event, Progress)}
    assert set(last) == {"loading", "warm-up, batch 1", "timing, batch 1", "warm-up, batch 2", "timing, batch 2"}
    assert all(event.done == event.total for event in last.values())


def test_a_written_report_is_read_back_whole(report: BenchReport, tmp_path: Path) -> None:
    files = write_report(report, tmp_path)
    assert read_report(files.json) == report
    assert files.markdown.is_file() and files.html.is_file()


def test_an_interruption_leaves_a_report_of_what_was_measured(config: BenchConfig, report: BenchReport) -> None:
    """Stopped in the second batch's rounds: the first batch is whole, the second has what it has."""
    kept: list[BenchReport] = []

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "timing, batch 2" and event.detail.startswith("round 5"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_bench(replace(config, steps=(1,), teacher="none", peers=()), emit=stop, keep=kept.append)
    (found,) = kept
    assert found.interrupted and not report.interrupted
    assert any("interrupted" in warning for warning in found.warnings)
    first, second = ([one for one in found.latency if one.batch == batch] for batch in (1, 2))
    assert {one.subject for one in first} == {one.key for one in found.subjects}
    assert second and all(max(one.rounds) <= 4 for one in second)


def test_an_interruption_before_the_first_round_leaves_nothing(config: BenchConfig) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "warm-up, batch 1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_bench(config, emit=stop, keep=lambda report: pytest.fail("nothing was measured"))


@pytest.mark.parametrize(("scenes", "says"), [(32, "cannot be read"), (64, "papercut's scenes are 64x64")])
def test_what_quality_cannot_be_compared_with_is_said_before_anything_is_timed(
    config: BenchConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scenes: int, says: str
) -> None:
    (tmp_path / "zero.npz").write_bytes(b"")
    monkeypatch.setattr("tiue_cli.bench.quality.measure.SIZE", scenes)

    def no_timing(event: Event) -> None:
        assert not (isinstance(event, Progress) and event.stage.startswith(("warm-up", "timing"))), event

    asked = replace(config, quality=True, reference=tmp_path / "zero.npz", images=16)
    with pytest.raises((QualityError, UsageError), match=says):
        run_bench(asked, emit=no_timing, keep=lambda report: pytest.fail("nothing was measured"))


def test_an_error_while_quality_is_measured_leaves_the_times(
    config: BenchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise QualityError("no disk is left")

    monkeypatch.setattr(QualityMeasurement, "prepare", lambda *_: None)
    monkeypatch.setattr(QualityMeasurement, "measure_all", fail)
    kept: list[BenchReport] = []
    with pytest.raises(QualityError, match="no disk"):
        run_bench(replace(config, quality=True, images=16, steps=(1,), teacher="none", peers=()), emit=lambda _: None,
                  keep=kept.append)  # fmt: skip
    (found,) = kept
    assert found.interrupted and found.latency and not found.quality


# --- what is kept out ----------------------------------------------------------------------------------------------


def test_no_ratio_for_a_decoder_that_draws_something_else(config: BenchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    right = layers.merged_weight
    monkeypatch.setattr(layers, "merged_weight", lambda weight: right(weight).flip(-1))
    report = run(replace(config, batches=(1,), steps=(2,), peers=(), teacher_steps=(1,)))
    merged = key(report, "torch/k2-merged")
    subject = next(subject for subject in report.subjects if subject.key == merged)
    assert subject.parity is not None and not subject.parity.passed
    for one in report.ratios:
        if one.subject == merged:
            assert one.ratio is None and one.low is None and one.high is None
            assert "not those of" in str(one.withheld)
        else:
            assert one.ratio is not None
    assert any("no ratio is given" in warning for warning in report.warnings)


def test_a_teacher_alone_gives_an_untrained_student_and_says_so(tiny_teacher_folder: Path) -> None:
    report = run(
        BenchConfig(models=(str(tiny_teacher_folder),), teacher_steps=(1,), batches=(1,), steps=(4,), duration_s=0.001)
    )
    students = [subject for subject in report.subjects if subject.kind in ("student", "student-plain")]
    assert students and all(subject.untrained for subject in students)
    assert not next(subject for subject in report.subjects if subject.kind == "teacher").untrained
    assert any("untrained student" in warning for warning in report.warnings)
    assert report.grid is not None and [column.rpartition("/")[2] for column in report.grid.columns] == ["1-steps"]


def test_random_weights_say_so_and_show_no_pictures() -> None:
    report = run(
        BenchConfig(
            models=("papercut",), random_weights=True, teacher="none", batches=(1,), steps=(4,), duration_s=0.001
        )
    )
    assert all(subject.random_weights and subject.model_sha256 is None for subject in report.subjects)
    assert all(subject.parity.passed for subject in report.subjects if subject.parity is not None)
    assert report.grid is None
    assert "-random_" in report.name
    assert any("random weights" in warning for warning in report.warnings)


def test_an_export_without_its_student_is_compared_with_nothing_and_gives_no_speed_up(
    tmp_path: Path, tiny_teacher_folder: Path
) -> None:
    manifest = write_tiny_export(tmp_path / "export", precision="fp32")
    assert manifest.parity is None
    report = run(
        BenchConfig(
            models=(str(tmp_path / "export"),),
            teacher=str(tiny_teacher_folder),
            teacher_steps=(1,),
            batches=(1,),
            duration_s=0.001,
        )
    )
    assert [subject.key for subject in report.subjects][1:] == [f"export/onnx/k{steps}" for steps in (1, 2, 3, 4)]
    assert all(one.ratio is None and "never compared" in str(one.withheld) for one in report.ratios)
    assert any("was not found" in warning for warning in report.warnings)


def test_a_damaged_export_is_refused(tmp_path: Path) -> None:
    write_tiny_export(tmp_path / "export", precision="fp32")
    (tmp_path / "export" / EXPORT_MANIFEST).write_text("{}")
    with pytest.raises(TiueError):
        run(BenchConfig(models=(str(tmp_path / "export"),)))


def test_tensorrt_that_was_asked_for_and_is_not_there_is_an_error(
    tiny_student_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there may be TensorRT here")
    monkeypatch.setattr(
        "tiue_cli.bench.subjects.loading.load_model", lambda *_, **__: pytest.fail("loaded before it was said")
    )
    with pytest.raises((DeviceError, MissingDependencyError)):
        run(BenchConfig(models=(str(tiny_student_folder),), backends=("torch", "trt")))


def test_models_of_different_sizes_need_a_size(
    tiny_student_folder: Path, tiny_teacher_folder: Path, tmp_path: Path
) -> None:
    from helpers import copy_folder, edit_json

    other = copy_folder(tiny_student_folder, tmp_path / "large")
    edit_json(other / "unet" / "config.json", sample_size=16)
    with pytest.raises(UsageError, match="different sizes") as caught:
        run(BenchConfig(models=(str(tiny_student_folder), str(other)), teacher="none"))
    assert "--size" in str(caught.value.hint)


# --- quality -------------------------------------------------------------------------------------------------------


def quality(subject: str, **metrics: float) -> QualityRecord:
    return QualityRecord(subject=subject, metrics=metrics, repetitions={})


class _Subject:
    def __init__(self, key: str, kind: str, reference: str | None = None) -> None:
        self.key, self.reference = key, reference
        self.record = type("Record", (), {"kind": kind, "label": key})()


def test_a_student_far_below_its_teacher_fails_and_so_does_what_draws_the_same() -> None:
    subjects = [
        _Subject("t", "teacher"),
        _Subject("good", "student"),
        _Subject("bad", "student"),
        _Subject("bad-onnx", "student", reference="bad"),
        _Subject("unmeasured", "student"),
    ]
    records = [
        quality("t", precision=0.6, coverage=0.8),
        quality("good", precision=0.31, coverage=0.41),
        quality("bad", precision=0.6, coverage=0.39),
    ]
    failures = quality_failures(subjects, records)  # type: ignore[arg-type]
    assert set(failures) == {"bad", "bad-onnx"}
    assert failures["bad"] == "its pictures did not pass: coverage 0.39, and 0.80 of t"
    assert quality_failures(subjects, records[1:]) == {}  # type: ignore[arg-type]


def test_names_of_reports_fit_every_file_system() -> None:
    import datetime

    day = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
    assert (
        report_name(["sd15", "A b/ü"], "nvidia-h100", day, random_weights=True)
        == "sd15+a-b-random_nvidia-h100_2026-01-02"
    )
    assert len(report_name(["x" * 300], "m", day, random_weights=False)) < 120
