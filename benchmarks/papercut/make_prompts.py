"""Write the captions that papercut's student is distilled on, one a line, without repetition.

    python benchmarks/papercut/make_prompts.py [--world]

`prompts.txt` (those of `tiue distill --prompts papercut`) holds many pairs of objects, and so few scenes with one
(there are 288 of those in all): for the warm start. `prompts_balanced.txt` holds all of those and three times as many
pairs: for the distillation proper, where each caption meets new noise every time. With --world they are captions of the
128-pixel world, in `work/prompts.txt`.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from common import WORK

from tiue_cli.papercut.captions import SceneSpec, all_single_specs, random_captions, training_captions
from tiue_cli.papercut.world import captions as world

HERE = Path(__file__).parent


def write(name: str, captions: list[str]) -> None:
    (HERE / name).write_text("\n".join(dict.fromkeys(captions)) + "\n")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--world", action="store_true")
    if options.parse_args().world:
        WORK.mkdir(parents=True, exist_ok=True)
        (WORK / "prompts.txt").write_text("\n".join(world.training_captions()) + "\n")
        return
    write("prompts.txt", training_captions())
    singles = [spec.caption for spec in all_single_specs()]
    singles += [SceneSpec(spec.things, None, None).caption for spec in all_single_specs()]
    pairs = random_captions(900, seed=1, pair_share=1.0)
    mixed = list(dict.fromkeys(singles)) + pairs
    random.Random(2).shuffle(mixed)
    write("prompts_balanced.txt", mixed)


if __name__ == "__main__":
    main()
