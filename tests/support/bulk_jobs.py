"""Bulk jobs for the tests: prompts, a config, a run, and what it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiue_cli.files.hashes import sha256_file
from tiue_cli.generate.bulk.config import BulkConfig
from tiue_cli.generate.bulk.run import run_bulk
from tiue_cli.generate.config import GenerateConfig

COLORS, THINGS = ("red", "blue"), ("star", "tree", "house")


def prompts_file(path: Path, count: int) -> Path:
    lines = [f"a {COLORS[i % 2]} {THINGS[i % 3]}" for i in range(count)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def job(model: Path, prompts: Path | str, out: Path, **options: Any) -> BulkConfig:
    draw = {name: options.pop(name) for name in ("images", "steps", "seed", "metadata", "batch") if name in options}
    return BulkConfig(
        draw=GenerateConfig(model=str(model), **{"seed": 100, **draw}), prompts=str(prompts), out=out, **options
    )


def run(config: BulkConfig) -> dict[str, Any]:
    return run_bulk(config, on_progress=lambda progress: None)


def data_files(out: Path) -> dict[str, str]:
    """Hash by name of everything that a job leaves."""
    return {file.name: sha256_file(file) for file in sorted(out.iterdir())}
