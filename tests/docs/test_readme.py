"""The README shows the tree as it is, and no place that was meant to be filled is empty."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def shown_files() -> set[str]:
    """Paths in the README's tree, from its indentation; folders end in a slash and may hold several files a line."""
    block = re.search(r"## The tree\n.*?```text\n(.*?)```", README, re.DOTALL)
    assert block is not None
    found, folders = set(), [""]
    for line in block[1].splitlines():
        names = re.split(r"  +", line.strip())[0]
        depth = (len(line) - len(line.lstrip())) // 2
        if not names:
            continue
        folders = folders[: depth + 1]
        for name in names.split(", "):
            path = folders[-1] + name
            if name.endswith("/"):
                folders.append(path)
            else:
                found.add(path)
    return found


def source_files() -> set[str]:
    patterns = ("tiue_cli/**/*.py", "benchmarks/**/*.py", "benchmarks/*.sh", "engines/profiles/*.toml")
    files = {path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)}
    return {path for path in files if not path.endswith("__init__.py") and "/work/" not in path}


def test_every_source_file_is_in_the_tree() -> None:
    assert sorted(source_files() - shown_files()) == []


def test_every_file_in_the_tree_exists() -> None:
    assert [path for path in sorted(shown_files()) if not (ROOT / path).exists()] == []


def test_nothing_is_left_to_be_filled_in() -> None:
    assert re.findall(r"@@\w+@@|TODO|TBD", README) == []


def test_every_link_to_a_file_leads_somewhere() -> None:
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", README) if "://" not in target]
    assert targets
    assert [target for target in targets if target and not (ROOT / target).exists()] == []
