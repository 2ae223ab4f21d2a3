"""Write the captions that papercut's student is distilled on, one a line, without repetition.

    python benchmarks/papercut/make_prompts.py

`prompts.txt` (those of `tiue distill --prompts papercut`) holds many pairs of objects, and so few scenes with one
(there are 288 of those in all): for the warm start. `prompts_balanced.txt` holds all of those and three times as many
pairs: for the distillation proper, where each caption meets new noise every time.
"""

from __future__ import annotations

import random
from pathlib import Path

from tiue_cli.papercut.captions import SceneSpec, all_single_specs, random_captions, training_captions

HERE = Path(__file__).parent


def write(name: str, captions: list[str]) -> None:
    (HERE / name).write_text("\n".join(dict.fromkeys(captions)) + "\n")


def main() -> None:
    write("prompts.txt", training_captions())
    singles = [spec.caption for spec in all_single_specs()]
    singles += [SceneSpec(spec.things, None, None).caption for spec in all_single_specs()]
    pairs = random_captions(900, seed=1, pair_share=1.0)
    mixed = list(dict.fromkeys(singles)) + pairs
    random.Random(2).shuffle(mixed)
    write("prompts_balanced.txt", mixed)


if __name__ == "__main__":
    main()
