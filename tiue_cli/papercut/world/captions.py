"""The words of the papercut world: what a scene may hold, and the captions that say it.

A scene is one to three groups of paper things in front of a background; a group is one, two or three equal things
("three small yellow stars"). Captions are a small regular language, so that every caption has one meaning and every
meaning can be read back (`SceneSpec.parse`). What a caption leaves open (a size, a colour, a background, how "and"
places its groups) varies from picture to picture; a pattern that is not named is none. Standard library only.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

PLURALS = {
    "star": "stars",
    "heart": "hearts",
    "tree": "trees",
    "house": "houses",
    "moon": "moons",
    "fish": "fish",
    "boat": "boats",
    "bird": "birds",
    "flower": "flowers",
    "mushroom": "mushrooms",
    "cloud": "clouds",
    "cat": "cats",
}
OBJECTS = tuple(PLURALS)
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
SIZES = ("small", "big")
PATTERNS = ("striped", "dotted")
COUNTS = ("one", "two", "three")
"""The word of a group of 1, 2, 3; a group of one is said with an article."""
BACKGROUNDS = {
    "night": "at night",
    "dawn": "at dawn",
    "meadow": "in a meadow",
    "snow": "in the snow",
    "sea": "under the sea",
    "desert": "in the desert",
}
RELATIONS = ("above", "below", "left of", "right of")
INVERSE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
"""The same relation seen from the other group."""
LONG_RELATIONS = {"left of": "to the left of", "right of": "to the right of"}
SYNONYMS = {
    "over": "above",
    "under": "below",
    "beside": "next to",
    "little": "small",
    "tiny": "small",
    "large": "big",
    "fishes": "fish",
    "at sunset": "at dawn",
    "in the sea": "under the sea",
}
"""Other words of the same meaning, which captions of a training hold now and then."""
MOST_THINGS = 4


@dataclass(frozen=True)
class Group:
    """One to three equal things, for example `Group("star", "yellow", count=3)`; None leaves colour or size open."""

    object: str
    color: str | None = None
    size: str | None = None
    pattern: str | None = None
    count: int = 1

    def __str__(self) -> str:
        adjectives = [word for word in (self.size, self.pattern, self.color) if word is not None]
        noun = self.object if self.count == 1 else PLURALS[self.object]
        words = " ".join([*adjectives, noun])
        if self.count > 1:
            return f"{COUNTS[self.count - 1]} {words}"
        return f"{'an' if words.startswith('orange') else 'a'} {words}"


@dataclass(frozen=True)
class SceneSpec:
    """What a caption fixes: one to three groups, how the first stands to the second, the background (None: open).

    With two groups, the relation may be open too (None, "and") or half open ("next to"). Three groups have none: they
    stand from left to right as they are named.
    """

    groups: tuple[Group, ...]
    relation: str | None = None
    background: str | None = None

    @property
    def caption(self) -> str:
        return self.phrase()

    def phrase(self, *, long_relation: bool = False, swap: bool = False) -> str:
        """The caption in another wording: `to the left of`, or told from the second group's side."""
        if swap:
            return self.turned.phrase(long_relation=long_relation)
        relation = self.relation
        *first, last = map(str, self.groups)
        words = ", ".join(first) + f" and {last}" if first else last
        if relation is not None:
            shown = LONG_RELATIONS.get(relation, relation) if long_relation else relation
            words = f"{first[0]} {shown} {last}"
        return words if self.background is None else f"{words} {BACKGROUNDS[self.background]}"

    @property
    def turned(self) -> SceneSpec:
        """The same scene told from the second group's side: "below" for "above"; itself where no relation is said."""
        if self.relation not in RELATIONS:
            return self
        return SceneSpec(self.groups[::-1], INVERSE[self.relation], self.background)

    @property
    def slots(self) -> tuple[Group, ...]:
        """The groups in reading order: left before right, upper before lower; as named where the caption is open."""
        return self.groups[::-1] if self.relation in ("below", "right of") else self.groups

    @property
    def axis(self) -> str | None:
        """`vertical` or `horizontal`; None for a single group, and where the caption leaves it open."""
        if self.relation in ("above", "below"):
            return "vertical"
        return "horizontal" if self.relation is not None or len(self.groups) == 3 else None

    @property
    def ordered(self) -> bool:
        """Does the caption say which group comes first in reading order?"""
        return len(self.groups) == 3 or self.relation in RELATIONS

    @property
    def things(self) -> int:
        """How many things stand in the scene, 1 to 4."""
        return sum(group.count for group in self.groups)

    @classmethod
    def parse(cls, caption: str) -> SceneSpec | None:
        """Read a caption back; None where it is not in papercut's language."""
        text = " ".join(re.sub(r"[,.;]", " , ", caption.lower()).split()).strip(" ,")
        text = re.sub(r", and\b|,", "and", text)
        for said, meant in SYNONYMS.items():
            if said != "under":
                text = re.sub(rf"\b{said}\b", meant, text)
        text = re.sub(r"\bunder(?! the sea)\b", "below", text)
        match = _CAPTION.fullmatch(text)
        if match is None:
            return None
        groups = [_read_group(match[name]) for name in ("first", "second", "third") if match[name] is not None]
        known = tuple(group for group in groups if group is not None)
        if len(known) < len(groups) or sum(group.count for group in known) > MOST_THINGS:
            return None
        link = match["link"]
        relation = None if link in (None, "and") else link.removeprefix("to the ")
        if relation is not None and len(known) == 3:
            return None
        background = next((name for name, words in BACKGROUNDS.items() if words == match["background"]), None)
        return cls(known, relation, background)


_SINGULARS = {plural: single for single, plural in PLURALS.items()}
_ADJECTIVES = {
    **dict.fromkeys(COLORS, "color"),
    **dict.fromkeys(SIZES, "size"),
    **dict.fromkeys(PATTERNS, "pattern"),
}
_WORDS_OF_GROUP = "|".join([*_ADJECTIVES, *PLURALS, *_SINGULARS])
_GROUP = rf"(?:an?|the|one|two|three)(?: (?:{_WORDS_OF_GROUP}))+"
_CAPTION = re.compile(
    rf"(?P<first>{_GROUP})"
    rf"(?: (?P<link>and|above|below|next to|(?:to the )?(?:left|right) of) (?P<second>{_GROUP}))?"
    rf"(?: and (?P<third>{_GROUP}))?(?: (?:and )?(?P<background>{'|'.join(BACKGROUNDS.values())}))?"
)


def _read_group(words: str) -> Group | None:
    """The group that a phrase like `three small yellow stars` names; None where it repeats itself or has no noun."""
    number, *adjectives, noun = words.split()
    count = COUNTS.index(number) + 1 if number in COUNTS else 1
    found: dict[str, str] = {}
    for word in adjectives:
        kind = _ADJECTIVES.get(word)
        if kind is None or kind in found:
            return None
        found[kind] = word
    single = noun if count == 1 else _SINGULARS.get(noun)
    if single not in PLURALS:
        return None
    return Group(single, found.get("color"), found.get("size"), found.get("pattern"), count)


WORDS = tuple(
    sorted({"a", "an", "to", "the", "left", "right", "of", "above", "below", "and", "next", *COUNTS,
            *OBJECTS, *PLURALS.values(), *COLORS, *SIZES, *PATTERNS}
           | {word for words in (*BACKGROUNDS.values(), *SYNONYMS) for word in words.split()})
)  # fmt: skip


def unknown_words(prompt: str) -> list[str]:
    """The words of a prompt that papercut has never seen, in order, without repetition."""
    words = re.findall(r"[\w'-]+", prompt.lower())
    return list(dict.fromkeys(word for word in words if word not in WORDS))


# --- drawing scenes ---------------------------------------------------------------------------------------------------

KINDS = {"single": (1,), "several": (2, 3), "pair": (1, 1), "counted_pair": (), "three": (1, 1, 1)}
"""The kinds of scenes: one thing; two or three equal ones; two things; two groups of 3 or 4 things; three things."""
SHARES = {"single": 0.2, "several": 0.16, "pair": 0.34, "counted_pair": 0.16, "three": 0.14}
_COUNTED_PAIRS = ((1, 2), (2, 1), (1, 3), (3, 1), (2, 2))


def kind_of(spec: SceneSpec) -> str:
    """Which of KINDS a scene is."""
    if len(spec.groups) == 1:
        return "single" if spec.things == 1 else "several"
    return "three" if len(spec.groups) == 3 else "pair" if spec.things == 2 else "counted_pair"


def random_spec(rng: random.Random, kind: str, *, open_words: bool = True) -> SceneSpec:
    """One scene of a kind. open_words: leave colour (one in 16), background (one in 8) and relation open at times."""
    counts: Sequence[int] = KINDS[kind]
    if kind == "several":
        counts = (rng.choice((2, 3)),)
    elif kind == "counted_pair":
        counts = rng.choice(_COUNTED_PAIRS)
    groups: list[Group] = []
    while len(groups) < len(counts):
        group = _random_group(rng, counts[len(groups)], open_words=open_words)
        if all((group.object, group.color) != (other.object, other.color) for other in groups):
            groups.append(group)
    relation = None
    if len(groups) == 2:
        draw = rng.random()
        relation = rng.choice(RELATIONS) if draw < 0.7 or not open_words else "next to" if draw < 0.75 else None
    open_background = rng.random() < 0.125 and open_words
    return SceneSpec(tuple(groups), relation, None if open_background else rng.choice(tuple(BACKGROUNDS)))


def _random_group(rng: random.Random, count: int, *, open_words: bool) -> Group:
    size = rng.choice(SIZES) if rng.random() < 0.25 else None
    pattern = rng.choice(PATTERNS) if rng.random() < 0.25 else None
    color = None if open_words and rng.random() < 1 / 16 else rng.choice(COLORS)
    return Group(rng.choice(OBJECTS), color, size, pattern, count)


def random_specs(count: int, seed: int, *, open_words: bool = True) -> list[SceneSpec]:
    """Draw scenes of all kinds in their SHARES, deterministic per seed."""
    rng = random.Random(f"papercut-specs-{seed}")
    kinds = rng.choices(tuple(SHARES), tuple(SHARES.values()), k=count)
    return [random_spec(rng, kind, open_words=open_words) for kind in kinds]


def rough_phrase(spec: SceneSpec, rng: random.Random) -> str:
    """A caption as people write it: other wordings, articles missing, words that papercut does not know."""
    words = spec.phrase(long_relation=rng.random() < 0.25)
    if rng.random() < 0.15:  # "a striped small red boat": adjectives in another order
        words = re.sub(rf"\b({'|'.join(PATTERNS)}) ({'|'.join(COLORS)})\b", r"\2 \1", words)
    if rng.random() < 0.15:
        said, meant = rng.choice(tuple(SYNONYMS.items()))
        words = re.sub(rf"\b{meant}\b", said, words)
    if rng.random() < 0.5:
        words = words.replace(",", " and") if rng.random() < 0.3 else words.replace(",", "")
    parts = words.split()
    if rng.random() < 0.08:
        parts = [word for word in parts if word not in ("a", "an", "the")]
    if rng.random() < 0.08:
        foreign = "".join(rng.choice("abcdefghijklmnoprstuvwy") for _ in range(rng.randint(1, 4)))
        parts.insert(rng.randrange(len(parts) + 1), foreign)
    return " ".join(parts)


def resolved(spec: SceneSpec, rng: random.Random) -> SceneSpec:
    """The scene with its open colours, background and relation drawn; sizes stay open, they vary by degrees."""
    groups = tuple(g if g.color is not None else replace(g, color=rng.choice(COLORS)) for g in spec.groups)
    relation = spec.relation
    if len(groups) == 2 and relation not in RELATIONS:
        relation = "left of" if relation == "next to" else rng.choice(("left of", "above"))
    background = spec.background if spec.background is not None else rng.choice(tuple(BACKGROUNDS))
    return SceneSpec(groups, relation, background)


def random_captions(count: int, *, seed: int) -> list[str]:
    """Captions of scenes of all kinds in all wordings; some come twice. Deterministic per seed."""
    rng = random.Random(seed)
    return [
        spec.phrase(long_relation=rng.random() < 0.2, swap=rng.random() < 0.3)
        for spec in random_specs(count, seed=400 + seed)
    ]


def training_captions() -> list[str]:
    """The captions that a student is distilled on; no two are equal."""
    return list(dict.fromkeys(random_captions(16_000, seed=0)))


def all_single_specs() -> list[SceneSpec]:
    """Every scene with one plain thing of any size: 12 objects × 8 colours × 6 backgrounds = 576."""
    return [SceneSpec((Group(o, c),), None, b) for o, c, b in product(OBJECTS, COLORS, BACKGROUNDS)]
