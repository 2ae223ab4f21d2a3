"""The public Python API: what ``import tiue_cli as tiue`` offers.

Everything a command does, without the command line: the same config types, the same defaults, the same errors
(`TiueError` and what derives from it). Nothing here prints; what takes long tells its ``on_…`` callback.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiue_cli.errors import TiueError, UsageError, full_installation
from tiue_cli.export.config import EngineConfig, ExportConfig, Part
from tiue_cli.export.run import run_engine, run_export
from tiue_cli.generate.config import BackendName, DeviceName, DtypeName, GenerateConfig, LongPrompts, ProviderName
from tiue_cli.generate.drawing import Pipeline
from tiue_cli.model.hub import place_base

if TYPE_CHECKING:
    from tiue_cli.base.events import BenchEvent, Event, Finished
    from tiue_cli.bench.config import BenchConfig
    from tiue_cli.bench.report.schema import BenchReport
    from tiue_cli.distill.config import DistillConfig
    from tiue_cli.export.onnx.export import ExportResult
    from tiue_cli.export.trt.engine import EngineResult
    from tiue_cli.files.exports import Precision

_LOAD = GenerateConfig()
_EXPORT = ExportConfig(student="")


def load(
    model: str | Path = _LOAD.model,
    *,
    backend: BackendName = _LOAD.backend,
    device: DeviceName = _LOAD.device,
    precision: DtypeName = _LOAD.dtype,
    vae: str | Path | None = None,
    loras: Sequence[str | Path] = (),
    base: str | Path | None = None,
    long_prompts: LongPrompts = _LOAD.long_prompts,
    provider: ProviderName = _LOAD.provider,
    compiled: bool = _LOAD.compiled,
    guidance: float | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Pipeline:
    """Load a model to draw with.

    ``model`` is a student's or teacher's folder, an export or engine folder, a hub id ``OWNER/NAME``, or ``papercut``,
    which is part of the package. ``backend`` is ``torch`` for model folders; ``onnx``, ``openvino`` or ``trt`` for
    exports. ``papercut`` has graphs as well, and draws with ``onnx`` on a CPU unless an option needs torch.
    ``precision`` is ``fp32`` (a CPU's default), ``fp16`` (CUDA's) or ``bf16``; an export has its own, which OpenVINO
    computes in fp32 or bf16. ``vae`` replaces the autoencoder of a model folder (``taesd`` is the tiny one for Stable
    Diffusion), ``loras`` are put on a model folder, ``SOURCE[:WEIGHT]`` each (`Pipeline.load_lora` does it later),
    ``base`` is where the teacher of a student that is an adapter lies, where it is not where it was,
    ``long_prompts`` is ``cut``, or ``chunk`` to read them in pieces of what the text encoder takes, ``provider`` is
    ONNX Runtime's, ``compiled`` sends a student on CUDA through ``torch.compile``, ``guidance`` is a teacher's.
    ``on_note`` is called with each sentence that is worth knowing.

    Raises ModelFolderError or ManifestError for a model that cannot be used, AdapterError for such a LoRA, UsageError
    for options that do not fit it, DeviceError for a device that is not there, MissingDependencyError for a library
    that is not installed.

    >>> pipe = tiue.load("papercut", device="cpu")
    >>> pipe.kind, pipe.backend, pipe.precision, pipe.steps, pipe.default_size
    ('student', 'onnx', 'fp32', 4, (64, 64))
    >>> pipe("a red heart at night", seed=0)[0].save("heart.png")
    >>> pipe.close()
    """
    if base is not None:
        place_base([model], str(base))
    config = GenerateConfig(
        model=str(model),
        vae=None if vae is None else str(vae),
        loras=tuple(str(lora) for lora in loras),
        long_prompts=long_prompts,
        guidance=guidance,
        backend=backend,
        device=device,
        dtype=precision,
        provider=provider,
        compiled=compiled,
    )
    return Pipeline(config, on_note=on_note)


def export(
    student: str | Path,
    *,
    out: Path | str | None = None,
    precision: Precision = _EXPORT.precision,
    opset: int = _EXPORT.opset,
    sizes: Sequence[tuple[int, int]] = (),
    vae: str | Path | None = None,
    loras: Sequence[str | Path] = (),
    check: bool = _EXPORT.check,
    overwrite: bool = _EXPORT.overwrite,
    calibration: str | Path | None = None,
    calibration_images: int = _EXPORT.calibration_images,
    quantized: Sequence[Part] = _EXPORT.quantized,
    on_stage: Callable[[str, int, int], None] | None = None,
) -> ExportResult:
    """Write a student as four ONNX graphs that run without torch, and compare them with it unless ``check`` is False.

    ``out`` None is ``engines/NAME``. ``precision`` is ``fp32``, ``fp16``, ``int8`` or ``fp8``. The last two are
    calibrated with ``calibration_images`` pictures of the prompts in the file ``calibration``; ``quantized`` names
    their parts, of ``text``, ``unet`` and ``vae``. ``opset`` is 18 to 23. ``sizes`` in pixels (height, width) fix the
    graphs to them; without, they take any. ``loras`` (``SOURCE[:WEIGHT]`` each) are added to the weights first.
    ``on_stage`` is called as a stage begins: what it is, its number from 1, how many there are. Returns where it lies
    (``folder``), its ``manifest``, ``seconds``, and ``notes``. A failure leaves the old export or none.

    Raises what loading a student raises, UsageError, OutputError, and ParityError where a graph computes something
    else.

    >>> result = tiue.export("runs/sd15/student", out="engines/sd15", check=False)
    >>> result.manifest.precision, sorted(path.name for path in result.folder.glob("*.onnx"))
    ('fp32', ['text_encoder.onnx', 'unet_decoder.onnx', 'unet_encoder.onnx', 'vae_decoder.onnx'])
    """
    config = ExportConfig(
        student=str(student),
        out=None if out is None else Path(out),
        precision=precision,
        opset=opset,
        sizes=tuple(sizes),
        vae=None if vae is None else str(vae),
        loras=tuple(str(lora) for lora in loras),
        check=check,
        overwrite=overwrite,
        calibration=None if calibration is None else str(calibration),
        calibration_images=calibration_images,
        quantized=tuple(quantized),
    )
    return run_export(config, stage=on_stage)


def build_engine(
    export: str | Path,
    *,
    profile: str | None = None,
    batches: Sequence[int | tuple[int, int, int]] = (),
    check: bool = True,
    rebuild: bool = False,
    refit: bool = False,
    on_stage: Callable[[str, float, str], None] | None = None,
) -> EngineResult:
    """Build TensorRT plans of an export folder for the GPU of this machine, and compare them unless ``check`` is False.

    ``profile`` names shipped profiles (``sd15-512``, ``sd21-512``, ``papercut``) or a TOML file; or ``batches`` says
    how many images they take, numbers or (fewest, usual, most). ``refit`` builds an engine that takes LoRAs, which
    needs the student that was exported. ``on_stage`` is called with what is being done, the share of it that is done
    (0 to 1), and a detail. Returns where it lies (``folder``), its ``manifest``, ``seconds``, and whether a fitting
    engine was ``reused``.

    Raises MissingDependencyError and DeviceError where TensorRT cannot run, ManifestError, ProfileError, UsageError,
    OutputError, AdapterError for a student that has gone, and ParityError where a plan computes something else.

    >>> result = tiue.build_engine("engines/sd15", batches=[1, (1, 4, 16)])
    >>> [profile.batch for profile in result.manifest.profiles], result.folder.parent.name
    ([(1, 1, 1), (1, 4, 16)], 'sd15')
    """
    ranges = tuple((batch, batch, batch) if isinstance(batch, int) else batch for batch in batches)
    config = EngineConfig(
        export=Path(export), profile=profile, batches=ranges, check=check, rebuild=rebuild, refit=refit
    )
    return run_engine(config, stage=on_stage)


def distill(
    config: str | Path | Mapping[str, Any] | DistillConfig | None = None,
    *,
    out: str | Path,
    teacher: str | Path | None = None,
    prompts: str | Path | None = None,
    max_steps: int | None = None,
    resume: bool = False,
    on_event: Callable[[Event], None] | None = None,
) -> Finished:
    """Distil a teacher into a one-pass student, from prompts alone.

    ``config`` is a recipe's name (``tiue recipes ls``), a YAML file, a mapping of its keys, or a `DistillConfig`;
    ``teacher``, ``prompts`` (a file) and ``max_steps`` override it. ``on_event`` is called with what
    ``tiue_cli.base.events`` defines: ``Note``, ``Progress`` (its ``figures`` are the losses), ``Saved``, ``Finished``.
    Returns the last of them: ``student`` is the folder, None where a signal stopped the run (``interrupted``), which
    ``resume`` continues. SIGINT and SIGTERM end the run after the step, saved.

    Raises UsageError for settings that cannot be, PromptError, DeviceError, OutputError, and what loading the teacher
    raises.

    >>> events = []
    >>> settings = {"teacher": "runs/sd15/teacher", "batch_size": 2, "warm_start": {"steps": 1, "pairs": 2}}
    >>> finished = tiue.distill(settings, prompts="captions.txt", out="runs/mine", max_steps=2, on_event=events.append)
    >>> finished.step, finished.student.name, finished.interrupted
    (2, 'student', False)
    >>> type(events[0]).__name__
    'Note'
    """
    from tiue_cli.base.events import Finished

    with full_installation("distilling"):
        from tiue_cli.distill.resolve import DistillRequest

    values = config if config is None or isinstance(config, (str, Path, Mapping)) else config.model_dump(mode="json")
    resolved = DistillRequest(
        out=Path(out),
        teacher=None if teacher is None else str(teacher),
        prompts=None if prompts is None else str(prompts),
        config=str(values) if isinstance(values, (str, Path)) else None,
        values=values if isinstance(values, Mapping) else {},
        max_steps=max_steps,
        resume=resume,
    ).resolve()
    with full_installation("distilling"):
        from tiue_cli.distill.start import open_run

    finished = None
    for event in open_run(resolved.config, Path(out), resume=resume).events():
        if on_event is not None:
            on_event(event)
        if isinstance(event, Finished):
            finished = event
    assert finished is not None, "a distillation ends with Finished"
    return finished


def bench(
    config: str | Path | Sequence[str] | BenchConfig,
    *,
    out: str | Path | None = None,
    on_event: Callable[[BenchEvent], None] | None = None,
) -> BenchReport:
    """Measure how fast and how good models are, side by side; returns the report.

    ``config`` names one model or several, or is a `BenchConfig` with all that ``tiue bench`` can be asked. With ``out``
    the report is written into that folder as JSON, Markdown and HTML. ``on_event`` is called with ``Note`` and
    ``Progress`` of ``tiue_cli.base.events``. Figures in the report carry their units in their names (``p50_ms``, …).

    Raises UsageError, and what loading and running the models raise.

    >>> asked = tiue.BenchConfig(models=("runs/sd15/student",), teacher="none", batches=(1,), duration_s=0.1)
    >>> report = tiue.bench(asked, out="reports")
    >>> {record.batch for record in report.latency}
    {1}
    """
    from tiue_cli.bench.config import BenchConfig

    if isinstance(config, (str, Path)):
        config = BenchConfig(models=(str(config),))
    elif not isinstance(config, BenchConfig):
        config = BenchConfig(models=tuple(config))
    if out is not None:
        config = replace(config, out=Path(out))
    config.validate()
    with full_installation("measuring"):
        from tiue_cli.bench.run import run_bench

    report = run_bench(config, emit=on_event or (lambda event: None))
    if report is None:
        raise UsageError("only the first of several processes has the report", hint="call tiue.bench there")
    if out is not None:
        from tiue_cli.bench.report.files import write_report

        write_report(report, config.out)
    return report


__all__ = ["Pipeline", "TiueError", "bench", "build_engine", "distill", "export", "load"]
