"""Options that several commands share, and the panels that help is ordered by."""

from __future__ import annotations

from typing import Annotated

import typer

from tiue_cli.cli.console import Format
from tiue_cli.generate.config import BackendName, DeviceName, DtypeName, ProviderName

MODEL = "Model"
OUTPUT = "Output"
MACHINE = "Machine"

FormatOption = Annotated[Format, typer.Option("--format", help="What goes to stdout.", rich_help_panel=OUTPUT)]
GuidanceOption = Annotated[
    float | None,
    typer.Option(metavar="G", min=0, max=100, help="Guidance of a teacher; 1 is none.", rich_help_panel=MODEL),
]
VaeOption = Annotated[
    str | None,
    typer.Option(
        metavar="taesd|FOLDER|HUB_ID",
        help="Another autoencoder; taesd: tiny, fast, less detail.",
        rich_help_panel=MODEL,
    ),
]
LoraOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE|FOLDER|HUB_ID[:WEIGHT]",
        help="A LoRA on the model, safetensors; repeat it for several.",
        rich_help_panel=MODEL,
    ),
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER|HUB_ID",
        help="Where the teacher of a student that is an adapter lies now; said once, it is remembered.",
        rich_help_panel=MODEL,
    ),
]
BackendOption = Annotated[
    BackendName,
    typer.Option(
        help="What computes: torch for a model folder; onnx, openvino or trt for an export; papercut has all but trt.",
        rich_help_panel=MACHINE,
    ),
]
ProviderOption = Annotated[ProviderName, typer.Option(help="What ONNX Runtime computes with.", rich_help_panel=MACHINE)]
DeviceOption = Annotated[
    DeviceName, typer.Option(help="Device to run on; gpu and npu are Intel's, by OpenVINO.", rich_help_panel=MACHINE)
]
PrecisionOption = Annotated[
    DtypeName,
    typer.Option(
        "--precision",
        "--dtype",
        help="auto is fp32 on a CPU, fp16 on CUDA. bf16 on a CPU is slower in torch, and faster in OpenVINO.",
        rich_help_panel=MACHINE,
    ),
]
CompileOption = Annotated[
    bool,
    typer.Option(
        "--compile", help="CUDA: torch.compile; minutes for each new shape, for long runs.", rich_help_panel=MACHINE
    ),
]
