"""Papercut's version of the paper's table: methods of the same teacher, on the same prompts and seeds.

    python compare.py work/comparison.yaml --name comparison

The file lists what to measure, one entry a row (see `runs/methods.yaml`). Each is drawn on 512 held-out captions (half
with one object, half with two) x 2 seeds, and read by the attribute checker; Fréchet distance, precision, recall,
density and coverage stand against freshly rendered scenes of the same captions, in the checker's features. Over that
many captions recall and coverage are nearly full for anything that follows them, so variety is measured apart: 32
captions x 16 images, against as many renders. Sharpness is the mean gradient of brightness: the features do not see
blur. Figures of each seed are kept: their distance is the spread. Pictures are cached in `work/drawn/`, so a row that
was added costs only itself.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from evaluate import BATCH, contact_sheet, draw
from papercut_quality import papercut_metrics
from PIL import Image, ImageDraw

import tiue_cli
from tiue_cli.model.hub import resolve_model
from tiue_cli.model.identity import model_fingerprint
from tiue_cli.model.noise import draw_noise
from tiue_cli.model.teacher import load_teacher
from tiue_cli.papercut.captions import SceneSpec
from tiue_cli.papercut.evaluation import HELD_OUT_SEED, balanced_specs
from tiue_cli.papercut.scenes import render

HERE = Path(__file__).parent
VARIETY_CAPTIONS, VARIETY_IMAGES = 32, 16
COLUMNS = (
    ("checker_single_all", "one object, all right"),
    ("checker_pair_all", "two objects, all right"),
    ("checker_objects", "objects"),
    ("checker_colors", "colours"),
    ("checker_relation", "relation"),
    ("checker_background", "background"),
    ("fid", "Fréchet distance ↓"),
    ("precision", "precision"),
    ("recall", "recall"),
    ("density", "density"),
    ("coverage", "coverage"),
    ("sharpness", "sharpness"),
    ("variety_fid", "32 x 16: Fréchet distance ↓"),
    ("variety_recall", "32 x 16: recall"),
    ("variety_coverage", "32 x 16: coverage"),
    ("variety_diversity", "32 x 16: diversity"),
)


@dataclass(frozen=True)
class Method:
    """A row: a model folder, how it is sampled, and what its training cost."""

    name: str
    label: str
    model: str
    kind: str
    """`student`, `teacher` (DDIM) or `lcm`."""
    steps: int
    guidance: float | None = None
    teacher_evaluations: int | None = None
    """Rows through the teacher's UNet in training."""
    student_steps: int | None = None
    reference: bool = False
    """The row that ratios refer to."""


def lcm_images(model: str, prompts: Sequence[str], noise: np.ndarray, steps: int, seed: int) -> np.ndarray:
    """Images of a consistency model by diffusers' LCMScheduler; noise that it adds between steps is seeded."""
    from diffusers import LCMScheduler

    teacher = load_teacher(model)
    scheduler = LCMScheduler.from_pretrained(model, subfolder="scheduler")
    random = torch.Generator().manual_seed(seed)
    parts = []
    with torch.inference_mode():
        for start in range(0, len(prompts), BATCH):
            scheduler.set_timesteps(steps)
            states = teacher.encode_prompts(prompts[start : start + BATCH])
            latents = torch.from_numpy(noise[start : start + BATCH])
            clean = latents
            for timestep in scheduler.timesteps:
                predicted = teacher.unet(latents, timestep, encoder_hidden_states=states, return_dict=False)[0]
                latents, clean = scheduler.step(predicted, timestep, latents, generator=random, return_dict=False)
            parts.append(teacher.decoder.decode(clean))
    return np.concatenate(parts)


def images_of(method: Method, prompts: Sequence[str], seeds: Sequence[int], *, cache: Path) -> np.ndarray:
    """(N, 64, 64, 3) uint8, image i of prompt i and seed i; from the cache where they were drawn before."""
    model_id = model_fingerprint(resolve_model(method.model))
    key = f"{model_id[:16]}-{method.steps}-{method.guidance}-{len(prompts)}-{seeds[0]}"
    path = cache / f"{key}.npy"
    if path.exists():
        return np.load(path)
    started = time.perf_counter()
    if method.kind == "lcm":
        images = lcm_images(method.model, prompts, draw_noise(seeds, (4, 16, 16)), method.steps, seeds[0])
    else:
        images = draw(method.model, list(prompts), steps=method.steps, guidance=method.guidance, seeds=seeds)
    print(json.dumps({"drawn": method.name, "seconds": round(time.perf_counter() - started, 1)}), flush=True)
    cache.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.save(file, images)
    part.rename(path)
    return images


def measure(specs: Sequence[SceneSpec], repetitions: int, images: Callable[..., np.ndarray]) -> dict[str, Any]:
    """Mean and each repetition's figures; `images(prompts, seeds)` draws."""
    count = len(specs)
    runs = []
    for repetition in range(repetitions):
        drawn = images([spec.caption for spec in specs], range(repetition * count, (repetition + 1) * count))
        # The references are drawn anew for each repetition, and never with the seeds of a training.
        figures = papercut_metrics(drawn, specs, render(specs, HELD_OUT_SEED + 100 + repetition))
        figures.pop("diversity", None)  # of the few captions that happen to occur twice
        runs.append(figures | variety(specs, repetition, images))
    mean = {name: round(float(np.mean([run[name] for run in runs])), 4) for name in runs[0]}
    spread = {name: round(float(np.ptp([run[name] for run in runs])), 4) for name in runs[0]}
    return {"mean": mean, "spread": spread, "repetitions": [{k: round(v, 4) for k, v in run.items()} for run in runs]}


def variety(specs: Sequence[SceneSpec], repetition: int, images: Callable[..., np.ndarray]) -> dict[str, float]:
    """Figures of many images of few captions, half of them with one object."""
    few = [spec for spec in specs[:: len(specs) // VARIETY_CAPTIONS][:VARIETY_CAPTIONS] for _ in range(VARIETY_IMAGES)]
    first = 100_000 + repetition * len(few)
    drawn = images([spec.caption for spec in few], range(first, first + len(few)))
    figures = papercut_metrics(drawn, few, render(few, HELD_OUT_SEED + 300 + repetition))
    return {f"variety_{name}": figures[name] for name in ("fid", "recall", "coverage", "density", "diversity")}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The Markdown table; in brackets the distance between the two seeds."""
    lines = ["| method | steps | " + " | ".join(title for _, title in COLUMNS) + " |"]
    lines.append("|---|---|" + "---|" * len(COLUMNS))
    for row in rows:
        cells = []
        for name, _ in COLUMNS:
            cells.append(f"{row['mean'][name]:.3f} ({row['spread'][name]:.3f})")
        lines.append(f"| {row['label']} | {row['steps'] or ''} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def grid(methods: Sequence[tuple[str, np.ndarray]], columns: int = 16) -> Image.Image:
    """The same prompts and seeds a column, a method a row, its name above its row."""
    bands = []
    for label, images in methods:
        picture = contact_sheet(images[:columns], columns)
        band = Image.new("RGB", (picture.width, picture.height + 16), "white")
        ImageDraw.Draw(band).text((4, 2), label, fill="black")
        band.paste(picture, (0, 16))
        bands.append(band)
    sheet = Image.new("RGB", (bands[0].width, sum(band.height for band in bands)), "white")
    top = 0
    for band in bands:
        sheet.paste(band, (0, top))
        top += band.height
    return sheet


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("methods", type=Path)
    options.add_argument("--prompts", type=int, default=512)
    options.add_argument("--repetitions", type=int, default=2)
    options.add_argument("--name", default="comparison")
    options.add_argument("--out", type=Path, default=HERE / "results")
    options.add_argument("--cache", type=Path, default=HERE / "work" / "drawn")
    args = options.parse_args()
    methods = [Method(**entry) for entry in yaml.safe_load(args.methods.read_text())]
    specs = balanced_specs(args.prompts)
    rows, shown = [], []
    half = len(specs) // 2
    picked = [*range(6), *range(half, half + 10)]

    def renders(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        parsed = [SceneSpec.parse(prompt) for prompt in prompts]
        return render([spec for spec in parsed if spec is not None], HELD_OUT_SEED + 200 + seeds[0])

    sources: list[tuple[dict[str, Any], Callable[..., np.ndarray]]] = [
        ({"name": "renders", "label": "rendered scenes (the ceiling)", "steps": None}, renders)
    ]
    for method in methods:
        facts = {key: value for key, value in vars(method).items() if key != "model"}
        facts["model_fingerprint"] = model_fingerprint(resolve_model(method.model))

        def drawn(prompts: Sequence[str], seeds: Sequence[int], method: Method = method) -> np.ndarray:
            return images_of(method, prompts, seeds, cache=args.cache)

        sources.append((facts, drawn))
    for facts, images in sources:
        row = {**facts, **measure(specs, args.repetitions, images)}
        rows.append(row)
        shown.append((row["label"], images([spec.caption for spec in specs], range(len(specs)))[picked]))
        print(json.dumps({"name": row["name"], **row["mean"]}), flush=True)
    report = {
        "prompts": args.prompts,
        "repetitions": args.repetitions,
        "prompts_seed": HELD_OUT_SEED,
        "variety": f"{VARIETY_CAPTIONS} captions x {VARIETY_IMAGES} images",
        "versions": {"tiue": tiue_cli.__version__, "torch": torch.__version__},
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{args.name}.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    (args.out / f"{args.name}.md").write_text(table(rows))
    grid(shown).save(args.out / f"{args.name}.webp", quality=92, method=6)


if __name__ == "__main__":
    main()
