"""The table of the emoji world: methods of the same teacher on the same captions and seeds.

    PAPERCUT_WORK=benchmarks/emoji/work python benchmarks/emoji/emoji_measure.py benchmarks/emoji/methods.yaml

The file lists the rows as in papercut's `compare.py`. Two sets of captions are drawn:

- *styled*, "NAME, ARTIST style", of which each has one true picture: how often the nearest of all pictures is it, or is
  of its name, or of its artist; Fréchet distance, precision, recall, density and coverage against all true pictures.
- *bare*, "NAME", with three or four true pictures: of several seeds, how many of a name's artists are drawn at all
  (`artists`), how evenly (`evenness`: entropy over the artists, 1 where all are drawn alike), and how far apart the
  pictures of one name are (`diversity`). A method that draws one picture a name has 1/3.6 there.

Pictures are compared by the features of `train_clip.py`'s half that sees pictures, unit length. Figures of each
repetition (other seeds) are kept: their distance is the spread, in brackets in the table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from train_clip import Pictures

sys.path.insert(0, str(Path(__file__).parent.parent / "papercut"))

from common import WORK, to_tensor
from compare import Method, grid, images_of
from emoji_data import caption

from tiue_cli.bench.quality.metrics import FeatureSet, compare_sets, diversity
from tiue_cli.model.hub import resolve_model
from tiue_cli.model.identity import model_fingerprint

HERE = Path(__file__).parent
STYLED, NAMES, SEEDS, SHOWN = 1024, 96, 16, 16
COLUMNS = (
    ("picture", "the true picture is nearest"),
    ("name", "its name"),
    ("artist", "its artist"),
    ("fid", "Fréchet distance ↓"),
    ("precision", "precision"),
    ("recall", "recall"),
    ("density", "density"),
    ("coverage", "coverage"),
    ("artists", "bare names: artists drawn"),
    ("evenness", "evenness"),
    ("diversity", "diversity"),
    ("bare_name", "name"),
)


def features(images: np.ndarray) -> np.ndarray:
    """Unit features (N, 160) float64 of images (N, 64, 64, 3) uint8."""
    seen = Pictures.load()
    with torch.inference_mode():
        parts = [seen(to_tensor(images[i : i + 256])) for i in range(0, len(images), 256)]
    return torch.nn.functional.normalize(torch.cat(parts), dim=-1).double().numpy()


class World:
    """The true pictures, what they are of, and the captions that are drawn."""

    def __init__(self, folder: Path) -> None:
        known = json.loads((folder / "pictures.json").read_text())
        self.names = np.array([one["name"] for one in known])
        self.artists = np.array([one["artist"] for one in known])
        self.images = np.load(folder / "images.npy")
        self.features = features(self.images)
        rng = np.random.default_rng(77)
        self.styled = rng.permutation(len(known))[:STYLED]
        self.bare = rng.permutation(np.unique(self.names))[:NAMES].repeat(SEEDS)

    def styled_captions(self) -> list[str]:
        return [caption(self.names[row], self.artists[row]) for row in self.styled]

    def styled_figures(self, images: np.ndarray) -> dict[str, float]:
        ours = features(images)
        nearest = (ours @ self.features.T).argmax(1)
        figures, _ = compare_sets(FeatureSet(ours, name="the images"), FeatureSet(self.features, name="the pictures"))
        return {
            "picture": float((nearest == self.styled).mean()),
            "name": float((self.names[nearest] == self.names[self.styled]).mean()),
            "artist": float((self.artists[nearest] == self.artists[self.styled]).mean()),
            **{name: figures[name] for name in ("fid", "precision", "recall", "density", "coverage")},
        }

    def bare_figures(self, images: np.ndarray) -> dict[str, float]:
        ours = features(images)
        right = self.names[(ours @ self.features.T).argmax(1)] == self.bare
        shares, evenness = [], []
        for name in np.unique(self.bare):
            rows = np.flatnonzero(self.names == name)
            own = (ours[self.bare == name] @ self.features[rows].T).argmax(1)
            counts = np.bincount(own, minlength=len(rows)) / len(own)
            shares.append((counts > 0).mean())
            evenness.append(float(-(counts[counts > 0] * np.log(counts[counts > 0])).sum() / np.log(len(rows))))
        return {
            "artists": float(np.mean(shares)),
            "evenness": float(np.mean(evenness)),
            "diversity": float(diversity(ours, list(self.bare)) or 0.0),
            "bare_name": float(right.mean()),
        }

    def truth(self, repetition: int) -> tuple[np.ndarray, np.ndarray]:
        """True pictures in the place of drawn ones: of the styled captions, and of each bare name at random."""
        rng = np.random.default_rng(100 + repetition)
        chosen = [rng.choice(np.flatnonzero(self.names == name)) for name in self.bare]
        return self.images[self.styled], self.images[chosen]


def measure(world: World, repetitions: int, drawn: Callable[[int], tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Mean and spread over the repetitions; `drawn(repetition)` gives the styled and the bare pictures."""
    runs = []
    for repetition in range(repetitions):
        styled, bare = drawn(repetition)
        runs.append(world.styled_figures(styled) | world.bare_figures(bare))
    mean = {name: round(float(np.mean([run[name] for run in runs])), 4) for name in runs[0]}
    return {"mean": mean, "spread": {name: round(float(np.ptp([run[name] for run in runs])), 4) for name in mean}}


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| method | " + " | ".join(title for _, title in COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    for row in rows:
        cells = [f"{row['mean'][name]:.3f} ({row['spread'][name]:.3f})" for name, _ in COLUMNS]
        lines.append(f"| {row['label']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("methods", type=Path)
    options.add_argument("--data", type=Path, default=WORK)
    options.add_argument("--repetitions", type=int, default=2)
    options.add_argument("--out", type=Path, default=HERE / "results")
    args = options.parse_args()
    world = World(args.data)

    def drawing(method: Method) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
        def draw(repetition: int) -> tuple[np.ndarray, np.ndarray]:
            return tuple(
                images_of(method, prompts, range(first, first + len(prompts)), cache=WORK / "drawn")
                for prompts, first in (
                    (world.styled_captions(), 10_000 * repetition),
                    (list(world.bare), 100_000 + 10_000 * repetition),
                )
            )

        return draw

    sources: list[tuple[dict[str, Any], Callable[[int], tuple[np.ndarray, np.ndarray]]]] = [
        ({"name": "truth", "label": "the artists' pictures (the ceiling)"}, world.truth)
    ]
    for entry in yaml.safe_load(args.methods.read_text()):
        # Trainings are written below work/, as the file has it.
        method = Method(**entry | {"model": str(WORK / entry["model"])})
        facts = {key: value for key, value in vars(method).items() if key != "model"}
        sources.append((facts | {"model_fingerprint": model_fingerprint(resolve_model(method.model))}, drawing(method)))
    rows, shown = [], []
    for facts, drawn in sources:
        rows.append(facts | measure(world, args.repetitions, drawn))
        styled, bare = drawn(0)
        shown.append((f"{facts['label']}: styled captions", styled[:SHOWN]))
        shown.append((f"{facts['label']}: one bare name", bare[:SEEDS]))
        print(json.dumps({"name": facts["name"], **rows[-1]["mean"]}), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    report = {"styled": STYLED, "names": NAMES, "seeds": SEEDS, "repetitions": args.repetitions, "rows": rows}
    (args.out / "comparison.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    (args.out / "comparison.md").write_text(table(rows))
    grid(shown).save(args.out / "comparison.webp", quality=90, method=6)


if __name__ == "__main__":
    main()
