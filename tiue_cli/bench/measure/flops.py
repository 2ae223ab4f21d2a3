"""FLOPs of every stage as torch counts them (a multiplication with its addition is two), on the meta device.

Nothing is computed: modules are built from their configs without memory, and ``FlopCounterMode`` adds up convolutions,
matrix products and attentions by their shapes. Norms, activations and additions do not count.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.models import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from tiue_cli.bench.report.schema import Stage
from tiue_cli.model.autoencoder import ImageDecoder
from tiue_cli.model.components import Components, quiet
from tiue_cli.model.shared import SharedUNetDecoder, merge_upsamplers, with_same_weights
from tiue_cli.model.unet import UNetDecoder, UNetEncoder

DecoderKind = Literal["shared", "plain", "merged"]


class StageFlops:
    """Counts for one model at one latent size (h, w); each different count is made once."""

    def __init__(self, components: Components, latent: tuple[int, int]) -> None:
        self._text_config = json.dumps(components.text_encoder.config.to_dict(), sort_keys=True, default=str)
        self._unet_config = _plain_config(components.unet.config)
        self._vae_config = _plain_config(components.vae.config)
        self._tiny = isinstance(components.vae, AutoencoderTiny)
        self._tokens = components.info.text_tokens
        self._latent = latent

    def text(self, rows: int) -> float:
        """The text encoder on ``rows`` prompts."""
        return rows * _count_text(self._text_config, self._tokens)

    def unet(self, rows: int, *, merged_upsampler: bool = False) -> float:
        """One whole UNet pass on ``rows`` rows."""
        return _count_unet(self._unet, rows, merged=merged_upsampler)

    def unet_encoder(self, batch: int) -> float:
        """The UNet encoder on ``batch`` images."""
        return _count_encoder(self._unet, batch)

    def unet_decoder(self, batch: int, steps: int, kind: DecoderKind) -> float:
        """The UNet decoder at ``steps`` timesteps on ``batch`` images; the weighted sum does not count."""
        return _count_decoder(self._unet, batch, steps=steps, kind=kind)

    def student(self, batch: int, steps: int, kind: DecoderKind) -> dict[Stage, float]:
        """Each stage of a student's pass."""
        decoder = self.unet_decoder(batch, steps, kind)
        return {
            "text": self.text(batch),
            "unet_encoder": self.unet_encoder(batch),
            "unet_decoder": decoder,
            "vae": self.vae(batch),
        }

    def vae(self, batch: int) -> float:
        """The autoencoder's decoder on ``batch`` images."""
        return batch * _count_vae(self._vae_config, self._latent, tiny=self._tiny)

    @property
    def _unet(self) -> _UNetShape:
        return _UNetShape(self._unet_config, self._latent, self._tokens)


@dataclass(frozen=True)
class _UNetShape:
    config: str
    latent: tuple[int, int]
    tokens: int


def _plain_config(config: Mapping[str, Any]) -> str:
    fields = {key: value for key, value in dict(config).items() if not key.startswith("_")}
    return json.dumps(fields, sort_keys=True, default=str)


@functools.lru_cache(maxsize=256)
def _count_text(config: str, tokens: int) -> float:
    with torch.device("meta"):
        module = CLIPTextModel(CLIPTextConfig(**json.loads(config))).eval()
        return _count(lambda: module(torch.zeros(1, tokens, dtype=torch.int64)))


@functools.lru_cache(maxsize=256)
def _count_vae(config: str, latent: tuple[int, int], *, tiny: bool) -> float:
    class_: Any = AutoencoderTiny if tiny else AutoencoderKL
    with quiet(), torch.device("meta"):
        decoder = ImageDecoder(class_.from_config(json.loads(config)).eval())
        return _count(lambda: decoder.decode_float(torch.zeros(1, decoder.latent_channels, *latent)))


@functools.lru_cache(maxsize=256)
def _count_unet(shape: _UNetShape, rows: int, *, merged: bool) -> float:
    unet: Any = _meta_unet(shape.config)
    if merged:
        unet = with_same_weights(unet)
        merge_upsamplers(unet)
    noise, text_states = _inputs(unet, shape, rows)
    with torch.device("meta"):
        return _count(lambda: unet(noise, torch.tensor(1), encoder_hidden_states=text_states))


@functools.lru_cache(maxsize=256)
def _count_encoder(shape: _UNetShape, batch: int) -> float:
    unet = _meta_unet(shape.config)
    with torch.device("meta"):
        return _count(lambda: UNetEncoder(unet)(*_inputs(unet, shape, batch), torch.tensor(1)))


@functools.lru_cache(maxsize=256)
def _count_decoder(shape: _UNetShape, batch: int, *, steps: int, kind: DecoderKind) -> float:
    unet = _meta_unet(shape.config)
    decoder: nn.Module = UNetDecoder(unet)
    if kind != "plain":
        decoder = SharedUNetDecoder(unet, merged_upsampler=kind == "merged")
    with torch.device("meta"), torch.no_grad():
        noise, text_states = _inputs(unet, shape, batch)
        features = UNetEncoder(unet)(noise, text_states, torch.tensor(1))
        return _count(lambda: decoder(features, torch.ones(steps, dtype=torch.int64), text_states))


@functools.lru_cache(maxsize=4)
def _meta_unet(config: str) -> UNet2DConditionModel:
    with quiet(), torch.device("meta"):
        unet: UNet2DConditionModel = UNet2DConditionModel.from_config(json.loads(config)).eval()
    return unet


def _inputs(unet: UNet2DConditionModel, shape: _UNetShape, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    config: Any = unet.config
    width = config.cross_attention_dim
    with torch.device("meta"):
        return (
            torch.zeros(batch, config.in_channels, *shape.latent),
            torch.zeros(batch, shape.tokens, width if isinstance(width, int) else width[0]),
        )


def _count(run: Any) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())
