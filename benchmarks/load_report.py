"""The figures of ``serve_load.py`` for readers, and the machine that they are of."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any


def cpu_name() -> str:
    """The processor as Linux names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def as_markdown(report: dict[str, Any]) -> str:
    """The report for readers."""
    machine = report["machine"]
    rows = [
        f"| {p['name']} | {p['images_per_s']:.1f} | {p['p50_ms']:.1f} | {p['p99_ms']:.1f} | {p['mean_batch']:.1f} "
        f"| {p['server_cpu_ms_per_image']:.1f} + {p['client_cpu_ms_per_image']:.1f} | {p['images']:,} | {p['failed']} |"
        for p in report["phases"].values()
    ]
    bulk = " and ".join(f"{rate:.1f}" for rate in report["bulk_images_per_s"])
    goals = [
        f"| {t['what']} | {t['value']:.3g} | {t['target']} | {'met' if t['met'] else 'missed'} |"
        for t in report["targets"]
    ]
    stages = ", ".join(f"{stage} {1000 * seconds:.1f}" for stage, seconds in report["stage_seconds"].items())
    return "\n".join(
        [
            f"# Load on `tiue serve` ({report['model']}, tiue {report['tiue_version']})",
            "",
            f"{machine['cpu']}, {machine['cores']} cores, which server and clients share; "
            f"{report['seconds_a_phase']:g} s a phase after {report['warm_up_s']:g} s of warm-up. Processor time is "
            "that of the server + that of the clients. Written by `benchmarks/serve_load.py`.",
            "",
            f"`tiue generate --batch 16`, the same images, before and in between: {bulk} images/s.",
            "",
            "| phase | images/s | p50 ms | p99 ms | mean batch | processor ms an image | images | failed |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            "| target | found | wanted | |",
            "|---|---|---|---|",
            *goals,
            "",
            f"Mean milliseconds of the stages, of a batch and of one image's PNG: {stages}.",
            "",
        ]
    )
