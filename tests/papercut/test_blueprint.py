"""The blueprint style: made of a scene it is recognised, and what is none is not."""

from __future__ import annotations

import numpy as np
from blueprint import LINE, PAPER, blueprint, is_blueprint

from tiue_cli.papercut.world.captions import random_specs
from tiue_cli.papercut.world.scenes import render


def test_blueprints_are_told_from_scenes() -> None:
    scenes = render(random_specs(24, 5), 5, size=64)
    prints = blueprint(scenes)
    assert prints.shape == scenes.shape and prints.dtype == np.uint8
    assert is_blueprint(prints).all()
    assert not is_blueprint(scenes).any()


def test_a_line_lies_where_the_colour_changes() -> None:
    image = np.full((1, 20, 20, 3), 40, np.uint8)
    image[:, :, 10:] = 200
    (drawn,) = blueprint(image)
    assert np.array_equal(drawn[5, 2], PAPER.astype(np.uint8))
    assert np.array_equal(drawn[5, 9], LINE.astype(np.uint8))
    assert np.array_equal(drawn[5, 16], PAPER.astype(np.uint8))


def test_plain_paper_and_white_are_no_scene_of_lines() -> None:
    assert is_blueprint(np.full((1, 8, 8, 3), PAPER, np.uint8)).all()
    assert not is_blueprint(np.full((1, 8, 8, 3), LINE, np.uint8)).any()
