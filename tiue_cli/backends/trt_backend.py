"""The TensorRT backend: the plans of an export, checked before they are opened, in one launch an image.

    prompts ─ tokenizer ─▶ text_encoder ─▶ unet_encoder ─▶ unet_decoder ─▶ vae_decoder ─▶ pixels

Tokens, noise and weights go in; latents (to be checked) and pixels come out; what is between stays where it was made.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from tiue_cli.backends.tokenizer import PromptTokenizer
from tiue_cli.backends.trt_device import check_device, current_device, find_engine, rebuild_command
from tiue_cli.backends.trt_loras import EngineLoras
from tiue_cli.errors import DeviceError, ManifestError, ProfileError
from tiue_cli.files.access import has_file, read_bytes
from tiue_cli.files.engines import ENGINE_MANIFEST, EngineManifest, PlanSpec, read_engine_manifest
from tiue_cli.files.exports import GRAPHS, ExportManifest, GraphSpec, Size, check_files, read_export_manifest

if TYPE_CHECKING:
    import numpy as np

    from tiue_cli.backends.base import ProgressFn
    from tiue_cli.backends.trt_plan import Plan
    from tiue_cli.backends.trt_runner import PlanChain
    from tiue_cli.files.png import LoraUse


SHAPES_HELD: Final = 6
"""Shapes of a profile that are ready at a time, each with its contexts and its CUDA graph; memory is shared."""


class TrtBackend:
    """The engine of an export folder, held ready on the GPU; see ``backends.base.Backend``."""

    name = "trt"
    device = "cuda"

    def __init__(self, folder: Path | str, *, engine: Path | None = None, graphs: bool = True) -> None:
        """``folder`` is an export folder or one of the engine folders in it; ``engine`` names one elsewhere.

        Reads manifests and compares them with this machine; opens no plan. ``graphs`` False runs without CUDA graphs.
        Raises ManifestError, DeviceError, MissingDependencyError.
        """
        folder = Path(folder)
        if engine is None and has_file(folder / ENGINE_MANIFEST, error=ManifestError):
            folder, engine = folder.resolve().parent, folder
        self.folder = folder
        self.manifest: ExportManifest = read_export_manifest(folder)
        here = current_device()
        if engine is None:
            engine, self.engine = find_engine(folder, here, self.manifest.precision)
        else:
            self.engine = read_engine_manifest(engine)
            check_device(engine, self.engine, here, rebuild=rebuild_command(folder))
        self.engine_folder: Path = engine
        _check_source(engine, self.engine, self.manifest, rebuild=rebuild_command(folder))
        self._use_graphs = graphs
        self._stack = ExitStack()
        self._stream: Any = None
        self._tokenizer: PromptTokenizer | None = None
        self._plans: dict[tuple[str, Size | None], Plan] = {}
        self._chains: dict[int, OrderedDict[tuple[int, ...], PlanChain]] = {}
        self._loras = EngineLoras(folder, self.manifest, self.engine)
        self.refit_s: float | None = None
        """Seconds that the last change of adapters took, the first with loading the student; None before one."""

    @property
    def dtype(self) -> str:
        """The precision of the export."""
        return self.manifest.precision

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the engine."""
        notes = list(self.engine.notes)
        if self.engine.parity is None:
            notes.append("this engine was not compared with its ONNX graphs (--no-check)")
        return tuple(notes)

    @property
    def default_size(self) -> Size:
        """(height, width) in pixels that the model was made for."""
        return self.manifest.default_size

    @property
    def graph_problem(self) -> str | None:
        """Why runs stay plain where a CUDA graph could not be captured; None where nothing spoke against it."""
        chains = [chain for chains in self._chains.values() for chain in chains.values()]
        return next((chain.graph_problem for chain in chains if chain.graph_problem is not None), None)

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """(C, h, w) for an image of ``size`` (H, W) pixels. Raises UsageError or ProfileError."""
        shape = self.manifest.latent_shape(size)
        if self.largest_batch(size) is None:
            have = ", ".join(_profile_sizes(self.engine))
            raise ProfileError(
                f"{size[0]}x{size[1]} pixels are outside the engine's range: it takes {have} ({self.engine_folder})",
                hint=f"choose one of them, or build it for more: {rebuild_command(self.folder)} --profile FILE.toml",
            )
        return shape

    def largest_batch(self, size: Size) -> int | None:
        """The most images of ``size`` (H, W) pixels in one run; None where the engine does not take the size."""
        fitting = [
            profile.batch[2]
            for profile in self.engine.profiles
            if profile.height[0] <= size[0] <= profile.height[2] and profile.width[0] <= size[1] <= profile.width[2]
        ]
        return max(fitting, default=None)

    def cut_text(self, prompts: Sequence[str]) -> list[str]:
        """The end of each prompt that does not fit; "" where it does."""
        return self._entered.cut_text(prompts)

    def generate(
        self,
        prompts: Sequence[str],
        noise: np.ndarray,
        *,
        steps: int | None = None,
        progress: ProgressFn | None = None,
    ) -> np.ndarray:
        """Images (B, H, W, 3) uint8 from prompts (B) and noise (B, C, h, w) float32; see ``Backend.generate``.

        Raises ProfileError for a batch, size or K outside the engine's range, UsageError for steps that the student
        lacks, DeviceError where memory or range do not suffice.
        """
        results = self._run(prompts, noise, steps, ["latents", "images"])
        if progress is not None:
            progress(1.0)
        return results["images"]

    def latents(self, prompts: Sequence[str], noise: np.ndarray, *, steps: int | None = None) -> np.ndarray:
        """Latents (B, C, h, w) float32; see ``Backend.latents``. The whole chain runs. Raises as ``generate``."""
        return self._run(prompts, noise, steps, ["latents"])["latents"]

    def use_loras(self, loras: Sequence[LoraUse]) -> None:
        """Refit the engine to exactly these adapters, () none; see ``TakesLoras``.

        Raises UsageError for an engine that was not built for it (``--refit``), AdapterError, DeviceError.
        """
        started = time.perf_counter()
        if self._loras.use(loras, {plan.name: plan for plan in self._plans.values()}):
            for chains in self._chains.values():
                for chain in chains.values():
                    chain.weights_changed()
            self.refit_s = time.perf_counter() - started

    def _run(
        self, prompts: Sequence[str], noise: np.ndarray, steps: int | None, outputs: list[str]
    ) -> dict[str, np.ndarray]:
        """The chain's ``outputs``, copied. Raises DeviceError for latents that are NaN or infinite."""
        import numpy as np

        assert len(prompts) == len(noise), "one prompt an image"
        combine, factor = self.manifest.combine(steps), self.manifest.latent_factor
        size = (noise.shape[2] * factor, noise.shape[3] * factor)
        profile = self._profile(batch=len(noise), steps=combine.steps, size=size)
        chain = self._chain(profile, (*noise.shape, combine.steps))
        inputs = {
            "input_ids": self._entered(prompts),
            "noise": noise,
            "timesteps": np.array(combine.timesteps),
            "weights": np.array(combine.weights, dtype=np.float32),
        }
        results = chain.run(inputs, outputs)
        if not np.isfinite(results["latents"]).all():
            raise DeviceError(
                f"the UNet or the text encoder produced NaN or infinity in {self.dtype}",
                hint="export it with --precision fp32, and build the engine again",
            )
        return results

    def __enter__(self) -> Self:
        from tiue_cli.backends.cuda import open_stream

        check_files(self.folder, [self.manifest.tokenizer])
        self._tokenizer = PromptTokenizer(self.folder / self.manifest.tokenizer.file)
        with ExitStack() as stack:
            self._stream = stack.enter_context(open_stream())
            # The first profile is the one that most runs use; what others need is opened when they do.
            for graph in self._graphs(0):
                self._plan(graph)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What uses the stream goes before it.
        for chains in self._chains.values():
            for chain in reversed(chains.values()):  # the first one's memory last
                chain.close()
        self._chains.clear()
        self._plans.clear()
        self._loras = EngineLoras(self.folder, self.manifest, self.engine)
        self._stack.close()
        self._stream = self._tokenizer = None

    @property
    def _entered(self) -> PromptTokenizer:
        assert self._tokenizer is not None, "the backend is used inside its with block"
        return self._tokenizer

    def _profile(self, *, batch: int, steps: int, size: Size) -> int:
        """The first profile that takes the request: they are in order of preference. Raises ProfileError."""
        refusals = []
        for index, profile in enumerate(self.engine.profiles):
            refusal = profile.refusal(batch=batch, steps=steps, size=size)
            if refusal is None:
                return index
            refusals.append(f"{profile.name}: {refusal}")
        raise ProfileError(
            f"the engine has no profile for this request ({'; '.join(refusals)}) ({self.engine_folder})",
            hint=f"build another: {rebuild_command(self.folder)} --batch 1:{max(1, batch // 2)}:{batch}",
        )

    def _chain(self, profile: int, shape: tuple[int, ...]) -> PlanChain:
        """The chain for one profile and shape, made when it is first needed: each keeps its own CUDA graph.

        The first chain of a profile owns the memory and stays; of the others the least recently used makes way.
        """
        from tiue_cli.backends.trt_runner import PlanChain

        chains = self._chains.setdefault(profile, OrderedDict())
        first = next(iter(chains), None)
        if shape in chains:
            if shape != first:
                chains.move_to_end(shape)
            return chains[shape]
        if len(chains) >= SHAPES_HELD:
            oldest = list(chains)[1]
            chains.pop(oldest).close()
        plans = [
            (self._plan(graph), _plan_spec(self.engine, graph, self.engine_folder).plan_profile(profile))
            for graph in self._graphs(profile)
        ]
        memory = None if first is None else chains[first].memory
        chain = PlanChain(plans, self._stream, graphs=self._use_graphs, memory=memory)
        chains[shape] = chain.__enter__()
        return chain

    def _graphs(self, profile: int) -> list[GraphSpec]:
        """The graphs of an image under one profile."""
        spec = self.engine.profiles[profile]
        return [self.manifest.graph(name, size=(spec.height[1], spec.width[1])) for name in GRAPHS]

    def _plan(self, graph: GraphSpec) -> Plan:
        key = (graph.name, graph.size)
        if key not in self._plans:
            from tiue_cli.backends.trt_plan import open_plan

            spec = _plan_spec(self.engine, graph, self.engine_folder)
            data = read_plan(self.engine_folder, spec, rebuild=rebuild_command(self.folder))
            plan = open_plan(spec.plan.file, data)
            self._loras.catch_up(plan, spec)
            self._plans[key] = plan
        return self._plans[key]


# --- checks --------------------------------------------------------------------------------------------------------


def read_plan(folder: Path, spec: PlanSpec, *, rebuild: str) -> bytes:
    """A plan's bytes, if they are the ones that were built: what is hashed is what will be opened.

    Raises ManifestError for a file that is missing or not the one in the manifest.
    """
    path = folder / spec.plan.file
    hint = f"build the engine again: {rebuild}"
    try:
        data = read_bytes(path, error=ManifestError)
    except FileNotFoundError:
        raise ManifestError(f"{path} is missing", hint=hint) from None
    if len(data) != spec.plan.size_bytes:
        problem = f"it has {len(data)} bytes, and engine.json says {spec.plan.size_bytes}"
    elif (found := hashlib.sha256(data).hexdigest()) != spec.plan.sha256:
        problem = f"its SHA-256 is {found[:12]}…, and engine.json says {spec.plan.sha256[:12]}…"
    else:
        return data
    raise ManifestError(f"{path} is not the plan that was built, and is not opened: {problem}", hint=hint)


def _check_source(folder: Path, engine: EngineManifest, export: ExportManifest, *, rebuild: str) -> None:
    """Refuse an engine of other graphs than this export's. Raises ManifestError."""
    digests = {(graph.name, graph.size): graph.digest for graph in export.graphs}
    for plan in engine.plans:
        digest = digests.get((plan.graph, plan.size), "none")
        if plan.onnx_sha256 != digest:
            raise ManifestError(
                f"{folder} was built from another {plan.graph} (SHA-256 {plan.onnx_sha256[:12]}…) than this export's"
                f" ({digest[:12]}…)",
                hint=f"build it again: {rebuild}",
            )


def _plan_spec(engine: EngineManifest, graph: GraphSpec, folder: Path) -> PlanSpec:
    for plan in engine.plans:
        if (plan.graph, plan.size) == (graph.name, graph.size):
            return plan
    size = "" if graph.size is None else f" for {graph.size[0]}x{graph.size[1]} pixels"
    raise ManifestError(
        f"{folder} has no plan of {graph.name}{size}", hint=f"build it again: {rebuild_command(folder.parent)}"
    )


def _profile_sizes(engine: EngineManifest) -> list[str]:
    """The sizes of an engine in words, each once."""
    texts = []
    for profile in engine.profiles:
        corners = dict.fromkeys((profile.height[index], profile.width[index]) for index in (0, 2))
        texts.append(" to ".join(f"{height}x{width}" for height, width in corners))
    return list(dict.fromkeys(texts))
