"""Claims about the judge: what counts as following a caption, decided by hand."""

from __future__ import annotations

import numpy as np
import torch

from tiue_cli.papercut.world.captions import Group, SceneSpec, random_specs
from tiue_cli.papercut.world.checker import FEATURES, HEADS, Checker, judge, targets
from tiue_cli.papercut.world.evaluation import balanced_specs, shares


def _found(*scenes: SceneSpec) -> dict[str, np.ndarray]:
    """What a perfect reader would read off pictures of these scenes; 0 where there is nothing."""
    return {name: np.maximum(value.numpy(), 0) for name, value in targets(scenes).items()}


def test_pictures_that_are_as_asked_are_right_in_everything():
    specs = random_specs(200, 3)
    assert all(value.all() for value in judge(_found(*specs), specs).values())


RED, BLUE, TWO = Group("star", "red"), Group("cat", "blue"), Group("bird", "white", count=2)


def _wrong(asked: SceneSpec, shown: SceneSpec) -> set[str]:
    return {name for name, value in judge(_found(shown), [asked]).items() if not value[0]} - {"all"}


def test_each_fault_is_told_by_its_name():
    asked = SceneSpec((RED, BLUE), "above", "night")
    assert _wrong(asked, SceneSpec((RED, BLUE), "above", "night")) == set()
    assert _wrong(asked, SceneSpec((RED, BLUE), "above", "sea")) == {"background"}
    assert _wrong(asked, SceneSpec((RED, BLUE), "left of", "night")) == {"relation"}
    assert "relation" in _wrong(asked, SceneSpec((BLUE, RED), "above", "night"))
    assert _wrong(asked, SceneSpec((Group("star", "pink"), BLUE), "above", "night")) == {"colors"}
    assert _wrong(asked, SceneSpec((Group("moon", "red"), BLUE), "above", "night")) == {"objects"}
    assert _wrong(asked, SceneSpec((Group("star", "red", pattern="dotted"), BLUE), "above", "night")) == {"patterns"}
    assert "count" in _wrong(asked, SceneSpec((Group("star", "red", count=2), BLUE), "above", "night"))
    assert "count" in _wrong(asked, SceneSpec((RED,), None, "night"))


def test_a_size_matters_where_it_is_said():
    small, big = (SceneSpec((Group("star", "red", size),), None, "sea") for size in ("small", "big"))
    assert _wrong(small, big) == {"sizes"}
    assert _wrong(SceneSpec((RED,), None, "sea"), big) == set()


def test_and_leaves_the_order_open_and_three_things_do_not():
    asked = SceneSpec((RED, TWO), None, "sea")
    for relation in ("above", "below", "left of", "right of"):
        assert _wrong(asked, SceneSpec((RED, TWO), relation, "sea")) == set()
    beside = SceneSpec((RED, TWO), "next to", "sea")
    assert _wrong(beside, SceneSpec((RED, TWO), "right of", "sea")) == set()
    assert "relation" in _wrong(beside, SceneSpec((RED, TWO), "above", "sea"))
    three = SceneSpec((RED, BLUE, Group("bird", "white")), None, "sea")
    assert "objects" in _wrong(three, SceneSpec((BLUE, RED, Group("bird", "white")), None, "sea"))


def test_open_colors_and_backgrounds_are_right_whatever_they_are():
    asked = SceneSpec((Group("star"),))
    assert _wrong(asked, SceneSpec((RED,), None, "sea")) == set()
    assert _wrong(asked, SceneSpec((BLUE,), None, "sea")) == {"objects"}


def test_shares_are_of_the_pictures_that_have_the_attribute():
    asked = [SceneSpec((RED, BLUE), "above", "sea"), SceneSpec((RED,), None, "sea")]
    shown = [SceneSpec((RED, BLUE), "left of", "sea"), SceneSpec((RED,), None, "sea")]
    figures = shares(_found(*shown), asked)
    assert (figures["relation"], figures["all"], figures["single_all"], figures["pair_all"]) == (0, 0.5, 1, 0)
    assert "patterns" not in figures and "three_all" not in figures


def test_held_out_scenes_are_balanced_and_closed():
    specs = balanced_specs(50)
    assert [len(spec.groups) for spec in specs] == [1] * 20 + [2] * 20 + [3] * 10
    assert all(g.color is not None for spec in specs for g in spec.groups)
    assert all(spec.background is not None for spec in specs)


def test_heads_can_be_read_from_features_alone():
    checker = Checker().eval()
    images = torch.rand(2, 3, 128, 128) * 2 - 1
    with torch.inference_mode():
        features, logits = checker.features(images), checker(images)
        assert features.shape == (2, FEATURES)
        assert {name: value.shape[1] for name, value in logits.items()} == HEADS
        for name, value in checker.read_features(features).items():
            torch.testing.assert_close(value, logits[name])
