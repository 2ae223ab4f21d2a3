"""The words of the papercut world: what a scene may hold, and the captions that say it.

A scene is one or two coloured objects in front of a background. Captions are a small regular language, so that every
caption has one meaning and every meaning can be read back (`SceneSpec.parse`). Standard library only.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from itertools import product

OBJECTS = ("star", "heart", "tree", "house", "moon", "fish")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
BACKGROUNDS = {
    "night": "at night",
    "dawn": "at dawn",
    "meadow": "in a meadow",
    "snow": "in the snow",
    "sea": "under the sea",
}
RELATIONS = ("above", "below", "left of", "right of")
# The same relation seen from the other object.
INVERSE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
LONG_RELATIONS = {"left of": "to the left of", "right of": "to the right of"}


@dataclass(frozen=True)
class Thing:
    """One coloured object, for example `Thing("yellow", "star")`."""

    color: str
    object: str

    def __str__(self) -> str:
        return f"{'an' if self.color == 'orange' else 'a'} {self.color} {self.object}"


@dataclass(frozen=True)
class SceneSpec:
    """What a caption fixes: one or two things, how the first stands to the second, the background (None: left open)."""

    things: tuple[Thing, ...]
    relation: str | None
    background: str | None

    @property
    def caption(self) -> str:
        return self.phrase()

    def phrase(self, *, long_relation: bool = False, swap: bool = False) -> str:
        """The caption in another wording: `to the left of`, or told from the second object's side."""
        things, relation = self.things, self.relation
        if swap and relation is not None:
            things, relation = things[::-1], INVERSE[relation]
        words = str(things[0])
        if relation is not None:
            shown = LONG_RELATIONS.get(relation, relation) if long_relation else relation
            words = f"{words} {shown} {things[1]}"
        return words if self.background is None else f"{words} {BACKGROUNDS[self.background]}"

    @property
    def slots(self) -> tuple[Thing, ...]:
        """The things in reading order: left before right, upper before lower."""
        return self.things[::-1] if self.relation in ("below", "right of") else self.things

    @property
    def axis(self) -> str | None:
        """`vertical`, `horizontal`, or None for a single object."""
        if self.relation is None:
            return None
        return "vertical" if self.relation in ("above", "below") else "horizontal"

    @classmethod
    def parse(cls, caption: str) -> SceneSpec | None:
        """Read a caption back; None where it is not in papercut's language."""
        match = _CAPTION.fullmatch(" ".join(caption.lower().replace(",", " ").split()).rstrip("."))
        if match is None:
            return None
        first = Thing(match["color1"], match["object1"])
        background = next((name for name, words in BACKGROUNDS.items() if words == match["background"]), None)
        if match["relation"] is None:
            return cls((first,), None, background)
        relation = match["relation"].removeprefix("to the ")
        return cls((first, Thing(match["color2"], match["object2"])), relation, background)


def _thing_pattern(number: int) -> str:
    return rf"an? (?P<color{number}>{'|'.join(COLORS)}) (?P<object{number}>{'|'.join(OBJECTS)})"


_CAPTION = re.compile(
    _thing_pattern(1)
    + rf"(?: (?P<relation>above|below|(?:to the )?left of|(?:to the )?right of) {_thing_pattern(2)})?"
    + rf"(?: (?P<background>{'|'.join(BACKGROUNDS.values())}))?"
)

WORDS = tuple(
    sorted({"a", "an", "to", "the", "left", "right", "of", "above", "below", *OBJECTS, *COLORS}
           | {word for words in BACKGROUNDS.values() for word in words.split()})
)  # fmt: skip


def unknown_words(prompt: str) -> list[str]:
    """The words of a prompt that papercut has never seen, in order, without repetition."""
    words = re.findall(r"[\w'-]+", prompt.lower())
    return list(dict.fromkeys(word for word in words if word not in WORDS))


def random_specs(count: int, seed: int, *, pair_share: float = 0.5) -> list[SceneSpec]:
    """Draw scenes, deterministic per seed. pair_share: the share of scenes with two objects, in [0, 1]."""
    rng = random.Random(f"papercut-specs-{seed}")
    backgrounds = tuple(BACKGROUNDS)

    def thing() -> Thing:
        return Thing(rng.choice(COLORS), rng.choice(OBJECTS))

    specs = []
    for _ in range(count):
        background = rng.choice(backgrounds)
        if rng.random() < pair_share:
            specs.append(SceneSpec((thing(), thing()), rng.choice(RELATIONS), background))
        else:
            specs.append(SceneSpec((thing(),), None, background))
    return specs


def training_captions() -> list[str]:
    """The 6,767 captions that papercut's student was warmed up on; no two are equal."""
    return list(dict.fromkeys(random_captions(8000, seed=0, pair_share=0.85)))


def random_captions(count: int, *, seed: int, pair_share: float) -> list[str]:
    """Captions in all wordings, about one in eight without a background; some come twice. Deterministic per seed."""
    rng = random.Random(seed)
    captions = []
    for spec in random_specs(count, seed=400 + seed, pair_share=pair_share):
        if rng.random() < 0.12:
            spec = SceneSpec(spec.things, spec.relation, None)
        captions.append(spec.phrase(long_relation=rng.random() < 0.2, swap=rng.random() < 0.5))
    return captions


def all_single_specs() -> list[SceneSpec]:
    """Every scene with one object: 6 objects × 8 colours × 5 backgrounds = 240."""
    return [SceneSpec((Thing(c, o),), None, b) for o, c, b in product(OBJECTS, COLORS, BACKGROUNDS)]
