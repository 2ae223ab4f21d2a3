"""The tree of the repository as text: each source file with the first sentence of what it says about itself."""

from __future__ import annotations

import ast
import re
from pathlib import Path

SOURCES = ("tiue_cli/**/*.py", "benchmarks/**/*.py", "benchmarks/**/*.sh", "docs/hooks/*.py", "engines/profiles/*.toml")
ROOTS = ("tiue_cli", "benchmarks", "docs", "engines")
LONGEST = 90  # characters of a line's text; a longer sentence ends at its first colon
# Folders that hold no module to say what they are.
FOLDERS = {
    "benchmarks": "Evidence: the protocol, reports, training scripts",
    "benchmarks/papercut": "Papercut from nothing: training scripts, logs, results",
    "benchmarks/papercut/runs": "The runs that made papercut's students",
    "docs": "This site",
    "docs/hooks": "What the site generates: this tree, the commands",
    "engines": "Shapes that TensorRT engines are built for; exports land here",
    "engines/profiles": "Shapes by model family",
    "tiue_cli/export/triton/models": "Code that goes into a Triton model repository as it is",
}


def render_tree(root: Path) -> str:
    """All source files below ``root``, one a line and indented by folder. Folders come after the files beside them."""
    lines: list[tuple[str, str]] = []  # name, what it is
    shown: set[Path] = set()
    for path in sorted(source_files(root), key=_files_first):
        for folder in reversed(path.parents):
            if folder != Path() and folder not in shown:
                shown.add(folder)
                lines.append((_indent(folder) + folder.name + "/", summary(root, folder)))
        if path.name != "__init__.py":
            lines.append((_indent(path) + path.name, summary(root, path)))
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join(f"{name:{width}}{text}".rstrip() for name, text in lines)


def source_files(root: Path) -> list[Path]:
    """The files that the tree shows, relative to ``root``; scratch folders named ``work`` are left out."""
    found = {path.relative_to(root) for pattern in SOURCES for path in root.glob(pattern)}
    return [path for path in found if "work" not in path.parts]


def summary(root: Path, path: Path) -> str:
    """The first sentence that a file or folder says about itself, without its full stop; "" where it says nothing."""
    file = root / path
    if file.is_dir():
        if path.as_posix() in FOLDERS:
            return FOLDERS[path.as_posix()]
        file = file / "__init__.py"
    if not file.exists():
        return ""
    text = file.read_text(encoding="utf-8")
    words = ast.get_docstring(ast.parse(text)) or "" if file.suffix == ".py" else _first_comment(text)
    sentence = " ".join(re.split(r"(?<=[^.]\.)\s|\n\n", words.strip(), maxsplit=1)[0].split()).removesuffix(".")
    return sentence if len(sentence) <= LONGEST else re.split(r"[:;] ", sentence, maxsplit=1)[0]


def _first_comment(text: str) -> str:
    comment = re.search(r"(?:^#(?!!).*\n)+", text, re.MULTILINE)
    return "" if comment is None else re.sub(r"^# ?", "", comment[0], flags=re.MULTILINE)


def _files_first(path: Path) -> tuple[tuple[int, str], ...]:
    *folders, name = path.parts
    root, *inner = folders
    return ((ROOTS.index(root), root), *((1, folder) for folder in inner), (0, name))


def _indent(path: Path) -> str:
    return "  " * (len(path.parts) - 1)
