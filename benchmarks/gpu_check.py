"""What an NVIDIA GPU makes of tiue, within a budget of minutes; needs torch and the package on PYTHONPATH alone.

    bash benchmarks/gpu_check.sh [--minutes 10] [--stages right,tests,pass,…] [--cpu]

Stages run in order of worth, on Stable Diffusion 1.5's shapes with random weights, 512 x 512. Each figure is written
when it is there (gpu_check.json and gpu_check.md in --out); a stage that fails or dies is recorded, and the next one
runs. The floor of a stage: its multiplications and additions over the matrix rate measured in the same run. ``--cpu``
rehearses all of it on papercut's shapes.

What is timed: medians, each run waited for; ``wall_ms`` from prompts and noise in main memory to pixels there, stages
by CUDA events between their launches.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_commands import bench, doctor, make_exports, onnx, start_exports, tensorrt, tests
from gpu_common import ROOT, Check, free, write_figures
from gpu_stages import ceilings, compiled, distill, machine, passes, profile, right, teacher

STAGES: dict[str, Callable[[Check], None]] = {
    "machine": machine,
    "doctor": doctor,
    "ceilings": ceilings,
    "right": right,
    "pass": passes,
    "tests": tests,
    "teacher": teacher,
    "distill": distill,
    "bench": bench,
    "onnx": onnx,
    "compile": compiled,
    "profile": profile,
    "tensorrt": tensorrt,
}


def main() -> int:
    """Run the stages, each group of them in a process that may die; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--stages", default=",".join(STAGES), help="in this order")
    parser.add_argument("--cpu", action="store_true", help="rehearse on papercut's shapes, without a GPU")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "gpu")
    parser.add_argument("--make-exports", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--ends", type=float, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make_exports:
        return make_exports()
    names = [name.strip() for name in options.stages.split(",") if name.strip()]
    if unknown := [name for name in names if name not in STAGES]:
        parser.error(f"unknown stage {unknown[0]}: choose among {', '.join(STAGES)}")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.worker:
        return work(options, names)
    import importlib.util

    if not options.cpu:
        import torch

        if not torch.cuda.is_available():
            print("error: torch finds no usable GPU\nhint: tiue doctor says why; --cpu rehearses without one")
            return 1
    assert importlib.util.find_spec("tiue_cli") is not None
    ends = time.time() + 60 * options.minutes
    state = options.out / "gpu_check.json"
    state.unlink(missing_ok=True)
    exports = start_exports() if "onnx" in names and not options.cpu else None
    while names and time.time() < ends:
        command = [sys.executable, __file__, "--worker", "--stages", ",".join(names), "--out", str(options.out)]
        command += ["--ends", str(ends), *(["--cpu"] if options.cpu else [])]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, check=False, timeout=max(10.0, ends + 15 - time.time()))
        figures = json.loads(state.read_text()) if state.exists() else {}
        finished = figures.get("finished", [])
        begun = [name for name in names if name not in finished]
        if begun:  # the first of them took the process with it
            figures.setdefault("failed", []).append(f"{begun[0]}: its process ended")
            figures["finished"] = [*finished, begun[0]]
            write_figures(options.out, figures)
        names = begun[1:]
    figures = json.loads(state.read_text()) if state.exists() else {}
    if exports is not None and exports.poll() is None:
        exports.terminate()
    if names:
        figures["not run"] = names
    write_figures(options.out, figures)
    print(f"report: {options.out / 'gpu_check.md'} and .json; not run: {', '.join(names) or 'none'}")
    return 1 if figures.get("failed") else 0


def work(options: argparse.Namespace, names: list[str]) -> int:
    """The stages in this process."""
    check = Check(options)
    for name in names:
        if not check.has(5):
            break
        print(f"== {name}, {check.ends - time.time():.0f} s left", flush=True)
        started = time.perf_counter()
        try:
            STAGES[name](check)
        except Exception as failure:  # noqa: BLE001  # the next stages go on
            traceback.print_exc(limit=-4)
            check.figures.setdefault("failed", []).append(f"{name}: {type(failure).__name__}: {str(failure)[:300]}")
            if "CUDA error" in str(failure):
                return 1  # this process cannot use the device any more
        check.figures.setdefault("finished", []).append(name)
        check.put("seconds", name, value=round(time.perf_counter() - started, 1))
        free(check)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
