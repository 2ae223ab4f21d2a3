"""The fields of a model folder's config.json files that something is built from, with their types and bounds.

diffusers and transformers believe what a config says: a text where a number is expected fails in the middle of a
picture, and a count of 2^63 blocks builds modules until somebody stops it. Defaults are the libraries' own. Fields that
are not named here do not touch what is built for Stable Diffusion 1.x and 2.x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

_Bool = Annotated[bool, Field(strict=True)]
_Text = Annotated[str, Field(max_length=200)]
# Strict: a number in quotes, or true for 1, is what an editor's slip looks like.
_Width = Annotated[int, Field(strict=True, ge=1, le=2**17)]
_Count = Annotated[int, Field(strict=True, ge=1, le=512)]
_Side = Annotated[int, Field(strict=True, ge=1, le=2**14)]
_Number = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-1e9, le=1e9)]
_Positive = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, le=1e9)]
_Levels = Annotated[tuple[_Width, ...], Field(min_length=1, max_length=16)]
_Counts = Annotated[tuple[_Count, ...], Field(min_length=1, max_length=16)]
_CountsOrNone = Annotated[
    tuple[Annotated[int, Field(strict=True, ge=0, le=512)], ...], Field(min_length=1, max_length=16)
]
_Names = Annotated[tuple[_Text, ...], Field(min_length=1, max_length=16)]


class _Config(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class UNetConfig(_Config):
    """unet/config.json."""

    class_name: str = Field(default="UNet2DConditionModel", validation_alias="_class_name")
    sample_size: _Side | tuple[_Side, _Side]
    in_channels: _Width = 4
    out_channels: _Width = 4
    block_out_channels: _Levels = (320, 640, 1280, 1280)
    cross_attention_dim: _Width | _Levels = 1280
    layers_per_block: _Count | _Counts = 2
    attention_head_dim: _Width | _Levels = 8
    num_attention_heads: _Width | _Levels | None = None
    transformer_layers_per_block: _Count | _Counts = 1
    norm_num_groups: _Width | None = 32
    norm_eps: _Positive = 1e-5
    freq_shift: _Number = 0
    flip_sin_to_cos: _Bool = True
    downsample_padding: Annotated[int, Field(strict=True, ge=0, le=4)] = 1
    mid_block_scale_factor: _Positive = 1
    act_fn: _Text = "silu"
    dropout: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.0
    use_linear_projection: _Bool = False
    upcast_attention: _Bool | None = False
    resnet_out_scale_factor: _Positive = 1.0
    conv_in_kernel: Annotated[int, Field(strict=True, ge=1, le=15)] = 3
    conv_out_kernel: Annotated[int, Field(strict=True, ge=1, le=15)] = 3
    down_block_types: _Names | None = None
    up_block_types: _Names | None = None
    only_cross_attention: _Bool | Annotated[tuple[_Bool, ...], Field(max_length=16)] = False

    @property
    def blocks(self) -> int:
        """At least so many tensors must be there."""
        return _total(self.layers_per_block) + len(self.block_out_channels)


class VaeConfig(_Config):
    """vae/config.json, of either class."""

    class_name: str = Field(validation_alias="_class_name")
    latent_channels: _Width = 4
    in_channels: _Width = 3
    out_channels: _Width = 3
    block_out_channels: _Levels = (64,)
    layers_per_block: _Count = 1
    norm_num_groups: _Width = 32
    act_fn: _Text = "silu"
    scaling_factor: _Positive = 0.18215
    shift_factor: _Number | None = None
    down_block_types: _Names | None = None
    up_block_types: _Names | None = None
    encoder_block_out_channels: _Levels = (64, 64, 64, 64)
    decoder_block_out_channels: _Levels = (64, 64, 64, 64)
    num_encoder_blocks: _CountsOrNone = (1, 3, 3, 3)
    num_decoder_blocks: _CountsOrNone = (3, 3, 3, 1)
    upsampling_scaling_factor: Annotated[int, Field(strict=True, ge=1, le=8)] = 2
    latent_magnitude: _Number = 3
    latent_shift: _Number = 0.5

    @property
    def factor(self) -> int:
        """Pixels per latent: each level but the last doubles the size (AutoencoderTiny may scale otherwise)."""
        if self.class_name == "AutoencoderTiny":
            return int(self.upsampling_scaling_factor ** (len(self.decoder_block_out_channels) - 1))
        return int(2 ** (len(self.block_out_channels) - 1))

    @property
    def blocks(self) -> int:
        """At least so many tensors must be there."""
        if self.class_name == "AutoencoderTiny":
            return _total(self.num_encoder_blocks) + _total(self.num_decoder_blocks)
        return self.layers_per_block + len(self.block_out_channels)


class TextConfig(_Config):
    """text_encoder/config.json."""

    model_type: _Text = "clip_text_model"
    architectures: tuple[_Text, ...] | None = None
    hidden_size: _Width = 512
    intermediate_size: _Width = 2048
    num_hidden_layers: _Count = 12
    num_attention_heads: _Width = 8
    max_position_embeddings: Annotated[int, Field(strict=True, ge=3, le=2**14)] = 77
    vocab_size: Annotated[int, Field(strict=True, ge=1, le=2**22)] = 49408
    hidden_act: _Text = "quick_gelu"
    layer_norm_eps: _Positive = 1e-5
    attention_dropout: _Number = 0.0
    projection_dim: _Width | None = 512

    @property
    def blocks(self) -> int:
        """At least so many tensors must be there."""
        return self.num_hidden_layers


class SchedulerConfig(_Config):
    """scheduler/scheduler_config.json: what the schedule is made of, see ``model.schedule``."""

    class_name: _Text = Field(validation_alias="_class_name")
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    num_train_timesteps: Annotated[int, Field(strict=True, ge=1, le=100_000)] = 1000


class TokenizerConfig(_Config):
    """tokenizer/tokenizer_config.json."""

    tokenizer_class: _Text = "CLIPTokenizer"
    # transformers writes 1e30 for "unlimited".
    model_max_length: float | None = Field(
        default=None, validation_alias=AliasChoices("model_max_length", "max_len"), gt=2, allow_inf_nan=False
    )


def class_in_index(index: Any, part: str) -> str | None:
    """The class that model_index.json names for ``part``; None where it names none, or is not understood."""
    entry = index.get(part)
    if not isinstance(entry, list) or len(entry) < 2 or not all(isinstance(word, str) for word in entry):
        return None
    return str(entry[1])


def _total(counts: int | Sequence[int]) -> int:
    return counts if isinstance(counts, int) else sum(counts)
