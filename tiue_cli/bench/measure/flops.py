"""FLOPs of every stage as torch counts them (a multiplication with its addition is two), on the meta device.

Nothing is computed: modules are built from their configs without memory, and ``FlopCounterMode`` adds up convolutions,
matrix products and attentions by their shapes. Norms, activations and additions do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from tiue_cli.bench.report.schema import Stage
from tiue_cli.model.autoencoder import ImageDecoder
from tiue_cli.model.components import Components, quiet
from tiue_cli.model.shared import SharedUNetDecoder, merge_upsamplers, with_same_weights
from tiue_cli.model.unet import UNetDecoder, UNetEncoder

DecoderKind = Literal["shared", "plain", "merged"]


class StageFlops:
    """Counts for one model at one latent size (h, w); each different count is made once."""

    def __init__(self, components: Components, latent: tuple[int, int]) -> None:
        def empty(module: Any) -> Any:
            return type(module).from_config(module.config)

        with quiet(), torch.device("meta"):
            text_encoder: Any = type(components.text_encoder)
            self._text_encoder = text_encoder(components.text_encoder.config).eval()
            self._unet = empty(components.unet).eval()
            self._images = ImageDecoder(empty(components.vae).eval())
        self._tokens, self._latent = components.info.text_tokens, latent
        self._counts: dict[Hashable, float] = {}

    def text(self, rows: int) -> float:
        """The text encoder on ``rows`` prompts."""
        ids = torch.zeros(1, self._tokens, dtype=torch.int64, device="meta")
        return rows * self._count("text", lambda: partial(self._text_encoder, ids))

    def vae(self, batch: int) -> float:
        """The autoencoder's decoder on ``batch`` images."""
        latents = torch.zeros(1, self._images.latent_channels, *self._latent, device="meta")
        return batch * self._count("vae", lambda: partial(self._images.decode_float, latents))

    def unet(self, rows: int, *, merged_upsampler: bool = False) -> float:
        """One whole UNet pass on ``rows`` rows."""

        def prepare() -> Callable[[], object]:
            unet = with_same_weights(self._unet)
            if merged_upsampler:
                merge_upsamplers(unet)
            noise, text_states = self._inputs(1)
            return partial(unet, noise, _timesteps(1), encoder_hidden_states=text_states)

        return rows * self._count(("unet", merged_upsampler), prepare)

    def unet_encoder(self, batch: int) -> float:
        """The UNet encoder on ``batch`` images."""
        encoder = UNetEncoder(self._unet)
        return self._count(("encoder", batch), lambda: partial(encoder, *self._inputs(batch), _timesteps(1)[0]))

    def unet_decoder(self, batch: int, steps: int, kind: DecoderKind) -> float:
        """The UNet decoder at ``steps`` timesteps on ``batch`` images; the weighted sum does not count."""

        def prepare() -> Callable[[], object]:
            decoder: Any = UNetDecoder(self._unet)
            if kind != "plain":
                decoder = SharedUNetDecoder(self._unet, merged_upsampler=kind == "merged")
            noise, text_states = self._inputs(batch)
            features = UNetEncoder(self._unet)(noise, text_states, _timesteps(1)[0])
            return partial(decoder, features, _timesteps(steps), text_states)

        return self._count(("decoder", batch, steps, kind), prepare)

    def whole_unet(
        self, batch: int, *, steps: int = 1, guided: bool = False, merged: bool = False
    ) -> dict[Stage, float]:
        """Each stage of a run of ``steps`` whole UNet passes; guidance doubles the rows of text encoder and UNet."""
        rows = 2 * batch if guided else batch
        unet = steps * self.unet(rows, merged_upsampler=merged)
        return {"text": self.text(rows), "unet": unet, "vae": self.vae(batch)}

    def student(self, batch: int, steps: int, kind: DecoderKind) -> dict[Stage, float]:
        """Each stage of a student's pass."""
        encoder, decoder = self.unet_encoder(batch), self.unet_decoder(batch, steps, kind)
        return {"text": self.text(batch), "unet_encoder": encoder, "unet_decoder": decoder, "vae": self.vae(batch)}

    def _inputs(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise and text states."""
        width = self._unet.config.cross_attention_dim
        width = width if isinstance(width, int) else width[0]
        with torch.device("meta"):
            noise = torch.zeros(rows, self._unet.config.in_channels, *self._latent)
            return noise, torch.zeros(rows, self._tokens, width)

    def _count(self, key: Hashable, prepare: Callable[[], Callable[[], object]]) -> float:
        """Operations of the call that ``prepare`` makes, which is made once."""
        if key not in self._counts:
            with torch.no_grad(), torch.device("meta"):
                run = prepare()
                with FlopCounterMode(display=False) as counter:
                    run()
            self._counts[key] = float(counter.get_total_flops())
        return self._counts[key]


def _timesteps(count: int) -> torch.Tensor:
    return torch.ones(count, dtype=torch.int64, device="meta")
