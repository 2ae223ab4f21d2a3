"""Where a bench ran, and what its report is called."""

from __future__ import annotations

import datetime
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from tiue_cli.bench.report.schema import MachineRecord
from tiue_cli.machine import machine_info, package_version

PACKAGES: Final = ("onnxruntime-gpu", "onnxruntime", "tensorrt", "accelerate", "torchmetrics")
"""Whose versions a bench shows beside those that can change a picture."""
_LONGEST_NAME: Final = 80
_GIT_TIMEOUT_S: Final = 15.0


def machine_record(device: str) -> MachineRecord:
    """This machine; it is named after the GPU where that is what ran."""
    info = machine_info()
    gpu = torch.cuda.get_device_name(0) if device == "cuda" else None
    extra = {name: package_version(name) for name in PACKAGES}
    return MachineRecord(
        name=slug(gpu) if gpu is not None else f"{slug(_short_cpu(info.cpu))}-{info.cores}-cores",
        system=info.system,
        cpu=info.cpu,
        cores=info.cores,
        threads=torch.get_num_threads(),
        memory_bytes=info.memory_bytes,
        gpu=gpu,
        driver=info.gpus[0].driver if gpu is not None and info.gpus else None,
        python=info.python,
        packages={**info.packages, **{name: version for name, version in extra.items() if version is not None}},
    )


def report_name(models: Sequence[str], machine: str, created: datetime.datetime, *, random_weights: bool) -> str:
    """``<model>_<machine>_<date>``, in letters that every file system takes."""
    names = "+".join(slug(model) for model in models)[:_LONGEST_NAME]
    return f"{names}{'-random' if random_weights else ''}_{machine}_{created:%Y-%m-%d}"


def source_commit() -> str | None:
    """The commit of the source tree that runs, with ``+`` where its code was changed since; None outside of one."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", "tiue_cli")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}+" if changed else head


def slug(text: str) -> str:
    """Lower-case letters, digits and dots, hyphens between."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "model"


def _short_cpu(name: str) -> str:
    """``Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz`` → ``Intel Xeon Platinum 8481C``."""
    bare = re.sub(r"\((?:R|TM)\)|\bCPU\b|\bProcessor\b|@.*$|\b\d+-Core\b", " ", name, flags=re.IGNORECASE)
    return " ".join(bare.split()[:4])


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_GIT_TIMEOUT_S).stdout.strip()
