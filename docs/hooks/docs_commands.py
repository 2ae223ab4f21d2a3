"""The commands of tiue as Markdown: what each one does, its options and its examples, as ``--help`` has them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer

from tiue_cli.cli.app import app


def render_commands() -> str:
    """A section for each command and subcommand, in the order of ``tiue --help``."""
    return "\n".join(line for name, command in all_commands() for line in _section(name, command))


def all_commands() -> Iterator[tuple[str, Any]]:
    """``("tiue generate", its command)`` and so on; groups are left out, what they hold is not."""
    yield from _leaves("tiue", typer.main.get_command(app))


def _leaves(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    if hasattr(command, "commands"):
        for word, child in command.commands.items():
            yield from _leaves(f"{name} {word}", child)
    elif not command.hidden:
        yield name, command


def _section(name: str, command: Any) -> Iterator[str]:
    arguments = [param for param in command.params if param.param_type_name == "argument" and not param.hidden]
    options = [param for param in command.params if param.param_type_name == "option" and not param.hidden]
    hints = get_type_hints(inspect.unwrap(command.callback))
    words = " ".join(_metavar(param, hints) + ("..." if param.nargs == -1 else "") for param in arguments)
    yield f"\n## {name}\n"
    yield _plain(command.help or "")
    yield f"\n```text\n{name} {words} {'[OPTIONS]' if options else ''}".rstrip() + "\n```\n"
    if arguments or options:
        yield "| option | value | default | what it is |"
        yield "|---|---|---|---|"
    for param in (*arguments, *options):
        yield f"| {' | '.join(_cells(param, hints))} |"
    examples = [_plain(line).strip() for line in (command.epilog or "").splitlines() if "[cyan]" in line]
    if examples:
        yield "\n```sh\n" + "\n".join(examples) + "\n```"


def _cells(param: Any, hints: Mapping[str, Any]) -> tuple[str, str, str, str]:
    if param.param_type_name == "argument":
        return f"`{_metavar(param, hints)}`", "", "", _plain(param.help or "")
    names = ", ".join(f"`{word}`" for word in (*param.opts, *param.secondary_opts))
    value = "" if param.is_flag else _metavar(param, hints)
    default = "needed" if param.required else "" if param.is_flag or param.default is None else str(param.default)
    return names, f"`{value}`" if value else "", default, _plain(param.help or "")


def _metavar(param: Any, hints: Mapping[str, Any]) -> str:
    """What stands for the value: the command's own word, the choices there are, or the name of the type."""
    if param.metavar:
        return str(param.metavar)
    hint = hints.get(param.name)
    kinds = [kind for kind in (hint, *get_args(hint)) if get_origin(kind) is Literal]
    if kinds:
        return "|".join(map(str, get_args(kinds[0])))
    return param.name.upper() if param.param_type_name == "argument" else getattr(hint, "__name__", "value").upper()


def _plain(text: str) -> str:
    """Without the markup of the terminal."""
    return re.sub(r"\[/?(?:bold|cyan|dim)\]", "", text).strip()


def options(command: Any) -> list[str]:
    """The options of a command as they are typed, ``--help`` with them."""
    return ["--help", *(word for param in command.params for word in (*param.opts, *param.secondary_opts))]
