"""Measure the shipped papercut teacher: prompt following by the checker, and a contact sheet.

    python benchmarks/papercut/evaluate.py --prompts 512 --out benchmarks/papercut/results

Writes `<model>.json` (every figure, with its setting) and `<model>.png`. The prompts are held out by seed; the
captions' language is small, so single-object captions also occur in the training.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tiue_cli.model.teacher import load_teacher
from tiue_cli.noise import draw_noise
from tiue_cli.papercut.captions import SceneSpec, random_specs
from tiue_cli.papercut.checker import judge, load_checker, read
from tiue_cli.papercut.scenes import render

SEED = 2026


def balanced_specs(count: int) -> list[SceneSpec]:
    """Held-out scenes, half of them with two objects."""
    return [
        *random_specs(count // 2, SEED, pair_share=0.0),
        *random_specs(count - count // 2, SEED + 1, pair_share=1.0),
    ]


def summarize(images: np.ndarray, specs: list[SceneSpec]) -> dict[str, float]:
    """Shares of images whose attributes are as asked, for scenes with one and with two objects."""
    verdict = judge(read(load_checker(), images), specs)
    pair = np.array([spec.relation is not None for spec in specs])
    figures = {"background": float(verdict["background"].mean())}
    for name, rows in (("single", ~pair), ("pair", pair)):
        for attribute in ("count", "objects", "colors", "relation", "all"):
            figures[f"{name}_{attribute}"] = float(verdict[attribute][rows].mean())
    return {key: round(value, 4) for key, value in figures.items()}


def contact_sheet(images: np.ndarray, columns: int, *, scale: int = 2) -> Image.Image:
    rows = len(images) // columns
    height, width = images.shape[1:3]
    sheet = images[: rows * columns].reshape(rows, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    picture = Image.fromarray(sheet.reshape(rows * height, columns * width, 3))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", default="papercut-teacher")
    options.add_argument("--prompts", type=int, default=512)
    options.add_argument("--steps", type=int, default=25)
    options.add_argument("--guidance", type=float, nargs="+", default=[2.0, 3.0, 4.0, 5.0, 7.5])
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options.add_argument("--device", default="cpu")
    args = options.parse_args()
    specs = balanced_specs(args.prompts)
    prompts = [spec.caption for spec in specs]
    teacher = load_teacher(args.model, device=args.device, dtype=torch.float32)
    noise = torch.from_numpy(draw_noise(range(len(prompts)), (4, 16, 16)))
    report: dict[str, object] = {
        "model": args.model, "prompts": len(prompts), "steps": args.steps,
        "renders (the checker's own ceiling)": summarize(render(specs, SEED), specs), "guidance": {},
    }  # fmt: skip
    best: tuple[float, np.ndarray] | None = None
    for guidance in args.guidance:
        started = time.perf_counter()
        parts = [
            teacher.sample(prompts[i : i + 64], noise[i : i + 64], steps=args.steps, guidance=guidance)
            for i in range(0, len(prompts), 64)
        ]
        images = np.concatenate([np.asarray(part) for part in parts])
        figures = summarize(images, specs)
        figures["seconds_per_image"] = round((time.perf_counter() - started) / len(prompts), 4)
        print(json.dumps({"guidance": guidance, **figures}), flush=True)
        report["guidance"][str(guidance)] = figures  # type: ignore[index]
        score = figures["pair_all"] + figures["single_all"]
        if best is None or score > best[0]:
            best = (score, images)
            report["best_guidance"] = guidance
    assert best is not None
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "teacher.json").write_text(json.dumps(report, indent=2) + "\n")
    half = len(specs) // 2
    mixed = np.concatenate([best[1][:48], best[1][half : half + 80]])
    contact_sheet(mixed, 16).save(args.out / "teacher.png", optimize=True)


if __name__ == "__main__":
    main()
