"""Recipes, YAML files, ``--set`` and options become one checked config."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic

from tiue_cli.base.text import excerpt
from tiue_cli.distill.config import DistillConfig, _Section, flatten, refuse_unused
from tiue_cli.distill.data.prompts import PAPERCUT
from tiue_cli.distill.run_folder import stored_config
from tiue_cli.errors import OutputError, UsageError
from tiue_cli.files import structured
from tiue_cli.files.access import kind_of, read_bytes, user_path
from tiue_cli.files.atomic import atomic_file
from tiue_cli.model.hub import EMBEDDED, EMBEDDED_GUIDANCE, EMBEDDED_NAMES, EMBEDDED_TEACHER

_CONFIG_BYTES = 2**20


@dataclass(frozen=True)
class Layer:
    """Values from one place; ``name`` is what the user calls it, e.g. ``recipe papercut`` or ``--set``."""

    name: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class ResolvedConfig:
    """A checked config; ``origins`` says for each dotted key that is no default which layer set it."""

    config: DistillConfig
    origins: Mapping[str, str]


def resolve_config(layers: Sequence[Layer]) -> ResolvedConfig:
    """Merge layers, later ones winning, and check the result. UsageError names key, reason and layer."""
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for layer in layers:
        for key, value in flatten(layer.values):
            _put(merged, key, value, layer)
            origins[key] = layer.name
    try:
        config = DistillConfig.model_validate(merged)
    except pydantic.ValidationError as error:
        raise _usage_error(error, origins) from error
    return ResolvedConfig(config, origins)


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. UsageError says what is wrong with the file."""
    try:
        text = read_bytes(path, error=UsageError, limit_bytes=_CONFIG_BYTES).decode("utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist", hint="give a YAML file or a recipe: tiue recipes ls") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} cannot be read: {error}", hint="give a YAML file in UTF-8") from error
    return parse_yaml(text, where=str(path))


def parse_yaml(text: str, *, where: str) -> dict[str, Any]:
    """A YAML document that must be a mapping; UsageError with ``where`` otherwise."""
    try:
        data = structured.parse_yaml(text)
    except ValueError as error:
        raise UsageError(f"{where} is not YAML: {error}", hint="see one: tiue recipes ls") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UsageError(f"{where} must hold keys and values", hint="a line looks like  batch_size: 8")
    return data


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """``key=value`` words, values in YAML, as a nested mapping. UsageError for a word without ``=``."""
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise UsageError(
                f"--set {excerpt(pair)} is not understood", hint="write --set key=value, e.g. --set kl.weight=0.05"
            )
        try:
            value = structured.parse_yaml(text)
        except ValueError as error:
            raise UsageError(f"--set {excerpt(pair)}: {error}", hint="values are YAML") from None
        _put(values, key.strip(), value, Layer("--set", {}))
    return values


def _put(target: dict[str, Any], dotted: str, value: Any, layer: Layer) -> None:
    *parents, last = dotted.split(".", 8)  # no setting lies deeper
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise UsageError(
                f"{layer.name}: {excerpt(dotted)}: {excerpt(parent)} is not a section",
                hint=f"the settings are {', '.join(known_keys())}",
            )
    target[last] = value


def _usage_error(error: pydantic.ValidationError, origins: Mapping[str, str]) -> UsageError:
    first, *others = error.errors()
    key = ".".join(str(part) for part in first["loc"])
    more = f" (and {len(others)} more)" if others else ""
    origin = next((name for known, name in origins.items() if known == key or key.startswith(f"{known}.")), None)
    where = f"{origin}: " if origin is not None else ""
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"the settings are {', '.join(known_keys())}"
        return UsageError(f"{where}there is no setting {excerpt(key)!r}{more}", hint=hint)
    if first["type"] == "missing":
        if "." in key:  # an item of a list; only whole settings are options
            return UsageError(
                f"{where}{excerpt(key)} is missing{more}", hint="tiue recipes show NAME shows a whole config"
            )
        return UsageError(f"{key} is not set{more}", hint=f"give --{key.replace('_', '-')}, or set it in the config")
    message = first["msg"].removeprefix("Value error, ")
    return UsageError(f"{where}{excerpt(key)}: {message}{more}", hint=f"it is {excerpt(repr(first['input']))} now")


def known_keys() -> list[str]:
    """Every dotted key of the config, in order."""
    return list(_keys(DistillConfig, ""))


def _keys(type_: type[pydantic.BaseModel], prefix: str) -> Iterator[str]:
    for name, info in type_.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, _Section):
            yield from _keys(info.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


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
    if os.path.lexists(path):
        raise OutputError(f"{path} exists; nothing was written", hint="choose another name")
    with atomic_file(path, replace=False) as temporary:
        temporary.write_text(recipe.text, encoding="utf-8")
    return path


def config_layer(source: str) -> Layer:
    """The layer behind ``--config``: a YAML file, or a recipe's name where no such file is."""
    path = user_path(source, error=UsageError)
    # A folder may bear a recipe's name; a FIFO may not stand for settings.
    if kind_of(path, error=UsageError) in ("file", "special") or path.suffix in (".yaml", ".yml"):
        return Layer(source, read_config(path))
    return Layer(f"recipe {source}", find_recipe(source).values)


@dataclass(frozen=True)
class DistillRequest:
    """The options as they were given; None and empty are "not given". ``values`` are settings that a script gives."""

    out: Path
    teacher: str | None = None
    prompts: str | None = None
    config: str | None = None
    overrides: Sequence[str] = ()
    max_steps: int | None = None
    warm_start: int | None = None
    quantize: str | None = None
    resume: bool = False
    values: Mapping[str, Any] = field(default_factory=dict)

    def resolve(self) -> ResolvedConfig:
        """Merge the stored config (with ``resume``) or the teacher's own, ``config``, ``overrides`` and options.

        Raises UsageError.
        """
        layers = []
        if self.resume:
            layers.append(Layer("the run", stored_config(self.out).model_dump(mode="json")))
        if self.config is not None:
            layers.append(config_layer(self.config))
        layers.append(Layer("the settings", self.values))
        layers.append(Layer("--set", parse_overrides(self.overrides)))
        for option, values in self._options().items():
            layers.append(Layer(option, values))
        if not self.resume:
            if any(dict(flatten(layer.values)).get("quantize.precision") is not None for layer in layers):
                layers.insert(0, Layer("--quantize", _quantizing(layers)))
            else:
                layers.insert(0, Layer("the teacher", _teachers_own(layers)))
            if not any("prompts" in layer.values for layer in layers):
                raise UsageError("there are no prompts to train on", hint="give --prompts FILE")
        resolved = resolve_config(layers)
        if resolved.config.quantize.precision is not None:
            refuse_unused(resolved.config)
        return resolved

    def arguments(self) -> list[str]:
        """The same request as words of a command line."""
        words = ["--out", str(self.out)]
        for option, value in (("--teacher", self.teacher), ("--prompts", self.prompts), ("--config", self.config)):
            if value is not None:
                words += [option, value]
        for override in self.overrides:
            words += ["--set", override]
        for option, number in (("--max-steps", self.max_steps), ("--warm-start", self.warm_start)):
            if number is not None:
                words += [option, str(number)]
        if self.quantize is not None:
            words += ["--quantize", self.quantize]
        return [*words, "--resume"] if self.resume else words

    def _options(self) -> dict[str, Mapping[str, Any]]:
        options: dict[str, Mapping[str, Any]] = {}
        if self.teacher is not None:
            options["--teacher"] = {"teacher": self.teacher}
        if self.prompts is not None:
            options["--prompts"] = {"prompts": self.prompts}
        if self.max_steps is not None:
            options["--max-steps"] = {"max_steps": self.max_steps}
        if self.warm_start is not None:
            options["--warm-start"] = {"warm_start": {"steps": self.warm_start}}
        if self.quantize is not None:
            options["--quantize"] = {"quantize": {"precision": self.quantize}}
        return options


QUANTIZING_STEPS = 300
"""Optimiser steps of quantisation-aware distillation where none are asked for."""


def _quantizing(layers: Sequence[Layer]) -> dict[str, Any]:
    """Settings that quantisation-aware distillation wants otherwise than a distillation: it is short and gentle."""
    own = {
        "max_steps": QUANTIZING_STEPS,
        "optimizer.learning_rate": 1e-5,
        "optimizer.decay": "cosine",
        "checkpoint.every": 100,
        "validation.every": 100,
    }
    return own | ({"prompts": PAPERCUT} if _teacher_of(layers) in EMBEDDED_NAMES else {})


def _teacher_of(layers: Sequence[Layer]) -> Any:
    teachers = [layer.values["teacher"] for layer in layers if "teacher" in layer.values]
    return teachers[-1] if teachers else None


def _teachers_own(layers: Sequence[Layer]) -> dict[str, Any]:
    """Settings that a teacher wants otherwise than Stable Diffusion, whose are the defaults of the config."""
    if _teacher_of(layers) not in (EMBEDDED, EMBEDDED_TEACHER):
        return {}
    return {
        "warm_start.guidance": EMBEDDED_GUIDANCE,
        "prompts": PAPERCUT,
        "vsd.guidance": EMBEDDED_GUIDANCE,
        "validation.teacher_guidance": EMBEDDED_GUIDANCE,
    }
