"""All figures of a set of papercut pictures at once: set distances in the checker's features, and its verdict."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tiue_cli.bench.quality.extractors import PapercutChecker, Sharpness
from tiue_cli.bench.quality.metrics import NEIGHBOURS, FeatureSet, compare_sets, diversity
from tiue_cli.papercut.captions import SceneSpec
from tiue_cli.papercut.evaluation import prompt_following_of_features


def papercut_features(images: NDArray[np.uint8], *, name: str) -> FeatureSet:
    """The checker's features of images (N, H, W, 3), to be compared with several others. Raises QualityError."""
    return FeatureSet(PapercutChecker()(images), name=name)


def papercut_metrics(
    images: NDArray[np.uint8],
    specs: Sequence[SceneSpec],
    references: NDArray[np.uint8] | FeatureSet,
    *,
    k: int = NEIGHBOURS,
    name: str = "the images",
) -> dict[str, float]:
    """Figures of images (N, H, W, 3) of N scenes, against references (M, H, W, 3) or their ``papercut_features``.

    fid, kid, precision, recall, density, coverage as N and M allow (``compare_sets``); diversity over the captions
    that occur more than once, absent where none does; sharpness (``Sharpness``; compare it with the references' own);
    ``checker_…`` as in ``prompt_following``. Raises QualityError.
    """
    ours = papercut_features(images, name=name)
    theirs = references if isinstance(references, FeatureSet) else papercut_features(references, name="the references")
    figures, _ = compare_sets(ours, theirs, k=k)
    spread = diversity(ours.features, [spec.caption for spec in specs])
    if spread is not None:
        figures["diversity"] = spread
    figures["sharpness"] = float(Sharpness()(images).mean())
    following = prompt_following_of_features(ours.features * PapercutChecker.scale, specs)
    return figures | {f"checker_{attribute}": value for attribute, value in following.items()}
