"""The state of an optimiser as safetensors and JSON: nothing in a checkpoint can run code when it is opened.

    optimizer.safetensors    every tensor, under a number
    optimizer.json           the tree around them; {"tensor": ["7", order]} stands for one, {"tuple": […]} for a
                             tuple, and {"dict": [[key, value], …]} for a mapping, whose keys may be numbers

``order`` is that of the dimensions in memory: sums over channels-last moments round otherwise than over plain ones, and
a resumed run must equal one that did not stop. A checkpoint of tiue 0.1 holds ``optimizer.pt``, a pickle: it is read
with torch's ``weights_only``, which builds tensors and plain containers and refuses the rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiue_cli.files.manifests import write_json
from tiue_cli.files.structured import parse_json

TENSORS: Final = "optimizer.safetensors"
TREE: Final = "optimizer.json"
PICKLE: Final = "optimizer.pt"


def save_optimizer(state: dict[str, Any], folder: Path) -> None:
    """Write ``Optimizer.state_dict()`` into a folder. Raises what safetensors raises, and OutputError."""
    tensors: dict[str, Tensor] = {}
    tree = _taken_apart(state, tensors, itertools.count())
    save_file(tensors, folder / TENSORS)
    write_json(folder / TREE, {"state": tree})


def load_optimizer(folder: Path) -> dict[str, Any]:
    """What ``save_optimizer`` was given, bit for bit, on the CPU. Damaged files raise all kinds of errors."""
    if (folder / TREE).is_file():
        tensors = load_file(folder / TENSORS, device="cpu")
        state = _put_together(parse_json((folder / TREE).read_bytes())["state"], tensors)
    else:
        state = torch.load(folder / PICKLE, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ValueError(f"the state of an optimiser is a mapping, not {type(state).__name__}")
    return state


def _taken_apart(value: Any, tensors: dict[str, Tensor], numbers: Iterator[int]) -> Any:
    if isinstance(value, Tensor):
        name = str(next(numbers))
        order = sorted(range(value.dim()), key=value.stride, reverse=True)
        # Cloned: 8-bit Adam shares one table between all parameters, and safetensors takes no shared memory.
        tensors[name] = value.detach().permute(order).to("cpu", copy=True).contiguous()
        return {"tensor": [name, order]}
    if isinstance(value, tuple):
        return {"tuple": [_taken_apart(item, tensors, numbers) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[key, _taken_apart(item, tensors, numbers)] for key, item in value.items()]}
    if isinstance(value, list):
        return [_taken_apart(item, tensors, numbers) for item in value]
    assert value is None or isinstance(value, bool | int | float | str), f"an optimiser keeps a {type(value).__name__}"
    return value


def _put_together(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_put_together(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        name, order = content
        return tensors[name].permute([order.index(dimension) for dimension in range(len(order))])
    if kind == "tuple":
        return tuple(_put_together(item, tensors) for item in content)
    if kind == "dict":
        return {key: _put_together(item, tensors) for key, item in content}
    raise ValueError(f"{kind!r} is none of tensor, tuple, dict")
