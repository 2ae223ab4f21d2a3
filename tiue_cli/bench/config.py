"""What ``tiue bench`` can be asked; the one place of its defaults. Light: the command line reads it for ``--help``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

from tiue_cli.errors import UsageError
from tiue_cli.model.noise import check_seed

StudentBackend = Literal["torch", "compile", "onnx", "trt", "openvino"]
DeviceName = Literal["auto", "cpu", "cuda"]
PrecisionName = Literal["auto", "fp32", "fp16", "bf16", "int8"]
"""``int8`` is for exports; torch computes in fp32 beside them."""

BACKENDS: Final[tuple[StudentBackend, ...]] = get_args(StudentBackend)
BACKEND_NAMES: Final = {
    "torch": "torch",
    "compile": "torch.compile",
    "onnx": "ONNX Runtime",
    "trt": "TensorRT",
    "openvino": "OpenVINO",
    "diffusers": "diffusers",
}
"""For people; a new runtime of exports has a line here, in StudentBackend and in ``subjects.exports.RUNTIMES``."""
SHAPES: Final = ("sd15", "sd21", "papercut")
"""What ``--random-weights`` can build."""
NO_TEACHER: Final = "none"
"""What ``--teacher`` says to leave the teacher out."""

MAX_BATCH: Final = 256
MAX_TEACHER_STEPS: Final = 1000

_PEER = re.compile(r"(?P<name>[^=:/\s]+)=(?P<source>.+?):(?P<steps>[0-9]{1,6})(?::(?P<guidance>[0-9]*\.?[0-9]+))?")


@dataclass(frozen=True)
class PeerSpec:
    """A diffusers text-to-image pipeline to compare with, under its own sampler.

    ``source`` is a folder or hub id; ``guidance`` None leaves it at the pipeline's own default.
    """

    name: str
    source: str
    steps: int
    guidance: float | None = None


@dataclass(frozen=True)
class BenchConfig:
    """What ``tiue bench`` can be asked, with the defaults of its options.

    ``models`` are folders, hub ids, export folders or embedded names; with ``random_weights`` they are ``SHAPES``.
    None means: the model's own (``size`` in pixels (H, W), ``steps``: every K up to the student's), what the student
    says (``teacher``), that of ``tiue generate`` (``guidance``), every core (``threads``), or for ``backends``: torch,
    and ONNX Runtime and TensorRT where an export or engine of the model lies ready. ``duration_s`` is what each subject
    is measured for at each batch. ``prompts`` None are scenes of papercut's language, which any model can read.
    For ``quality``: ``images`` of each subject and repetition; the rest as in ``quality_plan.QualityConfig``.
    """

    models: tuple[str, ...]
    teacher: str | None = None
    teacher_steps: tuple[int, ...] = (25, 50)
    guidance: float | None = None
    backends: tuple[StudentBackend, ...] | None = None
    batches: tuple[int, ...] = (1, 4, 16)
    size: tuple[int, int] | None = None
    steps: tuple[int, ...] | None = None
    precision: PrecisionName = "auto"
    device: DeviceName = "auto"
    vae: str | None = None
    duration_s: float = 2.0
    random_weights: bool = False
    peers: tuple[PeerSpec, ...] = ()
    prompts: Path | None = None
    seed: int = 0
    threads: int | None = None
    out: Path = Path("benchmarks")
    latency: bool = True
    quality: bool = False
    images: int = 256
    repetitions: int = 1
    reference: Path | None = None
    extractor: Path | None = None
    clip: Path | None = None
    resize: int | None = None
    keep_images: Path | None = None
    command: str = "tiue bench"
    """What was typed, for the record."""

    def validate(self) -> None:
        """Check the values, before anything heavy is loaded. Raises UsageError."""
        if not self.models:
            raise UsageError("no model was given", hint="say what to measure: tiue bench papercut")
        _refuse_twice("model", self.models)
        _check_numbers("--batch", self.batches, largest=MAX_BATCH)
        _check_numbers("--teacher-steps", self.teacher_steps, largest=MAX_TEACHER_STEPS)
        if self.steps is not None:
            _check_numbers("--steps", self.steps, largest=MAX_TEACHER_STEPS)
        if self.backends is not None:
            _refuse_twice("backend", self.backends)
        _refuse_twice("name of a --peer", [peer.name for peer in self.peers])
        _check_range("--duration", self.duration_s, 1e-3, 3600, hint="give seconds, e.g. --duration 3")
        _check_range("--guidance", self.guidance, 0, 100, hint="1 is none; 7.5 is usual")
        _check_range("--threads", self.threads, 1, 2**16, hint="leave it out for every core")
        check_seed(self.seed)
        self._check_random_weights()
        self._check_quality()

    def _check_random_weights(self) -> None:
        if not self.random_weights:
            for model in self.models:
                if model in SHAPES and model != "papercut" and not Path(model).exists():
                    raise UsageError(
                        f"{model} names a shape, and its weights are not part of tiue",
                        hint=f"measure its speed with --random-weights, or give a folder or hub id instead of {model}",
                    )
            return
        for model in self.models:
            if model not in SHAPES:
                raise UsageError(
                    f"--random-weights builds {', '.join(SHAPES)}, not {model}",
                    hint="leave --random-weights out to measure a folder or hub id",
                )
        if self.teacher not in (None, NO_TEACHER):
            raise UsageError("--random-weights and --teacher were both given", hint="the shapes are their own teachers")
        if self.quality:
            raise UsageError("random weights have no quality", hint="leave --quality out, or give trained models")

    def _check_quality(self) -> None:
        for option, value in (
            ("--reference", self.reference),
            ("--extractor", self.extractor),
            ("--clip", self.clip),
            ("--resize", self.resize),
            ("--keep-images", self.keep_images),
        ):
            if not self.quality and value is not None:
                raise UsageError(f"{option} is for --quality", hint=f"add --quality, or leave {option} out")
        if not self.quality and not self.latency:
            raise UsageError("with --no-latency and without --quality nothing is measured", hint="add --quality")
        _check_range("--repetitions", self.repetitions, 1, 100, hint="3 show the noise of a figure")
        _check_range("--images", self.images, 2, 10**7, hint="figures of fewer than 256 say little")


def parse_numbers(text: str, option: str) -> tuple[int, ...]:
    """Read "1,4,16" as numbers, each at least 1 and named once. Raises UsageError naming ``option``."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and len(word) < 6 for word in words):
        raise UsageError(f"{option} {text!r} is not understood", hint=f"write numbers with commas: {option} 1,4,16")
    numbers = tuple(int(word) for word in words)
    _check_numbers(option, numbers, largest=10**5)
    return numbers


def parse_backends(text: str) -> tuple[StudentBackend, ...]:
    """Read "torch,onnx" as backends. Raises UsageError for one that is none."""
    found: list[StudentBackend] = []
    for word in (word.strip() for word in text.split(",")):
        backend = next((name for name in BACKENDS if name == word), None)
        if backend is None:
            raise UsageError(f"unknown backend {word!r}", hint=f"choose among {', '.join(BACKENDS)}")
        found.append(backend)
    _refuse_twice("backend", found)
    return tuple(found)


def parse_peer(text: str) -> PeerSpec:
    """Read "NAME=FOLDER:STEPS[:GUIDANCE]". Raises UsageError."""
    match = _PEER.fullmatch(text.strip())
    if match is None or not 1 <= int(match["steps"]) <= MAX_TEACHER_STEPS:
        raise UsageError(
            f"--peer {text!r} is not understood",
            hint="write NAME=FOLDER_OR_HUB_ID:STEPS[:GUIDANCE], e.g. --peer turbo=stabilityai/sd-turbo:1:0",
        )
    guidance = None if match["guidance"] is None else float(match["guidance"])
    _check_range(f"--peer {match['name']}: guidance", guidance, 0, 100, hint="1 is none; 7.5 is usual")
    return PeerSpec(match["name"], match["source"], int(match["steps"]), guidance)


def _check_numbers(option: str, numbers: Sequence[int], *, largest: int) -> None:
    if not numbers:
        raise UsageError(f"{option} names nothing", hint=f"write numbers with commas: {option} 1,4,16")
    for number in numbers:
        _check_range(option, number, 1, largest, hint="write numbers with commas")
    _refuse_twice(option, numbers)


def _check_range(option: str, value: float | None, least: float, most: float, *, hint: str) -> None:
    if value is not None and not least <= value <= most:
        raise UsageError(f"{option} {value:g} is outside {least:g} to {most:.10g}", hint=hint)


def _refuse_twice(what: str, items: Sequence[object]) -> None:
    for item in items:
        if items.count(item) > 1:
            raise UsageError(f"{what} {item} is named twice", hint="name each once")
