"""Every subject draws what the product itself draws, and its stages are timed."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_export import write_tiny_export

from tiue_cli.backends.onnx_backend import OnnxBackend
from tiue_cli.backends.torch_backend import StudentTorchBackend, TeacherTorchBackend
from tiue_cli.bench.config import PeerSpec
from tiue_cli.bench.measure.flops import DecoderKind, StageFlops
from tiue_cli.bench.ratios import compare_images
from tiue_cli.bench.report.schema import SubjectRecord
from tiue_cli.bench.subjects.exports import OpenedExport
from tiue_cli.bench.subjects.loading import ModelArgument
from tiue_cli.bench.subjects.models import LoadedModel, load_model, named, random_model
from tiue_cli.bench.subjects.peers import load_peer, peer_subject
from tiue_cli.bench.subjects.subject import Subject
from tiue_cli.bench.subjects.torch_subjects import plain_unet_subject, student_subject, teacher_subject
from tiue_cli.errors import ModelFolderError, UsageError
from tiue_cli.export.tolerance import psnr_db
from tiue_cli.generate.target import ExportInfo
from tiue_cli.model.folder import check_model_folder
from tiue_cli.model.noise import draw_noise
from tiue_cli.model.shared import merge_upsamplers, with_same_weights

PROMPTS = ["a red star", "a blue house above a tree"]
NOISE = draw_noise([0, 1], (4, 8, 8))


def record(*, steps: int, guidance: float | None = None, merged: bool = False, backend: str = "torch") -> SubjectRecord:
    return SubjectRecord.model_validate(
        {
            "key": "m/torch/x",
            "label": "x",
            "kind": "student",
            "backend": backend,
            "model": "m",
            "model_sha256": None,
            "steps": steps,
            "guidance": guidance,
            "merged_upsampler": merged,
            "precision": "fp32",
            "device": "cpu",
            "load_s": 0.0,
        }
    )


@pytest.fixture(scope="module")
def student(tiny_student_folder: Path) -> LoadedModel:
    return load_model("student", str(tiny_student_folder), device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def teacher(tiny_teacher_folder: Path) -> LoadedModel:
    return load_model("teacher", str(tiny_teacher_folder), device="cpu", precision="fp32")


def flops_of(model: LoadedModel) -> StageFlops:
    return StageFlops(model.components, (8, 8))


@pytest.mark.parametrize("variant", ["shared", "plain", "merged"])
@pytest.mark.parametrize("steps", [1, 4])
def test_student_draws_what_generate_draws(
    variant: DecoderKind, steps: int, student: LoadedModel, tiny_student_folder: Path
) -> None:
    subject = student_subject(record(steps=steps), student, flops_of(student), variant=variant)
    outcome = subject.run(PROMPTS, NOISE)
    with StudentTorchBackend(check_model_folder(tiny_student_folder), device="cpu") as backend:
        expected = backend.generate(PROMPTS, NOISE, steps=steps)
    assert psnr_db(outcome.images, expected) > 60
    assert set(outcome.stage_ms) == {"text", "unet_encoder", "unet_decoder", "vae"} == set(subject.flops(2))
    assert all(value > 0 for value in outcome.stage_ms.values())


def test_prepared_subjects_draw_and_time_what_the_plain_ones_do(student: LoadedModel, teacher: LoadedModel) -> None:
    """What a bench runs, on CUDA captured."""
    many, single = record(steps=3, guidance=3.0), record(steps=1, merged=True)
    pairs: list[list[Subject]] = [
        [
            student_subject(record(steps=4), student, flops_of(student), variant="merged", prepared=p)
            for p in (True, False)
        ],
        [teacher_subject(many, teacher, flops_of(teacher), prepared=p) for p in (True, False)],
        [plain_unet_subject(single, student, flops_of(student), prepared=p) for p in (True, False)],
    ]
    for prepared, plain in pairs:
        found, expected = prepared.run(PROMPTS, NOISE), plain.run(PROMPTS, NOISE)
        assert psnr_db(found.images, expected.images) > 45, prepared
        assert set(found.stage_ms) == set(expected.stage_ms) == set(prepared.flops(2))
        assert (prepared.compiles, plain.compiles) == (True, False)
    authors = student_subject(record(steps=4), student, flops_of(student), variant="plain", prepared=True)
    assert not authors.compiles, "the plain K-fold batch is never prepared"


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_teacher_draws_what_generate_draws(guidance: float, teacher: LoadedModel, tiny_teacher_folder: Path) -> None:
    subject = teacher_subject(record(steps=3, guidance=guidance), teacher, flops_of(teacher))
    outcome = subject.run(PROMPTS, NOISE)
    info = check_model_folder(tiny_teacher_folder)
    with TeacherTorchBackend(info, guidance=guidance, device="cpu") as backend:
        expected = backend.generate(PROMPTS, NOISE, steps=3)
    np.testing.assert_array_equal(outcome.images, expected)
    assert set(outcome.stage_ms) == {"text", "unet", "vae"}
    rows = 2 if guidance == 1.0 else 4
    assert subject.flops(2)["unet"] == 3 * flops_of(teacher).unet(rows)


@pytest.mark.parametrize("merged", [False, True])
def test_a_plain_pass_is_the_student_at_one_step(merged: bool, student: LoadedModel) -> None:
    # At K = 1 the one pass runs encoder and decoder at the same timestep … if that timestep is the encoder's.
    subject = plain_unet_subject(record(steps=1, merged=merged), student, flops_of(student))
    outcome = subject.run(PROMPTS, NOISE)
    parts = student.components
    with torch.no_grad():
        tokens = parts.tokenizer(PROMPTS, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
        text_states = parts.text_encoder(tokens.input_ids)[0]
        noise = torch.from_numpy(NOISE)
        prediction = parts.unet(noise, 999, encoder_hidden_states=text_states).sample
        # DDIM's last step from t = 999: x_0 = (x_t - √(1-ᾱ)·ε) / √ᾱ, then back to the final ᾱ (set_alpha_to_one False).
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        bars = np.cumprod(1 - betas)
        clean = (noise - float(np.sqrt(1 - bars[999])) * prediction) / float(np.sqrt(bars[999]))
        latents = float(np.sqrt(bars[0])) * clean + float(np.sqrt(1 - bars[0])) * prediction
        pixels = parts.vae.decode(latents / parts.vae.config.scaling_factor).sample
    expected = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert psnr_db(outcome.images, expected) > 60
    assert set(outcome.stage_ms) == {"text", "unet", "vae"}


def test_merged_upsamplers_change_no_prediction_and_hold_no_weights_of_their_own(student: LoadedModel) -> None:
    unet = student.components.unet
    merged = with_same_weights(unet)
    merge_upsamplers(merged)
    assert {id(parameter) for parameter in merged.parameters()} == {id(parameter) for parameter in unet.parameters()}
    text_states = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(0))
    for size in ((8, 8), (7, 5)):  # the odd one upsamples to other than the double
        noise = torch.from_numpy(draw_noise([3], (4, *size)))
        with torch.no_grad():
            expected = unet(noise, 500, encoder_hidden_states=text_states).sample
            found = merged(noise, 500, encoder_hidden_states=text_states).sample
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_copy_with_the_same_weights_leaves_the_original_alone(student: LoadedModel) -> None:
    vae = student.components.vae
    decoder = vae.decoder
    copy = with_same_weights(vae)
    copy.decoder = torch.nn.Identity()
    assert vae.decoder is decoder


def test_peer_with_the_teachers_sampler_draws_what_the_teacher_draws(
    teacher: LoadedModel, tiny_teacher_folder: Path
) -> None:
    pipeline, _ = load_peer(PeerSpec("peer", str(tiny_teacher_folder), 3, 3.0), device="cpu", precision="fp32")
    from diffusers import DDIMScheduler

    from tiue_cli.model.schedule import ddim_config

    pipeline.scheduler = DDIMScheduler.from_config(ddim_config(teacher.components.scheduler_config))
    with ExitStack() as stack:
        peer = peer_subject(record(steps=3, guidance=3.0), pipeline, stack, size=teacher.image_size, seed=0)
        outcome = peer.run(PROMPTS, NOISE)
    expected = teacher_subject(record(steps=3, guidance=3.0), teacher, flops_of(teacher)).run(PROMPTS, NOISE)
    assert psnr_db(outcome.images, expected.images) > 45  # diffusers rounds in another place
    assert set(outcome.stage_ms) == {"text", "unet", "vae"}
    assert not pipeline.unet._forward_pre_hooks, "the pipeline is left as it was"


def test_a_peer_that_is_no_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"--peer x.*model_index"):
        load_peer(PeerSpec("x", str(tmp_path), 1), device="cpu", precision="fp32")
    (tmp_path / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    with pytest.raises(ModelFolderError, match="--peer x"):
        load_peer(PeerSpec("x", str(tmp_path), 1), device="cpu", precision="fp32")


def test_export_is_timed_graph_by_graph_and_draws_the_same(tmp_path: Path) -> None:
    manifest = write_tiny_export(tmp_path / "export", precision="fp32")
    noise = draw_noise([0, 1], manifest.latent_shape(manifest.default_size))
    with OnnxBackend(tmp_path / "export", provider="cpu", threads=1) as backend:
        expected = backend.generate(PROMPTS, noise, steps=2)
    with ExitStack() as stack:
        opened = OpenedExport(ExportInfo(tmp_path / "export", manifest), "onnx", stack, device="cpu", precision="fp32")
        outcome = Subject(record(steps=2, backend="onnx"), opened.draw(2), opened.clock).run(PROMPTS, noise)
    np.testing.assert_array_equal(outcome.images, expected)
    assert set(outcome.stage_ms) == {"text", "unet_encoder", "unet_decoder", "vae"}


@pytest.mark.parametrize("shape", ["papercut"])
def test_random_weights_are_finite_reproducible_and_no_constant(shape: str) -> None:
    models = [random_model(shape, device="cpu", precision="fp32", seed=seed) for seed in (0, 0, 1)]
    noise = draw_noise([0, 1], (4, 16, 16))
    images = [
        student_subject(record(steps=4), model, StageFlops(model.components, (16, 16)), variant="shared")
        .run(PROMPTS, noise)
        .images
        for model in models
    ]
    np.testing.assert_array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])
    assert images[0].std() > 1
    assert models[0].sha256 is None


def test_openvino_is_timed_graph_by_graph_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install 'tiue[openvino]'")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    manifest = write_tiny_export(tmp_path / "export", precision="fp32")
    noise = draw_noise([0, 1], manifest.latent_shape(manifest.default_size))
    with ExitStack() as stack:
        export = ExportInfo(tmp_path / "export", manifest)
        opened = OpenedExport(export, "openvino", stack, device="cpu", precision="fp32")
        images = opened.draw(2)(PROMPTS, noise)
        assert set(opened.clock.take_ms()) == {"text", "unet_encoder", "unet_decoder", "vae"}
    with OnnxBackend(tmp_path / "export", provider="cpu") as backend:
        assert np.abs(images.astype(int) - backend.generate(PROMPTS, noise, steps=2)).max() <= 1


def test_steps_of_a_student_are_those_it_can_run(student: LoadedModel) -> None:
    argument = ModelArgument("student", "student", student)
    assert argument.steps(None) == (1, 2, 3, 4)
    assert argument.steps((4, 2)) == (4, 2)
    with pytest.raises(UsageError, match="5"):
        argument.steps((5,))


def test_names_are_short_and_different(tmp_path: Path) -> None:
    for name in ("a/student", "b/student", "a/model", "b/model"):
        (tmp_path / name).mkdir(parents=True)
    names: list[str] = []
    for source in (tmp_path / "a/student", tmp_path / "b/student", tmp_path / "a/model", tmp_path / "b/model"):
        names.append(named(str(source), names))
    assert names == ["a-student", "b-student", "model", "model-2"]
    assert named("owner/name", ()) == "name"
    assert named("papercut-student", ()) == "papercut"


@pytest.mark.slow
def test_compiled_student_draws_the_same_and_leaves_the_model_as_it_was(
    student: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Traced and run without a code generator, which would take minutes.
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile_(function, backend="eager"))
    subject = student_subject(record(steps=4, backend="compile"), student, flops_of(student), variant="shared")
    assert subject.compiles
    expected = student_subject(record(steps=4), student, flops_of(student), variant="shared").run(PROMPTS, NOISE)
    found = subject.run(PROMPTS, NOISE)
    assert psnr_db(found.images, expected.images) > 60
    assert type(student.components.vae.decoder).__name__ != "OptimizedModule"


# --- parity --------------------------------------------------------------------------------------------------------


def pictures(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)


def test_parity_is_the_worst_picture_in_decibels() -> None:
    images, changed = pictures(), pictures()
    changed[1, 0, 0, 0] ^= 1
    # One of 192 values is off by one: 10·log10(255²·192).
    found = compare_images([(images, images), (images, changed)], reference="r", precision="fp32")
    assert found.psnr_db == pytest.approx(10 * np.log10(255**2 * 192))
    assert found.passed
    assert compare_images([(images, images)], reference="r", precision="fp32").psnr_db is None


@pytest.mark.parametrize(("precision", "passes"), [("fp32", False), ("fp16", True), ("bf16", True)])
def test_the_bar_depends_on_the_precision(precision: str, passes: bool) -> None:
    images = pictures()
    rounded = (images.astype(np.int64) + 1).clip(0, 255).astype(np.uint8)  # about 48 dB
    assert compare_images([(rounded, images)], reference="r", precision=precision).passed is passes


def test_pictures_that_show_nothing_or_have_another_shape_do_not_pass() -> None:
    grey = np.full((2, 8, 8, 3), 7, dtype=np.uint8)
    assert not compare_images([(grey, grey)], reference="r", precision="fp32").passed
    assert not compare_images([(pictures(), pictures()[:1])], reference="r", precision="fp32").passed
