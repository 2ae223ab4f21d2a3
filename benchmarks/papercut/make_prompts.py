"""Write the captions that papercut's student is distilled on, one a line, without repetition.

    python benchmarks/papercut/make_prompts.py

`prompts.txt` holds many pairs of objects, and so few scenes with one (there are 288 of those in all): for the warm
start. `prompts_balanced.txt` holds all of those and three times as many pairs: for the distillation proper, where
each caption meets new noise every time.
"""

from __future__ import annotations

import random
from pathlib import Path

from tiue_cli.papercut.captions import SceneSpec, all_single_specs, random_specs

HERE = Path(__file__).parent


def phrases(count: int, *, seed: int, pair_share: float) -> list[str]:
    """Captions in all wordings, about one in eight without a background."""
    rng = random.Random(seed)
    captions = []
    for spec in random_specs(count, seed=400 + seed, pair_share=pair_share):
        if rng.random() < 0.12:
            spec = SceneSpec(spec.things, spec.relation, None)
        captions.append(spec.phrase(long_relation=rng.random() < 0.2, swap=rng.random() < 0.5))
    return captions


def write(name: str, captions: list[str]) -> None:
    (HERE / name).write_text("\n".join(dict.fromkeys(captions)) + "\n")


def main() -> None:
    write("prompts.txt", phrases(8000, seed=0, pair_share=0.85))
    singles = [spec.caption for spec in all_single_specs()]
    singles += [SceneSpec(spec.things, None, None).caption for spec in all_single_specs()]
    pairs = phrases(900, seed=1, pair_share=1.0)
    mixed = list(dict.fromkeys(singles)) + pairs
    random.Random(2).shuffle(mixed)
    write("prompts_balanced.txt", mixed)


if __name__ == "__main__":
    main()
