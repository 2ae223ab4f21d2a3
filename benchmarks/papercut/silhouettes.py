"""How clean are the outlines of single things? The overlap of each with the nearest drawing of the same thing.

    python benchmarks/papercut/silhouettes.py --model papercut --count 96

A checker forgives lumps: it reads a fish with two heads as a fish. Here each picture of one plain thing is compared
with what the renderer would cut: the thing's pixels are those of its colour; place, size, turn and side are fitted by
random search; and the score is the intersection over union of the two areas. Renders score what the fit and the shades
allow (the ceiling in the report).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tiue_cli.papercut.world.captions import Group, SceneSpec
from tiue_cli.papercut.world.paper import UNITS, Brush
from tiue_cli.papercut.world.scenes import PALETTE, render
from tiue_cli.papercut.world.shapes import DRAWERS, MIRRORED, Stock

TOLERANCE = 0.24
"""A pixel has the thing's colour where each channel is this near to it, 0..1."""
SEARCH = 160
# Things whose colours stand out on their background, so that the area is theirs alone.
CONTRASTS = (("red", "snow"), ("blue", "dawn"), ("yellow", "night"), ("purple", "meadow"), ("green", "night"))


def plain_things(count: int) -> list[SceneSpec]:
    """Scenes of one plain thing, object after object, in colours that stand out."""
    objects = tuple(DRAWERS)
    pairs = [(objects[i % len(objects)], CONTRASTS[i // len(objects) % len(CONTRASTS)]) for i in range(count)]
    return [SceneSpec((Group(thing, color),), None, background) for thing, (color, background) in pairs]


def mask_of(pixels: np.ndarray, color: np.ndarray) -> np.ndarray:
    """(H, W) bool from (H, W, 3) 0..1: the pixels of a colour, lighter and darker shades of it included."""
    return np.abs(pixels - color).max(-1) < TOLERANCE


def drawn_mask(thing: str, color: np.ndarray, place: np.ndarray, *, flip: bool, size: int) -> np.ndarray:
    """The area of a thing's colour when it is cut at a place (x, y, radius in units, angle) on contrasting paper."""
    paper = np.broadcast_to(1 - np.round(color), (3,)).astype(np.float32)
    canvas = np.ascontiguousarray(np.broadcast_to(paper[:, None, None], (3, size, size)))
    x, y, radius, angle = map(float, place)
    brush = Brush(canvas, (x, y), radius, angle=angle, flip=flip, scale=size / UNITS)
    DRAWERS[thing](brush, Stock(color, None))
    return mask_of(canvas.transpose(1, 2, 0), color)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max((a | b).sum(), 1))


def silhouette_score(image: np.ndarray, spec: SceneSpec, rng: np.random.Generator) -> float:
    """Intersection over union, 0..1, of the thing in an image (H, W, 3) uint8 with the nearest drawing of it."""
    group, size = spec.groups[0], len(image)
    assert group.color is not None
    color = np.array(PALETTE[group.color], np.float32)
    seen = mask_of(image.astype(np.float32) / 255, color)
    if seen.sum() < size:
        return 0.0
    rows, columns = np.nonzero(seen)
    scale = size / UNITS
    start = np.array([columns.mean() / scale, rows.mean() / scale, 1.0, 0.0])
    best_score, best, best_flip = 0.0, start, False
    sides = (False, True) if group.object in MIRRORED else (False,)
    extent = max(np.ptp(rows), np.ptp(columns)) / scale / 2
    for flip in sides:
        for radius in extent * np.array([0.9, 1.0, 1.15]):
            place = np.array([*start[:2], radius, 0.0])
            for _ in range(2):  # the coloured area's middle is not the thing's: move it there
                there = drawn_mask(group.object, color, place, flip=flip, size=size)
                if there.any():
                    ys, xs = np.nonzero(there)
                    place[:2] += (start[:2] * scale - (xs.mean(), ys.mean())) / scale
            score = overlap(seen, drawn_mask(group.object, color, place, flip=flip, size=size))
            if score > best_score:
                best_score, best, best_flip = score, place, flip
    for step in range(SEARCH):
        width = 0.5 * (1 - step / SEARCH) + 0.05
        trial = best + width * rng.standard_normal(4) * (1.5, 1.5, 1.2, 0.12)
        score = overlap(seen, drawn_mask(group.object, color, trial, flip=best_flip, size=size))
        if score > best_score:
            best_score, best = score, trial
    return best_score


def silhouette_scores(images: np.ndarray, specs: Sequence[SceneSpec], *, seed: int = 0) -> np.ndarray:
    """(N,) scores of images (N, H, W, 3) uint8 of single plain things."""
    rng = np.random.default_rng(seed)
    return np.array([silhouette_score(image, spec, rng) for image, spec in zip(images, specs, strict=True)])


def summary(scores: np.ndarray, specs: Sequence[SceneSpec]) -> dict[str, float]:
    """Mean, the tenth percentile, the share under 0.8, and the mean of each object."""
    figures = {
        "mean": float(scores.mean()),
        "tenth percentile": float(np.percentile(scores, 10)),
        "share under 0.8": float((scores < 0.8).mean()),
    }
    for thing in DRAWERS:
        chosen = np.array([spec.groups[0].object == thing for spec in specs])
        if chosen.any():
            figures[thing] = float(scores[chosen].mean())
    return {name: round(value, 4) for name, value in figures.items()}


def main() -> None:
    from evaluate import draw

    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", default="papercut")
    options.add_argument("--count", type=int, default=96)
    options.add_argument("--steps", type=int, default=None)
    options.add_argument("--guidance", type=float, default=None, help="for a teacher")
    options.add_argument("--out", type=Path, default=None, help="JSON file")
    args = options.parse_args()
    specs = plain_things(args.count)
    images = draw(args.model, [spec.caption for spec in specs], steps=args.steps, guidance=args.guidance)
    report = {
        "model": args.model,
        "images": len(specs),
        "scores": summary(silhouette_scores(images, specs), specs),
        "renders (the ceiling)": summary(silhouette_scores(render(specs, 2026), specs), specs),
    }
    print(json.dumps(report, indent=2))
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
