"""Full-size models with random weights, built in memory: speed does not depend on what the weights are.

Random and not zero: a GPU that multiplies zeros draws less power and clocks higher than one at work.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from diffusers.models import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from tokenizers import pre_tokenizers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tiue_cli.errors import UsageError
from tiue_cli.model.components import Components, quiet
from tiue_cli.model.folder import ModelInfo, check_model_folder
from tiue_cli.model.hub import EMBEDDED_TEACHER, resolve_model
from tiue_cli.model.parts import part_folder
from tiue_cli.model.sd_configs import (
    SD15_SCHEDULER,
    SD15_TEXT,
    SD15_UNET,
    SD15_VAE,
    SD21_SCHEDULER,
    SD21_TEXT,
    SD21_UNET,
    TAESD,
)
from tiue_cli.model.weights import read_json

TINY_VAE: Final = "taesd"
"""What ``--vae`` calls the tiny autoencoder's shape."""
_EMBEDDING_SCALE = 0.02

Configs = Mapping[str, Mapping[str, Any]]


def random_components(
    shape: str, *, device: str, dtype: torch.dtype, seed: int = 0, vae: str | None = None
) -> Components:
    """The parts of ``sd15``, ``sd21`` or ``papercut`` with random weights on ``device``; nothing is read but configs.

    ``vae`` None is the shape's own autoencoder, ``taesd`` the tiny one. Every matrix has the scale of its fan-in, so
    that activations stay finite in half precision as well. Raises UsageError for another ``vae``.
    """
    configs = _configs(shape)
    if vae is not None:
        if vae != TINY_VAE:
            raise UsageError(f"--vae {vae}: random weights come as {TINY_VAE} only", hint=f"give --vae {TINY_VAE}")
        configs = {**configs, "vae": {**TAESD, "_class_name": "AutoencoderTiny"}}
    generator = torch.Generator(device).manual_seed(seed)
    autoencoder = AutoencoderTiny if configs["vae"].get("_class_name") == "AutoencoderTiny" else AutoencoderKL
    with quiet(), torch.device("meta"):
        text_encoder: Any = CLIPTextModel(CLIPTextConfig(**configs["text_encoder"]))
        unet: Any = UNet2DConditionModel.from_config(dict(configs["unet"]))
        tiny_or_kl: Any = autoencoder.from_config(dict(configs["vae"]))
    with quiet():
        for module in (text_encoder, unet, tiny_or_kl):
            _fill(module, device=device, dtype=dtype, generator=generator)
    tokenizer = _tokenizer(shape, text_encoder)
    return Components(
        info=_info(shape, configs, tokens=int(tokenizer.model_max_length)),
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        unet=unet.eval(),
        vae=tiny_or_kl.eval(),
        scheduler_config=dict(configs["scheduler"]),
    )


def _configs(shape: str) -> Configs:
    if shape == "sd15":
        return {"unet": SD15_UNET, "vae": SD15_VAE, "text_encoder": SD15_TEXT, "scheduler": SD15_SCHEDULER}
    if shape == "sd21":
        return {"unet": SD21_UNET, "vae": SD15_VAE, "text_encoder": SD21_TEXT, "scheduler": SD21_SCHEDULER}
    assert shape == "papercut", "the config knows the shapes"
    folder = resolve_model(EMBEDDED_TEACHER)
    files = {name: part_folder(folder, name) / "config.json" for name in ("unet", "vae", "text_encoder")}
    files["scheduler"] = part_folder(folder, "scheduler") / "scheduler_config.json"
    return {name: read_json(file) for name, file in files.items()}


def _fill(module: nn.Module, *, device: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Give a module of the meta device memory and values."""
    module.to(dtype).to_empty(device=device)
    for name, buffer in module.named_buffers():
        assert name.endswith("position_ids"), f"{name}: a buffer that is not known here"
        buffer.copy_(torch.arange(buffer.shape[-1], device=device).expand_as(buffer))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
                continue
            fan_in = parameter[0].numel()
            scale = _EMBEDDING_SCALE if "embedding.weight" in name else fan_in**-0.5
            parameter.normal_(0.0, scale, generator=generator)


def _tokenizer(shape: str, text_encoder: CLIPTextModel) -> CLIPTokenizer:
    """Papercut's own; else CLIP's scheme without its merges: one token a byte, at CLIP's length."""
    if shape == "papercut":
        info = check_model_folder(resolve_model(EMBEDDED_TEACHER))
        tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(info.folder("tokenizer"))
        tokenizer.model_max_length = info.text_tokens
        return tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(char + "</w>" for char in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[],
        pad_token="<|endoftext|>",
        model_max_length=int(text_encoder.config.max_position_embeddings),
    )


def _info(shape: str, configs: Configs, *, tokens: int) -> ModelInfo:
    """What ``check_model_folder`` says of a folder, for one that is not there."""
    unet, vae, side = configs["unet"], configs["vae"], int(configs["unet"]["sample_size"])
    tiny = vae.get("_class_name") == "AutoencoderTiny"
    levels = len(vae["decoder_block_out_channels"] if tiny else vae["block_out_channels"])
    return ModelInfo(
        path=Path(shape),
        kind="teacher",
        manifest=None,
        sample_size=(side, side),
        factor=2 ** (levels - 1),
        latent_channels=int(vae["latent_channels"]),
        text_tokens=tokens,
        text_width=int(configs["text_encoder"]["hidden_size"]),
        unet_widths=tuple(unet["block_out_channels"]),
        vae_class="AutoencoderTiny" if tiny else "AutoencoderKL",
        scheduler_class=str(configs["scheduler"]["_class_name"]),
        prediction_type=configs["scheduler"].get("prediction_type", "epsilon"),
        components=(),
        license="none: random weights",
    )
