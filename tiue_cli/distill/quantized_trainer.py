"""One optimiser step of quantisation-aware distillation: a student in rounded arithmetic learns its own float pass.

noise, text states ─▶ the student as it was, in fp32 ─▶ predictions, latents
                   └▶ the student, rounded ───────────▶ predictions, latents ─▶ squared errors
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from tiue_cli.distill.checkpoint import Checkpoint
from tiue_cli.distill.config import DistillConfig
from tiue_cli.distill.data.order import Stream, generator, normal
from tiue_cli.distill.data.text_states import TextStates
from tiue_cli.distill.fake_quantization import FakeQuantization, LayerRange, RangeRecorder, recomputing
from tiue_cli.distill.losses import regression_loss
from tiue_cli.distill.networks import StudentGenerator
from tiue_cli.distill.student_trainer import StudentNetworks, StudentTrainer
from tiue_cli.model.quantization import CALIBRATION_BATCH, LayerError, sensitive
from tiue_cli.model.unet import UNetFeatures


@dataclass(frozen=True)
class QuantizedNetworks(StudentNetworks):
    """The student, and what it was: the frozen pass in float32 that it is to come back to."""

    original: StudentGenerator


class QuantizedTrainer(StudentTrainer):
    """The state of a quantisation-aware distillation; ``calibrate`` or ``restore`` comes before the first ``step``."""

    def __init__(
        self, config: DistillConfig, networks: QuantizedNetworks, texts: TextStates, *, accelerator: Accelerator
    ) -> None:
        # The export has no merged upsampler: its convolution is rounded as it is.
        super().__init__(config, networks, texts, accelerator=accelerator, merged_upsampler=False)
        self._original = networks.original
        self.ranges: Mapping[str, LayerRange] = {}
        """Of the layers that compute in 8 bits."""
        if config.gradient_checkpointing:
            networks.student.enable_gradient_checkpointing(recomputing(self._rounding))

    def _rounding(self) -> FakeQuantization:
        return FakeQuantization(self._student, self.ranges)

    # --- calibration -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def calibrate(self) -> list[str]:
        """Measure ranges and choose which layers stay in floats, as the export does; returns those found sensitive.

        In float32 and a function of weights, config and prompts alone: all processes find the same.
        """
        images = self.config.quantize.calibration_images
        encoder, decoder = RangeRecorder(self._student), RangeRecorder(self._student)
        first: tuple[Tensor, Tensor, UNetFeatures] | None = None
        for start in range(0, images, CALIBRATION_BATCH):
            noise, states = self._calibration_rows(range(start, min(images, start + CALIBRATION_BATCH)))
            with encoder:
                features = self._encoded(noise, states)
            with decoder:
                self._decoded(features, states)
            if first is None:
                first = noise, states, features
        assert first is not None, "calibration has at least one image"
        noise, states, features = first

        def latents() -> list[Tensor]:
            return [self._combine(noise, self._decoded(features, states))]

        def encoded() -> list[Tensor]:
            mid, skips = self._encoded(noise, states)
            return [mid, *skips]

        kept = [
            *sensitive(list(self._layer_errors(encoder.ranges, encoded))),
            *sensitive(list(self._layer_errors(decoder.ranges, latents))),
        ]
        found = {error.layer for error in kept}
        every = {**encoder.ranges, **decoder.ranges}
        self.ranges = {layer: ranges for layer, ranges in every.items() if layer not in found}
        return sorted(found)

    def _layer_errors(
        self, ranges: Mapping[str, LayerRange], outputs: Callable[[], Sequence[Tensor]]
    ) -> Iterator[LayerError]:
        """What each layer alone in 8 bits costs: the root of the mean square of the outputs' relative errors."""
        expected = [output.double() for output in outputs()]
        for layer, found in ranges.items():
            with FakeQuantization(self._student, {layer: found}):
                rounded = outputs()
            squares = [
                float((one.double() - other).square().sum() / other.square().sum().clamp_min(1e-24))
                for one, other in zip(rounded, expected, strict=True)
            ]
            yield LayerError(layer, (sum(squares) / len(squares)) ** 0.5)

    def _calibration_rows(self, images: range) -> tuple[Tensor, Tensor]:
        """Noise and text states of the calibration's ``images``: prompts from the first on, noise of its own stream."""
        count, device = self.texts.count, self.accelerator.device
        states = self.texts.rows([image % count for image in images])
        noise = [
            normal(generator(self.config.seed, Stream.CALIBRATION, step=image), self._latent_shape) for image in images
        ]
        return torch.stack(noise).to(device).contiguous(memory_format=torch.channels_last), states

    def _encoded(self, noise: Tensor, states: Tensor) -> UNetFeatures:
        features: UNetFeatures = self.generator.unet_encoder(noise, states, self.generator.timesteps[:1])
        return features

    def _decoded(self, features: UNetFeatures, states: Tensor) -> Tensor:
        predictions: Tensor = self.generator.unet_decoder(features, self.generator.timesteps, states)
        return predictions

    # --- one step --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predictions(self, noise: Tensor, states: Tensor) -> Tensor:
        """What the rounded student predicts now, (K, B, C, h, w)."""
        with self._rounding():
            return super().predictions(noise, states)

    @torch.no_grad()
    def original_latents(self, noise: Tensor, states: Tensor) -> Tensor:
        """What the student drew before, in float32: latents (B, C, h, w)."""
        return self._combine(noise, self._in_float32(noise, states))

    def _in_float32(self, noise: Tensor, states: Tensor) -> Tensor:
        with torch.autocast(noise.device.type, enabled=False):
            result: Tensor = self._original(noise.float(), states.float())
        return result

    def _advance(self) -> dict[str, float]:
        assert self.ranges, "a trainer is calibrated or restored before it steps"
        config = self.config
        sums: dict[str, Tensor] = {}
        for micro in range(config.accumulation):
            rows = self._prompt_order.rows(self._position(micro, config.batch_size), config.batch_size)
            states, noise = self.texts.rows(rows), self._normal(Stream.NOISE, micro, len(rows))
            with torch.no_grad():
                wanted = self._in_float32(noise, states)
            with self._accumulating(self._student_ddp, micro), self._rounding():
                predictions = self._student_ddp(noise, states)
                parts = {
                    "latents": regression_loss(self._combine(noise, predictions), self._combine(noise, wanted)),
                    # Each by itself as well: fewer steps than it was trained for are another sum of them.
                    "predictions": regression_loss(predictions, wanted),
                }
                self._backward((parts["latents"] + parts["predictions"]) / config.accumulation)
            self._add(sums, parts)
        rate = config.optimizer.learning_rate * self._rate_factor(
            self.state.step, config.max_steps, config.optimizer.decay
        )
        return {**self._means(sums), **self._update_student(rate)}

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def _other_weights(self) -> dict[str, Mapping[str, Tensor]]:
        return {"ranges": {layer: torch.tensor(found, dtype=torch.float64) for layer, found in self.ranges.items()}}

    def _other_optimizers(self) -> dict[str, Any]:
        return {}

    def _restore_others(self, checkpoint: Checkpoint) -> None:
        self.ranges = {layer: LayerRange(*found.tolist()) for layer, found in checkpoint.weights["ranges"].items()}
