"""A machine with a GPU has what tiue runs with and no more: every test module must be collected there."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# By another name than its distribution's, or there all the same: what runs needs it (huggingface_hub, rich).
MODULES = {"sd-parsers": "sd_parsers"}
THERE_ANYWAY = {"httpx", "markdown-it-py", "pytest"}


def extras() -> set[str]:
    """Modules that only an extra installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    name = lambda requirement: re.match(r"[A-Za-z0-9_.-]+", requirement)[0]  # type: ignore[index]  # noqa: E731
    always = {name(one) for one in project["dependencies"]} | THERE_ANYWAY
    wanted = {name(one) for group in project["optional-dependencies"].values() for one in group}
    return {MODULES.get(one, one) for one in wanted - always}


def unguarded(tree: ast.Module, missing: set[str]) -> Iterator[str]:
    """Imports on the module's top level that fail where ``missing`` is not installed."""
    skipped: set[str] = set()
    for node in tree.body:
        for call in ast.walk(node):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.importorskip":
                skipped.add(ast.literal_eval(call.args[0]).partition(".")[0])
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (name for name in names if name.partition(".")[0] in missing - skipped)


@pytest.mark.parametrize("file", sorted((ROOT / "tests").rglob("*.py")), ids=lambda file: file.stem)
def test_what_only_an_extra_installs_is_asked_for_gently(file: Path) -> None:
    found = list(unguarded(ast.parse(file.read_text(encoding="utf-8")), extras()))
    assert not found, f"{file.name} imports {found[0]}: pytest.importorskip it, or pytest -m gpu stops at it"


def test_the_check_finds_an_import_that_would_stop_it() -> None:
    missing = extras()
    assert {"prdc", "hypothesis", "torchmetrics", "tensorrt"} <= missing and not missing & {"torch", "numpy", "httpx"}
    bad = "import numpy\nfrom torchmetrics.image import fid\n"
    good = "import pytest\npytest.importorskip('torchmetrics')\nfrom torchmetrics.image import fid\n"
    assert list(unguarded(ast.parse(bad), missing)) == ["torchmetrics.image"]
    assert list(unguarded(ast.parse(good), missing)) == []
