"""The emoji world's data: names of several sets, pictures in their frames, and the loss that binds both."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
import torch
from emoji_data import MARGIN, SIZE, caption, picture, shared_names
from train_clip import loss_of


def icons(*names: str) -> dict[str, dict[str, dict[str, str]]]:
    return {"icons": {name: {"body": "<path/>"} for name in names}}


def test_a_name_counts_for_every_artist_however_its_words_are_joined() -> None:
    sets = {
        "one": icons("red-heart", "cat", "hand-light", "red-flag"),
        "two": icons("redheart", "cat", "hand-light", "red-flag"),
        "three": icons("red-heart", "dog", "hand-light", "red-flag"),
    }
    assert shared_names(sets) == {"red heart": {"one": "red-heart", "two": "redheart", "three": "red-heart"}}


def test_one_word_keeps_its_name() -> None:
    assert list(shared_names({each: icons("cat") for each in "abc"})) == ["cat"]


@pytest.mark.parametrize(("width", "height"), [(32, 32), (128, 64), (64, 128)])
def test_a_picture_lies_in_the_middle_of_a_square_with_a_margin(width: int, height: int) -> None:
    svg = ElementTree.fromstring(picture({"width": width, "height": height, **icons("cat")}, "cat"))
    left, top, across, down = (float(value) for value in svg.attrib["viewBox"].split())
    assert across == pytest.approx(down, abs=1e-3)
    assert left + across / 2 == pytest.approx(width / 2, abs=1e-3)
    assert top + down / 2 == pytest.approx(height / 2, abs=1e-3)
    assert max(width, height) / across == pytest.approx((SIZE - 2 * MARGIN) / SIZE, abs=1e-3)


def test_captions_with_and_without_an_artist() -> None:
    assert caption("red heart", "noto") == "red heart, noto style"
    assert caption("red heart", None) == "red heart"


def test_the_loss_takes_every_true_picture_of_a_caption() -> None:
    """Two captions with both pictures true of both: nothing is left to learn where they are alike."""
    alike = torch.zeros(2, 2)
    both, own = torch.ones(2, 2, dtype=torch.bool), torch.eye(2, dtype=torch.bool)
    assert loss_of(alike, both).item() == pytest.approx(torch.log(torch.tensor(2.0)).item())
    apart = torch.tensor([[9.0, 0.0], [0.0, 9.0]])
    assert loss_of(apart, own).item() < 1e-3
    assert loss_of(apart, both).item() > loss_of(alike, both).item()
