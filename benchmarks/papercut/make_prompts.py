"""Write the captions that papercut's student is distilled on: `prompts.txt`, one a line, without repetition.

python benchmarks/papercut/make_prompts.py
"""

from __future__ import annotations

import random
from pathlib import Path

from tiue_cli.papercut.captions import SceneSpec, random_specs


def main() -> None:
    rng = random.Random(0)
    captions = []
    for spec in random_specs(8000, seed=400, pair_share=0.85):
        if rng.random() < 0.12:
            spec = SceneSpec(spec.things, spec.relation, None)
        captions.append(spec.phrase(long_relation=rng.random() < 0.2, swap=rng.random() < 0.5))
    unique = list(dict.fromkeys(captions))
    (Path(__file__).parent / "prompts.txt").write_text("\n".join(unique) + "\n")


if __name__ == "__main__":
    main()
