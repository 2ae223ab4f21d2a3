"""Move papercut's student from a run of `tiue distill` into the package, in fp16, with a card of its own.

    python package_student.py work/longer work/last --warm-start work/warm work/warm-longer

Writes `tiue_cli/papercut/model/student/` (without the parts that equal the teacher's) and copies the logs of all
runs to `logs/`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from packaged import package_model

from tiue_cli.model.hub import EMBEDDED_TEACHER
from tiue_cli.model.parts import PACKAGED as MODEL
from tiue_cli.model.student import load_student, save_student

HERE = Path(__file__).parent
CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [tiue, one-pass, distillation]
---
# papercut, the student

One pass of the UNet encoder, one batch of the UNet decoder at the timesteps {timesteps}, one weighted sum: a picture
of papercut's world without a loop and without guidance. Distilled from `papercut-teacher` on captions alone: {warm:,}
steps of regression onto the teacher's solutions, then {steps:,} steps of variational score distillation. Settings and
logs: benchmarks/papercut; figures: benchmarks/papercut/results.

```
tiue generate "a yellow star above a green tree"
```
"""


def steps_of(run: Path) -> int:
    lines = (run / "log.jsonl").read_text().splitlines()
    return int(json.loads(lines[-1])["step"])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("runs", type=Path, nargs="+", help="the distillations, in their order: the last one's student")
    options.add_argument(
        "--warm-start", type=Path, nargs="+", required=True, help="the runs of regression before it, in their order"
    )
    args = options.parse_args()
    student = load_student(args.runs[-1] / "student")
    warm, steps = sum(map(steps_of, args.warm_start)), sum(map(steps_of, args.runs))
    student.manifest = student.manifest.model_copy(
        update={"training_steps": warm + steps, "teacher": EMBEDDED_TEACHER, "license": "apache-2.0"}
    )
    whole = save_student(student, MODEL / "student.part", dtype=torch.float16, overwrite=True)
    folder = package_model(whole, "student")
    timesteps = list(student.manifest.decoder_timesteps)
    (folder / "README.md").write_text(CARD.format(timesteps=timesteps, warm=warm, steps=steps))
    for name, runs in (("student_warm_start", args.warm_start), ("student", args.runs)):
        lines = "".join((run / "log.jsonl").read_text() for run in runs)
        (HERE / "logs" / f"{name}.log.jsonl").write_text(lines)
    for file in sorted(folder.rglob("*.safetensors")):
        print(f"{file.relative_to(MODEL)}  {file.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
