"""``tiue generate --shards``: a bulk job, its progress and its totals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tiue_cli.cli.console import Console
from tiue_cli.errors import UsageError
from tiue_cli.generate.bulk.config import BulkConfig

if TYPE_CHECKING:
    from tiue_cli.generate.bulk.run import BulkProgress

BULK = "In bulk"


_DEFAULTS = {
    "--image-format": BulkConfig.image_format,
    "--strict": BulkConfig.strict,
    "--workers": BulkConfig.workers,
    "--launch": BulkConfig.launch,
}


def check_bulk_options(
    shards: int | None, prompts_file: Path | None, given: Mapping[str, object], *, others: bool
) -> None:
    """Raise UsageError for options of a bulk job without ``--shards``, and for what does not go with it.

    ``others``: prompts come from elsewhere too, from arguments or the keyboard.
    """
    if shards is None:
        if named := [name for name, value in given.items() if value != _DEFAULTS[name]]:
            raise UsageError(f"{named[0]} is for bulk jobs", hint="add --shards N, the images of a shard")
    elif prompts_file is None or others:
        raise UsageError("--shards reads its prompts from --prompts", hint="give --prompts FILE, FOLDER or -")


def run_shards(config: BulkConfig, console: Console) -> None:
    """Run the job; on Ctrl-C say how to go on."""
    from tiue_cli.generate.bulk.run import run_bulk

    try:
        # How many there are is known at the end of the stream only, so there is no bar to fill.
        with console.stages() as show:

            def shown(progress: BulkProgress) -> None:
                failed = f"  {progress.failed} failed" if progress.failed else ""
                figures = f"{progress.images:,} images  {progress.images_per_s:.1f} images/s{failed}"
                show("shards", progress.shards, progress.shards, figures)

            totals = run_bulk(config, on_progress=shown)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the shards that are whole stay; the same command makes the rest") from None
    console.path(str(config.out))
    console.document(totals)
    failed = f", {totals['failed_rows']:,} rows failed: {config.out / 'failed.jsonl'}" if totals["failed_rows"] else ""
    console.summary(f"{totals['images']:,} images in {totals['shards']:,} shards, seed {totals['seed']}{failed}")
