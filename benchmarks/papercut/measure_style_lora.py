"""How well a style LoRA that was trained on papercut's teacher works on the teacher and on its one-pass student.

    python benchmarks/papercut/measure_style_lora.py work/papercut-blueprint.safetensors --images 600

Reports, for each model with and without it, the share of pictures in the style and what the checker says of their
captions (colours are lost in a blueprint, and the checker has never seen one: compare teacher and student, not with and
without).
"""

from __future__ import annotations

import argparse
import json

import numpy as np
from blueprint import is_blueprint
from worlds import world_of

import tiue_cli as tiue


def figures(pipe: tiue.Pipeline, count: int) -> dict[str, float]:
    """Shares over ``count`` held-out captions, drawn with seeds 0, 1, …"""
    world = world_of(pipe.default_size[0])
    specs = world.balanced_specs(count)
    drawn = pipe.stream([spec.caption for spec in specs], seed=0, output="numpy")
    images = np.stack([picture.image for picture in drawn])
    following = world.prompt_following(images, specs)
    found = {"style": round(float(is_blueprint(images).mean()), 3)}
    return found | {name: round(following[name], 3) for name in world.attributes if name in following}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("lora")
    options.add_argument("--images", type=int, default=600)
    options.add_argument("--models", nargs="+", default=["papercut-teacher", "papercut-student"])
    options.add_argument("--weights", nargs="+", type=float, default=[0.0, 0.5, 1.0])
    args = options.parse_args()
    for model in args.models:
        with tiue.load(model) as pipe:
            name = pipe.load_lora(args.lora)
            for weight in args.weights:
                pipe.set_adapters([name] if weight else [], [weight] if weight else None)
                print(json.dumps({"model": model, "weight": weight, **figures(pipe, args.images)}), flush=True)


if __name__ == "__main__":
    main()
