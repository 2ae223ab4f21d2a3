"""``tiue merge``: a model with LoRAs in its weights."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from tiue_cli.cli.console import Console
from tiue_cli.cli.options import FormatOption, LoraOption
from tiue_cli.errors import OutputError
from tiue_cli.files.access import user_path

EXAMPLES = ("tiue merge runs/sd15/student models/pixel-art --lora pixel-art.safetensors:0.8",)


def merge(
    model: Annotated[str, typer.Argument(metavar="FOLDER|HUB_ID", help="Student or teacher.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The model folder to write.")],
    lora: LoraOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model folder that is there.")] = False,
    format_: FormatOption = "human",
) -> None:
    """Write a model folder with LoRAs added to its weights, for good."""
    from tiue_cli.model.lora.merge import merge_loras

    out = merge_loras(model, user_path(folder, error=OutputError), tuple(lora or ()), overwrite=overwrite)
    console = Console(format_)
    console.document({"folder": str(out)})
    console.path(str(out))
    if format_ == "human":
        console.line(f'next: tiue generate --model {shlex.quote(str(out))} "a prompt"')
