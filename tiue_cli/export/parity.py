"""Does the export compute what the student computes? Figures for every output and for whole images, and a bar.

Each graph runs in ONNX Runtime on the CPU, on inputs from the torch reference in float32 (``chain``), at batches, sizes
and numbers of timesteps that are not the traced ones; then prompts run through all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from tiue_cli.backends.onnx_backend import OnnxBackend
from tiue_cli.backends.onnx_session import choose_provider, open_session, run_session, session_errors
from tiue_cli.errors import ParityError
from tiue_cli.export.chain import CHECK_PROMPTS, Case, Tensors, check_prompts
from tiue_cli.export.manifest import GraphSpec, OutputParity, Precision, Size

PROVIDER: Final = "cpu"
REQUIRED_PSNR_DB: Final[Mapping[Precision, float]] = {"fp32": 60.0, "fp16": 35.0}
ALLOWED_RELATIVE_ERROR: Final[Mapping[Precision, float]] = {"fp32": 1e-3, "fp16": 5e-2}
"""Of every output of every graph. Measured: 1e-6 and 1e-3; a wrong graph is off by 1e-1 and more."""
IDENTICAL_DB: Final = 100.0
"""PSNR that stands for images without any difference; uint8 images that differ at all stay below it."""

LARGE_PARAMETERS: Final = 200_000_000
"""From this size of the UNet on, the check runs on smaller latents: it must not take longer than the export."""

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
            errors = _compare(value.numpy(), tensors[name], where=f"{graph.name}: {name} with {case.label}")
            if errors[1] > (allowed := ALLOWED_RELATIVE_ERROR[graph.precision]):
                raise ParityError(
                    f"{graph.name}: {name} with {case.label} has a relative error of {errors[1]:.1e}; {allowed:.0e} is"
                    f" allowed in {graph.precision}",
                    hint=_NEXT if graph.precision == "fp32" else f"try --precision fp32; {_NEXT}",
                )
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
        for case, tensors in references:
            prompts = check_prompts(case.batch)
            images = backend.generate(prompts, tensors["noise"], steps=case.steps)
            for prompt, image, reference in zip(prompts, images, tensors["images"], strict=True):
                found = psnr_db(image, reference)
                _check_image(found, image, where=f"the image of {prompt!r} with {case.label}", precision=precision)
                worst = min(worst, found)
    return worst


def _check_image(found_db: float, image: np.ndarray, *, where: str, precision: Precision) -> None:
    hint = _NEXT if precision == "fp32" else f"try --precision fp32; {_NEXT}"
    if image.std() == 0:
        raise ParityError(f"{where} has one colour only", hint=hint)
    if found_db < (required := REQUIRED_PSNR_DB[precision]):
        raise ParityError(
            f"{where} differs from torch's in float32: PSNR {found_db:.1f} dB, and {precision} needs {required:.0f}",
            hint=hint,
        )


def psnr_db(image: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 images; IDENTICAL_DB where nothing differs."""
    error = float(np.mean((image.astype(np.float64) - reference.astype(np.float64)) ** 2))
    return IDENTICAL_DB if error == 0 else min(IDENTICAL_DB, 10 * math.log10(255**2 / error))


def _compare(found: np.ndarray, expected: np.ndarray, *, where: str) -> tuple[float, float]:
    """(largest absolute error, norm of the difference over the norm). Raises ParityError for no numbers."""
    if found.shape != expected.shape:
        raise ParityError(f"{where} has the shape {found.shape}, and torch's has {expected.shape}", hint=_NEXT)
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    if not np.isfinite(expected).all():
        raise ParityError(f"{where} is not a number in torch either", hint="check the student: tiue generate")
    if not np.isfinite(found).all():
        raise ParityError(f"{where} is not a number somewhere", hint=f"try --precision fp32; {_NEXT}")
    difference = found - expected
    norm = float(np.linalg.norm(expected))
    relative = float(np.linalg.norm(difference)) / norm if norm > 0 else float(np.abs(difference).max())
    return float(np.abs(difference).max()), relative
