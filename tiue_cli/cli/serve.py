"""``tiue serve``: one model behind a URL."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tiue_cli.cli.console import Console
from tiue_cli.cli.options import (
    MODEL,
    BackendOption,
    BaseOption,
    CompileOption,
    DeviceOption,
    GuidanceOption,
    LoraOption,
    PrecisionOption,
    ProviderOption,
    VaeOption,
)
from tiue_cli.errors import MissingDependencyError
from tiue_cli.generate.config import GenerateConfig
from tiue_cli.model.hub import place_base
from tiue_cli.serve.config import ServeConfig

_SERVE = ServeConfig()
_DRAW = _SERVE.draw
ACCESS = "Access"
BATCHES = "Batches and limits"
EXAMPLES = (
    "tiue serve",
    "tiue serve engines/papercut --port 9000 --max-batch 32",
    "tiue serve runs/sd15/student --lora-dir loras",
    "tiue serve runs/sd15/student --host 0.0.0.0 --api-key-file keys.txt",
)


def serve(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Student, teacher or export folder, hub id, or papercut.")
    ] = _DRAW.model,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|HUB_ID",
            help="A teacher to compare with on the page; papercut's own is there.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    vae: VaeOption = _DRAW.vae,
    lora: LoraOption = None,
    base: BaseOption = None,
    lora_dir: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="LoRAs that requests may name in their field lora.", rich_help_panel=MODEL),
    ] = _SERVE.lora_dir,
    guidance: GuidanceOption = _DRAW.guidance,
    no_metadata: Annotated[
        bool,
        typer.Option(
            "--no-metadata",
            help="Write no prompt, seed and model into files; that a machine made them stays.",
            rich_help_panel=MODEL,
        ),
    ] = not _SERVE.metadata,
    host: Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=ACCESS)] = _SERVE.host,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.", rich_help_panel=ACCESS)
    ] = _SERVE.port,
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keys that may ask, one a line.", rich_help_panel=ACCESS),
    ] = None,
    no_auth: Annotated[
        bool,
        typer.Option("--no-auth", help="Let everybody ask who can reach --host.", rich_help_panel=ACCESS),
    ] = _SERVE.no_auth,
    cors: Annotated[
        list[str] | None,
        typer.Option(
            "--cors", metavar="ORIGIN", help="A web page's origin that may ask; repeatable.", rich_help_panel=ACCESS
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A host name that an open server on loopback answers to, besides localhost; repeatable.",
            rich_help_panel=ACCESS,
        ),
    ] = None,
    max_batch: Annotated[
        int, typer.Option(metavar="N", min=1, help="Images computed at once.", rich_help_panel=BATCHES)
    ] = _SERVE.max_batch,
    max_wait_ms: Annotated[
        float,
        typer.Option(metavar="MS", min=0, max=1000, help="Longest wait for others to join.", rich_help_panel=BATCHES),
    ] = _SERVE.max_wait_ms,
    max_queue: Annotated[
        int, typer.Option(metavar="N", min=1, help="Images that wait; beyond it, 429.", rich_help_panel=BATCHES)
    ] = _SERVE.max_queue,
    timeout_s: Annotated[
        float, typer.Option(metavar="S", min=0.1, help="Longest time of a request.", rich_help_panel=BATCHES)
    ] = _SERVE.timeout_s,
    max_images: Annotated[
        int, typer.Option(metavar="N", min=1, help="Images of one request.", rich_help_panel=BATCHES)
    ] = _SERVE.max_images,
    backend: BackendOption = _DRAW.backend,
    provider: ProviderOption = _DRAW.provider,
    device: DeviceOption = _DRAW.device,
    dtype: PrecisionOption = _DRAW.dtype,
    compiled: CompileOption = _DRAW.compiled,
) -> None:
    """Serve a model: OpenAI's images API, A1111's, and a page that draws as you type.

    Requests of one size and K that come together share a batch.
    """
    config = ServeConfig(
        draw=GenerateConfig(
            model=model,
            vae=vae,
            loras=tuple(lora or ()),
            guidance=guidance,
            backend=backend,
            provider=provider,
            device=device,
            dtype=dtype,
            compiled=compiled,
        ),
        teacher=teacher,
        lora_dir=lora_dir,
        host=host,
        port=port,
        max_batch=max_batch,
        max_wait_ms=max_wait_ms,
        max_queue=max_queue,
        timeout_s=timeout_s,
        max_images=max_images,
        api_key_file=api_key_file,
        no_auth=no_auth,
        cors=tuple(cors or ()),
        allow_hosts=tuple(allow_host or ()),
        metadata=not no_metadata,
    )
    config.validate()
    if base is not None:
        place_base([model], base)
    try:
        from tiue_cli.serve.run import serve as run
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"{error.name} is not installed", hint="install tiue whole: python -m pip install tiue"
        ) from None
    console = Console()

    def listening(url: str) -> None:
        console.line(url)
        console.note(f"the model is being loaded; the page is {url}/, the API {url}/v1, its description {url}/docs")

    run(config, log=console.note, on_listen=listening)
