"""Claims about papercut's language."""

from __future__ import annotations

import pytest

from tiue_cli.cli.app import main
from tiue_cli.papercut.captions import (
    WORDS,
    SceneSpec,
    Thing,
    all_single_specs,
    random_specs,
    unknown_words,
)

SPECS = [*random_specs(300, 0), *all_single_specs()]


def test_a_caption_read_back_is_its_scene():
    assert all(SceneSpec.parse(spec.caption) == spec for spec in SPECS)
    assert all(SceneSpec.parse(spec.phrase(long_relation=True)) == spec for spec in SPECS)


def test_telling_a_scene_from_the_other_side_keeps_places_and_axis():
    for spec in SPECS:
        told = SceneSpec.parse(spec.phrase(swap=True))
        assert told is not None
        assert (told.slots, told.axis, told.background) == (spec.slots, spec.axis, spec.background)


def test_slots_are_in_reading_order():
    star, tree = Thing("yellow", "star"), Thing("green", "tree")
    assert SceneSpec((star, tree), "above", None).slots == (star, tree)
    assert SceneSpec((star, tree), "below", None).slots == (tree, star)
    assert SceneSpec((star, tree), "right of", None).slots == (tree, star)


def test_the_readme_prompts_are_in_the_language():
    assert SceneSpec.parse("a yellow star above a green tree") == SceneSpec(
        (Thing("yellow", "star"), Thing("green", "tree")), "above", None
    )
    spec = SceneSpec.parse("A red heart to the left of a blue house, at night.")
    assert spec is not None and spec.background == "night" and spec.relation == "left of"
    assert SceneSpec.parse("an orange fish under the sea") == SceneSpec((Thing("orange", "fish"),), None, "sea")


@pytest.mark.parametrize("text", ["", "star", "a red dragon", "a red star above", "a red star on a tree"])
def test_what_is_not_in_the_language_is_not_read(text):
    assert SceneSpec.parse(text) is None


def test_captions_use_known_words_and_foreign_words_are_named_once():
    assert {word for spec in SPECS for word in spec.caption.split()} <= set(WORDS)
    assert unknown_words("A red dragon, above a dragon in Paris") == ["dragon", "paris"]


def test_specs_are_deterministic_per_seed_and_hold_the_asked_share_of_pairs():
    assert random_specs(50, 7) == random_specs(50, 7) != random_specs(50, 8)
    share = sum(spec.relation is not None for spec in random_specs(2000, 1, pair_share=0.7)) / 2000
    assert abs(share - 0.7) < 0.04


def test_the_embedded_model_names_the_words_it_has_never_seen(tmp_path, capsys):
    command = ["--model", "papercut-teacher", "--teacher-steps", "1", "--seed", "1", "--out", str(tmp_path)]
    assert main(["generate", "a red dragon", *command]) == 0
    assert "never seen: dragon." in " ".join(capsys.readouterr().err.split())
    assert main(["generate", "a red star at night", *command]) == 0
    assert "never seen" not in capsys.readouterr().err
