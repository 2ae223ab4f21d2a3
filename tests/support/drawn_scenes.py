"""A subject whose pictures cost no model: papercut scenes, rendered from what its noise says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tiue_cli.bench.quality.drawing import QualitySubject
from tiue_cli.bench.quality.plan import QualityConfig
from tiue_cli.papercut.captions import SceneSpec
from tiue_cli.papercut.scenes import render

LATENT = (4, 2, 2)


def scenes(prompts: Sequence[str], noise: np.ndarray) -> np.ndarray:
    """Image i: the scene of prompt i, rendered from a seed that only noise i decides."""
    seeds = np.abs(noise.reshape(len(noise), -1)[:, 0] * 1e6).astype(int)
    specs = [SceneSpec.parse(prompt) for prompt in prompts]
    return np.concatenate([render([spec], int(seed)) for spec, seed in zip(specs, seeds, strict=True) if spec])


def subject(generate: Any = scenes, key: str = "papercut/k4", **changes: Any) -> QualitySubject:
    made = QualitySubject(key, identity="weights 1", size=(64, 64), latent_shape=LATENT, generate=generate)
    return replace(made, **changes)


def small(tmp_path: Path, **changes: Any) -> QualityConfig:
    settings = {"images": 12, "diversity_prompts": 3, "diversity_images": 2, "batch": 4, **changes}
    return QualityConfig(cache=tmp_path / "cache", **settings)
