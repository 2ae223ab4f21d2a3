"""What the site generates is complete, and what pages ask for exists. The build itself runs in ``.ci/run``."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import docs_commands
import docs_recipes
import pytest

from tiue_cli.cli.app import main
from tiue_cli.distill.resolve import all_recipes, known_keys

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def help_of(words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "200")
    assert main([*words, "--help"]) == 0
    return capsys.readouterr().out


def test_every_command_and_option_of_the_help_is_on_the_page(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {
        section.split("\n", 1)[0]: section for section in re.split(r"^## ", docs_commands.render_commands(), flags=re.M)
    }
    names = {name for name, _ in docs_commands.all_commands()}
    listed = re.findall(r"^│ (\w+) ", help_of([], capsys, monkeypatch).partition("Commands")[2], re.M)
    assert len(listed) >= 6
    assert all(any(name.split()[1] == word for name in names) for word in listed)
    for name in names:
        options = set(re.findall(r"^│ (?:\*\s+)?(--[a-z0-9-]+)", help_of(name.split()[1:], capsys, monkeypatch), re.M))
        assert options - {"--help"} <= set(re.findall(r"`(--[a-z0-9-]+)`", sections[name])), name


def test_every_setting_and_recipe_is_on_the_page() -> None:
    assert re.findall(r"^\| `([^`]+)`", docs_recipes.render_settings(), re.M) == known_keys()
    assert all(f'"{recipe.name}"' in docs_recipes.render_recipes() for recipe in all_recipes())


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_pages_are_finished_and_ask_for_what_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"@@\w+@@|TODO|TBD|QUICK_TIME", text) == []
    for kind, argument in re.findall(r"^<!-- generated: (\w+)(?: (\S+))? -->$", text, re.M):
        assert kind in ("tree", "commands", "recipes", "settings", "file")
        assert not argument or (ROOT / argument).is_file()
    assert text.count("<!-- generated") == len(re.findall(r"^<!-- generated: (\w+)(?: (\S+))? -->$", text, re.M))


def test_the_layers_shown_are_those_that_the_tests_hold() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    layers = runpy.run_path(str(ROOT / "tests" / "test_imports.py"))["LAYERS"]
    block = re.search(r"^## Layers\n.*?```text\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert block is not None
    shown = [re.split(r"  +", line)[0].split(", ") for line in block[1].splitlines()]
    wanted = sorted({layers[name] for names in shown for name in names}, reverse=True)
    assert [{layers[name] for name in names} for names in shown] == [{layer} for layer in wanted]
    assert {name for names in shown for name in names} == layers.keys() - {"", "__main__"}


def test_every_page_is_in_the_navigation() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert sorted(re.findall(r": (\w+\.md)$", config, re.M)) == [page.name for page in PAGES]


def test_commands_in_the_documentation_have_the_options_they_use() -> None:
    """Every ``tiue …`` line of a code block or table uses commands and options that there are."""
    known = {name: set(docs_commands.options(command)) for name, command in docs_commands.all_commands()}
    seen = 0
    for page in (*PAGES, ROOT / "README.md", ROOT / "engines" / "README.md", ROOT / "benchmarks" / "PROTOCOL.md"):
        for line in re.findall(r"(?:^\$? ?|`|&& )(tiue [^`\n#]+)", page.read_text(encoding="utf-8"), re.M):
            name = next((name for name in sorted(known, key=len, reverse=True) if line.startswith(name)), None)
            if name is None:
                assert re.match(r"tiue (COMMAND|recipes)\b", line) or not re.match(r"tiue [a-z]+ .*--", line), line
                continue
            used = set(re.findall(r"(?<=\s)--[a-z][a-z0-9-]*", line.split(" -- ")[0]))
            assert used <= known[name], f"{page.name}: {line}"
            seen += 1
    assert seen > 20
