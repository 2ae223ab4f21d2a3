"""What a call of ``tiue generate`` asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tiue_cli.model.hub import EMBEDDED

BackendName = Literal["auto", "torch", "onnx", "openvino", "trt"]


DeviceName = Literal["auto", "cpu", "cuda", "gpu", "npu"]
"""``gpu`` and ``npu`` are Intel's, which OpenVINO runs."""


DtypeName = Literal["auto", "fp32", "fp16", "bf16", "int8"]
"""``int8`` is for 8-bit exports."""


EncoderTimestep = Literal["trained", "first"]
"""Where a student's UNet encoder runs: at the timestep that it was trained at, or at the first of those drawn with."""


ProviderName = Literal["auto", "cuda", "tensorrt", "cpu"]


LongPrompts = Literal["cut", "chunk"]


@dataclass(frozen=True)
class GenerateConfig:
    """What ``tiue generate`` can be asked, with the defaults of its options.

    None means the model's own (``size`` in pixels (H, W), ``steps``, ``teacher_steps``, ``guidance``, ``vae``), one
    that fits (``batch``), or a random one (``seed``). ``loras`` are ``SOURCE[:WEIGHT]`` each. ``out`` is a folder, or a
    file where it ends in ``.png``.
    """

    model: str = EMBEDDED
    vae: str | None = None
    loras: tuple[str, ...] = ()
    long_prompts: LongPrompts = "cut"
    steps: int | None = None
    encoder_timestep: EncoderTimestep = "trained"
    teacher_steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    images: int = 1
    size: tuple[int, int] | None = None
    batch: int | None = None
    backend: BackendName = "auto"
    device: DeviceName = "auto"
    dtype: DtypeName = "auto"
    provider: ProviderName = "auto"
    compiled: bool = False
    out: Path = Path("images")
    grid: bool = False
    metadata: bool = True
    overwrite: bool = False
