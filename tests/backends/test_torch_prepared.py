"""The pass that a GPU runs, against diffusers' modules; uncaptured on a CPU, in torch's own arithmetic."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tiue_cli.backends.few_entries import FewEntries
from tiue_cli.backends.torch_backend import StudentTorchBackend, TeacherTorchBackend
from tiue_cli.backends.torch_prepared import FastModel, FastOptions, StudentPass, TeacherSteps, group_size, searching
from tiue_cli.errors import DeviceError, ModelFolderError
from tiue_cli.model.folder import check_model_folder
from tiue_cli.model.noise import draw_noise
from tiue_cli.model.schedule import combine_for_run, ddim_steps
from tiue_cli.model.student import load_student
from tiue_cli.model.teacher import load_teacher

PROMPTS = ("a red heart above a blue house", "a yellow star at night")


def fast(parts: object, **options: bool) -> FastModel:
    return FastModel(text_encoder=parts.text_encoder, unet=parts.unet, vae=parts.vae, options=FastOptions(**options))


@pytest.mark.parametrize("option", ["single", "products", "search"])
def test_ways_to_run_a_pass_draw_the_same(tiny_student_folder: Path, option: str) -> None:
    student = load_student(tiny_student_folder)
    noise = draw_noise([0, 1], (4, 8, 8))
    drawn, latents = [], []
    for options in ({}, {option: True}):
        run = StudentPass(fast(student, **options), student.tokenizer, encoder_timestep=981)
        with torch.inference_mode():
            for _ in range(2):
                drawn.append(run(PROMPTS, noise, student.linear_combine()))
            latents.append(run.latents(PROMPTS, noise, student.linear_combine()))
    assert all(np.abs(images.astype(int) - drawn[0]).max() <= 1 for images in drawn)
    assert torch.equal(*latents)


class FromTheHost(TorchDispatchMode):
    """Notes what a CUDA graph cannot hold: a tensor made of Python's numbers, a number read back."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.lift_fresh, torch.ops.aten._local_scalar_dense):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_what_is_captured_takes_nothing_from_the_host(tiny_student_folder: Path) -> None:
    student = load_student(tiny_student_folder)
    run = StudentPass(fast(student), student.tokenizer, encoder_timestep=981)
    noise = draw_noise([0, 1], (4, 8, 8))
    with torch.inference_mode():
        run(PROMPTS, noise, student.linear_combine())
        (shape,) = run._shapes._entries.values()
        for name, stage in shape._stages.items():
            with FromTheHost() as host:
                stage()
            assert host.seen == [], name
    # What the pass was before: the claim can fail.
    with StudentTorchBackend(check_model_folder(tiny_student_folder), device="cpu") as backend:
        with FromTheHost() as host:
            backend.generate(PROMPTS, noise)
        assert host.seen


@pytest.mark.parametrize(("gib", "images"), [(80, 13), (24, 4), (4, 1)])
def test_images_are_decoded_in_groups_that_fill_a_quarter_of_the_gpu(
    gib: int, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=gib * 2**30))
    assert group_size(torch.device("cuda"), 512 * 512) == images


def test_searching_lasts_for_its_block() -> None:
    before = torch.backends.cudnn.benchmark
    with pytest.raises(RuntimeError), searching(True):
        assert torch.backends.cudnn.benchmark
        raise RuntimeError
    with searching(False):
        assert torch.backends.cudnn.benchmark == before
    assert torch.backends.cudnn.benchmark == before


@pytest.mark.parametrize("vae", [None, "embedded"])
def test_prepared_pass_draws_what_the_plain_backend_draws(tiny_student_folder: Path, vae: str | None) -> None:
    folder = tiny_student_folder if vae is None else Path(__file__)
    if vae is not None:
        from tiue_cli.model.hub import EMBEDDED_STUDENT, resolve_model

        folder = resolve_model(EMBEDDED_STUDENT)
    student = load_student(folder)
    manifest = student.manifest
    with StudentTorchBackend(check_model_folder(folder), device="cpu") as backend:
        backend._pass = None  # diffusers' modules
        noise = draw_noise([0, 1], backend.latent_shape(backend.default_size))
        run = StudentPass(fast(student), student.tokenizer, encoder_timestep=manifest.encoder_timestep)
        for steps in (None, 1, 2, None):
            combine = combine_for_run(
                student.scheduler_config, manifest.decoder_timesteps, spacing=manifest.spacing, steps=steps
            )
            with torch.inference_mode():
                ours = run(PROMPTS, noise, combine)
            theirs = backend.generate(PROMPTS, noise, steps=steps)
            assert np.abs(ours.astype(int) - theirs).max() <= 1, steps


def test_captured_steps_sample_what_the_pipeline_samples(tiny_teacher_folder: Path) -> None:
    teacher = load_teacher(tiny_teacher_folder)
    with TeacherTorchBackend(check_model_folder(tiny_teacher_folder), guidance=4.0, device="cpu") as backend:
        backend._steps = None  # diffusers' modules
        noise = draw_noise([0, 1], backend.latent_shape(backend.default_size))
        run = TeacherSteps(fast(teacher), teacher.tokenizer)
        done: list[int] = []
        for steps in (1, 3, 4):
            with torch.inference_mode():
                sampled = ddim_steps(teacher.scheduler_config, steps)
                ours = run(PROMPTS, noise, sampled, guidance=4.0, progress=done.append)
            theirs = backend.generate(PROMPTS, noise, steps=steps)
            assert np.abs(ours.astype(int) - theirs).max() <= 1, steps
        assert done == [1, 1, 2, 3, 1, 2, 3, 4]


@pytest.mark.parametrize("merged", [False, True])
def test_prepared_latents_are_those_of_the_plain_backend_and_stay_what_they_were(
    tiny_student_folder: Path, merged: bool
) -> None:
    student = load_student(tiny_student_folder)
    with StudentTorchBackend(check_model_folder(tiny_student_folder), device="cpu") as backend:
        backend._pass = None  # diffusers' modules
        noise = draw_noise([0, 1], backend.latent_shape(backend.default_size))
        expected = backend.latents(PROMPTS, noise)
        images = backend.generate(PROMPTS, noise)
        backend._pass = run = StudentPass(
            fast(student, merged=merged), student.tokenizer, encoder_timestep=student.manifest.encoder_timestep
        )
        found = backend.latents(PROMPTS, noise)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
        with torch.inference_mode():
            held = run.latents(PROMPTS, noise, student.linear_combine())
            assert np.abs(backend.generate(PROMPTS, noise[::-1].copy()).astype(int) - images).max() > 1
        np.testing.assert_array_equal(held.numpy(), found)


WEIGHTS = {
    "text encoder": ("text_encoder", "final_layer_norm.weight"),
    # Of the UNet, and yet computed with the text: it makes the keys that a pass keeps.
    "UNet": ("unet", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"),
    "autoencoder": ("vae", "decoder.conv_out.weight"),
}


@pytest.mark.parametrize("part", list(WEIGHTS))
@pytest.mark.parametrize(
    ("value", "said"), [(float("nan"), "weights hold NaN or infinity"), (3e38, "produced NaN or infinity in float32")]
)
@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_of_a_picture_that_is_not_finite_the_first_part_to_blame_is_named(
    tiny_student_folder: Path, tiny_teacher_folder: Path, kind: str, part: str, value: float, said: str
) -> None:
    model = load_student(tiny_student_folder) if kind == "student" else load_teacher(tiny_teacher_folder)
    module, name = WEIGHTS[part]
    weights = dict(getattr(model, module).named_parameters())
    with torch.no_grad():
        next(weight for key, weight in weights.items() if key.endswith(name)).fill_(value)
    prepared, noise = fast(model), draw_noise([0], (4, 8, 8))
    with torch.inference_mode(), pytest.raises((DeviceError, ModelFolderError)) as caught:
        if kind == "student":
            StudentPass(prepared, model.tokenizer, encoder_timestep=751)(PROMPTS[:1], noise, model.linear_combine())
        else:
            steps = ddim_steps(model.scheduler_config, 2)
            TeacherSteps(prepared, model.tokenizer)(PROMPTS[:1], noise, steps, guidance=2.0)
    assert caught.value.message.startswith(f"the {part}") and said in caught.value.message


def test_compile_is_refused_on_a_cpu(tiny_student_folder: Path) -> None:
    with pytest.raises(DeviceError, match="--compile is for CUDA"):
        StudentTorchBackend(check_model_folder(tiny_student_folder), device="cpu", compiled=True)


def test_the_least_recently_used_entry_makes_way() -> None:
    entries: FewEntries[str] = FewEntries(2)
    made: list[str] = []

    def make(key: str) -> str:
        made.append(key)
        return key.upper()

    for key in ("a", "b", "a", "c", "a", "b"):
        assert entries.get(key, lambda key=key: make(key)) == key.upper()
    assert made == ["a", "b", "c", "b"]
    assert entries.keys == ("a", "b")
