"""The four modules that become graphs: plain tensors in and out, with the names that are part of the format.

text_encoder: input_ids ─▶ text_states
unet_encoder: noise, text_states ─▶ mid, skip_00 …        (the time is a constant in it)
unet_decoder: mid, skip_00 …, text_states, noise, timesteps, weights ─▶ latents
vae_decoder:  latents ─▶ images

At the border noise, weights and latents are float32 whatever the precision: the weighted sum takes the unrounded noise,
and its terms cancel. The hand-off between the graphs (text states, features) is in the graph's own precision.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers.models import UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPTextModel

from tiue_cli.errors import ModelFolderError
from tiue_cli.export.onnx.trace import Port, Trace
from tiue_cli.files.exports import Size
from tiue_cli.model.autoencoder import ImageDecoder
from tiue_cli.model.shared import SharedUNetDecoder
from tiue_cli.model.student import StudentModel
from tiue_cli.model.text import tokenize
from tiue_cli.model.unet import UNetEncoder, UNetFeatures, time_embedding, time_projection


class TextEncoderGraph(nn.Module):
    """Prompts as tokens to text states. Raises ModelFolderError for a text encoder that wants the padding mask."""

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        if getattr(text_encoder.config, "use_attention_mask", False):
            raise ModelFolderError(
                "the text encoder's config asks for the padding mask (use_attention_mask); the graph has no such input",
                hint="set use_attention_mask to false: Stable Diffusion was trained without it",
            )
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L) int64 → (B, L, D)."""
        text_states: Tensor = self.text_encoder(input_ids)[0]
        return text_states


class UNetEncoderGraph(nn.Module):
    """The UNet encoder at its one timestep; trace it inside ``folded_time``."""

    def __init__(self, unet: UNet2DConditionModel, timestep: int) -> None:
        super().__init__()
        self.encoder = UNetEncoder(unet)
        self.timestep = timestep

    def forward(self, noise: Tensor, text_states: Tensor) -> tuple[Tensor, ...]:
        """(B, C, h, w) float32 and (B, L, D) → the mid feature, then the skips in the order they arise."""
        mid, skips = self.encoder(noise.to(text_states.dtype), text_states, self.timestep)
        return (mid, *skips)


class UNetDecoderGraph(nn.Module):
    """The sharing UNet decoder over K timesteps, and the weighted sum of the noise and its predictions."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.decoder = SharedUNetDecoder(unet)

    def forward(
        self,
        mid: Tensor,
        skips: list[Tensor],
        text_states: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """Latents (B, C, h, w) float32; noise (B, C, h, w), timesteps (K,) int64, weights (K + 1,) float32."""
        predictions = self.decoder(UNetFeatures(mid, tuple(skips)), timesteps, text_states)
        # Multiply and add, no matmul: that could run in TF32.
        terms = weights[1:, None, None, None, None] * predictions.float()
        result: Tensor = weights[0] * noise + terms.sum(0)
        return result


class VaeDecoderGraph(nn.Module):
    """Latents to pixels, rounded as ``ImageDecoder`` rounds."""

    def __init__(self, decoder: ImageDecoder) -> None:
        super().__init__()
        self.vae = decoder.vae
        self._decoder = decoder

    def forward(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) float32 → (B, H, W, 3) uint8."""
        images = self._decoder.decode_float(latents)
        levels = (images * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255
        # The cast comes last: TensorRT has uint8 at the border only.
        return levels.round().to(torch.uint8)


@contextlib.contextmanager
def folded_time(unet: UNet2DConditionModel, timestep: int) -> Iterator[None]:
    """Inside, every time projection of the UNet encoder is the constant that it is at ``timestep``.

    Computed in the UNet's precision at entry; a cast inside (``unet.half()``) casts the constants as well. The exporter
    does not fold this by itself, and a graph with a timestep in it would ask for the time embedding's weights.
    """
    device = unet.conv_in.weight.device
    embedding = time_embedding(unet, torch.tensor([timestep], device=device), unet.dtype)
    projections = {resnet: resnet.time_emb_proj for resnet in encoder_resnets(unet)}
    try:
        for resnet in projections:
            resnet.time_emb_proj = _Constant(time_projection(resnet, embedding))
        yield
    finally:
        for resnet, projection in projections.items():
            resnet.time_emb_proj = projection.to(unet.dtype)  # it missed a cast of the UNet meanwhile


def encoder_resnets(unet: UNet2DConditionModel) -> list[Any]:
    """The residual blocks of the UNet encoder."""
    blocks: list[Any] = [*unet.down_blocks, *([] if unet.mid_block is None else [unet.mid_block])]
    return [resnet for block in blocks for resnet in block.resnets]


class _Constant(nn.Module):
    """Answers the same tensor whatever it is asked."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value.detach())

    def forward(self, _: Tensor) -> Any:
        return self.value


# Traced with two images and three timesteps: with one of either, the tracer would fix the dimension to 1.
BATCH, STEPS = 2, 3
SIDES = (3, 5)
"""Traced height and width at the UNet's lowest level, where height and width are free."""


def trace_text_encoder(student: StudentModel) -> Trace:
    """input_ids (B, L) → text_states (B, L, D)."""
    input_ids = tokenize(student.tokenizer, ["a", "b"])
    length, width = input_ids.shape[1], int(student.text_encoder.config.hidden_size)
    return Trace(
        name="text_encoder",
        module=TextEncoderGraph(student.text_encoder),
        arguments=(input_ids,),
        inputs=(Port("input_ids", ("batch", length)),),
        outputs=(Port("text_states", ("batch", length, width)),),
    )


def trace_unet_encoder(student: StudentModel, size: Size | None) -> Trace:
    """noise, text_states → mid, skip_00 …; trace it inside ``folded_time``."""
    noise, text_states, features = _example(student, size)
    return Trace(
        name="unet_encoder",
        module=UNetEncoderGraph(student.unet, student.manifest.encoder_timestep),
        arguments=(noise, text_states),
        inputs=(_latents_port("noise", noise, size), _text_port(text_states)),
        outputs=_feature_ports(noise, features, size),
        size=size,
    )


def trace_unet_decoder(student: StudentModel, size: Size | None) -> Trace:
    """mid, skip_00 …, text_states, noise, timesteps (K,), weights (K + 1,) → latents."""
    noise, text_states, features = _example(student, size)
    timesteps, weights = torch.zeros(STEPS, dtype=torch.int64), torch.zeros(STEPS + 1)
    return Trace(
        name="unet_decoder",
        module=UNetDecoderGraph(student.unet),
        arguments=(features.mid, list(features.skips), text_states, noise, timesteps, weights),
        inputs=(
            *_feature_ports(noise, features, size),
            _text_port(text_states),
            _latents_port("noise", noise, size),
            Port("timesteps", ("steps",)),
            Port("weights", ("steps_plus_1",)),
        ),
        outputs=(_latents_port("latents", noise, size),),
        size=size,
    )


def trace_vae_decoder(student: StudentModel, size: Size | None) -> Trace:
    """latents → images (B, H, W, 3) uint8."""
    decoder = ImageDecoder(student.vae)
    latents = torch.zeros(BATCH, decoder.latent_channels, *_latent(student, size))
    sides: Sequence[int | str] = ("image_height", "image_width") if size is None else size
    return Trace(
        name="vae_decoder",
        module=VaeDecoderGraph(decoder),
        arguments=(latents,),
        inputs=(_latents_port("latents", latents, size),),
        outputs=(Port("images", ("batch", *sides, 3)),),
        size=size,
    )


def lowest_level(student: StudentModel) -> int:
    """Latents per side of one feature at the UNet's lowest level."""
    return int(2 ** (len(student.unet.config["block_out_channels"]) - 1))


def _latent(student: StudentModel, size: Size | None) -> tuple[int, int]:
    if size is not None:
        return ImageDecoder(student.vae).latent_size(size)
    scale = lowest_level(student)
    return SIDES[0] * scale, SIDES[1] * scale


def _example(student: StudentModel, size: Size | None) -> tuple[Tensor, Tensor, UNetFeatures]:
    """Tensors of the right shapes and dtypes; what the UNet encoder makes of them is inferred, not computed."""
    unet = student.unet
    channels, length = int(unet.config["in_channels"]), int(student.tokenizer.model_max_length)
    width = int(student.text_encoder.config.hidden_size)
    noise = torch.zeros(BATCH, channels, *_latent(student, size))
    text_states = torch.zeros(BATCH, length, width, dtype=unet.dtype)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = UNetEncoder(unet)(mode.from_tensor(noise).to(unet.dtype), mode.from_tensor(text_states), 0)
    real = [torch.zeros(tuple(tensor.shape), dtype=unet.dtype) for tensor in (fake.mid, *fake.skips)]
    return noise, text_states, UNetFeatures(real[0], tuple(real[1:]))


def _latents_port(name: str, latents: Tensor, size: Size | None) -> Port:
    _, channels, height, width = latents.shape
    return Port(name, ("batch", channels, *(("height", "width") if size is None else (height, width))))


def _text_port(text_states: Tensor) -> Port:
    return Port("text_states", ("batch", *text_states.shape[1:]))


def _feature_ports(noise: Tensor, features: UNetFeatures, size: Size | None) -> tuple[Port, ...]:
    """Ports of mid and skips. Free sides are named by level: ``height_4`` is a quarter of ``height``, rounded up."""
    names = ["mid", *(f"skip_{index:02}" for index in range(len(features.skips)))]
    ports = []
    for name, feature in zip(names, (features.mid, *features.skips), strict=True):
        _, channels, height, width = feature.shape
        level = math.ceil(noise.shape[-2] / height)
        suffix = "" if level == 1 else f"_{level}"
        sides: Sequence[int | str] = (f"height{suffix}", f"width{suffix}") if size is None else (height, width)
        ports.append(Port(name, ("batch", channels, *sides)))
    return tuple(ports)
