"""``tiue generate --shards``: a bulk job, its progress and its totals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def with_shard_size(words: Sequence[str]) -> list[str]:
    """``--shards`` without a number takes the default: an option of typer's always wants its value."""
    found: list[str] = []
    for position, word in enumerate(words):
        if word == "--":
            return [*found, *words[position:]]
        found.append(word)
        following = words[position + 1] if position + 1 < len(words) else "-"
        if word == "--shards" and following.startswith("-"):
            found.append(str(BulkConfig.shard))
    return found


def check_bulk_options(
    shards: int | None, prompts_file: Path | None, given: Mapping[str, object], *, others: bool
) -> None:
    """Raise UsageError for options of a bulk job without ``--shards``, and for what does not go with it.

    ``others``: prompts come from elsewhere too, from arguments or the keyboard.
    """
    if shards is None:
        if named := [name for name, value in given.items() if value != _DEFAULTS[name]]:
            raise UsageError(f"{named[0]} is for bulk jobs", hint="add --shards")
    elif prompts_file is None or others:
        raise UsageError("--shards reads its prompts from --prompts", hint="give --prompts FILE, FOLDER or -")


def run_shards(config: BulkConfig, console: Console) -> None:
    """Run the job; on Ctrl-C say how to go on."""
    from tiue_cli.generate.bulk.run import run_bulk

    try:
        with console.stages() as show:

            def shown(progress: BulkProgress) -> None:
                failed = f"  {progress.failed} failed" if progress.failed else ""
                rate = f"  {progress.images_per_s:.1f} images/s" if progress.images_per_s else ""
                # The expected number is an estimate, and none is known of standard input.
                total = max(progress.shards, progress.expected_shards or 0)
                show("shards", progress.shards, total, f"{progress.images:,} images{rate}{failed}")

            totals = run_bulk(config, on_progress=shown)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the shards that are whole stay; the same command makes the rest") from None
    console.path(str(config.out))
    console.document(totals)
    failed = f", {totals['failed_rows']:,} rows failed: {config.out / 'failed.jsonl'}" if totals["failed_rows"] else ""
    shards = f"{totals['shards']:,} shard{'' if totals['shards'] == 1 else 's'}"
    console.summary(f"{totals['images']:,} images in {shards}, seed {totals['seed']}{failed}")
