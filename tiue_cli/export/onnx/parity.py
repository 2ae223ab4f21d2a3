"""Does the export compute what the student computes? Figures for every output and for whole images, and a bar.

Each graph runs in ONNX Runtime on the CPU, on inputs from the torch reference in float32 (``chain``), at batches, sizes
and numbers of timesteps that are not the traced ones; then prompts run through all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from tiue_cli.backends.onnx_backend import OnnxBackend
from tiue_cli.backends.onnx_session import choose_provider, open_session, run_session, session_errors
from tiue_cli.export.onnx.chain import CHECK_PROMPTS, Case, Tensors, check_prompts
from tiue_cli.export.tolerance import IDENTICAL_DB, check_image, check_relative_error, output_errors
from tiue_cli.files.exports import GraphSpec, OutputParity, Size

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
        for case, tensors in references:
            prompts = check_prompts(case.batch)
            images = backend.generate(prompts, tensors["noise"], steps=case.steps)
            for prompt, image, reference in zip(prompts, images, tensors["images"], strict=True):
                where = f"the image of {prompt!r} with {case.label}"
                found = check_image(image, reference, where=where, reference=_TORCH, precision=precision, hint=_NEXT)
                worst = min(worst, found)
    return worst
