"""How well pictures follow papercut's captions: held-out scenes to ask for, and the checker's verdict in shares."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from tiue_cli.papercut.world.captions import KINDS, SceneSpec, kind_of, random_spec
from tiue_cli.papercut.world.checker import Checker, judge, load_checker, read

HELD_OUT_SEED = 2026
"""Seed of the captions that no training of papercut's own was given."""
ATTRIBUTES = ("count", "background", "objects", "colors", "patterns", "sizes", "relation", "all")


@cache
def shipped_checker() -> Checker:
    """The checker in the package, loaded once."""
    return load_checker()


def balanced_specs(count: int, seed: int = HELD_OUT_SEED) -> list[SceneSpec]:
    """Held-out scenes, as many of each kind: singles first, then several, pairs, pairs with counts, threes.

    They are held out by seed: the language of single things is small, so those captions also occur in a training.
    """
    rng = random.Random(f"papercut-held-out-{seed}")
    share, rest = divmod(count, len(KINDS))
    return [
        random_spec(rng, kind, open_words=False)
        for number, kind in enumerate(KINDS)
        for _ in range(share + (number < rest))
    ]


def prompt_following(images: NDArray[np.uint8], specs: Sequence[SceneSpec]) -> dict[str, float]:
    """Shares of images (N, H, W, 3) whose attributes are as their specs say, by the shipped checker.

    ATTRIBUTES over the images that have them (``relation`` where the caption gives one, ``patterns`` and ``sizes``
    where it names one); ``KIND_ATTRIBUTE``, for example ``pair_colors``, over the scenes of one kind.
    """
    return shares(read(shipped_checker(), images), specs)


@torch.inference_mode()
def prompt_following_of_features(features: NDArray[np.float32], specs: Sequence[SceneSpec]) -> dict[str, float]:
    """``prompt_following`` from the checker's features (N, 384) alone, as ``checker.embed`` gives them."""
    rows = torch.from_numpy(features)
    logits = shipped_checker().read_features(rows)
    return shares({name: value.argmax(-1).numpy() for name, value in logits.items()}, specs)


def shares(found: Mapping[str, NDArray[np.int64]], specs: Sequence[SceneSpec]) -> dict[str, float]:
    """The figures of ``prompt_following`` from what a checker found."""
    verdict = judge(found, specs)
    everywhere = np.ones(len(specs), bool)
    asked = {
        "relation": np.array([spec.ordered for spec in specs]),
        "patterns": np.array([any(group.pattern is not None for group in spec.groups) for spec in specs]),
        "sizes": np.array([any(group.size is not None for group in spec.groups) for spec in specs]),
    }
    kinds = np.array([kind_of(spec) for spec in specs])
    figures: dict[str, float] = {}
    for prefix, rows in (("", everywhere), *((f"{kind}_", kinds == kind) for kind in KINDS)):
        for attribute in ATTRIBUTES:
            chosen = rows & asked.get(attribute, everywhere)
            if chosen.any():
                figures[prefix + attribute] = float(verdict[attribute][chosen].mean())
    return figures
