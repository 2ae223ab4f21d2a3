"""Configs that ship with the package, by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiue_cli.distill.config import Layer, parse_yaml, read_config
from tiue_cli.errors import OutputError, UsageError
from tiue_cli.files.atomic import atomic_file

_FOLDER = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    """A shipped config: YAML with comments; its first comment line says what it is for."""

    name: str
    text: str

    @property
    def summary(self) -> str:
        """The first line, without its comment sign."""
        return self.text.split("\n", 1)[0].removeprefix("#").strip()

    @property
    def values(self) -> dict[str, Any]:
        """What it sets."""
        return parse_yaml(self.text, where=f"recipe {self.name}")


def all_recipes() -> list[Recipe]:
    """Every recipe, by name."""
    return [Recipe(path.stem, path.read_text(encoding="utf-8")) for path in sorted(_FOLDER.glob("*.yaml"))]


def find_recipe(name: str) -> Recipe:
    """The recipe of that name. UsageError lists the names there are."""
    recipes = {recipe.name: recipe for recipe in all_recipes()}
    if name not in recipes:
        raise UsageError(f"there is no recipe {name!r}", hint=f"there are: {', '.join(recipes)}")
    return recipes[name]


def copy_recipe(name: str, path: Path) -> Path:
    """Write a recipe to a file that is not there yet. Raises OutputError."""
    recipe = find_recipe(name)
    if path.exists():
        raise OutputError(f"{path} exists; nothing was written", hint="choose another name")
    with atomic_file(path) as temporary:
        temporary.write_text(recipe.text, encoding="utf-8")
    return path


def config_layer(source: str) -> Layer:
    """The layer behind ``--config``: a YAML file, or a recipe's name where no such file is."""
    path = Path(source).expanduser()
    if path.is_file() or path.suffix in (".yaml", ".yml"):
        return Layer(source, read_config(path))
    return Layer(f"recipe {source}", find_recipe(source).values)
