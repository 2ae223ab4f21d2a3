"""The world that a papercut model draws: the first one at 64 pixels, the larger one at 128."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Scenes = Sequence[Any]
"""The world's own ``SceneSpec``s; each has a ``caption``."""


@dataclass(frozen=True)
class World:
    """Its scenes, their renders (N, H, W, 3) uint8, and the checker's verdict on pictures of them in shares."""

    random_specs: Callable[[int, int], Scenes]
    balanced_specs: Callable[[int], Scenes]
    render: Callable[[Scenes, int], NDArray[np.uint8]]
    prompt_following: Callable[[NDArray[np.uint8], Scenes], dict[str, float]]
    attributes: tuple[str, ...]
    """Of ``prompt_following``: those that a picture without colours still has."""


def world_of(side: int) -> World:
    """The world of a model that draws ``side`` pixels."""
    if side == 64:
        from tiue_cli.papercut import captions, evaluation, scenes

        attributes = ("objects", "relation", "single_count", "pair_count")
        return World(
            captions.random_specs,
            evaluation.balanced_specs,
            scenes.render,
            evaluation.prompt_following,
            attributes,
        )
    from tiue_cli.papercut.world import captions, evaluation, scenes  # type: ignore[assignment]

    return World(
        captions.random_specs,
        evaluation.balanced_specs,
        lambda specs, seed: scenes.render(specs, seed, size=side),  # type: ignore[call-arg]
        evaluation.prompt_following,
        ("objects", "count", "relation", "sizes"),
    )
