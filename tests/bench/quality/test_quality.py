"""Claims about the measurement: what it draws and keeps, how it goes on, and that its figures are those of the parts.

The subject "draws" by rendering papercut scenes from its noise, so that good pictures cost no model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import drawn_scenes
import numpy as np
import pytest
from drawn_scenes import LATENT, scenes, small, subject
from feature_graphs import mean_color_graph
from papercut_quality import papercut_features, papercut_metrics
from PIL import Image

from tiue_cli.base.events import Event, Note, Progress
from tiue_cli.bench.quality import measure as quality
from tiue_cli.bench.quality.drawing import Drawing, Processes, QualitySubject
from tiue_cli.bench.quality.extractors import Sharpness
from tiue_cli.bench.quality.features import Resizing
from tiue_cli.bench.quality.measure import QualityMeasurement, QualityResult
from tiue_cli.bench.quality.metrics import FeatureSet, compare_sets, diversity
from tiue_cli.bench.quality.onnx_features import OnnxExtractor
from tiue_cli.bench.quality.plan import QualityConfig, Row, plan_quality
from tiue_cli.bench.quality.references import REFERENCE_SEED, Reference, rendered_chunks, write_statistics
from tiue_cli.errors import PromptError, QualityError, UsageError
from tiue_cli.model.noise import draw_noise
from tiue_cli.papercut.evaluation import balanced_specs


class Painter:
    """A subject that counts what it draws, and may be made to fail after some images."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.drawn: list[str] = []
        self._fail_after = fail_after

    def __call__(self, prompts: Sequence[str], noise: np.ndarray) -> np.ndarray:
        if self._fail_after is not None and len(self.drawn) >= self._fail_after:
            raise KeyboardInterrupt
        self.drawn += prompts
        return scenes(prompts, noise)


def run(config: QualityConfig, *subjects: QualitySubject) -> tuple[QualityResult, list[Event]]:
    events: list[Event] = []
    result = QualityMeasurement(config, emit=events.append).measure_all(subjects)
    assert result is not None
    return result, events


# --- figures -------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_images_themselves(tmp_path: Path) -> None:
    """Against the same pictures drawn at once and measured by papercut_metrics."""
    config = QualityConfig(cache=tmp_path, images=40, diversity_prompts=5, diversity_images=3, batch=16, seeds=(7,))
    result, _ = run(config, subject())
    specs = balanced_specs(40)
    prompts = [spec.caption for spec in specs]
    images = scenes(prompts, draw_noise(range(7, 47), LATENT))
    references = np.concatenate([part for _, part in rendered_chunks(specs, REFERENCE_SEED)])
    expected = papercut_metrics(images, specs, references)
    expected.pop("diversity", None)  # there over captions that happen to repeat; here over chosen prompts
    ceiling, ours = result.records
    assert (ceiling.subject, ours.subject) == ("reference", "papercut/k4")
    assert {name: ours.metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert set(ours.metrics) == {*expected, "diversity"} == set(ceiling.metrics)
    assert {"kid", "precision", "recall", "density", "coverage", "checker_all"} <= set(expected)

    # Prompts 0, 8, 16, 24, 32; the first of three images is that of the 40, the others follow in pairs.
    again = scenes([prompts[n] for n in range(0, 40, 8) for _ in "12"], draw_noise(range(47, 57), LATENT))
    features = papercut_features(np.concatenate([images[::8], again]), name="both").features
    groups = [*range(5), 0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert ours.metrics["diversity"] == pytest.approx(diversity(features, groups), rel=1e-5)


def test_repetitions_stand_apart_and_their_mean_is_the_figure(tmp_path: Path) -> None:
    both, _ = run(small(tmp_path, seeds=(0, 1000)), subject())
    alone, _ = run(small(tmp_path, seeds=(1000,)), subject())
    ours = both.records[1]
    for name, values in ours.repetitions.items():
        assert values[1] == alone.records[1].metrics[name]
        assert ours.metrics[name] == pytest.approx(sum(values) / 2)
    assert len(set(ours.repetitions["recall"])) + len(set(ours.repetitions["kid"])) > 2
    assert both.protocol.seeds == (0, 1000)


def test_a_subject_that_ignores_its_noise_has_no_diversity(tmp_path: Path) -> None:
    def stubborn(prompts: Sequence[str], noise: np.ndarray) -> np.ndarray:
        return scenes(prompts, np.ones_like(noise))

    result, _ = run(small(tmp_path), subject(), subject(stubborn, "stubborn", identity="2"))
    ceiling, varied, same = (record.metrics for record in result.records)
    assert same["diversity"] < 1e-4 < varied["diversity"] and varied["diversity"] == pytest.approx(
        ceiling["diversity"], rel=0.5
    )
    assert same["checker_all"] == 1


def test_the_protocol_says_what_was_left_out_and_what_may_be_compared(tmp_path: Path) -> None:
    result, events = run(small(tmp_path), subject())
    protocol, notes = result.protocol, " | ".join(result.protocol.notes)
    assert "fid" not in result.records[1].metrics and "fid left out: 12 images, and 192 features need 193" in notes
    assert not protocol.comparable and "12 images, fewer than 5,000: not comparable with published figures" in notes
    assert (protocol.images, protocol.features, protocol.k, protocol.reference_images) == (12, 192, 5, 12)
    assert protocol.diversity == "2 images of each of 3 prompts" and protocol.clip is None
    done = [event for event in events if isinstance(event, Progress) and event.stage == "quality"]
    assert (done[-1].done, done[-1].total, done[-1].detail) == (15, 15, "papercut/k4")


# --- prompts -------------------------------------------------------------------------------------------------------


def test_prompts_of_a_file_are_cut_or_repeated_and_it_is_said(tmp_path: Path) -> None:
    file = tmp_path / "captions.txt"
    file.write_text("a red star at night\nan orange fish under the sea\na red star at night\n")
    plan = plan_quality(small(tmp_path, prompts=file, images=2))
    assert plan.prompts == ("a red star at night", "an orange fish under the sea") and "first 2 of 3" in plan.notes[0]
    plan = plan_quality(small(tmp_path, prompts=file, images=5))
    assert plan.prompts[3:] == plan.prompts[:2] and "more than once" in plan.notes[0]
    assert plan.specs is not None and plan.specs[1].things[0].object == "fish"
    file.write_text("a lighthouse\na red star\n")
    assert plan_quality(small(tmp_path, prompts=file, images=2)).specs is None
    (rows := tmp_path / "rows.jsonl").write_text('{"prompt": "a star", "seed": 3}\n')
    with pytest.raises(UsageError, match="sets a seed"):
        plan_quality(small(tmp_path, prompts=rows, images=2))
    with pytest.raises(PromptError, match="does not exist"):
        plan_quality(small(tmp_path, prompts=tmp_path / "none.txt"))


def test_images_of_a_plan_have_seeds_of_their_own() -> None:
    plan = plan_quality(QualityConfig(cache=Path(), images=10, diversity_prompts=3, diversity_images=4, seeds=(5, 50)))
    seeds = [row.seed for repetition in range(2) for row in plan.rows(repetition)]
    assert seeds == [*range(5, 24), *range(50, 69)]
    places, groups = plan.diversity_groups()
    rows = plan.rows(0)
    assert len(places) == 12
    assert [rows[place].prompt for place in places] == [plan.prompts[group] for group in groups]
    assert sorted(groups.count(group) for group in set(groups)) == [4, 4, 4]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"seeds": (0, 14)}, "share noise"),
        ({"images": 1}, "images 1"),
        ({"resize": 4}, "resize 4"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_drawn(tmp_path: Path, changes: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        run(small(tmp_path, **changes), subject(None))


def test_pictures_that_are_not_papercuts_need_prompts_references_and_an_extractor(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="draws 512x512"):
        run(small(tmp_path), subject(None, size=(512, 512)))
    (file := tmp_path / "captions.txt").write_text("a lighthouse\n")
    with pytest.raises(UsageError, match="needs a feature extractor"):
        run(small(tmp_path, prompts=file), subject(None))


# --- drawing -------------------------------------------------------------------------------------------------------


def test_an_interrupted_measurement_goes_on_and_equals_the_uninterrupted(tmp_path: Path) -> None:
    whole, _ = run(small(tmp_path / "a"), subject())
    config, broken = small(tmp_path / "b"), Painter(fail_after=8)
    with pytest.raises(KeyboardInterrupt):
        run(config, subject(broken))
    second = Painter()
    result, events = run(config, subject(second))
    assert (len(broken.drawn), len(second.drawn)) == (8, 7)
    assert result.records[1].repetitions == whole.records[1].repetitions
    first = next(event for event in events if isinstance(event, Progress) and event.stage == "quality")
    assert (first.done, first.total) == (12, 15)

    third = Painter()
    again, _ = run(config, subject(third))
    assert third.drawn == [] and again.records[1].metrics == whole.records[1].metrics
    assert again.records[1].images_per_s is None


@pytest.mark.parametrize("change", ["identity", "seeds", "size"])
def test_cached_features_are_not_taken_for_other_pictures(tmp_path: Path, change: str) -> None:
    config, painter = small(tmp_path), Painter()
    run(config, subject())
    other = subject(painter, identity="weights 2") if change == "identity" else subject(painter)
    if change == "seeds":
        config = replace(config, seeds=(9,))
    elif change == "size":
        config = replace(config, images=10)
    run(config, other)
    assert len(painter.drawn) == len(plan_quality(config).order)


def test_images_are_kept_with_their_prompts_and_seeds_and_drawn_again_where_one_is_gone(tmp_path: Path) -> None:
    config = small(tmp_path, keep_images=tmp_path / "images", seeds=(3,))
    result, _ = run(config, subject())
    folder = tmp_path / "images" / "papercut-k4" / "3"
    assert result.records[1].kept_in == str(folder.parent)
    lines = [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]
    assert len(lines) == 15 and lines[5]["seed"] == 8
    expected = scenes([lines[5]["prompt"]], draw_noise([8], LATENT))[0]
    assert np.array_equal(np.asarray(Image.open(folder / lines[5]["file"])), expected)
    (folder / "000010.png").unlink()
    painter = Painter()
    run(config, subject(painter))
    assert len(painter.drawn) == 4 and (folder / "000010.png").is_file()


def test_a_subject_that_draws_another_size_or_type_is_an_error(tmp_path: Path) -> None:
    def wide(prompts: Sequence[str], noise: np.ndarray) -> np.ndarray:
        return np.zeros((len(prompts), 64, 96, 3), np.uint8)

    with pytest.raises(QualityError, match=r"papercut/k4 drew uint8 \(4, 64, 96, 3\)"):
        run(small(tmp_path), subject(wide))


def test_constant_pictures_are_measured_and_recall_nothing(tmp_path: Path) -> None:
    def grey(prompts: Sequence[str], noise: np.ndarray) -> np.ndarray:
        return np.full((len(prompts), 64, 64, 3), 128, np.uint8)

    metrics = run(small(tmp_path), subject(grey))[0].records[1].metrics
    assert metrics["recall"] == 0 and metrics["diversity"] < 1e-4 and metrics["checker_all"] < 0.3
    assert all(np.isfinite(value) for value in metrics.values())


def test_features_that_are_not_finite_name_the_subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiue_cli.bench.quality import extractors

    def overflown(_: Any, images: np.ndarray) -> np.ndarray:
        found = embed(shipped, images)
        return np.where(images.mean(axis=(1, 2, 3))[:, None] == 7, np.float32(np.nan), found)

    embed, shipped = extractors.embed, extractors.shipped_checker()
    monkeypatch.setattr(extractors.PapercutChecker, "__call__", overflown)

    def drawn(prompts: Sequence[str], noise: np.ndarray) -> np.ndarray:
        images = scenes(prompts, noise)
        images[-1] = 7
        return images

    with pytest.raises(QualityError, match="papercut/k4: the features of image 3 are not finite"):
        run(small(tmp_path), subject(drawn))


def test_memory_holds_a_batch_of_images_and_not_all(tmp_path: Path) -> None:
    """120 images of 256x256 are 24 MB, a batch of 4 is 0.8 MB."""

    class MeanColor:
        name, sha256, width, resize = "mean colour", "0" * 64, 3, "none"

        def __call__(self, images: np.ndarray) -> np.ndarray:
            return np.stack([image.mean(axis=(0, 1)) for image in images]).astype(np.float32)

    def blank(prompts: Sequence[str], noise: np.ndarray) -> np.ndarray:
        return np.zeros((len(prompts), 256, 256, 3), np.uint8)

    drawing = Drawing(
        subject(blank, size=(256, 256)),
        [Row("a star", seed) for seed in range(120)],
        {"features": MeanColor()},
        resizing=Resizing(),
        batch=4,
        cache=tmp_path,
    )
    tracemalloc.start()
    assert sum(drawing.draw(Processes())) == 120
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert drawing.features("features").shape == (120, 3) and peak_bytes < 8e6


def test_processes_draw_their_own_batches_and_only_the_main_one_measures(tmp_path: Path) -> None:
    """Two processes one after the other, without a barrier: together they draw each image once."""
    painters = [Painter(), Painter()]
    config = small(tmp_path)
    for index in (1, 0):
        processes = Processes()
        processes.index, processes.count = index, 2
        result = QualityMeasurement(config, processes=processes).measure_all([subject(painters[index])])
        assert (result is None) == (index == 1)
    assert result is not None
    assert [len(painter.drawn) for painter in painters] == [8, 7]
    whole, _ = run(small(tmp_path / "whole"), subject())
    assert result.records[1].metrics == whole.records[1].metrics


@pytest.mark.slow
def test_accelerate_launch_with_two_processes_equals_one(tmp_path: Path) -> None:
    script = tmp_path / "measure.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(drawn_scenes.__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "from drawn_scenes import small, subject\n"
        "from tiue_cli.bench.quality.measure import QualityMeasurement\n"
        "from tiue_cli.bench.quality.drawing import Processes\n"
        "processes = Processes()\n"
        "assert processes.count == 2\n"
        "measurement = QualityMeasurement(small(Path(sys.argv[1])), processes=processes)\n"
        "result = measurement.measure_all([subject()])\n"
        "if result is not None:\n"
        "    Path(sys.argv[1], 'result.json').write_text(result.records[1].model_dump_json())\n"
    )
    # With --cpu alone, accelerate starts a single process; this launcher serves CPUs too.
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    command = [sys.executable, "-m", "accelerate.commands.launch", *options.split(), "--main_process_port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command += [str(script), str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "two" / "result.json").read_text())
    whole, _ = run(small(tmp_path / "one"), subject())
    assert found["metrics"] == whole.records[1].metrics and found["images_per_s"] is None
    names = [sorted(file.name for file in (tmp_path / one).rglob("*.npy")) for one in ("one", "two")]
    assert names[0] == names[1] and len(names[0]) == 8


def test_subjects_with_one_key_and_no_subject_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="named twice"):
        run(small(tmp_path), subject(), subject())
    with pytest.raises(UsageError, match="no subject"):
        run(small(tmp_path))


def test_notes_of_the_plan_are_told_before_anything_is_drawn(tmp_path: Path) -> None:
    (file := tmp_path / "captions.txt").write_text("a red star at night\n" * 30)
    told: list[str] = []

    def stop_at_a_note(event: Event) -> None:
        if isinstance(event, Note):
            told.append(event.text)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        QualityMeasurement(small(tmp_path, prompts=file), emit=stop_at_a_note).measure_all([subject(None)])
    assert told == ["the first 12 of 30 prompts"]


# --- other pictures than papercut's --------------------------------------------------------------------------------


def lights(prompts: Sequence[str], noise: np.ndarray) -> np.ndarray:
    """Pictures of 24x32 whose mean colour and brightness follow the noise."""
    levels = 128 + 40 * noise[:, :3, 0, 0]
    ramp = np.linspace(-60, 60, 32)[None, None, :, None]
    return np.clip(levels[:, None, None] + ramp + np.zeros((1, 24, 1, 1)), 0, 255).astype(np.uint8)


def test_any_pictures_are_measured_by_a_given_extractor_folder_and_prompts(tmp_path: Path) -> None:
    """With 3 features, 40 images allow the Fréchet distance; the reference is another draw of the same."""
    graph = mean_color_graph(tmp_path / "mean.onnx", ["n", 3, "h", "w"])
    (prompts := tmp_path / "captions.txt").write_text("a lighthouse\na pier\n" * 20)
    (folder := tmp_path / "photos").mkdir()
    references = lights([""] * 50, draw_noise(range(5000, 5050), LATENT))
    for number, image in enumerate(references):
        Image.fromarray(image).save(folder / f"{number}.png")
    config = small(
        tmp_path, prompts=prompts, reference=folder, extractor=graph, images=40, resize=16, diversity_images=1
    )
    painter = subject(lights, "lights", size=(24, 32))
    result, _ = run(config, painter)
    (record,) = result.records
    images = Resizing(16)(lights([""] * 40, draw_noise(range(40), LATENT)))
    ours, theirs = (FeatureSet(OnnxExtractor(graph)(one), name="x") for one in (images, Resizing(16)(references)))
    ordered = FeatureSet(theirs.features[np.argsort([str(n) for n in range(50)], kind="stable")], name="x")
    expected, left_out = compare_sets(ours, ordered)
    expected["sharpness"] = float(Sharpness()(images).mean())
    assert left_out == {} and record.metrics == pytest.approx(expected, rel=1e-5)
    assert result.protocol.extractor == "mean.onnx (ONNX)" and result.protocol.reference == "50 images in photos"
    assert "16x16 by lanczos" in result.protocol.resize and result.protocol.diversity is None

    with pytest.raises(QualityError, match=r"24x32 and the other images are 20x20"):
        run(replace(config, resize=None), subject(None, "other", size=(20, 20)))
    with pytest.raises(UsageError, match=r"second draws 64x64, the subjects before it 24x32"):
        run(replace(config, resize=None), painter, subject(None, "second"))


def test_statistics_stand_for_their_folder_and_comparable_figures_need_many_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "COMPARABLE_IMAGES", 500)  # 5,000 in fact, which take their time
    extractor = OnnxExtractor(mean_color_graph(tmp_path / "mean.onnx", ["n", 3, "h", "w"]))
    (prompts := tmp_path / "captions.txt").write_text("a lighthouse\n")
    features = extractor(lights([""] * 600, draw_noise(range(9000, 9600), LATENT)))
    reference = Reference("600 lights", 600, None, FeatureSet(features, name="lights"))
    stats = write_statistics(tmp_path / "stats.npz", reference, extractor=extractor, resizing=Resizing())
    config = small(
        tmp_path, prompts=prompts, reference=stats, extractor=tmp_path / "mean.onnx", images=500, diversity_images=1
    )
    result, _ = run(replace(config, batch=100), subject(lights, "lights", size=(24, 32)))
    assert result.protocol.comparable and result.protocol.reference_images == 600
    assert result.records[0].metrics["precision"] > 0.9
    few, _ = run(replace(config, images=100), subject(lights, "lights", size=(24, 32)))
    assert not few.protocol.comparable and few.records[0].metrics["fid"] > result.records[0].metrics["fid"]
