"""Claims about the renderer; the oracles look at pixels and know nothing of the drawing code."""

from __future__ import annotations

import numpy as np
import pytest

from tiue_cli.papercut.world.captions import BACKGROUNDS, COLORS, OBJECTS, RELATIONS, Group, SceneSpec, random_specs
from tiue_cli.papercut.world.paper import Brush, blurred, cover
from tiue_cli.papercut.world.scenes import PALETTE, compositions, render
from tiue_cli.papercut.world.shapes import DRAWERS, Stock


def test_same_seed_same_pictures_and_another_seed_others():
    specs = random_specs(6, 1)
    first, again, other = render(specs, 3), render(specs, 3), render(specs, 4)
    assert np.array_equal(first, again)
    assert all(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_picture_depends_on_its_place_and_spec_alone():
    specs, others = random_specs(5, 2), random_specs(5, 3)
    assert np.array_equal(render(specs, 5)[4], render([*others[:4], specs[4]], 5)[4])


def test_equal_captions_give_different_pictures():
    images = render([SceneSpec((Group("star", "red"),), None, "meadow")] * 4, 0).astype(int)
    differences = [np.abs(images[i] - images[j]).mean() for i in range(4) for j in range(i)]
    assert min(differences) > 3


def test_a_scene_is_the_same_at_every_size():
    specs = random_specs(12, 4)
    large = render(specs, 1, size=128).reshape(12, 64, 2, 64, 2, 3).mean((2, 4))
    assert np.abs(large - render(specs, 1, size=64)).mean() < 4  # shadows and edges are whole pixels


def _near(image: np.ndarray, color: str) -> np.ndarray:
    """Mask of the pixels that have a colour of the palette, a little lighter or darker."""
    return np.abs(image.astype(float) - np.array(PALETTE[color]) * 255).max(-1) < 40


def _pieces(mask: np.ndarray, smallest: int = 20) -> int:
    """How many connected areas of at least `smallest` pixels a mask has."""
    left, pieces = {(int(y), int(x)) for y, x in np.argwhere(mask)}, 0
    while left:
        area, edge = 0, [left.pop()]
        while edge:
            y, x = edge.pop()
            area += 1
            for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if near in left:
                    left.remove(near)
                    edge.append(near)
        pieces += area >= smallest
    return pieces


@pytest.mark.parametrize("count", [1, 2, 3])
def test_as_many_things_as_the_caption_says(count):
    for image in render([SceneSpec((Group("heart", "red", count=count),), None, "sea")] * 12, 8):
        assert _pieces(_near(image, "red")) == count


@pytest.mark.parametrize("counts", [(1, 1), (2, 1), (1, 3)])
@pytest.mark.parametrize("relation", RELATIONS)
def test_things_stand_as_the_relation_says(relation, counts):
    groups = (Group("heart", "red", count=counts[0]), Group("star", "yellow", count=counts[1]))
    for image in render([SceneSpec(groups, relation, "night")] * 8, 1):
        red, yellow = (np.argwhere(_near(image, color)).mean(0) for color in ("red", "yellow"))
        vertical, horizontal = red - yellow
        expected = {"above": -vertical, "below": vertical, "left of": -horizontal, "right of": horizontal}[relation]
        assert expected > 24


def test_three_things_stand_in_the_order_of_their_names():
    groups = (Group("heart", "red"), Group("star", "yellow"), Group("heart", "pink"))
    for image in render([SceneSpec(groups, None, "night")] * 8, 2):
        places = [np.argwhere(_near(image, color)).mean(0)[1] for color in ("red", "yellow", "pink")]
        assert places == sorted(places) and min(np.diff(places)) > 10


@pytest.mark.parametrize("color", COLORS)
def test_an_object_has_its_color(color):
    background = "night" if color != "blue" else "dawn"
    for image in render([SceneSpec((Group("heart", color),), None, background)] * 6, 2):
        areas = {name: int(_near(image, name).sum()) for name in COLORS}
        assert max(areas, key=areas.__getitem__) == color
        assert areas[color] > 600  # pixels: large enough to be seen


def test_big_things_are_bigger_than_small_ones():
    areas = {}
    for size in ("small", "big"):
        images = render([SceneSpec((Group("heart", "red", size),), None, "sea")] * 12, 6)
        areas[size] = [int(_near(image, "red").sum()) for image in images]
    assert min(areas["big"]) > 1.8 * max(areas["small"])


@pytest.mark.parametrize("pattern", ["striped", "dotted"])
def test_a_pattern_prints_on_the_color(pattern):
    def plain_share(name: str | None) -> float:
        images = render([SceneSpec((Group("heart", "blue", "big", name),), None, "dawn")] * 6, 3)
        return float(np.mean([_near(image, "blue").sum() for image in images]))

    assert 0.4 < plain_share(pattern) / plain_share(None) < 0.85


def test_backgrounds_differ_more_than_pictures_of_one():
    tops = {}
    for name in BACKGROUNDS:
        images = render([SceneSpec((Group("star", "red", "small"),), None, name)] * 6, 4)
        tops[name] = images[:, :12].astype(float).mean((1, 2))
    for name, colors in tops.items():
        inside = np.abs(colors - colors.mean(0)).max()
        others = min(np.abs(colors.mean(0) - other.mean(0)).max() for key, other in tops.items() if key != name)
        assert others > inside


def _cut_alone(thing: str, *, size: int = 128) -> np.ndarray:
    """A red thing cut on blank white paper (size, size, 3), upright, in the middle; values 0..1."""
    canvas = np.ones((3, size, size), np.float32)
    brush = Brush(canvas, (32.0, 32.0), 24.0, angle=0.0, flip=False, scale=size / 64)
    DRAWERS[thing](brush, Stock(np.array((0.9, 0.1, 0.1), np.float32), None))
    return canvas.transpose(1, 2, 0)


@pytest.mark.parametrize("thing", OBJECTS)
def test_a_thing_stays_inside_its_circle(thing):
    """Little may reach beyond the unit circle: neighbours keep their distance by radius."""
    picture = _cut_alone(thing)
    rows, columns = np.nonzero(np.ptp(picture, axis=-1) > 0.25)  # colour; shadows are grey
    distance = np.hypot(rows + 0.5 - 64, columns + 0.5 - 64) / 48
    assert 0.8 < distance.max() < 1.2
    assert len(rows) > 0.2 * np.pi * 48**2


def test_the_moon_is_round_and_its_shadow_has_no_ring():
    picture = _cut_alone("moon")
    red = np.ptp(picture, axis=-1) > 0.3
    rows, columns = np.nonzero(red)
    radius = np.hypot(rows + 0.5 - 64, columns + 0.5 - 64)
    outer = [radius[(columns < 40) & (np.abs(rows - row) < 0.5)].max() for row in range(45, 84)]
    assert np.ptp(outer) < 1.5  # pixels: the outer edge is an arc of one circle
    # The bite shows the paper behind, not the shadow of a disc's edge.
    assert picture[50:70, 84:92].min() > 0.97


def test_a_fish_has_one_eye_at_one_end():
    picture = _cut_alone("fish")
    ink = picture.max(-1) < 0.3
    assert ink.any() and np.argwhere(ink)[:, 1].max() < 50


def test_shadow_is_the_blurred_area():
    area = np.zeros((21, 21), np.float32)
    area[10, 10] = 1
    soft = blurred(area, 1)
    taps = np.array([1, 2, 3, 2, 1]) / 9
    assert np.allclose(soft[8:13, 8:13], np.outer(taps, taps), atol=1e-6)
    assert np.isclose(soft.sum(), 1, atol=1e-5)


def test_an_edge_goes_from_covered_to_bare_within_two_pixels():
    distances = np.linspace(-3, 3, 61, dtype=np.float32)
    area = cover(distances)
    assert np.all(np.diff(area) <= 0)
    assert area[distances <= -0.8].min() == 1 and area[distances >= 0.8].max() == 0 and np.isclose(area[30], 0.5)


def test_compositions_say_where_the_things_are():
    specs = [SceneSpec((Group("heart", "red"),), None, "sea")] * 8
    for image, composition in zip(render(specs, 9), compositions(specs, 9), strict=True):
        ((piece,),) = composition.groups
        y, x = np.argwhere(_near(image, "red")).mean(0)
        assert np.hypot(x / 2 - piece.x, y / 2 - piece.y) < 0.2 * piece.radius
