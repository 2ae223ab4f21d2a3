"""The torch backend on a real GPU: what is captured equals what is launched plainly, in every shape and precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tiue_cli.backends import torch_prepared
from tiue_cli.backends.torch_backend import StudentTorchBackend, TeacherTorchBackend
from tiue_cli.backends.torch_prepared import FastModel, FastOptions, StudentPass, TeacherSteps
from tiue_cli.bench.measure.clock import clock_for
from tiue_cli.errors import DeviceError
from tiue_cli.export.tolerance import psnr_db
from tiue_cli.model.folder import check_model_folder
from tiue_cli.model.noise import draw_noise
from tiue_cli.model.schedule import combine_for_run, ddim_steps
from tiue_cli.model.student import StudentModel, load_student
from tiue_cli.model.teacher import load_teacher

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no usable GPU"),
]
PROMPTS = ["a red heart above a blue house", "a yellow star at night", "two green trees"]
LEAST_DB = {"fp16": 35.0, "bf16": 22.0, "fp32": 60.0}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def student_on_gpu(folder: Path, precision: str) -> StudentModel:
    student = load_student(folder, device="cuda", dtype=DTYPES[precision])
    for module in (student.unet, student.vae):
        torch.nn.Module.to(module, memory_format=torch.channels_last)
    return student


def make_pass(student: StudentModel, **options: bool) -> StudentPass:
    model = FastModel(
        text_encoder=student.text_encoder, unet=student.unet, vae=student.vae, options=FastOptions(**options)
    )
    return StudentPass(model, student.tokenizer, encoder_timestep=student.manifest.encoder_timestep)


def draw(run: StudentPass, student: StudentModel, *, batch: int = 1, steps: int | None = None) -> np.ndarray:
    manifest = student.manifest
    combine = combine_for_run(
        student.scheduler_config, manifest.decoder_timesteps, spacing=manifest.spacing, steps=steps
    )
    side = student.unet.config.sample_size
    with torch.inference_mode():
        return run(PROMPTS[:batch], draw_noise(range(batch), (4, side, side)), combine)


@pytest.mark.parametrize("precision", LEAST_DB)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "k-fold"])
def test_captured_pass_equals_the_cpu_in_float32(tiny_student_folder: Path, shared: bool, precision: str) -> None:
    student = student_on_gpu(tiny_student_folder, precision)
    run = make_pass(student, shared=shared)
    with StudentTorchBackend(check_model_folder(tiny_student_folder), device="cpu") as backend:
        backend._pass = None  # diffusers' modules
        side = student.unet.config.sample_size
        for batch, steps in ((1, None), (3, 2), (1, 1), (1, None), (2, 4), (3, 2)):
            expected = backend.generate(PROMPTS[:batch], draw_noise(range(batch), (4, side, side)), steps=steps)
            actual = draw(run, student, batch=batch, steps=steps)
            assert psnr_db(actual, expected) >= LEAST_DB[precision], (batch, steps)
    assert run._model.notes == []


def test_replays_are_equal_to_the_byte_and_to_plain_launches(tiny_student_folder: Path) -> None:
    student = student_on_gpu(tiny_student_folder, "fp16")
    captured, plain = make_pass(student), make_pass(student, captured=False)
    first = draw(captured, student, batch=2)
    draw(captured, student, batch=1)
    assert np.array_equal(first, draw(captured, student, batch=2))
    assert np.abs(first.astype(int) - draw(plain, student, batch=2)).max() <= 2


def test_latents_are_those_of_the_cpu_and_become_its_pictures(tiny_student_folder: Path) -> None:
    info = check_model_folder(tiny_student_folder)
    with (
        StudentTorchBackend(info, device="cpu") as cpu,
        StudentTorchBackend(info, device="cuda", dtype="fp32") as gpu,
    ):
        cpu._pass = None  # diffusers' modules
        noise = draw_noise([0, 1], cpu.latent_shape(cpu.default_size))
        for steps in (None, 1):
            expected = cpu.latents(PROMPTS[:2], noise, steps=steps)
            found = gpu.latents(PROMPTS[:2], noise, steps=steps)
            assert np.linalg.norm(found - expected) <= 2e-3 * np.linalg.norm(expected), steps
        assert gpu._pass is not None and len(gpu._pass._shapes.keys) == 2


@pytest.mark.parametrize("option", ["single", "search", "products"])
def test_other_ways_to_run_draw_the_same(tiny_student_folder: Path, option: str) -> None:
    student = student_on_gpu(tiny_student_folder, "fp16")
    expected = draw(make_pass(student), student, batch=2)
    run = make_pass(student, **{option: True})
    for _ in range(2):
        assert psnr_db(draw(run, student, batch=2), expected) >= 40.0
    assert run._model.notes == []


def test_pictures_that_were_returned_stay_what_they_were(tiny_student_folder: Path) -> None:
    student = student_on_gpu(tiny_student_folder, "fp16")
    run = make_pass(student)
    kept = draw(run, student, batch=2)
    copy = kept.copy()
    for batch in (1, 2, 3):
        draw(run, student, batch=batch)
    assert np.array_equal(kept, copy)


def test_more_shapes_than_are_held_still_draw_the_same(
    tiny_student_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_prepared, "SHAPES_HELD", 2)
    student = student_on_gpu(tiny_student_folder, "fp16")
    run = make_pass(student)
    wanted = {(batch, steps): draw(run, student, batch=batch, steps=steps) for batch in (1, 2) for steps in (1, 2, 4)}
    assert len(run._shapes.keys) == 2
    for (batch, steps), images in wanted.items():
        assert np.array_equal(draw(run, student, batch=batch, steps=steps), images), (batch, steps)


def test_what_cannot_be_captured_runs_plainly_with_a_note(tiny_student_folder: Path) -> None:
    student = student_on_gpu(tiny_student_folder, "fp16")
    run, plain = make_pass(student), make_pass(student, captured=False)
    text = run._model.text

    def waiting(ids: torch.Tensor) -> torch.Tensor:
        states = text(ids)
        assert float(states.sum().cpu()) == float(states.sum().cpu())  # a copy to the host forbids capture
        return states

    run._model.text = waiting
    images = draw(run, student)
    assert any("cannot be captured" in note for note in run._model.notes)
    assert np.abs(images.astype(int) - draw(plain, student)).max() <= 2
    assert np.array_equal(images, draw(run, student))


def test_overflow_is_told_after_a_replay_too(tiny_student_folder: Path) -> None:
    student = student_on_gpu(tiny_student_folder, "fp16")
    run = make_pass(student)
    draw(run, student)
    with torch.no_grad():
        student.vae.decoder.conv_out.weight.fill_(float("inf"))
    with pytest.raises(DeviceError, match="NaN or infinity"):
        draw(run, student)


def test_the_backend_runs_captured_and_says_nothing(tiny_student_folder: Path) -> None:
    with StudentTorchBackend(check_model_folder(tiny_student_folder), device="cuda") as backend:
        noise = draw_noise([0, 1], backend.latent_shape(backend.default_size))
        images = backend.generate(PROMPTS[:2], noise)
        assert images.shape[0] == 2 and backend.notes == ()
        assert np.array_equal(images, backend.generate(PROMPTS[:2], noise))


def test_the_teachers_captured_steps_equal_the_pipelines(tiny_teacher_folder: Path) -> None:
    teacher = load_teacher(tiny_teacher_folder, device="cuda")
    model = FastModel(text_encoder=teacher.text_encoder, unet=teacher.unet, vae=teacher.vae, options=FastOptions())
    run = TeacherSteps(model, teacher.tokenizer)
    noise = draw_noise([0, 1], (4, teacher.unet.config.sample_size, teacher.unet.config.sample_size))
    with TeacherTorchBackend(check_model_folder(tiny_teacher_folder), guidance=4.0, device="cpu") as backend:
        backend._steps = None  # diffusers' modules
        for steps in (1, 4, 3):
            with torch.inference_mode():
                ours = run(PROMPTS[:2], noise, ddim_steps(teacher.scheduler_config, steps), guidance=4.0)
            assert psnr_db(ours, backend.generate(PROMPTS[:2], noise, steps=steps)) >= 50.0
    assert model.notes == []


def test_events_time_every_stage(tiny_student_folder: Path) -> None:
    student = student_on_gpu(tiny_student_folder, "fp16")
    run, clock = make_pass(student), clock_for("cuda")
    combine = student.linear_combine()
    side = student.unet.config.sample_size
    with torch.inference_mode():
        for _ in range(2):
            run(PROMPTS[:1], draw_noise([0], (4, side, side)), combine, clock=clock)
            taken = clock.take_ms()
    assert set(taken) == {"text", "unet_encoder", "unet_decoder", "vae"} and min(taken.values()) > 0


@pytest.mark.slow
def test_compiled_pass_equals_the_plain_one(tiny_student_folder: Path) -> None:
    student = student_on_gpu(tiny_student_folder, "fp16")
    expected = draw(make_pass(student), student)
    for kernels in (False, True):
        run = make_pass(student, kernels=kernels, compiled=True)
        assert psnr_db(draw(run, student), expected) >= 35.0, kernels
        assert run._model.notes == []
