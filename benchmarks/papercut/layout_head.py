"""What stands where in a scene, and a head that reads it off the UNet's features while the teacher is trained.

The renderer knows which object, colour and pattern covers which part of a picture. A teacher that has to say so from
its features, at every level of noise, learns sooner what things look like than one that predicts the noise alone: the
idea of representation alignment (Yu et al. 2024, REPA), with the truth in the place of a large model's features. The
head is dropped when the training ends. The checker has no part in it, so its figures stay independent.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
from common import chunks
from numpy.typing import NDArray
from torch import Tensor, nn

from tiue_cli.papercut.world.captions import COLORS, OBJECTS, PATTERNS, SceneSpec
from tiue_cli.papercut.world.scenes import Composition, compositions, lay_piece
from tiue_cli.papercut.world.shapes import Stock

CHANNELS = len(OBJECTS) + len(COLORS) + len(PATTERNS)
SIDE = 16
"""Cells a side: those of the latents."""
WEIGHT = 0.3
"""What the head's loss counts beside the picture's."""
_FINE = 64  # pixels a side at which coverage is drawn
_WHITE = np.ones(3, np.float32)


def layout_map(composition: Composition) -> NDArray[np.uint8]:
    """(CHANNELS, SIDE, SIDE): by how much each object, colour and pattern covers each cell; 255 is all of it."""
    fine = np.zeros((CHANNELS, _FINE, _FINE), np.float32)
    for group, pieces in zip(composition.scene.slots, composition.groups, strict=True):
        assert group.color is not None
        channels = [OBJECTS.index(group.object), len(OBJECTS) + tuple(COLORS).index(group.color)]
        if group.pattern is not None:
            channels.append(len(OBJECTS) + len(COLORS) + tuple(PATTERNS).index(group.pattern))
        for piece in pieces:
            # White paper on black: shadows stay black, and all that is cut or printed is brighter.
            canvas = np.zeros((3, _FINE, _FINE), np.float32)
            lay_piece(canvas, piece, Stock(_WHITE, None))
            covered = (8 * canvas.max(0)).clip(0, 1)
            fine *= 1 - covered  # what lies behind
            fine[channels] += covered
    step = _FINE // SIDE
    coverage = fine.reshape(CHANNELS, SIDE, step, SIDE, step).mean((2, 4))
    return (255 * coverage + 0.5).astype(np.uint8)


def layout_maps(specs: Sequence[SceneSpec], seed: int) -> Iterator[NDArray[np.uint8]]:
    """Parts of (N, CHANNELS, SIDE, SIDE): the pictures of `scenes(len(specs), seed)`, in their order."""
    _, parts, seeds = zip(*chunks(specs, seed), strict=True)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(_part, parts, seeds)


def _part(specs: list[SceneSpec], seed: int) -> NDArray[np.uint8]:
    return np.stack([layout_map(each) for each in compositions(specs, seed)])


class LayoutHead(nn.Module):
    """A small network on the UNet's features at 8 × 8 cells on the way down.

    There, and not later: a head on the last features before the output cost the picture more than it taught.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(unet.config["block_out_channels"][1], 128), nn.SiLU(), nn.Linear(128, CHANNELS)
        )
        self._features: Tensor | None = None
        unet.down_blocks[1].attentions[0].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: tuple[Tensor]) -> None:
        if self.training:
            self._features = output[0]

    def loss(self, maps: Tensor) -> Tensor:
        """Cross-entropy of the last forward pass with the truth (B, CHANNELS, SIDE, SIDE) in 0..1, weighted."""
        features, self._features = self._features, None
        assert features is not None, "the UNet has not run since"
        truth = nn.functional.adaptive_avg_pool2d(maps, features.shape[-2:]).permute(0, 2, 3, 1)
        said = self.layers(features.permute(0, 2, 3, 1))
        errors = nn.functional.binary_cross_entropy_with_logits(said, truth, reduction="none")
        return WEIGHT * errors.sum(-1).mean()
