"""The most memory that drawing an export takes on a CPU, and the time of a picture: each row in a process of its own.

    python benchmarks/cpu_memory.py engines/sd15 engines/sd15-int8 --out benchmarks/results/cpu_memory_sd15

Two pictures in a row, since what a first one leaves behind counts for the second; the time is the second's. ONNX
Runtime runs with self-attention as one operator, as tiue opens large graphs, and with the graphs as they stand.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tiue_cli.backends import onnx_backend
from tiue_cli.backends.exported import ExportBackend
from tiue_cli.backends.onnx_backend import OnnxBackend
from tiue_cli.backends.openvino_backend import OpenvinoBackend
from tiue_cli.base.machine import machine_info, usable_cores
from tiue_cli.model.noise import draw_noise

ENGINES = ("ONNX Runtime", "ONNX Runtime, graphs as they stand", "OpenVINO")
PROMPT = "a red heart at night"


def measure(folder: Path, engine: str) -> dict[str, Any]:
    """Draw two pictures in this process."""
    if engine.endswith("as they stand"):
        onnx_backend.MIN_TOKENS = sys.maxsize  # type: ignore[misc]
    backend: ExportBackend[Any] = (
        OpenvinoBackend(folder, device="cpu") if engine == "OpenVINO" else OnnxBackend(folder, provider="cpu")
    )
    with backend:
        shape = backend.latent_shape(backend.default_size)
        for seed in range(2):
            started = time.perf_counter()
            backend.generate([PROMPT], draw_noise([seed], shape))
        seconds = time.perf_counter() - started
        return {
            "export": folder.name,
            "precision": backend.manifest.precision,
            "engine": engine,
            "size": list(backend.default_size),
            "second_picture_s": round(seconds, 2),
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("exports", type=Path, nargs="+")
    options.add_argument("--engine", choices=ENGINES, default=None, help="one row, in this process")
    options.add_argument("--out", type=Path, default=None, help="write OUT.json and OUT.md")
    args = options.parse_args()
    if args.engine is not None:
        print(json.dumps(measure(args.exports[0], args.engine)))
        return
    rows = []
    for folder in args.exports:
        for engine in ENGINES:
            command = [sys.executable, __file__, str(folder), "--engine", engine]
            line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
            print(line, flush=True)
            rows.append(json.loads(line))
    if args.out is None:
        return
    found = {"machine": machine_info().cpu, "cores": usable_cores(), "rows": rows}
    args.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    table = [f"| {r['precision']} | {r['engine']} | {r['second_picture_s']} | {r['peak_mib']} |" for r in rows]
    head = ["| graphs | engine | second picture, s | most memory, MiB |", "|---|---|---|---|"]
    args.out.with_suffix(".md").write_text(
        "\n".join([f"{found['machine']}, {found['cores']} cores", "", *head, *table, ""])
    )


if __name__ == "__main__":
    main()
