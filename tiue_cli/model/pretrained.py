"""Loading with transformers' ``from_pretrained``, whose failures are of every kind and which draws missing weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tiue_cli.base.text import excerpt
from tiue_cli.errors import TiueError
from tiue_cli.model.components import quiet


def load_pretrained(
    class_: Any, source: str | Path, *, what: str, hint: str, error: type[TiueError], **options: Any
) -> Any:
    """An instance of ``class_`` from a folder or hub id, a model in evaluation mode and from safetensors alone.

    Raises ``error`` about ``what`` where it cannot be loaded, or lacks weights: the library would draw them at random.
    """
    is_model = issubclass(class_, torch.nn.Module)
    if is_model:
        options |= {"use_safetensors": True, "output_loading_info": True}
    try:
        with quiet():
            loaded = class_.from_pretrained(source, **options)
    except Exception as problem:
        # A config of wrong types ends in whatever it is used for first: TypeError, KeyError, RuntimeError, …
        says = next(iter(str(problem).strip().splitlines()), type(problem).__name__)
        raise error(f"{what} cannot be loaded: {excerpt(says, 300)}", hint=hint) from problem
    if not is_model:
        return loaded
    model, info = loaded
    absent = sorted(map(str, info["missing_keys"]))
    if absent:
        raise error(f"{what}: the weights lack {absent[0]}", hint=hint)
    return model.eval()
