"""Claims about the figures of papercut pictures: renders are as good as renders, and what is worse looks worse."""

from __future__ import annotations

import numpy as np
import pytest
from papercut_quality import papercut_features, papercut_metrics

from tiue_cli.papercut.evaluation import balanced_specs
from tiue_cli.papercut.scenes import render

SPECS = balanced_specs(240)


@pytest.fixture(scope="module")
def references() -> np.ndarray:
    return render(SPECS, 1)


@pytest.fixture(scope="module")
def ceiling(references: np.ndarray) -> dict[str, float]:
    return papercut_metrics(render(SPECS, 2), SPECS, references)


def test_fresh_renders_are_as_good_as_references(ceiling: dict[str, float]) -> None:
    assert set(ceiling) >= {"fid", "kid", "precision", "recall", "density", "coverage", "diversity", "checker_all"}
    assert ceiling["checker_all"] > 0.97 and ceiling["recall"] > 0.9 and ceiling["precision"] > 0.9
    assert abs(ceiling["kid"]) < 0.05 and all(np.isfinite(value) for value in ceiling.values())


def test_noisy_pictures_are_further_away(references: np.ndarray, ceiling: dict[str, float]) -> None:
    noise = np.random.Generator(np.random.Philox(key=0)).integers(-60, 61, references.shape)
    noisy = np.clip(render(SPECS, 2) + noise, 0, 255).astype(np.uint8)
    found = papercut_metrics(noisy, SPECS, papercut_features(references, name="renders"))
    assert found["fid"] > 1.4 * ceiling["fid"] and found["kid"] > ceiling["kid"] + 0.02


def test_one_kind_of_scene_lacks_recall_and_prompt_following(references: np.ndarray, ceiling: dict[str, float]) -> None:
    found = papercut_metrics(render([SPECS[0]] * len(SPECS), 2), SPECS, references)
    assert found["recall"] < 0.3 * ceiling["recall"] and found["coverage"] < 0.3 * ceiling["coverage"]
    assert found["checker_all"] < 0.1


def test_pictures_that_repeat_per_prompt_lack_diversity(references: np.ndarray) -> None:
    one, other = render(SPECS[-8:], 2), render(SPECS[-8:], 3)
    specs = [*SPECS[-8:], *SPECS[-8:]]
    different = papercut_metrics(np.concatenate([one, other]), specs, references)
    same = papercut_metrics(np.concatenate([one, one]), specs, references)
    assert different["diversity"] > 0.1 and same["diversity"] == 0
    assert "fid" not in same  # 16 images, 192 features
    assert "diversity" not in papercut_metrics(one, SPECS[-8:], references)
