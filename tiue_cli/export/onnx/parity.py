"""Does the export compute what the student computes? Figures for every output and for whole images, and a bar.

Each graph runs in ONNX Runtime on the CPU, on inputs from the torch reference in float32 (``chain``), at batches, sizes
and numbers of timesteps that are not the traced ones; then prompts run through all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch
from torch import nn

from tiue_cli.backends.onnx_backend import OnnxBackend
from tiue_cli.backends.onnx_session import choose_provider, open_session, run_session, session_errors
from tiue_cli.backends.openvino_backend import OpenvinoBackend
from tiue_cli.backends.openvino_device import native_precisions, open_core
from tiue_cli.base.machine import package_version
from tiue_cli.export.tolerance import (
    CHECK_PROMPTS,
    IDENTICAL_DB,
    REQUIRED_PSNR_DB,
    check_image,
    check_relative_error,
    output_errors,
    psnr_db,
)
from tiue_cli.files.exports import GraphSpec, OutputParity, RuntimeParity, Size
from tiue_cli.model.autoencoder import ImageDecoder
from tiue_cli.model.noise import draw_noise
from tiue_cli.model.schedule import LinearCombine, decoder_timesteps
from tiue_cli.model.student import StudentModel
from tiue_cli.model.text import tokenize
from tiue_cli.model.unet import UNetDecoder, UNetEncoder

PROVIDER: Final = "cpu"

LARGE_PARAMETERS: Final = 200_000_000
"""From this size of the UNet on, the check runs on smaller latents: it must not take longer than the export."""

_TORCH = "torch in float32"
_NEXT = "please report this; --no-check writes the folder without the comparison"


def check_cases(*, steps: int, default: Size, parameters: int, fixed: bool) -> tuple[Case, ...]:
    """Batches, K and latent sizes (h, w) to compare at; none of them is what was traced (2 images, K = 3)."""
    if fixed:
        return (Case(1, steps, default), Case(3 if parameters < LARGE_PARAMETERS else 2, 1, default))
    limit = 16 if parameters >= LARGE_PARAMETERS else 32
    height, width = (min(side, limit) for side in default)
    # The odd sides are no multiple of anything: upsampling has to ask the skips how large to become.
    return (Case(1, steps, (height, width)), Case(3, 1, (height // 2, width)), Case(5, 2, (height // 2 + 1, 5)))


def check_graph(folder: Path, graph: GraphSpec, references: Sequence[tuple[Case, Tensors]]) -> tuple[OutputParity, ...]:
    """Compare one graph with the reference in every case. Raises ParityError naming output and case."""
    provider = choose_provider(PROVIDER)
    session = open_session(folder / graph.onnx.file, provider)
    worst: dict[str, tuple[float, float]] = {output.name: (0.0, 0.0) for output in graph.outputs}
    for case, tensors in references:
        inputs = {port.name: np.ascontiguousarray(tensors[port.name], dtype=port.dtype) for port in graph.inputs}
        with session_errors(f"{graph.onnx.file} with {case.label}"):
            outputs = run_session(session, inputs, provider)
        for name, value in outputs.items():
            where = f"{graph.name}: {name} with {case.label}"
            errors = output_errors(value.numpy(), tensors[name], where=where, reference=_TORCH, hint=_NEXT)
            check_relative_error(errors[1], where=where, precision=graph.precision, hint=_NEXT)
            worst[name] = (max(worst[name][0], errors[0]), max(worst[name][1], errors[1]))
    cases = tuple(case.label for case, _ in references)
    return tuple(
        OutputParity(graph=graph.name, output=name, cases=cases, max_error=error, relative_error=relative)
        for name, (error, relative) in worst.items()
    )


def image_case(*, steps: int, default: Size, parameters: int, fixed: bool) -> Case:
    """What the fixed prompts are drawn as: at the default size, or smaller where that would take minutes."""
    if parameters < LARGE_PARAMETERS:
        return Case(len(CHECK_PROMPTS), steps, default)
    return Case(1, steps, default if fixed else (min(default[0], 32), min(default[1], 32)))


def check_images(folder: Path, references: Sequence[tuple[Case, Tensors]]) -> float:
    """PSNR in dB of the worst image of the fixed prompts, all graphs together. Raises ParityError below the bar."""
    worst = IDENTICAL_DB
    with OnnxBackend(folder, provider=PROVIDER) as backend:
        precision = backend.manifest.precision
        for where, image, reference in _drawn(backend, references):
            found = check_image(image, reference, where=where, reference=_TORCH, precision=precision, hint=_NEXT)
            worst = min(worst, found)
    return worst


def check_openvino(folder: Path, references: Sequence[tuple[Case, Tensors]]) -> tuple[RuntimeParity, ...]:
    """The same images in OpenVINO, where it is installed: in the export's precision, and in bf16 where the CPU has it.

    bf16 is measured and not required: ``--precision auto`` takes it only where it holds. Raises ParityError for images
    of the export's own precision below its bar.
    """
    if package_version("openvino") is None:
        return ()
    found = [_openvino_parity(folder, references, precision="fp32")]
    if "bf16" in native_precisions(open_core(cache=None), "CPU"):
        found.append(_openvino_parity(folder, references, precision="bf16"))
    return tuple(found)


def _openvino_parity(
    folder: Path, references: Sequence[tuple[Case, Tensors]], *, precision: Literal["fp32", "bf16"]
) -> RuntimeParity:
    worst = IDENTICAL_DB
    with OpenvinoBackend(folder, device="cpu", precision=precision) as backend:
        own = backend.manifest.precision
        for where, image, reference in _drawn(backend, references):
            where = f"{where} in OpenVINO"
            if precision == "fp32":
                check_image(image, reference, where=where, reference=_TORCH, precision=own, hint=_NEXT)
            worst = min(worst, psnr_db(image, reference))
    bar = REQUIRED_PSNR_DB[own] if precision == "fp32" else min(REQUIRED_PSNR_DB[own], REQUIRED_PSNR_DB["fp16"])
    version = package_version("openvino")
    assert version is not None
    return RuntimeParity(
        runtime="openvino", version=version, precision=precision, image_psnr_db=worst, required_psnr_db=bar
    )


def _drawn(
    backend: OnnxBackend | OpenvinoBackend, references: Sequence[tuple[Case, Tensors]]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(what it is, image, the reference's) for every image of the cases."""
    for case, tensors in references:
        prompts = check_prompts(case.batch)
        images = backend.generate(prompts, tensors["noise"], steps=case.steps)
        for prompt, image, reference in zip(prompts, images, tensors["images"], strict=True):
            yield f"the image of {prompt!r} with {case.label}", image, reference


Tensors = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """A batch of images to compare: ``latent`` is the latents' (h, w), ``steps`` is K."""

    batch: int
    steps: int
    latent: Size

    @property
    def label(self) -> str:
        """Such as ``3 images, K=1, latents 8x12``."""
        images = "1 image" if self.batch == 1 else f"{self.batch} images"
        return f"{images}, K={self.steps}, latents {self.latent[0]}x{self.latent[1]}"


@torch.no_grad()
def run_chain(student: StudentModel, case: Case) -> dict[str, np.ndarray]:
    """All tensors of a case by their names in the graphs: float32, tokens and timesteps int64, images uint8."""
    input_ids = tokenize(student.tokenizer, check_prompts(case.batch))
    channels = int(student.unet.config["in_channels"])
    noise = torch.from_numpy(draw_noise(range(case.batch), (channels, *case.latent)))
    text_states = student.text_encoder(input_ids)[0]
    features = UNetEncoder(student.unet)(noise, text_states, student.manifest.encoder_timestep)
    combine = _combine(student, case.steps)
    timesteps = torch.tensor(combine.timesteps)
    latents = combine(noise, UNetDecoder(student.unet)(features, timesteps, text_states))
    tensors = {
        "input_ids": input_ids.numpy(),
        "text_states": text_states.numpy(),
        "noise": noise.numpy(),
        "mid": features.mid.numpy(),
        **{f"skip_{index:02}": skip.numpy() for index, skip in enumerate(features.skips)},
        "timesteps": timesteps.numpy(),
        "weights": np.array(combine.weights, dtype=np.float32),
        "latents": latents.numpy(),
    }
    return {**tensors, "images": ImageDecoder(student.vae).decode(latents)}


def check_prompts(batch: int) -> list[str]:
    """The fixed prompts of a batch, over and over."""
    return [CHECK_PROMPTS[index % len(CHECK_PROMPTS)] for index in range(batch)]


@contextlib.contextmanager
def largest_magnitude(module: nn.Module) -> Iterator[Callable[[], float]]:
    """Watch a module at work: yields a function that says the largest magnitude of any layer's output so far."""
    largest = [0.0]

    def look(_: nn.Module, __: object, output: object) -> None:
        if isinstance(output, torch.Tensor) and output.is_floating_point():
            largest.append(max(largest.pop(), float(output.detach().abs().max())))

    handles = [part.register_forward_hook(look) for part in module.modules()]
    try:
        yield lambda: largest[0]
    finally:
        for handle in handles:
            handle.remove()


def _combine(student: StudentModel, steps: int) -> LinearCombine:
    """The student's own timesteps where it has so many; else what the schedule gives: arithmetic is arithmetic."""
    if steps == len(student.manifest.decoder_timesteps):
        return student.linear_combine()
    config = student.scheduler_config
    return LinearCombine.from_scheduler_config(config, decoder_timesteps(config, steps, spacing="leading"))
