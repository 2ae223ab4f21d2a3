"""The report of gpu_check.py for people."""

from __future__ import annotations

import json
from typing import Any


def markdown(figures: dict[str, Any]) -> str:
    """The report for people."""
    found = figures.get("machine", {})
    lines = [
        f"# tiue {found.get('tiue', '')} on {found.get('gpu', 'a CPU (a rehearsal)')}",
        "",
        f"{found.get('date', '')}, driver {found.get('driver', '-')}, torch {found.get('torch', '')}, cuDNN"
        f" {found.get('cudnn', '-')}. Stable Diffusion 1.5's shapes, random weights, 512 x 512, fp16, K = 4 unless"
        " said."
        " Written by `benchmarks/gpu_check.sh`; what is timed stands at the top of `gpu_check.py`.",
    ]
    if ceiling := figures.get("ceilings"):
        lines += [
            "",
            "Ceilings: " + "; ".join(f"{key} {value}" for key, value in ceiling.items() if "flops" not in key),
        ]
    if rows := figures.get("pass"):
        lines += [
            "",
            "| prompts to pixels | ms | text | UNet encoder | UNet decoder | VAE | share of peak | first call, s |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for name, row in rows.items():
            if isinstance(row, str):
                lines.append(f"| {name} | {row[:120]} |")
                continue
            stages, floors = row.get("stage_ms", {}), row.get("floor_ms", {})
            cells = [
                f"{stages[key]} (floor {floors[key]})" if key in floors and key in stages else str(stages.get(key, ""))
                for key in ("text", "unet_encoder", "unet_decoder", "vae")
            ]
            share = "" if "share_of_peak" not in row else f"{100 * row['share_of_peak']:.0f} %"
            lines.append(f"| {name} | {row['wall_ms']} | {' | '.join(cells)} | {share} | {row.get('first_s', '')} |")
    for title in ("teacher", "distill", "right", "onnx"):
        if isinstance(rows := figures.get(title), str):
            lines += ["", f"{title}: {rows}"]
        elif rows:
            lines += ["", f"| {title} | |", "|---|---|"]
            lines += [f"| {name} | {json.dumps(value)} |" for name, value in rows.items()]
    for title in ("doctor", "tests", "bench", "tensorrt", "failed", "not run"):
        if title in figures:
            lines += ["", f"{title}: {json.dumps(figures[title])[:1500]}"]
    for name, row in figures.get("profile", {}).items():
        lines += ["", f"Kernels, {name}: {row['ms']} ms in {row['launches']} launches", ""]
        lines += [f"- {spent} ms, {count} x `{key}`" for key, count, spent in row["top"][:8]]
    return "\n".join(lines) + "\n"
