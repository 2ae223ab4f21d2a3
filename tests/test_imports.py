"""Start-up stays light, and imports run downwards only; read from the sources and from a fresh interpreter."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "tiue_cli"

# Layer of every room: a folder, or a module on the top level. A module may import from lower layers and from its own
# room; rooms of one layer do not see each other.
LAYERS: dict[str, int] = {
    "": 0,
    "errors": 0,
    "base": 1,
    "files": 2,
    "model": 3,
    "papercut": 3,
    "backends": 4,
    "distill": 4,
    "export": 5,
    "generate": 6,
    "bench": 7,
    "serve": 7,
    "api": 8,
    "cli": 9,
    "__main__": 10,
}
HEAVY = {
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "onnx",
    "onnxruntime",
    "openvino",
    "tensorrt",
}
# Rooms whose modules may load them when they are imported; elsewhere only the functions listed below may, when called.
HEAVY_ROOMS = {"model", "papercut", "distill", "export", "bench", "backends"}
HEAVY_FUNCTIONS = {
    ("base.machine", "torch"),
    ("base.machine", "onnxruntime"),
    ("cli.launch", "torch"),
    ("cli.launch", "accelerate"),
}
LIGHT_MODULES_OF_HEAVY_ROOMS = {
    "model.folder",
    "model.hub",
    "model.lora.files",
    "model.noise",
    "model.schedule",
    "model.sd_configs",
    "backends.base",
    "bench.config",
    "bench.report.schema",
    "export.config",
}


def modules() -> dict[str, ast.Module]:
    """Every source file of the package by dotted name below it (a package by its own name)."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    return found


MODULES = modules()


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """(dotted name, statement) of every import anywhere in the file, type-checking blocks and functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute in this package"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node


def room_of(name: str) -> tuple[int, str]:
    """(layer, room) of a module."""
    room = name.partition(".")[0]
    assert room in LAYERS, f"{room} has no place in the layers: add it to LAYERS"
    return LAYERS[room], room


def target_of(imported: str) -> str | None:
    """The module of ours that an import names (``tiue_cli.errors.TiueError`` → ``errors``), None for other packages."""
    package, _, name = imported.partition(".")
    if package != PACKAGE.name:
        return None
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_imports_run_downwards(module: str) -> None:
    layer, room = room_of(module)
    for imported, statement in imports(MODULES[module]):
        target = target_of(imported)
        if target is None:
            continue
        target_layer, target_room = room_of(target)
        assert target_layer < layer or target_room == room, (
            f"{module} (layer {layer}, {room}) line {statement.lineno} imports {target} "
            f"(layer {target_layer}, {target_room})"
        )


@pytest.mark.parametrize("module", list(MODULES))
def test_heavy_libraries_stay_in_their_rooms(module: str) -> None:
    _, room = room_of(module)
    if room in HEAVY_ROOMS and module not in LIGHT_MODULES_OF_HEAVY_ROOMS:
        return
    for imported, statement in imports(MODULES[module]):
        library = imported.partition(".")[0]
        if library not in HEAVY or inside_type_checking(MODULES[module], statement):
            continue
        allowed = (module, library) in HEAVY_FUNCTIONS or module in LIGHT_MODULES_OF_HEAVY_ROOMS
        assert allowed and statement not in MODULES[module].body, f"{module} line {statement.lineno} imports {library}"


@pytest.mark.parametrize(
    "module",
    [
        name
        for name in MODULES
        if name.startswith(("backends.exported", "backends.onnx", "backends.openvino", "backends.trt"))
    ],
)
def test_runtimes_of_exported_models_know_no_torch(module: str) -> None:
    for imported, statement in imports(MODULES[module]):
        library = imported.partition(".")[0]
        assert library not in {"torch", "diffusers", "transformers"}, f"{module} line {statement.lineno}: {library}"


def inside_type_checking(tree: ast.Module, statement: ast.stmt) -> bool:
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    return any(statement in block.body for block in blocks)


def test_package_inits_import_nothing() -> None:
    for file in PACKAGE.rglob("__init__.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        found = {
            name.partition(".")[0] for name, statement in imports(tree) if not inside_type_checking(tree, statement)
        }
        # What the root fetches late is fetched in functions: the next test.
        allowed = {"importlib", "sys", "types", "typing", PACKAGE.name} if file.parent == PACKAGE else set()
        assert found - {"__future__"} <= allowed, file


def test_importing_the_package_loads_nothing_of_it() -> None:
    code = "import sys, tiue_cli\nassert [name for name in sys.modules if name.startswith('tiue_cli.')] == []"
    assert not loaded_after(code) & (TOO_HEAVY_FOR_HELP | {"pydantic", "typer"})


def test_only_the_console_prints() -> None:
    # ruff's T20 finds print(); this finds the other ways to a standard stream.
    for name, tree in MODULES.items():
        if name in ("cli.console", "cli.streams"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout", "sys.stderr"):
                pytest.fail(f"{name} line {node.lineno} uses {ast.unparse(node)}")


def loaded_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after ``code``."""
    script = (
        f"{code}\nimport json, sys\nprint('\\n' + json.dumps(sorted({{n.partition('.')[0] for n in sys.modules}})))"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, encoding="utf-8", env=environment, check=True, timeout=120
    )
    return set(json.loads(done.stdout.strip().splitlines()[-1]))


TOO_HEAVY_FOR_HELP = HEAVY | {"numpy", "PIL", "huggingface_hub", "tokenizers"}


def test_help_of_every_command_loads_nothing_heavy() -> None:
    code = (
        "from tiue_cli.cli.app import app, main\n"
        "names = [command.callback.__name__ for command in app.registered_commands]\n"
        "assert 'generate' in names and 'inspect' in names and 'doctor' in names, names\n"
        "for words in ([], ['--help'], ['--version'], *([name, '--help'] for name in names)):\n"
        "    main(words)\n"
    )
    assert not loaded_after(code) & TOO_HEAVY_FOR_HELP


def test_planning_and_inspecting_load_no_torch(tmp_path: Path, tiny_student_folder: Path) -> None:
    code = (
        "import os\n"
        f"os.chdir({str(tmp_path)!r})\n"
        "from tiue_cli.generate.session import Session\n"
        "from tiue_cli.cli.inspection import inspect_source\n"
        "from tiue_cli.generate.prompts import PromptRow\n"
        "from tiue_cli.generate.plan import GenerateConfig\n"
        "import tiue_cli.cli.diagnosis, tiue_cli.base.machine, tiue_cli.cli.generate\n"
        f"inspect_source({str(tiny_student_folder)!r})\n"
        f"with Session(GenerateConfig(model={str(tiny_student_folder)!r}, grid=True)) as session:\n"
        "    assert session.plan([PromptRow('a star', 'it')]).todo == [0]\n"
    )
    assert not loaded_after(code) & HEAVY


def test_what_cannot_be_distilled_or_exported_is_said_before_torch_is_loaded(
    tmp_path: Path, tiny_student_folder: Path
) -> None:
    (tmp_path / "file").write_text("")
    prompts = ("nope.txt", "/dev/zero", "file", "-", "")
    calls = [
        *(["distill", "--teacher", "papercut", "--prompts", one, "--out", "run", *dry] for one in prompts
          for dry in ([], ["--dry-run"])),
        ["distill", "--teacher", "papercut", "--out", "file"],
        ["export", "nope"],
        ["export", str(tiny_student_folder), "--out", "file"],
        ["bench", str(tiny_student_folder), "--out", "file"],
        ["bench", "nope"],
    ]  # fmt: skip
    code = (
        "import os\n"
        f"os.chdir({str(tmp_path)!r})\n"
        "from tiue_cli.cli.app import main\n"
        f"for words in {calls!r}:\n"
        "    assert main(words) in (1, 2), words\n"
    )
    assert not loaded_after(code) & HEAVY
