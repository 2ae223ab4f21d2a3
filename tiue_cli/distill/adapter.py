"""A student that is an adapter: the teacher's own weights, frozen and held once, and a LoRA that learns."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.models import UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from tiue_cli.distill.config import LoraSettings
from tiue_cli.distill.data.order import Stream, generator
from tiue_cli.distill.networks import ScoreModel, lora_targets
from tiue_cli.files.atomic import atomic_folder
from tiue_cli.files.manifests import write_json
from tiue_cli.files.students import LORA_FILE, STUDENT_MANIFEST, StudentManifest


def adapt_student(unet: UNet2DConditionModel, score: ScoreModel, settings: LoraSettings, *, seed: int) -> None:
    """Give ``unet``, the teacher's own, the frozen weights that ``score`` holds, and an adapter that can be trained.

    The teacher, the LoRA teacher and the student are then one set of weights in memory with two small adapters. The
    adapter begins as nothing: the student is the teacher's UNet until its first step. Raises UsageError.
    """
    _share(unet, score.unet)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank,
        target_modules=lora_targets(unet, settings.targets),
        init_lora_weights=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(generator(seed, Stream.STUDENT_WEIGHTS).integers(2**31)))
        unet.add_adapter(config)
    cast_training_params(unet, torch.float32)


def adapter_weights(unet: nn.Module) -> dict[str, Tensor]:
    """The student's trained weights by PEFT's names."""
    return {name: value for name, value in unet.state_dict().items() if ".lora_" in name}


def save_adapter_student(unet: UNet2DConditionModel, manifest: StudentManifest, out: Path) -> Path:
    """Write the adapter as diffusers reads it, and ``manifest``, which names its base. Raises OutputError."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    assert manifest.base is not None, "an adapter has a base"
    with atomic_folder(out, overwrite=True, marker=STUDENT_MANIFEST) as folder:
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
        StableDiffusionPipeline.save_lora_weights(
            folder,
            unet_lora_layers=layers,
            weight_name=LORA_FILE,
            unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
        )
        write_json(folder / STUDENT_MANIFEST, manifest)
        (folder / "README.md").write_text(_card(manifest, name=out.name), encoding="utf-8")
    return out.resolve()


def _share(unet: nn.Module, frozen: nn.Module) -> None:
    """Put the parameters of ``frozen``, which may lie below adapters of its own, in place of those of ``unet``."""
    for name, parameter in frozen.named_parameters():
        if ".lora_" in name:
            continue
        module, _, leaf = name.replace(".base_layer", "").rpartition(".")
        setattr(unet.get_submodule(module), leaf, parameter)
    unet.requires_grad_(False)


def _card(manifest: StudentManifest, *, name: str) -> str:
    assert manifest.base is not None
    return (
        f"---\nlicense: {manifest.license}\nlibrary_name: diffusers\npipeline_tag: text-to-image\n"
        "tags: [tiue, one-pass, distillation, lora]\n---\n\n"
        f"# {name}\n\n"
        f"A one-pass text-to-image student of `{manifest.base.source}` as a LoRA of it"
        f" ({manifest.training_steps:,} training steps): it makes an image in one pass over the timesteps"
        f" {list(manifest.decoder_timesteps)}.\n\n"
        f'```\ntiue generate "a prompt" --model {name}\n```\n\n'
        "Plain diffusers can load the adapter, but its samplers do not take the one pass that it is for.\n"
    )
