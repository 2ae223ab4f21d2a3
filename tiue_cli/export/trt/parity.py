"""Does an engine compute what its ONNX graphs compute? Every plan on its own, then whole images; figures and a bar.

The reference is ONNX Runtime: it computes one or two images, and the engine is given those, repeated to fill the batch.
So a profile's largest batch is tried as well, and every image in it must be right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from tiue_cli.backends.cuda import open_stream
from tiue_cli.backends.onnx_session import Provider, choose_provider, open_session, run_session, session_errors
from tiue_cli.backends.tokenizer import PromptTokenizer
from tiue_cli.backends.trt_backend import TrtBackend, read_plan
from tiue_cli.backends.trt_device import rebuild_command
from tiue_cli.backends.trt_plan import Plan, open_plan, working_memory
from tiue_cli.backends.trt_runner import PlanChain
from tiue_cli.export.tolerance import (
    CHECK_PROMPTS,
    IDENTICAL_DB,
    REQUIRED_PSNR_DB,
    check_image,
    check_relative_error,
    output_errors,
)
from tiue_cli.files.engines import EngineManifest, EngineParity, PlanSpec, ProfileSpec
from tiue_cli.files.exports import GRAPHS, ExportManifest, GraphSpec, OutputParity, Size
from tiue_cli.model.noise import draw_noise

LARGE_BYTES: Final = 500 * 1000**2
"""From this size of a graph on, ONNX Runtime computes one image only where it has no GPU."""

_NEXT = "please report this; --no-check builds the engine without the comparison"
_PER_RUN = frozenset({"timesteps", "weights"})  # what has no row for each image

Tensors = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class PlanCase:
    """One run of an engine's profile (its number and name): images, K and image size (H, W) in pixels."""

    profile: int
    name: str
    batch: int
    steps: int
    size: Size

    @property
    def label(self) -> str:
        """Such as ``batch-1-4-16: 16 images, K=4, 512x512``."""
        images = "1 image" if self.batch == 1 else f"{self.batch} images"
        return f"{self.name}: {images}, K={self.steps}, {self.size[0]}x{self.size[1]}"


def plan_cases(profiles: Sequence[ProfileSpec], manifest: ExportManifest) -> tuple[PlanCase, ...]:
    """The corners of every profile: its smallest batch with the largest K, and its largest with the smallest.

    K is one that the student has; sizes are the profile's smallest and optimum.
    """
    cases = []
    for index, profile in enumerate(profiles):
        steps = [number for number in manifest.steps if profile.steps[0] <= number <= profile.steps[2]]
        sizes = dict.fromkeys((profile.height[corner], profile.width[corner]) for corner in (1, 0))
        for size in sizes:
            corners = [(profile.batch[0], steps[-1]), (profile.batch[2], steps[0])]
            cases += [PlanCase(index, profile.name, batch, k, size) for batch, k in dict.fromkeys(corners)]
    return tuple(cases)


class Reference:
    """What ONNX Runtime computes: all tensors by name, for as many images as is worth the time."""

    def __init__(self, export: Path, manifest: ExportManifest, *, provider: Provider | None = None) -> None:
        self.provider = choose_provider("auto") if provider is None else provider
        large = max(graph.size_bytes for graph in manifest.graphs) >= LARGE_BYTES
        self.rows = 1 if large and self.provider.device == "cpu" else len(CHECK_PROMPTS)
        self._export = export
        self._manifest = manifest
        self._tensors: dict[tuple[int, Size], dict[str, np.ndarray]] = {}

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"ONNX Runtime ({self.provider.name})"

    def compute(self, cases: Sequence[PlanCase], *, say: Callable[[float, str], None] | None = None) -> None:
        """Compute what ``cases`` need, before the engine takes the GPU."""
        wanted = list(dict.fromkeys((case.steps, case.size) for case in cases))
        for number, (steps, size) in enumerate(wanted):
            if say is not None:
                say(number / len(wanted), f"{self.name}, K={steps}, {size[0]}x{size[1]}")
            self._tensors[steps, size] = self._run(steps, size)
        if say is not None:
            say(1.0, "done")

    def tensors(self, case: PlanCase) -> Tensors:
        """The tensors of a case: row i is that of reference image i modulo ``rows``."""
        repeat = np.arange(case.batch) % self.rows
        tensors = self._tensors[case.steps, case.size]
        return {name: value if name in _PER_RUN else value[repeat] for name, value in tensors.items()}

    def _run(self, steps: int, size: Size) -> dict[str, np.ndarray]:
        combine = self._manifest.combine(steps)
        tokenizer = PromptTokenizer(self._export / self._manifest.tokenizer.file)
        tensors: dict[str, np.ndarray] = {
            "input_ids": tokenizer(CHECK_PROMPTS[: self.rows]),
            "noise": draw_noise(range(self.rows), self._manifest.latent_shape(size)),
            "timesteps": np.array(combine.timesteps, dtype=np.int64),
            "weights": np.array(combine.weights, dtype=np.float32),
        }
        for name in GRAPHS:
            graph = self._manifest.graph(name, size=size)
            tensors |= self.run(self._export / graph.onnx.file, graph, tensors)
        return tensors

    def run(self, onnx_file: Path, graph: GraphSpec, tensors: Tensors) -> dict[str, np.ndarray]:
        """The outputs of a file that holds ``graph``, for its inputs among ``tensors``."""
        # Opened anew each time: four large sessions at once would double the memory.
        session = open_session(onnx_file, self.provider)
        inputs = {port.name: np.ascontiguousarray(tensors[port.name], dtype=port.dtype) for port in graph.inputs}
        with session_errors(graph.onnx.file):
            outputs = run_session(session, inputs, self.provider)
        return {output: value.numpy() for output, value in outputs.items()}


def check_plans(
    folder: Path,
    engine: EngineManifest,
    manifest: ExportManifest,
    reference: Reference,
    cases: Sequence[PlanCase],
    *,
    say: Callable[[float, str], None] | None = None,
) -> tuple[tuple[OutputParity, ...], dict[str, int]]:
    """Compare every plan, given the reference's inputs, in every case; the figures, and each plan's working memory.

    Memory is in bytes, by the plan's file name. Raises ParityError naming output and case.
    """
    found: list[OutputParity] = []
    memory_bytes: dict[str, int] = {}
    with open_stream() as stream:
        for number, spec in enumerate(engine.plans):
            if say is not None:
                say(number / len(engine.plans), spec.plan.file)
            graph = manifest.graph(spec.graph, size=spec.size)
            plan = open_plan(spec.plan.file, read_plan(folder, spec, rebuild=rebuild_command(folder.parent)))
            found += _check_plan(plan, spec, graph, reference, cases, stream)
            memory_bytes[spec.plan.file] = working_memory(plan)
    if say is not None:
        say(1.0, "done")
    return tuple(found), memory_bytes


def _check_plan(
    plan: Plan, spec: PlanSpec, graph: GraphSpec, reference: Reference, cases: Sequence[PlanCase], stream: object
) -> list[OutputParity]:
    worst: dict[str, tuple[float, float]] = {output.name: (0.0, 0.0) for output in graph.outputs}
    labels: list[str] = []
    for profile in dict.fromkeys(case.profile for case in cases if spec.shapes[case.profile]):
        with PlanChain([(plan, spec.plan_profile(profile))], stream, graphs=False) as chain:
            for case in (case for case in cases if case.profile == profile):
                tensors = reference.tensors(case)
                outputs = chain.run({name: tensors[name] for name in chain.inputs}, list(worst))
                labels.append(case.label)
                for name, value in outputs.items():
                    where = f"TensorRT's {graph.name}: {name} with {case.label}"
                    errors = output_errors(value, tensors[name], where=where, reference=reference.name, hint=_NEXT)
                    check_relative_error(errors[1], where=where, precision=graph.precision, hint=_NEXT)
                    worst[name] = (max(worst[name][0], errors[0]), max(worst[name][1], errors[1]))
    return [
        OutputParity(graph=graph.name, output=name, cases=tuple(labels), max_error=error, relative_error=relative)
        for name, (error, relative) in worst.items()
    ]


def check_engine_images(
    folder: Path,
    export: Path,
    reference: Reference,
    cases: Sequence[PlanCase],
    *,
    say: Callable[[float, str], None] | None = None,
) -> tuple[float, tuple[str, ...]]:
    """PSNR in dB of the worst image, all plans in a row, plain and as a CUDA graph; and notes for the user.

    Raises ParityError below the bar.
    """
    worst = IDENTICAL_DB
    with TrtBackend(export, engine=folder) as backend:
        for number, case in enumerate(cases):
            if say is not None:
                say(number / len(cases), case.label)
            tensors = reference.tensors(case)
            prompts = [CHECK_PROMPTS[row % reference.rows] for row in range(case.batch)]
            # The first run of a shape is plain, the second one is captured.
            for way in ("plain", "as a CUDA graph"):
                images = backend.generate(prompts, tensors["noise"], steps=case.steps)
                for row, (image, expected) in enumerate(zip(images, tensors["images"], strict=True)):
                    found = check_image(
                        image,
                        expected,
                        where=f"TensorRT's image {row + 1} with {case.label}, run {way},",
                        reference=reference.name,
                        precision=backend.manifest.precision,
                        hint=_NEXT,
                    )
                    worst = min(worst, found)
        problem = backend.graph_problem
    if say is not None:
        say(1.0, "done")
    notes = () if problem is None else (f"this engine runs without CUDA graphs, and slower for it: {problem}",)
    return worst, notes


def engine_parity(
    reference: Reference, outputs: tuple[OutputParity, ...], worst_psnr_db: float, manifest: ExportManifest
) -> EngineParity:
    """The figures as ``engine.json`` keeps them."""
    return EngineParity(
        reference=reference.provider.name,
        outputs=outputs,
        image_psnr_db=worst_psnr_db,
        required_psnr_db=REQUIRED_PSNR_DB[manifest.precision],
    )
