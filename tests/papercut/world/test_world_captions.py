"""Claims about the language of the papercut world; the sentences are ones that people type."""

from __future__ import annotations

import random

import pytest

from tiue_cli.papercut import captions as first_world
from tiue_cli.papercut.world.captions import (
    INVERSE,
    KINDS,
    MOST_THINGS,
    WORDS,
    Group,
    SceneSpec,
    all_single_specs,
    kind_of,
    random_specs,
    resolved,
    rough_phrase,
    training_captions,
    unknown_words,
)

SPECS = [*random_specs(800, 0), *all_single_specs()]


def test_a_caption_read_back_is_its_scene():
    assert all(SceneSpec.parse(spec.caption) == spec for spec in SPECS)
    assert all(SceneSpec.parse(spec.phrase(long_relation=True)) == spec for spec in SPECS)


def test_telling_a_scene_from_the_other_side_keeps_places_and_axis():
    for spec in SPECS:
        told = SceneSpec.parse(spec.phrase(swap=True))
        assert told is not None
        assert (told.slots, told.axis, told.background) == (spec.slots, spec.axis, spec.background)
        assert spec.relation not in INVERSE or told.relation == INVERSE[spec.relation]


def test_captions_of_the_first_world_mean_what_they_meant():
    for old in first_world.random_specs(300, 1):
        new = SceneSpec.parse(old.caption)
        assert new is not None
        assert [(g.color, g.object, g.count, g.pattern) for g in new.slots] == [
            (thing.color, thing.object, 1, None) for thing in old.slots
        ]
        assert (new.relation, new.background, new.axis) == (old.relation, old.background, old.axis)


@pytest.mark.parametrize(
    ("caption", "groups", "relation", "background"),
    [
        ("a red boat and two white birds at night",
         (Group("boat", "red"), Group("bird", "white", count=2)), None, "night"),
        ("Three yellow stars above a small blue house at night.",
         (Group("star", "yellow", count=3), Group("house", "blue", "small")), "above", "night"),
        ("a red star, a blue house, and a green fish at sunset",
         (Group("star", "red"), Group("house", "blue"), Group("fish", "green")), None, "dawn"),
        ("a tiny red striped boat beside a cat in the snow",
         (Group("boat", "red", "small", "striped"), Group("cat")), "next to", "snow"),
        ("three large fishes under a moon under the sea",
         (Group("fish", size="big", count=3), Group("moon")), "below", "sea"),
        ("two dotted mushrooms", (Group("mushroom", pattern="dotted", count=2),), None, None),
        ("the orange cat over an orange flower in the desert",
         (Group("cat", "orange"), Group("flower", "orange")), "above", "desert"),
    ],
)  # fmt: skip
def test_sentences_that_people_type(caption, groups, relation, background):
    assert SceneSpec.parse(caption) == SceneSpec(groups, relation, background)


@pytest.mark.parametrize(
    "caption",
    ["", "a", "two", "a red", "two star", "a stars", "a red blue star", "a striped dotted cat", "a small big cat",
     "three stars and three moons", "a star above a moon below a cat", "a dog", "a star in space", "a star and",
     "a star at night at dawn", "a star above"],
)  # fmt: skip
def test_other_sentences_have_no_meaning(caption):
    assert SceneSpec.parse(caption) is None


def test_scenes_hold_at_most_four_things_of_three_groups_that_differ():
    kinds = [kind_of(spec) for spec in random_specs(800, 0)]
    assert set(kinds) == set(KINDS)
    for spec in SPECS:
        assert 1 <= spec.things <= MOST_THINGS
        assert len({(group.object, group.color) for group in spec.groups}) == len(spec.groups)


def test_what_is_said_stays_and_what_is_open_is_drawn():
    backgrounds, colors, relations = set(), set(), set()
    rng = random.Random(0)
    open_spec = SceneSpec((Group("star"), Group("cat", "red")))
    for _ in range(200):
        scene = resolved(open_spec, rng)
        assert scene.groups[1] == Group("cat", "red")
        backgrounds.add(scene.background)
        colors.add(scene.groups[0].color)
        relations.add(scene.relation)
    assert (len(backgrounds), len(colors), relations) == (6, 8, {"left of", "above"})
    said = SceneSpec((Group("star", "red"), Group("cat", "red")), "below", "sea")
    assert resolved(said, rng) == said


def test_rough_captions_fit_the_text_encoder_and_mostly_read_back():
    rng = random.Random(1)
    specs = random_specs(500, 2)
    rough = [rough_phrase(spec, rng) for spec in specs]
    assert max(len(caption.replace(",", " ,").split()) for caption in rough) <= 22  # of 24 tokens two are marks
    read = sum(SceneSpec.parse(caption) == spec for caption, spec in zip(rough, specs, strict=True))
    assert read > 0.75 * len(specs)  # articles are missing and letters come in between in the rest


def test_the_captions_of_a_distillation_differ_and_are_of_all_kinds():
    captions = training_captions()
    assert len(captions) == len(set(captions)) > 12_000
    kinds = {kind_of(spec) for caption in captions[:500] if (spec := SceneSpec.parse(caption)) is not None}
    assert kinds == set(KINDS)
    assert all(SceneSpec.parse(caption) is not None for caption in captions[:2000])


def test_every_word_of_every_caption_is_known():
    assert not unknown_words(" ".join(spec.phrase(long_relation=True) for spec in SPECS))
    assert unknown_words("a Dog and a dog on two skis") == ["dog", "on", "skis"]
    assert len(WORDS) == len(set(WORDS))
