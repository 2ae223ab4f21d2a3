"""``tiue convert``: a checkpoint of one file into a model folder."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from tiue_cli.cli.console import Console
from tiue_cli.cli.options import FormatOption
from tiue_cli.errors import ModelFolderError, UsageError
from tiue_cli.files.access import user_path
from tiue_cli.model.hub import resolve_model

EXAMPLES = (
    "tiue convert v1-5-pruned.safetensors models/sd15",
    "tiue convert v2-1_768.safetensors models/sd21 --prediction v_prediction --ema",
    "tiue convert fine-tuned.safetensors models/mine --like models/sd15",
)


def convert(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Stable Diffusion 1.x or 2.x, .safetensors.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The model folder to write.")],
    prediction: Annotated[
        Literal["epsilon", "v_prediction"] | None,
        typer.Option(help="What its UNet predicts, where the file does not say; 2.x at 768 pixels: v_prediction."),
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Take the averaged weights of a file that has both.")] = False,
    like: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|HUB_ID", help="A model of its family: its configs are used, and parts that FILE lacks."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model folder that is there.")] = False,
    format_: FormatOption = "human",
) -> None:
    """Make a folder of a checkpoint file; other commands take the file as well, and convert it into the cache."""
    path = user_path(file, error=ModelFolderError)
    if path.is_dir():
        raise UsageError(f"{path} is a folder already", hint=f"use it: tiue inspect {path}")
    source = None if like is None else resolve_model(like)
    from tiue_cli.model.checkpoint.convert import convert_checkpoint

    out = convert_checkpoint(
        path,
        user_path(folder, error=UsageError),
        prediction=prediction,
        ema=ema,
        like=source,
        overwrite=overwrite,
    )
    console = Console(format_)
    console.document({"folder": str(out)})
    console.path(str(out))
    if format_ == "human":
        console.line(f'next: tiue generate --model {shlex.quote(str(out))} "a prompt"')
