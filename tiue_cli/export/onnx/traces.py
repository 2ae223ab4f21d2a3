"""How each of the four graphs is traced: its module, example arguments, and the names of its free dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tiue_cli.export.onnx.chain import tokenize
from tiue_cli.export.onnx.graphs import TextEncoderGraph, UNetDecoderGraph, UNetEncoderGraph, VaeDecoderGraph
from tiue_cli.export.onnx.trace import Port, Trace
from tiue_cli.files.exports import Size
from tiue_cli.model.autoencoder import ImageDecoder
from tiue_cli.model.student import StudentModel
from tiue_cli.model.unet import UNetEncoder, UNetFeatures

# Traced with two images and three timesteps: with one of either, the tracer would fix the dimension to 1.
BATCH, STEPS = 2, 3
SIDES = (3, 5)
"""Traced height and width at the UNet's lowest level, where height and width are free."""


def trace_text_encoder(student: StudentModel) -> Trace:
    """input_ids (B, L) → text_states (B, L, D)."""
    input_ids = tokenize(student, ["a", "b"])
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
