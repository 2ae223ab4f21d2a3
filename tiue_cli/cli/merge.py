"""``tiue merge``: a model with LoRAs in its weights."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from tiue_cli.cli.console import Console
from tiue_cli.cli.options import BaseOption, FormatOption, LoraOption
from tiue_cli.errors import OutputError, UsageError
from tiue_cli.files.access import user_path
from tiue_cli.model.hub import adapter_folder
from tiue_cli.model.lora.student import write_full_student

EXAMPLES = (
    "tiue merge runs/sd15/student models/pixel-art --lora pixel-art.safetensors:0.8",
    "tiue merge runs/sd15-adapter/student models/sd15-student",
)


def merge(
    model: Annotated[str, typer.Argument(metavar="FOLDER|HUB_ID", help="Student or teacher.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The model folder to write.")],
    lora: LoraOption = None,
    base: BaseOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model folder that is there.")] = False,
    format_: FormatOption = "human",
) -> None:
    """Write a model folder with LoRAs in its weights, for good; of a student that is an adapter a full one."""
    target = user_path(folder, error=OutputError)
    if not lora and (adapter := adapter_folder(model)) is not None:
        out = write_full_student(adapter, target, base=base, overwrite=overwrite)
    elif base is not None:
        raise UsageError("--base is for a student that is an adapter, without other LoRAs", hint="leave it out")
    else:
        from tiue_cli.model.lora.merge import merge_loras

        out = merge_loras(model, target, tuple(lora or ()), overwrite=overwrite)
    console = Console(format_)
    console.document({"folder": str(out)})
    console.path(str(out))
    if format_ == "human":
        console.line(f'next: tiue generate --model {shlex.quote(str(out))} "a prompt"')
