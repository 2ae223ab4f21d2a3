"""What Stable Diffusion 1.5 and 2.1-base look like, as plain dicts, and which UNets the one-pass split takes.

Plain data: nothing here imports torch, so that a folder can be judged before anything heavy is loaded. The fields are
those of the models' published ``config.json`` files; a field that is left out has the library's default.
Random weights in these shapes are as fast as trained ones, so the benchmarks build from here as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from tiue_cli.base.text import excerpt
from tiue_cli.errors import ModelFolderError

SD15_UNET: Final[dict[str, Any]] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-05,
    "cross_attention_dim": 768,
    # In this class the name means the number of heads, not their width (historical).
    "attention_head_dim": 8,
}

SD21_UNET: Final[dict[str, Any]] = {
    **SD15_UNET,
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}

SD15_VAE: Final[dict[str, Any]] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}

TAESD: Final[dict[str, Any]] = {
    "in_channels": 3,
    "out_channels": 3,
    "encoder_block_out_channels": (64, 64, 64, 64),
    "decoder_block_out_channels": (64, 64, 64, 64),
    "act_fn": "relu",
    "upsample_fn": "nearest",
    "latent_channels": 4,
    "upsampling_scaling_factor": 2,
    "num_encoder_blocks": (1, 3, 3, 3),
    "num_decoder_blocks": (3, 3, 3, 1),
    "latent_magnitude": 3,
    "latent_shift": 0.5,
    "scaling_factor": 1.0,
}

SD15_TEXT: Final[dict[str, Any]] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-05,
    "projection_dim": 768,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}

SD21_TEXT: Final[dict[str, Any]] = {
    **SD15_TEXT,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    # OpenCLIP ViT-H has 24 layers; SD 2.x takes the output of the last but one.
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}

SD15_SCHEDULER: Final[dict[str, Any]] = {
    "_class_name": "PNDMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}

SD21_SCHEDULER: Final[dict[str, Any]] = {**SD15_SCHEDULER, "prediction_type": "epsilon"}

_DOWN_BLOCKS = {"CrossAttnDownBlock2D", "DownBlock2D"}
_UP_BLOCKS = {"CrossAttnUpBlock2D", "UpBlock2D"}
_MID_BLOCKS = {"UNetMidBlock2DCrossAttn", None}

# Field → the one value that the split reproduces, and what a model with another value is.
_REQUIRED: Final[dict[str, tuple[Any, str]]] = {
    "addition_embed_type": (None, "an SDXL- or Kandinsky-like UNet, which wants more than text states"),
    "class_embed_type": (None, "a class-conditional UNet"),
    "num_class_embeds": (None, "a class-conditional UNet"),
    "encoder_hid_dim_type": (None, "a UNet with its own projection of the text states"),
    "encoder_hid_dim": (None, "a UNet with its own projection of the text states"),
    "time_cond_proj_dim": (None, "a UNet distilled for guidance, which wants the guidance scale as an input"),
    "attention_type": ("default", "a GLIGEN UNet"),
    "dual_cross_attention": (False, "a UNet with two text encoders in each attention"),
    "cross_attention_norm": (None, "a UNet that normalises its text states"),
    "time_embedding_type": ("positional", "a UNet with another time embedding than Stable Diffusion's"),
    "resnet_time_scale_shift": ("default", "a UNet whose resnets scale by the time embedding"),
    "center_input_sample": (False, "a UNet that rescales its input"),
}


def check_unet_config(config: Mapping[str, Any], *, where: str = "the UNet's config") -> None:
    """Refuse a ``UNet2DConditionModel`` config that the split into UNet encoder and UNet decoder does not reproduce.

    ``config`` holds the fields of ``unet/config.json`` (missing ones have diffusers' defaults); ``where`` names it in
    the message. Raises ``ModelFolderError`` that says which field, what it means, and what to use instead.
    """
    class_name = config.get("_class_name", "UNet2DConditionModel")
    if class_name != "UNet2DConditionModel":
        raise _refusal(where, "_class_name", class_name, "no UNet of Stable Diffusion 1.x or 2.x")
    for field, (required, meaning) in _REQUIRED.items():
        value = config.get(field, required)
        if value != required:
            raise _refusal(where, field, value, meaning)
    for field, allowed in (("down_block_types", _DOWN_BLOCKS), ("up_block_types", _UP_BLOCKS)):
        names = config.get(field, SD15_UNET[field])
        for value in names if isinstance(names, list | tuple) else [names]:
            if not isinstance(value, str) or value not in allowed:
                raise _refusal(where, field, value, f"a block that is none of {', '.join(sorted(allowed))}")
    mid_block = config.get("mid_block_type", SD15_UNET["mid_block_type"])
    if not (mid_block is None or isinstance(mid_block, str)) or mid_block not in _MID_BLOCKS:
        raise _refusal(where, "mid_block_type", config["mid_block_type"], "another mid block than Stable Diffusion's")
    only_cross_attention = config.get("only_cross_attention", False)
    if only_cross_attention and (not isinstance(only_cross_attention, list | tuple) or any(only_cross_attention)):
        raise _refusal(where, "only_cross_attention", only_cross_attention, "a UNet without self-attention")
    in_channels, out_channels = config.get("in_channels", 4), config.get("out_channels", 4)
    if in_channels != out_channels:
        raise _refusal(
            where, "in_channels", in_channels, f"an inpainting or image-guided UNet, as it predicts {out_channels}"
        )


def _refusal(where: str, field: str, value: object, meaning: str) -> ModelFolderError:
    return ModelFolderError(
        f"{where}: {field} is {excerpt(repr(value))}: {meaning}, which a one-pass student does not support",
        hint="use a text-to-image model of the Stable Diffusion 1.x or 2.x family",
    )
