"""Students that are adapters beside the full student, of one teacher and as many evaluations of it: one table.

    python adapter_students.py train --ranks 8 16 32 64     # the full student and four adapters; goes on where it was
    python adapter_students.py table                        # → results/adapter_students.{json,md}

Every row is the recipe ``papercut`` with its own ``student``: the same captions, pairs, steps and batch, so the teacher
answers as often. An adapter learns at a higher rate than whole weights (``--faster``). Quality is ``tiue bench
--quality``'s, on the same captions and seeds. Memory is what ``tiue distill --dry-run`` plays out of a step, seconds a
step are the log's median (other work on the machine is in them), the size is that of the student's folder.
``--scale 0.01`` shortens everything, to see that it runs: such a table says nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import WORK

import tiue_cli as tiue
from tiue_cli.distill.config import DistillConfig
from tiue_cli.distill.estimate import estimate_run
from tiue_cli.distill.resolve import find_recipe
from tiue_cli.files.students import RUN_MANIFEST
from tiue_cli.papercut.captions import training_captions

RESULTS = Path(__file__).parent / "results"
METRICS = (
    ("checker_single_all", "one object, all right"),
    ("checker_pair_all", "two objects, all right"),
    ("checker_objects", "objects"),
    ("checker_colors", "colours"),
    ("checker_relation", "relation"),
    ("fid", "Fréchet distance ↓"),
    ("coverage", "coverage"),
)


@dataclass(frozen=True)
class Row:
    """One student: ``rank`` None trains all weights; ``steps`` and ``scale`` are of the whole table."""

    rank: int | None
    seed: int

    @property
    def name(self) -> str:
        return ("full" if self.rank is None else f"rank{self.rank}") + f"-seed{self.seed}"

    def config(self, *, scale: float, faster: float) -> dict[str, Any]:
        """The recipe with this row's student, everything cut to ``scale``; an adapter's rates are ``faster``."""
        values: dict[str, Any] = {**find_recipe("papercut").values, "prompts": "papercut", "seed": self.seed}
        warm = values["warm_start"] = dict(values["warm_start"])
        if self.rank is not None:
            values["student"] = {**values["student"], "trainable": "lora", "rank": self.rank, "targets": "all"}
            values["optimizer"] = {**values["optimizer"]}
            for section in (warm, values["optimizer"]):
                section["learning_rate"] *= faster
        for section, key in ((values, "max_steps"), (warm, "steps"), (warm, "pairs")):
            section[key] = max(values["batch_size"] if key == "pairs" else 2, round(section[key] * scale))
        values["max_steps"] = max(values["max_steps"], warm["steps"] + 2)
        return values


def rows(args: argparse.Namespace) -> list[Row]:
    """The table's rows: for each seed the full student, then the ranks in their order."""
    return [Row(rank, seed) for seed in args.seeds for rank in (None, *args.ranks)]


def train(args: argparse.Namespace) -> None:
    """Train what is not trained yet, one after the other; a run that was stopped goes on."""
    for row in rows(args):
        out = args.work / row.name
        if (out / "student").is_dir():
            continue
        print(json.dumps({"training": row.name}), flush=True)
        config = row.config(scale=args.scale, faster=args.faster)
        finished = tiue.distill(config, out=out, resume=(out / RUN_MANIFEST).is_file())
        if finished.interrupted:
            raise SystemExit(130)


def table(args: argparse.Namespace) -> None:
    """Measure the rows that are trained, and write them."""
    trained = [row for row in rows(args) if (args.work / row.name / "student").is_dir()]
    report = tiue.bench(
        tiue.BenchConfig(
            models=tuple(str(args.work / row.name) for row in trained),  # a run's folder stands for its student
            teacher="none",
            backends=("torch",),
            steps=(4,),
            latency=False,
            quality=True,
            images=args.images,
            repetitions=args.repetitions,
            threads=args.threads,
        )
    )
    names = {subject.key: Path(subject.model).name for subject in report.subjects}
    quality = {names[record.subject]: record for record in report.quality if record.subject in names}
    found = [costs(row, args) | {"metrics": quality[row.name].metrics} for row in trained]
    spread = {row.name: quality[row.name].repetitions for row in trained}
    document = {"scale": args.scale, "faster": args.faster, "images": args.images, "rows": found, "repetitions": spread}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "adapter_students.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (args.out / "adapter_students.md").write_text(markdown(found, args), encoding="utf-8")
    print(markdown(found, args))


def costs(row: Row, args: argparse.Namespace) -> dict[str, Any]:
    """What a row's training took: teacher evaluations, seconds a step, memory and size in bytes."""
    out = args.work / row.name
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = [line["seconds_per_step"] for line in lines if "vsd" in line] or [lines[-1]["seconds_per_step"]]
    config = DistillConfig.model_validate(row.config(scale=args.scale, faster=args.faster))
    estimate = estimate_run(config, prompts=len(training_captions()), half=False)
    return {
        "name": row.name,
        "rank": row.rank,
        "seed": row.seed,
        "teacher_evaluations": lines[-1]["teacher_evaluations"],
        "seconds_per_step": round(statistics.median(seconds), 3),
        "memory_bytes": estimate.peak_memory_bytes,
        "folder_bytes": sum(file.stat().st_size for file in (out / "student").rglob("*") if file.is_file()),
    }


def markdown(found: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """The table for people."""
    titles = ["student", "seed", "teacher evaluations", "s a step", "memory, MiB", "folder, MiB"]
    titles += [title for _, title in METRICS]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in found:
        cells = [
            "all weights" if row["rank"] is None else f"adapter, rank {row['rank']}",
            str(row["seed"]),
            f"{row['teacher_evaluations']:,.0f}",
            f"{row['seconds_per_step']:.2f}",
            f"{row['memory_bytes'] / 2**20:.0f}",
            f"{row['folder_bytes'] / 2**20:.1f}",
            *(f"{row['metrics'][name]:.3f}" if name in row["metrics"] else "" for name, _ in METRICS),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    short = "" if args.scale == 1 else f", **cut to {args.scale:g} of its steps: figures of a rehearsal**"
    lines += ["", f"Recipe `papercut`{short}; quality over {args.images} images, {args.repetitions} times."]
    return "\n".join(lines) + "\n"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("action", choices=("train", "table"))
    options.add_argument("--ranks", type=int, nargs="*", default=[8, 16, 32, 64])
    options.add_argument("--seeds", type=int, nargs="+", default=[0])
    options.add_argument("--scale", type=float, default=1.0)
    options.add_argument("--faster", type=float, default=5.0, help="an adapter's learning rates, times the recipe's")
    options.add_argument("--images", type=int, default=1024)
    options.add_argument("--repetitions", type=int, default=2)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--work", type=Path, default=WORK / "adapter_students")
    options.add_argument("--out", type=Path, default=RESULTS)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    (train if args.action == "train" else table)(args)


if __name__ == "__main__":
    main()
