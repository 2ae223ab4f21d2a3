"""How well pictures follow papercut's captions: held-out scenes to ask for, and the checker's verdict in shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from tiue_cli.papercut.captions import SceneSpec, random_specs
from tiue_cli.papercut.checker import Checker, judge, load_checker, read

HELD_OUT_SEED = 2026
"""Seed of the captions that no training of papercut's own was given."""
ATTRIBUTES = ("count", "objects", "colors", "relation", "all")


@cache
def shipped_checker() -> Checker:
    """The checker in the package, loaded once."""
    return load_checker()


def balanced_specs(count: int, seed: int = HELD_OUT_SEED) -> list[SceneSpec]:
    """Held-out scenes, half of them with two objects: singles first, then pairs.

    They are held out by seed: the language is small, so captions with one object also occur in a training.
    """
    return [
        *random_specs(count // 2, seed, pair_share=0.0),
        *random_specs(count - count // 2, seed + 1, pair_share=1.0),
    ]


def prompt_following(images: NDArray[np.uint8], specs: Sequence[SceneSpec]) -> dict[str, float]:
    """Shares of images (N, H, W, 3) whose attributes are as their specs say, by the shipped checker.

    ``background``, ``objects``, ``colors``, ``relation`` and ``all`` over all images (``relation`` over those with two
    objects, which alone have one); ``single_…`` and ``pair_…`` over the scenes with one and with two objects, where
    there are any.
    """
    return _shares(read(shipped_checker(), images), specs)


@torch.inference_mode()
def prompt_following_of_features(features: NDArray[np.float32], specs: Sequence[SceneSpec]) -> dict[str, float]:
    """``prompt_following`` from the checker's features (N, 192) alone, as ``checker.embed`` gives them."""
    rows = torch.from_numpy(features)
    return _shares({name: head(rows).argmax(-1).numpy() for name, head in shipped_checker().heads.items()}, specs)


def _shares(found: Mapping[str, NDArray[np.int64]], specs: Sequence[SceneSpec]) -> dict[str, float]:
    verdict = judge(found, specs)
    pair = np.array([spec.relation is not None for spec in specs])
    figures = {name: float(verdict[name].mean()) for name in ("background", "objects", "colors")}
    if pair.any():
        figures["relation"] = float(verdict["relation"][pair].mean())
    figures["all"] = float(verdict["all"].mean())
    for group, rows in (("single", ~pair), ("pair", pair)):
        for attribute in ATTRIBUTES if rows.any() else ():
            if (group, attribute) != ("single", "relation"):
                figures[f"{group}_{attribute}"] = float(verdict[attribute][rows].mean())
    return figures
