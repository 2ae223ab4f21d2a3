"""Move finished weights from `work/` into the package, as a Stable Diffusion folder in fp16.

    python benchmarks/papercut/package.py [--checkpoint] [--out FOLDER]

With --checkpoint the UNet is the averaged one of a training that still runs. With --out the folder is written there,
whole, and nothing is packaged: to evaluate it and to distil from it. Without, it writes, under
`tiue_cli/papercut/model/`, `teacher/` (its UNet and a model card), `shared/` (text encoder, tokenizer, autoencoder and
scheduler, which the student uses too) and `checker.safetensors`.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from common import WORK
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from packaged import package_model, share_parts
from safetensors.torch import load_file
from train_teacher import CONFIG, SCHEDULER
from transformers import CLIPTextModel, CLIPTokenizer

from tiue_cli.model.parts import PACKAGED as MODEL

CARD = """---
license: apache-2.0
pipeline_tag: text-to-image
library_name: diffusers
---
# papercut, the teacher

A miniature Stable Diffusion: the same parts (CLIP text encoder, UNet with cross-attention, autoencoder, DDIM), trained
from scratch on procedurally drawn 64 × 64 paper scenes. It knows one or two of six objects (star, heart, tree, house,
moon, fish) in eight colours, four relations and five backgrounds, and nothing else.
"""


def trained_unet(*, checkpoint: bool) -> UNet2DConditionModel:
    if not checkpoint:
        return UNet2DConditionModel.from_pretrained(WORK / "unet")
    unet = UNet2DConditionModel(**CONFIG)
    tensors = load_file(WORK / "teacher.pt.safetensors")
    unet.load_state_dict({key.removeprefix("ema/"): value for key, value in tensors.items() if key.startswith("ema/")})
    return unet


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--checkpoint", action="store_true")
    options.add_argument("--out", type=Path, default=None)
    args = options.parse_args()
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderTiny.from_pretrained(WORK / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(WORK / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(WORK / "tokenizer"),
        unet=trained_unet(checkpoint=args.checkpoint),
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.float16)
    if args.out is not None:
        pipeline.save_pretrained(args.out, safe_serialization=True)
        return
    part = MODEL / "teacher.part"
    shutil.rmtree(part, ignore_errors=True)
    pipeline.save_pretrained(part, safe_serialization=True)
    (part / "README.md").write_text(CARD)
    share_parts(part)
    package_model(part, "teacher")
    shutil.copyfile(WORK / "checker.safetensors", MODEL / "checker.safetensors")
    for file in sorted(MODEL.rglob("*.safetensors")):
        print(f"{file.relative_to(MODEL)}  {file.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
