"""Claims about the renderer; the oracles look at pixels and know nothing of the drawing code."""

from __future__ import annotations

import numpy as np
import pytest

from tiue_cli.papercut import scenes
from tiue_cli.papercut.captions import COLORS, OBJECTS, RELATIONS, SceneSpec, Thing, random_specs


def test_same_seed_same_pictures_and_another_seed_others():
    specs = random_specs(6, 1)
    first, again, other = scenes.render(specs, 3), scenes.render(specs, 3), scenes.render(specs, 4)
    assert np.array_equal(first, again)
    assert all(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_picture_does_not_depend_on_its_batch(monkeypatch):
    specs = random_specs(9, 2)
    whole = scenes.render(specs, 5)
    monkeypatch.setattr(scenes, "CHUNK", 4)
    assert np.array_equal(scenes.render(specs, 5), whole)


def test_equal_captions_give_different_pictures():
    images = scenes.render([SceneSpec((Thing("red", "star"),), None, "meadow")] * 4, 0).astype(int)
    differences = [np.abs(images[i] - images[j]).mean() for i in range(4) for j in range(i)]
    assert min(differences) > 3


def _colored(image: np.ndarray, color: str) -> np.ndarray:
    """Mask of the pixels whose nearest palette direction is `color`, by chromaticity."""
    wanted = np.array(scenes.PALETTE[color]) * 255
    return np.abs(image.astype(float) - wanted).max(-1) < 40


@pytest.mark.parametrize("relation", RELATIONS)
def test_things_stand_as_the_relation_says(relation):
    spec = SceneSpec((Thing("red", "heart"), Thing("yellow", "star")), relation, "night")
    for image in scenes.render([spec] * 12, 1):
        red, yellow = (np.argwhere(_colored(image, c)).mean(0) for c in ("red", "yellow"))
        vertical, horizontal = red - yellow
        expected = {"above": -vertical, "below": vertical, "left of": -horizontal, "right of": horizontal}[relation]
        assert expected > 12


@pytest.mark.parametrize("color", COLORS)
def test_an_object_has_its_color(color):
    background = "night" if color != "blue" else "dawn"
    for image in scenes.render([SceneSpec((Thing(color, "heart"),), None, background)] * 8, 2):
        distances = {c: np.abs(image - np.array(scenes.PALETTE[c]) * 255).max(-1) for c in COLORS}
        nearest = {c: int((d < 45).sum()) for c, d in distances.items()}
        assert max(nearest, key=nearest.__getitem__) == color
        assert nearest[color] > 150  # pixels: large enough to be seen


@pytest.mark.parametrize("kind", OBJECTS)
def test_outlines_are_signed_distances(kind):
    """Eikonal property: outside, a distance's gradient has length 1 (unions keep it, insides of unions need not)."""
    grid = np.linspace(-1.6, 1.6, 257, dtype=np.float32)
    x, y = np.meshgrid(grid, grid)
    distance = scenes._OUTLINES[kind](x, y)
    step = grid[1] - grid[0]
    slope = np.hypot(*np.gradient(distance, step))
    outside = (distance > 0.03) & (distance < 0.5)
    assert distance.min() < -0.1 and distance[0, 0] > 0
    assert np.median(slope[outside]) == pytest.approx(1, abs=0.02)
    assert np.mean(np.abs(slope[outside] - 1) < 0.1) > 0.93


def test_edges_are_anti_aliased():
    """A hard edge between a white moon and the night has no pixel in between; a smooth one has a rim of them."""
    image = scenes.render([SceneSpec((Thing("white", "moon"),), None, "night")], 1)[0].mean(-1)
    rim = ((image > 110) & (image < 190)).sum()
    assert 30 < rim < 300
