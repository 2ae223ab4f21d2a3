"""Keep the trainings' weights in the repository while a model is not finished, and take them up again elsewhere.

    python benchmarks/papercut/checkpoints.py keep      # work/ -> checkpoints/, fp16
    python benchmarks/papercut/checkpoints.py take      # checkpoints/ -> work/, where every training resumes

What is kept: autoencoder, tokenizer, text encoder and checker as far as they are finished; and of each training its
weights (of the teacher the averaged ones), from which it goes on with fresh moments. Scenes, latents and text states
are drawn and computed anew.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from common import WORK
from safetensors import safe_open
from safetensors.torch import load_file, save_file

KEPT = Path(__file__).parent / "checkpoints"
FOLDERS = ("vae", "text_encoder", "tokenizer")
TRAININGS = {"autoencoder": "model/", "checker": "model/", "teacher": "ema/"}
"""Trainings that go on, and the weights that are kept of each."""


def halved(source: Path, target: Path, *, prefix: str = "", rename: str = "") -> None:
    """Write the tensors under a prefix to a file in fp16; the metadata stays."""
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    tensors = {
        rename + key.removeprefix(prefix): (value.half() if value.is_floating_point() else value).contiguous()
        for key, value in load_file(source).items()
        if key.startswith(prefix)
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target, metadata=metadata)


def widened(source: Path) -> dict[str, torch.Tensor]:
    """A file's tensors, the floating ones in float32."""
    return {key: value.float() if value.is_floating_point() else value for key, value in load_file(source).items()}


def keep() -> None:
    for name in FOLDERS:
        if (WORK / name).is_dir():
            shutil.rmtree(KEPT / name, ignore_errors=True)
            shutil.copytree(WORK / name, KEPT / name)
            for file in (KEPT / name).glob("*.safetensors"):
                halved(WORK / name / file.name, file)
    if (WORK / "checker.safetensors").exists():
        halved(WORK / "checker.safetensors", KEPT / "checker.safetensors")
    for name, prefix in TRAININGS.items():
        if (WORK / f"{name}.pt.safetensors").exists():
            halved(WORK / f"{name}.pt.safetensors", KEPT / f"{name}.pt.safetensors", prefix=prefix)
    for file in sorted(KEPT.rglob("*.safetensors")):
        print(f"{file.relative_to(KEPT)}  {file.stat().st_size / 1e6:.2f} MB")


def take() -> None:
    WORK.mkdir(parents=True, exist_ok=True)
    for name in FOLDERS:
        if not (KEPT / name).is_dir():
            continue
        shutil.copytree(KEPT / name, WORK / name, dirs_exist_ok=True)
        for file in (WORK / name).glob("*.safetensors"):
            save_file(widened(file), file, metadata={"format": "pt"})
    if (KEPT / "checker.safetensors").exists():
        shutil.copyfile(KEPT / "checker.safetensors", WORK / "checker.safetensors")
    for name, prefix in TRAININGS.items():
        kept = KEPT / f"{name}.pt.safetensors"
        if not kept.exists():
            continue
        with safe_open(kept, "pt") as file:
            metadata = file.metadata()
        weights = widened(kept)
        parts = {"model/", prefix}
        flat = {part + key: value.clone() for part in parts for key, value in weights.items()}
        save_file(flat, WORK / f"{name}.pt.safetensors", metadata=metadata)
        print(json.dumps({"training": name, **metadata, "parameters": sum(map(torch.numel, weights.values()))}))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("what", choices=("keep", "take"))
    {"keep": keep, "take": take}[options.parse_args().what]()


if __name__ == "__main__":
    main()
