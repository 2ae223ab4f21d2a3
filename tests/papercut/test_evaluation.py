"""Claims about papercut's figures of prompt following."""

from __future__ import annotations

import numpy as np
import pytest

from tiue_cli.papercut.captions import SceneSpec, Thing
from tiue_cli.papercut.evaluation import balanced_specs, prompt_following
from tiue_cli.papercut.scenes import render


def test_held_out_scenes_are_half_pairs_and_the_same_every_time():
    specs = balanced_specs(21)
    assert [spec.relation is not None for spec in specs] == [False] * 10 + [True] * 11
    assert specs == balanced_specs(21) != balanced_specs(21, seed=1)


def test_figures_are_shares_of_the_images_that_the_checker_finds_right():
    """Fresh renders of other captions in two of eight places: the shares are counted by hand."""
    star, tree, fish = Thing("yellow", "star"), Thing("green", "tree"), Thing("red", "fish")
    single, pair = SceneSpec((star,), None, "night"), SceneSpec((star, tree), "above", "night")
    asked = [single] * 4 + [pair] * 4
    drawn = [SceneSpec((fish,), None, "night"), *[single] * 3, SceneSpec((tree, star), "above", "night"), *[pair] * 3]
    figures = prompt_following(render(drawn, 3), asked)
    wrong_in_one_of_four = {
        *("objects", "colors", "relation", "all"),
        *("single_objects", "single_colors", "single_all", "pair_objects", "pair_colors", "pair_relation", "pair_all"),
    }
    right = {"background", "single_count", "pair_count"}
    assert figures == dict.fromkeys(wrong_in_one_of_four, 0.75) | dict.fromkeys(right, 1.0)


@pytest.mark.parametrize(("rows", "absent"), [(slice(0, 4), "pair"), (slice(4, 8), "single")])
def test_a_group_that_is_not_there_has_no_figures(rows: slice, absent: str):
    specs = balanced_specs(8)[rows]
    figures = prompt_following(render(specs, 0), specs)
    assert not any(name.startswith(absent) for name in figures) and all(np.isfinite(v) for v in figures.values())
