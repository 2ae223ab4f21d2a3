"""What mkdocs calls while it builds the site: puts in what is made from the code, and files from outside ``docs/``.

A page asks for it in a comment of its own line: ``<!-- generated: tree -->``, ``commands``, ``recipes``, ``settings``,
or ``file PATH`` for another Markdown file of the repository, without its title.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "hooks")]

import docs_commands  # noqa: E402 - they lie beside this file, which mkdocs loads by its path
import docs_recipes  # noqa: E402
import docs_tree  # noqa: E402

PICTURES = {"pictures/student.png": "benchmarks/papercut/results/student.png"}
_REQUEST = re.compile(r"^<!-- generated: (\w+)(?: (\S+))? -->$", re.MULTILINE)
TEST_MARKER = re.compile(r"<!-- ?(?:bench|json|test):? .*?-->")


def on_files(files: Files, config: Any) -> Files:
    """Pictures that lie elsewhere in the repository become files of the site."""
    for name, source in PICTURES.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in what the page asks for; markers that only the tests read go."""
    return TEST_MARKER.sub("", _REQUEST.sub(lambda match: generated(match[1], match[2]), markdown))


def generated(kind: str, argument: str | None) -> str:
    """The Markdown behind a request. ValueError for one that is not known."""
    if kind == "tree":
        return f"```text\n{docs_tree.render_tree(ROOT)}\n```"
    if kind == "commands":
        return docs_commands.render_commands()
    if kind in ("recipes", "settings"):
        return docs_recipes.render_recipes() if kind == "recipes" else docs_recipes.render_settings()
    if kind == "file" and argument is not None:
        text = (ROOT / argument).read_text(encoding="utf-8")
        return re.sub(r"\A# .*\n", "", text)
    raise ValueError(f"<!-- generated: {kind} -->: there are tree, commands, recipes, settings, file PATH")
