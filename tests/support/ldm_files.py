"""Checkpoint files in the layout of the original Stable Diffusion code, written key by key from model folders.

The names are put together here from the layout itself, not by inverting the converters that read them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_EDGES = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def write_checkpoint(
    path: Path,
    folder: Path,
    *,
    ema: bool = False,
    vae: bool = True,
    text: bool = True,
    extra: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """The folder as one file; with ``ema`` the averaged weights are the folder's, and the others twice them."""
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in unet_tensors(folder).items()}
    if ema:
        averaged = {f"model_ema.{name.removeprefix('model.').replace('.', '')}": t for name, t in tensors.items()}
        tensors = {name: 2 * tensor for name, tensor in tensors.items()} | averaged
        tensors["model_ema.decay"] = torch.tensor(0.999)
    if vae:
        tensors |= {f"first_stage_model.{name}": tensor for name, tensor in vae_tensors(folder).items()}
    if text:
        tensors |= text_tensors(folder)
    tensors |= {"betas": torch.zeros(1000), "model_ema.num_updates": torch.tensor(1)} | dict(extra or {})
    if dtype is not None:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, path, metadata=dict(metadata or {}))
    return path


def write_vae_file(path: Path, folder: Path, *, prefix: str = "") -> Path:
    """The folder's autoencoder alone."""
    save_file({f"{prefix}{name}": t.contiguous().clone() for name, t in vae_tensors(folder).items()}, path)
    return path


def unet_tensors(folder: Path) -> dict[str, Tensor]:
    """``ldm_unet`` of a folder."""
    return ldm_unet(_weights(folder, "unet"), _config(folder, "unet"))


def ldm_unet(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The UNet's tensors by LDM's names, without the part in front."""
    layers, found = config["layers_per_block"], {}
    for name, tensor in weights.items():
        module, _, leaf = name.rpartition(".")
        words = module.split(".")
        if words[0] in ("down_blocks", "up_blocks"):
            new = _block(words, layers, has_attention="CrossAttn" in config[_types(words[0])][int(words[1])])
        elif words[0] == "mid_block":
            place = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}[".".join(words[1:3])]
            new = f"middle_block.{place}.{_inner(words[1], words[3:])}"
        else:
            new = _EDGES[module]
        found[f"{new}.{leaf}"] = tensor
    return found


def _types(block: str) -> str:
    return f"{block.split('_')[0]}_block_types"


def _block(words: list[str], layers: int, *, has_attention: bool) -> str:
    """E.g. ``down_blocks.1.resnets.0.conv1`` → ``input_blocks.4.0.in_layers.2`` at two layers a block."""
    level, kind, number = int(words[1]), words[2], int(words[3])
    if words[0] == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{(layers + 1) * (level + 1)}.0.op"
        place = f"input_blocks.{(layers + 1) * level + number + 1}"
    else:
        if kind == "upsamplers":
            return f"output_blocks.{(layers + 1) * level + layers}.{2 if has_attention else 1}.conv"
        place = f"output_blocks.{(layers + 1) * level + number}"
    return f"{place}.{0 if kind == 'resnets' else 1}.{_inner(kind, words[4:])}"


def _inner(kind: str, words: list[str]) -> str:
    return _RESNET[words[0]] if kind == "resnets" else ".".join(words)


def vae_tensors(folder: Path) -> dict[str, Tensor]:
    """``ldm_vae`` of a folder."""
    return ldm_vae(_weights(folder, "vae"), _config(folder, "vae"))


def ldm_vae(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The autoencoder's tensors by LDM's names; its attention is made of 1x1 convolutions there."""
    levels, found = len(config["block_out_channels"]), {}
    for name, tensor in weights.items():
        words = name.split(".")
        if words[1:2] in (["down_blocks"], ["up_blocks"]):
            level = int(words[2]) if words[1] == "down_blocks" else levels - 1 - int(words[2])
            side = words[1].split("_")[0]
            kind = f"block.{words[4]}" if words[3] == "resnets" else f"{side}sample"
            words = [words[0], side, str(level), kind, *words[5:]]
        elif words[1:3] == ["mid_block", "resnets"]:
            words = [words[0], "mid", f"block_{int(words[3]) + 1}", *words[4:]]
        elif words[1:3] == ["mid_block", "attentions"]:
            layer = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}[words[4]]
            tensor = tensor[:, :, None, None] if layer != "norm" and words[-1] == "weight" else tensor
            words = [words[0], "mid", "attn_1", layer, words[-1]]
        elif words[1:2] == ["conv_norm_out"]:
            words = [words[0], "norm_out", words[2]]
        found[".".join(words).replace("conv_shortcut", "nin_shortcut")] = tensor
    return found


def text_tensors(folder: Path) -> dict[str, Tensor]:
    """``ldm_text`` of a folder."""
    return ldm_text(_weights(folder, "text_encoder"), _config(folder, "text_encoder"))


def ldm_text(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """CLIP's names for SD 1.x; OpenCLIP's for 2.x, with the last layer that 2.x does not use."""
    own = {name.removeprefix("text_model."): t for name, t in weights.items()}
    own = {name: t for name, t in own.items() if not name.endswith("position_ids")}
    if config["hidden_act"] == "quick_gelu":
        found = {f"cond_stage_model.transformer.text_model.{name}": t for name, t in own.items()}
        position = torch.arange(config["max_position_embeddings"])[None]
        return found | {"cond_stage_model.transformer.text_model.embeddings.position_ids": position}
    prefix, found = "cond_stage_model.model.", {}
    edges = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    for name, new in edges.items():
        found[f"{prefix}{new}"] = own[name]
    layers = config["num_hidden_layers"]
    for layer in range(layers + 1):
        source = {
            name.removeprefix(f"encoder.layers.{min(layer, layers - 1)}."): t
            for name, t in own.items()
            if name.startswith(f"encoder.layers.{min(layer, layers - 1)}.")
        }
        new = f"{prefix}transformer.resblocks.{layer}."
        for leaf in ("weight", "bias"):
            joined = torch.cat([source[f"self_attn.{which}_proj.{leaf}"] for which in "qkv"])
            found[f"{new}attn.in_proj_{leaf}"] = joined
            found[f"{new}attn.out_proj.{leaf}"] = source[f"self_attn.out_proj.{leaf}"]
            found[f"{new}mlp.c_fc.{leaf}"] = source[f"mlp.fc1.{leaf}"]
            found[f"{new}mlp.c_proj.{leaf}"] = source[f"mlp.fc2.{leaf}"]
            found[f"{new}ln_1.{leaf}"] = source[f"layer_norm1.{leaf}"]
            found[f"{new}ln_2.{leaf}"] = source[f"layer_norm2.{leaf}"]
    width = config["hidden_size"]
    return found | {f"{prefix}text_projection": torch.eye(width), f"{prefix}logit_scale": torch.tensor(4.6)}


def _config(folder: Path, part: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
    return config


def _weights(folder: Path, part: str) -> dict[str, Tensor]:
    return load_file(next((folder / part).glob("*.safetensors")))
