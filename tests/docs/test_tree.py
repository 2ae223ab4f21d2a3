"""The tree in the documentation is made from the files, and each file says what it is."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from docs_tree import render_tree

ROOT = Path(__file__).resolve().parents[2]
TREE = render_tree(ROOT)


def shown_paths() -> dict[str, str]:
    """Path → its words, read back from the indentation of the tree."""
    found: dict[str, str] = {}
    folders: list[str] = []
    for line in TREE.splitlines():
        name, _, words = line.strip().partition("  ")
        depth = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], name] if name.endswith("/") else folders
        path = "".join(folders) if name.endswith("/") else "".join(folders[:depth]) + name
        found[path] = words.strip()
    return found


def test_the_tree_shows_every_python_file_of_the_package_that_git_keeps() -> None:
    listed = subprocess.run(["git", "ls-files", "tiue_cli/*.py"], cwd=ROOT, capture_output=True, encoding="utf-8")
    if listed.returncode or not listed.stdout:
        pytest.skip("not a git checkout")
    kept = [path for path in listed.stdout.split() if (ROOT / path).exists() and not path.endswith("__init__.py")]
    assert len(kept) > 100
    assert sorted(set(kept) - shown_paths().keys()) == []


def test_every_path_in_the_tree_exists() -> None:
    assert [path for path in shown_paths() if not (ROOT / path).exists()] == []


def test_every_file_and_package_says_what_it_is() -> None:
    silent = [path for path, words in shown_paths().items() if not re.search(r"\w", words)]
    assert [path for path in silent if not path.endswith("/") or (ROOT / path / "__init__.py").exists()] == []
