"""Made-up bench reports for the tests of what reads them: every figure is drawn from a seeded generator, none measured.

The shape is that of a real run: a teacher at two numbers of steps, a plain UNet pass, students, a peer; interleaved
rounds; slow subjects in fewer of them.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from tiue_cli.bench.report.schema import (
    BenchReport,
    GridRecord,
    LatencyRecord,
    MachineRecord,
    ParityRecord,
    PeakRecord,
    QualityProtocol,
    QualityRecord,
    RatioRecord,
    SubjectRecord,
)

TEACHER = "papercut/torch/teacher25"
PLAIN = "papercut/torch/plain-unet"
STUDENT = "papercut-student/torch/k4"
ONNX = "papercut-student/onnx/k4"
SIZE = (64, 64)
PEAK_FLOPS = 92e9
UNET_FLOPS = 1.1e9

_STAGES = {
    "papercut/torch/teacher50": {"text": 1.9, "unet": 1480.0, "vae": 3.1},
    TEACHER: {"text": 1.9, "unet": 741.0, "vae": 3.1},
    PLAIN: {"unet": 15.4},
    "papercut-student/torch/k1": {"text": 1.0, "unet_encoder": 5.1, "unet_decoder": 10.4, "vae": 3.1},
    "papercut-student/torch/k2": {"text": 1.0, "unet_encoder": 5.1, "unet_decoder": 18.2, "vae": 3.1},
    STUDENT: {"text": 1.0, "unet_encoder": 5.1, "unet_decoder": 34.9, "vae": 3.1},
    "papercut-student/torch/k4-plain": {"text": 1.0, "unet_encoder": 5.1, "unet_decoder": 40.8, "vae": 3.1},
    "papercut-student/compile/k4": {"text": 0.8, "unet_encoder": 4.2, "unet_decoder": 30.1, "vae": 2.7},
    ONNX: {"text": 0.5, "unet_encoder": 3.9, "unet_decoder": 27.3, "vae": 2.2},
    "lcm/diffusers/4": {},
}
_TOTALS = {"lcm/diffusers/4": 71.0}
_KINDS = {"teacher50": "teacher", "teacher25": "teacher", "plain-unet": "plain-unet", "k4-plain": "student-plain"}


def make_report(
    *,
    seed: int = 0,
    rounds: int = 48,
    noise: float = 0.03,
    correlation: float = 0.0,
    slower: Mapping[str, float] | None = None,
    pace: float = 1.0,
    batches: Sequence[int] = (1, 4, 16),
    keys: Sequence[str] = tuple(_STAGES),
    quality: bool = True,
    grid: bool = True,
    **changes: Any,
) -> BenchReport:
    """A report; ``slower`` multiplies a subject's times, ``pace`` everything's, ``noise`` is the sigma of log time."""
    generator = np.random.default_rng(seed)
    latency = [
        _latency(key, batch, generator, rounds, noise, correlation, pace * (slower or {}).get(key, 1.0))
        for batch in batches
        for key in keys
    ]
    fields: dict[str, Any] = {
        "name": "papercut_test-machine_2026-01-02",
        "created": "2026-01-02T03:04:05Z",
        "command": "tiue bench papercut-student --teacher papercut --teacher-steps 25,50 --batch 1,4,16 --quality",
        "tiue_version": "0.1.0",
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "seed": 0,
        "prompts": ("a yellow star above a green tree", "a red heart at night"),
        "machine": machine(),
        "peak": PeakRecord(
            flops_per_s=PEAK_FLOPS, precision="fp32", device="cpu", shape=(1024, 1024, 1024), samples_ms=(23.3, 23.4)
        ),
        "subjects": tuple(_subject(key) for key in keys),
        "latency": tuple(latency),
        "ratios": tuple(_ratios(latency)),
        "control_samples_ms": tuple((2.0 * pace * _factors(generator, rounds, noise, correlation)).tolist()),
        "quality_protocol": protocol() if quality else None,
        "quality": tuple(_quality(key, generator) for key in keys if _has_quality(key)) if quality else (),
        "grid": make_grid((TEACHER, STUDENT, ONNX)) if grid else None,
    }
    return BenchReport(**{**fields, **changes})


def machine(**changes: Any) -> MachineRecord:
    """A machine that does not exist."""
    fields: dict[str, Any] = {
        "name": "test-machine", "system": "Linux 6.1", "cpu": "Imaginary CPU @ 2.1 GHz", "cores": 2, "threads": 2,
        "memory_bytes": 16 * 2**30, "gpu": None, "driver": None, "python": "3.11.9",
        "packages": {"torch": "2.13.0", "diffusers": "0.42.1", "onnxruntime": "1.26.0", "tensorrt": None},
    }  # fmt: skip
    return MachineRecord(**{**fields, **changes})


def protocol(**changes: Any) -> QualityProtocol:
    """256 images: not comparable."""
    fields: dict[str, Any] = {
        "prompts": "papercut's captions", "prompts_sha256": "ab" * 32, "images": 256, "seeds": (0, 10_000, 20_000),
        "reference": "scenes drawn from the same captions", "reference_images": 256, "reference_sha256": "cd" * 32,
        "extractor": "papercut checker", "extractor_sha256": "ef" * 32, "features": 128, "resize": "none",
        "comparable": False, "notes": ("fewer than 5,000 images: not comparable with published figures",),
    }  # fmt: skip
    return QualityProtocol(**{**fields, **changes})


def make_grid(columns: Sequence[str], prompts: Sequence[str] = ("a red heart at night", "a blue fish")) -> GridRecord:
    """Plain colours, a different one in each cell, without gaps."""
    cell = (32, 32)
    pixels = np.zeros((cell[0] * len(prompts), cell[1] * len(columns), 3), dtype=np.uint8)
    for row in range(len(prompts)):
        for column in range(len(columns)):
            area = pixels[row * cell[0] : (row + 1) * cell[0], column * cell[1] : (column + 1) * cell[1]]
            area[:] = (40 * row, 60 * column, 120)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return GridRecord(
        columns=tuple(columns),
        prompts=tuple(prompts),
        seeds=tuple(range(len(prompts))),
        png_base64=base64.b64encode(stream.getvalue()).decode("ascii"),
        cell=cell,
    )


def _subject(key: str) -> SubjectRecord:
    model, backend, way = key.split("/")
    kind = "peer" if backend == "diffusers" else _KINDS.get(way, "student")
    steps = int("".join(char for char in way if char.isdigit()) or 1)
    words = {
        "teacher": f"papercut's teacher, {steps} steps",
        "plain-unet": "one plain UNet pass",
        "student": f"K = {steps}, {backend}",
        "student-plain": f"K = {steps}, plain batch, {backend}",
        "peer": f"LCM, {steps} steps",
    }
    return SubjectRecord(
        key=key,
        label=words[kind],
        kind=kind,  # type: ignore[arg-type]
        backend=backend,  # type: ignore[arg-type]
        model=model,
        model_sha256=None if kind == "peer" else "12" * 32,
        steps=steps,
        guidance=2.0 if kind == "teacher" else None,
        precision="fp32",
        device="cpu",
        weights_bytes=21_000_000,
        load_s=0.8,
        build_s=41.0 if backend == "compile" else None,
        parity=ParityRecord(reference=STUDENT, psnr_db=61.2, required_db=40.0, passed=True) if key == ONNX else None,
    )


def _factors(generator: np.random.Generator, count: int, noise: float, correlation: float) -> np.ndarray:
    """Positive factors with median 1: exp of an AR(1) series with standard deviation ``noise``."""
    steps = generator.standard_normal(count)
    series = np.empty(count)
    series[0] = steps[0]
    for index in range(1, count):
        series[index] = correlation * series[index - 1] + np.sqrt(1 - correlation**2) * steps[index]
    factors: np.ndarray = np.exp(noise * series)
    return factors


def _latency(
    key: str,
    batch: int,
    generator: np.random.Generator,
    rounds: int,
    noise: float,
    correlation: float,
    factor: float,
) -> LatencyRecord:
    stride = 4 if "teacher" in key else 1
    taking_part = tuple(range(0, rounds, stride))
    scale = factor * batch**0.9
    stages = {
        stage: scale * ms * _factors(generator, len(taking_part), noise, correlation)
        for stage, ms in _STAGES[key].items()
    }
    total = sum(stages.values()) + 0.4 * factor if stages else None
    if total is None:
        total = scale * _TOTALS[key] * _factors(generator, len(taking_part), noise, correlation)
    kind = _KINDS.get(key.split("/")[-1], "student")
    steps = int("".join(char for char in key.split("/")[-1] if char.isdigit()) or 1)
    flops = {
        stage: batch
        * UNET_FLOPS
        * {"unet": 2.0 * steps if kind == "teacher" else 1.0, "unet_encoder": 0.325, "unet_decoder": 0.6 * steps}[stage]
        for stage in stages
        if stage.startswith("unet")
    }
    return LatencyRecord(
        subject=key,
        batch=batch,
        size=SIZE,
        first_call_ms=3.1 * float(total[0]),
        warm_up=3,
        clock="wall",
        samples_ms=tuple(total.tolist()),
        rounds=taking_part,
        stage_samples_ms={stage: tuple(samples.tolist()) for stage, samples in stages.items()},  # type: ignore[misc]
        flops=flops,  # type: ignore[arg-type]
        peak_memory_bytes=int(60e6 * batch**0.8) if stages else None,
        memory_kind="rss" if stages else None,
    )


def _ratios(latency: Sequence[LatencyRecord]) -> list[RatioRecord]:
    found = {(record.subject, record.batch): record for record in latency}
    rows = []
    for (subject, batch), record in found.items():
        for baseline, scope in ((TEACHER, "image"), ("papercut/torch/teacher50", "image"), (PLAIN, "unet")):
            other = found.get((baseline, batch))
            if other is None or subject == baseline or (scope == "image" and "/plain" in subject):
                continue
            if scope == "unet" and (not record.stage_samples_ms or "teacher" in subject):
                continue
            if subject == "papercut-student/compile/k4":
                ratio, withheld = None, "its pictures are not those of the eager student: 21.3 dB, 40 needed"
            else:
                ratio, withheld = _time(record, scope) / _time(other, scope), None
            rows.append(
                RatioRecord(
                    subject=subject,
                    baseline=baseline,
                    batch=batch,
                    size=SIZE,
                    scope=scope,  # type: ignore[arg-type]
                    ratio=ratio,
                    low=None if ratio is None else ratio * 0.985,
                    high=None if ratio is None else ratio * 1.017,
                    withheld=withheld,
                )
            )
    return rows


def _time(record: LatencyRecord, scope: str) -> float:
    if scope == "image":
        return float(np.median(record.samples_ms))
    return sum(float(np.median(samples)) for stage, samples in record.stage_samples_ms.items() if "unet" in stage)


def _has_quality(key: str) -> bool:
    return "plain" not in key and "compile" not in key


def _quality(key: str, generator: np.random.Generator) -> QualityRecord:
    steps = int("".join(char for char in key.split("/")[-1] if char.isdigit()))
    worse = 1 / steps
    centres = {
        "fid": 6 + 30 * worse, "kid": 0.004 + 0.03 * worse, "precision": 0.8 - 0.3 * worse, "recall": 0.6 - 0.4 * worse,
        "diversity": 0.5 - 0.2 * worse, "checker_all": 0.99 - 0.4 * worse,
    }  # fmt: skip
    repetitions = {
        name: tuple((value * (1 + 0.02 * generator.standard_normal(3))).tolist()) for name, value in centres.items()
    }
    return QualityRecord(
        subject=key,
        metrics={name: float(np.mean(values)) for name, values in repetitions.items()},
        repetitions=repetitions,
        images_per_s=12.5,
    )
