"""An export folder gets an engine: one TensorRT plan a graph, compared with ONNX Runtime, for this GPU.

    profiles ─▶ for each graph: build ─▶ compare every plan ─▶ compare images ─▶ engine.json

Everything is written to a temporary folder beside the final one; a lock lets one build at a time work at an engine.
"""

from __future__ import annotations

import contextlib
import glob
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tiue_cli import __version__
from tiue_cli.backends.cuda import memory_bytes
from tiue_cli.backends.trt_device import current_device, device_difference, engine_name
from tiue_cli.errors import DeviceError, ManifestError, OutputError, UsageError
from tiue_cli.export.config import NO_REFIT_IN_8_BITS, EngineConfig
from tiue_cli.export.trt.builder import BuiltPlan, build_plan, timing_cache_file, workspace_bytes
from tiue_cli.export.trt.parity import (
    Reference,
    check_engine_images,
    check_plans,
    engine_parity,
    plan_cases,
)
from tiue_cli.export.trt.profiles import DEFAULT_BATCHES, batch_profiles, fit_profiles, input_shapes, load_profiles
from tiue_cli.export.trt.refit import graph_weights, refit_weights
from tiue_cli.export.trt.refit_parity import check_refits
from tiue_cli.files.access import is_file
from tiue_cli.files.atomic import atomic_folder, terminated_as_interrupt
from tiue_cli.files.engines import (
    ENGINE_MANIFEST,
    EngineDevice,
    EngineManifest,
    PlanSpec,
    ProfileSpec,
    RefitWeight,
    read_engine_manifest,
)
from tiue_cli.files.exports import (
    EXPORT_MANIFEST,
    QUANTIZED,
    ExportManifest,
    FileSpec,
    GraphSpec,
    check_files,
    read_export_manifest,
)
from tiue_cli.files.external_data import check_external_data
from tiue_cli.files.hashes import sha256_file
from tiue_cli.files.lock import release_lock, try_lock
from tiue_cli.files.manifests import write_json
from tiue_cli.model.lora.exported import ExportedWeights
from tiue_cli.model.weights import some_of

PlanStageFn = Callable[[str, float, str], None]
"""Called with a stage ("build unet_decoder"), the share of it that is done (0 to 1), and what it is at."""

BUILD_FLAGS: Final = ("strongly-typed", "tf32-off", "layer-names-only")
_WAIT_S: Final = 0.5
_EXPORT_AGAIN: Final = "export the student again: tiue export STUDENT --out FOLDER"


@dataclass(frozen=True)
class EngineResult:
    """What was built; ``reused`` where a fitting engine existed already."""

    folder: Path
    manifest: EngineManifest
    seconds: float
    reused: bool
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The document of ``--format json``; times in seconds."""
        return {
            "folder": str(self.folder),
            "seconds": round(self.seconds, 1),
            "reused": self.reused,
            "notes": list(self.notes),
            "manifest": self.manifest.model_dump(mode="json"),
        }


def build_engine(config: EngineConfig, *, stage: PlanStageFn | None = None) -> EngineResult:
    """Build the engine of an export folder for this machine; a failure or an interrupt leaves the old one or none.

    Raises MissingDependencyError and DeviceError where TensorRT cannot run here, ManifestError for a damaged export,
    ProfileError, UsageError, OutputError, and ParityError where a plan does not compute what its graph does.
    """
    started = time.perf_counter()
    device = current_device()
    manifest = read_export_manifest(config.export)
    _check_float8(manifest, device)
    if config.refit and manifest.precision in QUANTIZED:
        raise UsageError(NO_REFIT_IN_8_BITS, hint="export the student in fp16 or fp32")
    profiles = engine_profiles(config, manifest)
    folder = config.export / engine_name(device, manifest.precision)
    with terminated_as_interrupt(), build_lock(folder, waiting=_waiting(stage)):
        if not config.rebuild and (found := _fitting_engine(folder, config, manifest, profiles, device)):
            return EngineResult(folder, found, time.perf_counter() - started, reused=True, notes=found.notes)
        remove_leftovers(folder)
        check_files(config.export, [file for graph in manifest.graphs for file in (graph.onnx, *graph.data)])
        for graph in manifest.graphs:
            check_external_data(config.export, graph, hint=_EXPORT_AGAIN)
        with atomic_folder(folder, overwrite=True, marker=ENGINE_MANIFEST) as temporary:
            engine = _Job(config, manifest, profiles, device, temporary, stage).run()
    return EngineResult(folder, engine, time.perf_counter() - started, reused=False, notes=engine.notes)


FLOAT8_CAPABILITY: Final = (8, 9)
"""Ada; Hopper is 9.0."""


def _check_float8(manifest: ExportManifest, device: EngineDevice) -> None:
    """Raise DeviceError for float8 on a GPU that has none: the builder would say so minutes later, in its own words."""
    found = tuple(int(number) for number in device.compute_capability.split("."))
    if manifest.precision == "fp8" and found < FLOAT8_CAPABILITY:
        raise DeviceError(
            f"{device.gpu} has compute capability {device.compute_capability}, and fp8 needs 8.9 (Ada) or more",
            hint=f"export in 8 bits that it has: tiue export {manifest.student.source} --precision int8 --trt",
        )


def engine_profiles(config: EngineConfig, manifest: ExportManifest) -> tuple[ProfileSpec, ...]:
    """The profiles that ``config`` asks for, fitted to the export. Raises UsageError, ProfileError."""
    if config.profile is not None and config.batches:
        raise UsageError("--profile and --batch were both given", hint="a profile names its batches: leave one out")
    if config.profile is not None:
        return fit_profiles(load_profiles(config.profile), manifest)
    profiles = batch_profiles(manifest, config.batches or DEFAULT_BATCHES)
    if len({profile.name for profile in profiles}) < len(profiles):
        raise UsageError("the same --batch was given twice", hint="name each range once")
    return profiles


# --- the job -------------------------------------------------------------------------------------------------------


class _Job:
    """One engine, stage by stage; ``folder`` is the temporary one."""

    def __init__(
        self,
        config: EngineConfig,
        manifest: ExportManifest,
        profiles: tuple[ProfileSpec, ...],
        device: EngineDevice,
        folder: Path,
        stage: PlanStageFn | None,
    ) -> None:
        self._config = config
        self._manifest = manifest
        self._profiles = profiles
        self._device = device
        self._folder = folder
        self._stage = stage or (lambda what, share, detail: None)
        self._notes: list[str] = []
        self._workspace = 0
        self._student = ExportedWeights(config.export, manifest) if config.refit else None

    def run(self) -> EngineManifest:
        """Write everything into the folder; returns the manifest."""
        started = time.perf_counter()
        plans = tuple(self._build(graph) for graph in self._manifest.graphs if self._serves(graph))
        self._student = None  # the check takes memory of its own
        engine = EngineManifest(
            name=self._manifest.name,
            tiue_version=__version__,
            device=self._device,
            precision=self._manifest.precision,
            export_sha256=sha256_file(self._config.export / EXPORT_MANIFEST),
            profiles=self._profiles,
            plans=plans,
            build_flags=(*BUILD_FLAGS, *(("refit-individual",) if self._config.refit else ())),
            workspace_bytes=self._workspace,
            build_s=round(time.perf_counter() - started, 3),
            parity=None,
            notes=tuple(self._notes),
        )
        # The images run through the folder as a user would run it, so it needs a manifest first.
        write_json(self._folder / ENGINE_MANIFEST, engine)
        if self._config.check:
            engine = self._checked(engine)
            write_json(self._folder / ENGINE_MANIFEST, engine)
        return engine

    def _shapes(self, graph: GraphSpec) -> tuple[dict[str, Any], ...]:
        factor = self._manifest.latent_factor
        return tuple(input_shapes(graph, profile, factor=factor) for profile in self._profiles)

    def _serves(self, graph: GraphSpec) -> bool:
        return any(self._shapes(graph))

    def _build(self, graph: GraphSpec) -> PlanSpec:
        title = f"build {graph.onnx.file.removesuffix('.onnx')}"
        self._stage(title, 0.0, "starting")
        path = self._folder / f"{graph.onnx.file.removesuffix('.onnx')}.plan"
        spec = PlanSpec(
            graph=graph.name,
            size=graph.size,
            plan=FileSpec(file=path.name, sha256="0" * 64, size_bytes=0),
            onnx_sha256=graph.digest,
            inputs=graph.inputs,
            outputs=graph.outputs,
            shapes=self._shapes(graph),
            build_s=0.0,
            refit=self._refit_weights(graph),
        )
        free_bytes, _ = memory_bytes()
        built = build_plan(
            self._config.export / graph.onnx.file,
            path,
            spec.distinct_shapes,
            workspace_bytes=workspace_bytes(free_bytes, graph.size_bytes),
            timing_cache=timing_cache_file(self._device),
            refit=[weight.name for weight in spec.refit],
            progress=lambda share, detail: self._stage(title, share, detail),
        )
        self._note_retries(graph, built)
        self._workspace = max(self._workspace, built.workspace_bytes)
        self._stage(title, 1.0, f"{built.layers} layers, {built.seconds:.0f} s")
        file = FileSpec(file=path.name, sha256=sha256_file(path), size_bytes=path.stat().st_size)
        return spec.model_copy(update={"plan": file, "build_s": round(built.seconds, 3), "layers": built.layers})

    def _refit_weights(self, graph: GraphSpec) -> tuple[RefitWeight, ...]:
        """The weights of a graph that a LoRA may change; those of layers that cannot be told apart stay fixed."""
        if self._student is None or graph.name == "vae_decoder":
            return ()
        weights, fixed = refit_weights(graph, graph_weights(self._config.export / graph.onnx.file), self._student)
        if fixed:
            self._notes.append(f"a LoRA cannot change these layers of {graph.name} in this engine: {some_of(fixed)}")
        return weights

    def _note_retries(self, graph: GraphSpec, built: BuiltPlan) -> None:
        if built.retries:
            self._notes.append(
                f"{graph.name} was built with {built.workspace_bytes // 1024**2} MiB of workspace, because the GPU's"
                " memory ran out with more; with other programs closed it may run faster"
            )

    def _checked(self, engine: EngineManifest) -> EngineManifest:
        cases = plan_cases(self._profiles, self._manifest)
        reference = Reference(self._config.export, self._manifest)
        reference.compute(cases, say=self._say("compare: reference"))
        say = self._say("compare: plans")
        outputs, memory_bytes = check_plans(self._folder, engine, self._manifest, reference, cases, say=say)
        if self._config.refit:
            check_refits(
                self._folder,
                self._config.export,
                engine,
                self._manifest,
                reference,
                cases,
                say=self._say("compare: refitted"),
            )
        worst, notes = check_engine_images(
            self._folder, self._config.export, reference, cases, say=self._say("compare: images")
        )
        parity = engine_parity(reference, outputs, worst, self._manifest)
        plans = tuple(
            plan.model_copy(update={"device_memory_bytes": memory_bytes[plan.plan.file]}) for plan in engine.plans
        )
        return engine.model_copy(update={"plans": plans, "parity": parity, "notes": (*engine.notes, *notes)})

    def _say(self, title: str) -> Callable[[float, str], None]:
        return lambda share, detail: self._stage(title, share, detail)


def _fitting_engine(
    folder: Path,
    config: EngineConfig,
    manifest: ExportManifest,
    profiles: tuple[ProfileSpec, ...],
    device: EngineDevice,
) -> EngineManifest | None:
    """The engine in the folder, if it is what would be built; None where anything differs."""
    if not is_file(folder / ENGINE_MANIFEST, error=OutputError):
        return None
    try:
        engine = read_engine_manifest(folder)
        check_files(folder, [plan.plan for plan in engine.plans])
    except (ManifestError, OutputError):
        return None
    digests = {(graph.name, graph.size): graph.digest for graph in manifest.graphs}
    fits = (
        engine.profiles == profiles
        and device_difference(engine.device, device) is None
        and all(digests.get((plan.graph, plan.size)) == plan.onnx_sha256 for plan in engine.plans)
        and (engine.parity is not None or not config.check)
        and engine.takes_loras == config.refit
    )
    return engine if fits else None


# --- one build at a time -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def build_lock(folder: Path, *, waiting: Callable[[float], None] | None = None) -> Iterator[None]:
    """Hold the lock of an engine folder, and wait for whoever holds it; ``waiting`` is told the seconds so far.

    The lock is the operating system's: it goes with its process, however that ends. Raises OutputError.
    """
    path = folder.with_name(f".{folder.name}.lock")
    started = time.monotonic()
    while (file := try_lock(path)) is None:
        if waiting is not None:
            waiting(time.monotonic() - started)
        time.sleep(_WAIT_S)
    try:
        yield
    finally:
        release_lock(path, file)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed builds of this engine left behind; call it while the lock is held."""
    pattern = f".{glob.escape(folder.stem)}.*.tmp{glob.escape(folder.suffix)}"
    for leftover in folder.parent.glob(pattern):
        shutil.rmtree(leftover, ignore_errors=True)


def _waiting(stage: PlanStageFn | None) -> Callable[[float], None] | None:
    if stage is None:
        return None
    return lambda seconds: stage("wait", 0.0, f"another process builds this engine, {seconds:.0f} s")
