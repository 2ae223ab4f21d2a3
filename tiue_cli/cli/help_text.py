"""Commands and groups whose help is for people: ``--grid`` is not ``<bool>``, and ``PROMPT`` is not ``<list[str]>``."""

from __future__ import annotations

from typing import Any

from typer.core import TyperArgument, TyperCommand, TyperGroup


class _WithoutTypes:
    """Hides Python's types of flags and arguments, and of ``--help`` itself."""

    def get_params(self, ctx: Any) -> list[Any]:
        """All parameters, ``--help`` and those of shell completion among them."""
        parameters: list[Any] = super().get_params(ctx)  # type: ignore[misc]  # of the class that follows this one
        for parameter in parameters:
            if isinstance(parameter, TyperArgument) or getattr(parameter, "is_flag", False):
                vars(parameter)["display_type_rich"] = lambda ctx: None
        return parameters


class Command(_WithoutTypes, TyperCommand):
    """A command."""


class Group(_WithoutTypes, TyperGroup):
    """A command of commands."""
