"""tiue: one-pass text-to-image. Distil, export, generate, measure.

>>> import tiue_cli as tiue
>>> with tiue.load("papercut") as pipe:
...     images = pipe("a red heart at night", seed=0, images=4)

Importing this loads nothing else; each name is fetched when it is first used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from tiue_cli.api import bench, build_engine, distill, export, load
    from tiue_cli.bench.config import BenchConfig
    from tiue_cli.errors import TiueError
    from tiue_cli.generate.drawing import Pipeline
    from tiue_cli.generate.pictures import Picture, Request
    from tiue_cli.model.diffusers_pipeline import TiuePipeline

_WHERE = {
    "BenchConfig": "tiue_cli.bench.config",
    "Picture": "tiue_cli.generate.pictures",
    "Pipeline": "tiue_cli.generate.drawing",
    "Request": "tiue_cli.generate.pictures",
    "TiueError": "tiue_cli.errors",
    "TiuePipeline": "tiue_cli.model.diffusers_pipeline",
    "build_engine": "tiue_cli.api",
    "load": "tiue_cli.api",
}
_FOLDERS = ("bench", "distill", "export")
"""Functions whose names are those of folders, too: the folder itself can be called."""

__all__ = [
    "BenchConfig",
    "Picture",
    "Pipeline",
    "Request",
    "TiueError",
    "TiuePipeline",
    "__version__",
    "bench",
    "build_engine",
    "distill",
    "export",
    "load",
]


class _CallableFolder(ModuleType):
    """``tiue_cli.bench`` is a package and, called, the function ``tiue_cli.api.bench``."""

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self.__wrapped__(*args, **keywords)

    @property
    def __wrapped__(self) -> Any:  # where help and inspect.signature look for what is behind
        return getattr(importlib.import_module("tiue_cli.api"), self.__name__.rpartition(".")[2])


class _Package(ModuleType):
    """This package: names come late, and folders that are functions as well become callable as they are imported."""

    def __getattr__(self, name: str) -> Any:
        if name in _FOLDERS:
            return importlib.import_module(f"{__name__}.{name}")  # light: what it needs is loaded by the call
        if name not in _WHERE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from tiue_cli.errors import full_installation

        with full_installation(name):
            value = getattr(importlib.import_module(_WHERE[name]), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FOLDERS and type(value) is ModuleType:
            value.__class__ = _CallableFolder
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *__all__})


sys.modules[__name__].__class__ = _Package
