"""What a bench report holds: the JSON document that everything else (Markdown, HTML, comparisons) is made from.

Samples are kept, to MS_DECIMALS; medians, percentiles and intervals follow from them (``bench.stats``). Times are in
milliseconds for one run of a whole batch, memory in bytes, FLOPs as torch counts them (a multiplication with its
addition is two).
"""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import AfterValidator, ConfigDict, Field, PositiveInt

from tiue_cli.bench.config import StudentBackend

SubjectKind = Literal["teacher", "plain-unet", "student", "student-plain", "peer"]
"""A many-step model; one plain UNet pass, which any one-step student costs; a student with the sharing decoder; the
same student with the TiUE authors' plain K-fold batch; another diffusers pipeline under its own sampler."""
BenchBackend = StudentBackend | Literal["diffusers"]
Stage = Literal["text", "unet_encoder", "unet_decoder", "unet", "vae"]
"""``unet`` is the whole UNet loop of a teacher, peer or plain pass; a student has the two halves instead."""
UNET_STAGES: tuple[Stage, ...] = ("unet_encoder", "unet_decoder", "unet")
Scope = Literal["image", "unet"]
"""What a ratio compares: prompt to pixels, or the UNet's stages alone."""

PeakKernel = Literal["matrix product", "1x1 convolution", "3x3 convolution"]

MS_DECIMALS = 6
"""Of a time: a nanosecond, which is the clock's own; fewer would move what a run takes beyond its stages."""


_Ms = Annotated[float, Field(ge=0.0), AfterValidator(lambda ms: round(ms, MS_DECIMALS))]
_Size = tuple[PositiveInt, PositiveInt]
"""(height, width) in pixels."""


class _Record(pydantic.BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True, allow_inf_nan=False
    )


class MachineRecord(_Record):
    """Where it ran."""

    name: str
    """Short, for file names: e.g. ``amd-epyc-2-cores`` or ``nvidia-h200``."""
    system: str
    cpu: str
    cores: int
    threads: int
    memory_bytes: int | None
    gpu: str | None
    driver: str | None
    python: str
    packages: dict[str, str | None]


class PeakRecord(_Record):
    """The machine's matmul rate, measured in the same run: the ceiling that shares of peak refer to."""

    flops_per_s: float
    precision: Literal["fp32", "fp16", "bf16"]
    device: str
    kernel: PeakKernel = "matrix product"
    """What computed the product: on some CPUs convolutions run on newer instructions than products do."""
    shape: tuple[int, int, int]
    """M, L, N of the product (M, L) x (L, N); a convolution's as the product that it is."""
    samples_ms: tuple[_Ms, ...]


class ParityRecord(_Record):
    """Whether a subject's pictures are those of its reference on the same prompts and seeds."""

    reference: str
    """Key of the subject it was compared with."""
    psnr_db: float | None
    """None where the images are equal."""
    required_db: float
    passed: bool


class SubjectRecord(_Record):
    """One thing that is measured: a model, the way it is run, and its number of steps."""

    key: str
    """Unique in the report, stable from run to run, e.g. ``papercut/torch/k4``."""
    label: str
    """For people, e.g. ``papercut, K = 4, shared decoder``."""
    kind: SubjectKind
    backend: BenchBackend
    model: str
    model_sha256: str | None
    steps: int
    """Decoder timesteps K, or sampler steps."""
    guidance: float | None
    precision: Literal["fp32", "fp16", "bf16", "int8"]
    device: str
    random_weights: bool = False
    untrained: bool = False
    """A student that is its teacher's weights as they are: its speed is a student's, its pictures mean nothing."""
    merged_upsampler: bool = False
    """Nearest upsampling and its convolution as one transposed convolution: compare with what has it as well."""
    weights_bytes: int | None = None
    """Of the parameters that the subject uses, as they lie in memory."""
    load_s: float
    build_s: float | None = None
    """Compilation or export that this run had to do first; None where there was none."""
    parity: ParityRecord | None = None
    notes: tuple[str, ...] = ()


class LatencyRecord(_Record):
    """Samples of one subject at one batch and size.

    Sample i comes from round ``rounds[i]`` (from round i where that is empty): a slow subject takes part in every
    second, fourth … round only. Samples of two subjects of one round are a pair.
    """

    subject: str
    batch: PositiveInt
    size: _Size
    first_call_ms: _Ms
    warm_up: int
    clock: Literal["wall", "cuda-events"]
    """What timed the stages; ``samples_ms`` is the wall clock, end to end, always."""
    samples_ms: tuple[_Ms, ...]
    rounds: tuple[int, ...] = ()
    stage_samples_ms: dict[Stage, tuple[_Ms, ...]]
    """Empty where a backend cannot be stopped between its stages."""
    flops: dict[Stage, float] = {}
    """Of one run of the batch; empty where they cannot be counted."""
    peak_memory_bytes: int | None = None
    """The most that the subject's own calls added to what lay in memory before them; weights do not count."""
    memory_kind: Literal["rss", "torch"] | None = None
    driver_memory_bytes: int | None = None
    """The same as the GPU's driver counts it, for the whole device."""


class RatioRecord(_Record):
    """Time of a subject as a multiple of a baseline's: ratio of medians, bootstrap interval over paired rounds."""

    subject: str
    baseline: str
    batch: PositiveInt
    size: _Size
    scope: Scope
    ratio: float | None
    """None where it is withheld."""
    low: float | None
    high: float | None
    confidence: float = 0.95
    withheld: str | None = None
    """Why no figure is given: the subject's pictures or quality did not pass."""


class QualityProtocol(_Record):
    """How quality was measured: figures of another protocol cannot be compared."""

    prompts: str
    """Where the prompts come from."""
    prompts_sha256: str
    images: int
    """N, for each subject."""
    seeds: tuple[int, ...]
    """First seed of each repetition."""
    reference: str
    reference_images: int
    reference_sha256: str | None
    extractor: str
    extractor_sha256: str | None
    features: int
    resize: str
    k: int = 5
    """Nearest neighbours of precision, recall, density and coverage."""
    diversity: str | None = None
    """How many images of how many prompts diversity is over."""
    clip: str | None = None
    """The model of the CLIP score; None where there is no such score."""
    clip_sha256: str | None = None
    comparable: bool
    """Whether the figures may stand beside published ones."""
    notes: tuple[str, ...] = ()


class QualityRecord(_Record):
    """Figures of one subject: mean over the repetitions, and each repetition's own."""

    subject: str
    metrics: dict[str, float]
    """E.g. fid, kid, clip_score, precision, recall, density, coverage, diversity, and ``checker_…`` for papercut."""
    repetitions: dict[str, tuple[float, ...]]
    images_per_s: float | None = None
    kept_in: str | None = None
    """Folder of the images where they were kept."""


class GridRecord(_Record):
    """A picture of rows of prompts by columns of subjects, same seeds in a row."""

    columns: tuple[str, ...]
    """Keys of subjects; ``reference`` for a drawn or given one."""
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    png_base64: str
    cell: _Size
    """(height, width) of one picture in pixels."""


class BenchReport(_Record):
    """A whole report. ``warnings`` are what a reader must know before believing it."""

    format_version: int = 1
    kind: Literal["bench"] = "bench"
    name: str
    """``<model>_<machine>_<date>``, the stem of the files."""
    created: str
    """ISO 8601, UTC."""
    command: str
    tiue_version: str
    commit: str | None
    seed: int
    prompts: tuple[str, ...]
    """The ones that latency was measured on."""
    machine: MachineRecord
    peak: PeakRecord | None
    subjects: tuple[SubjectRecord, ...]
    latency: tuple[LatencyRecord, ...]
    ratios: tuple[RatioRecord, ...]
    control_samples_ms: tuple[_Ms, ...] = ()
    """One fixed matrix product at the begin of every round, in order: what drifts in it is the machine."""
    quality_protocol: QualityProtocol | None = None
    quality: tuple[QualityRecord, ...] = ()
    grid: GridRecord | None = None
    interrupted: bool = False
    """Stopped before its end: fewer rounds, batches or subjects than the command asks for."""
    warnings: tuple[str, ...] = ()
