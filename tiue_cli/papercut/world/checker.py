"""The attribute checker: reads groups, objects, colours, sizes, patterns, counts and background off a papercut image.

Convolutions make 8 × 8 cells of the image; two layers of attention let four further tokens read them, one for the scene
and one for each of three groups in reading order. Those four tokens, side by side, also serve as the embedding of
Fréchet distance, precision and recall on papercut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from tiue_cli.papercut.world.captions import BACKGROUNDS, COLORS, COUNTS, OBJECTS, PATTERNS, SIZES, SceneSpec
from tiue_cli.papercut.world.scenes import SIZE

WEIGHTS = Path(__file__).parents[1] / "model" / "checker.safetensors"
AXES = ("horizontal", "vertical")
PRINTS = (None, *PATTERNS)
SLOTS = 3
# Classes of the scene, and of each group. Groups are in reading order: slot 0 is the left or upper one.
SCENE = {"background": len(BACKGROUNDS), "groups": SLOTS, "axis": len(AXES)}
GROUP = {
    "object": len(OBJECTS),
    "color": len(COLORS),
    "count": len(COUNTS),
    "pattern": len(PRINTS),
    "size": len(SIZES),
}
HEADS = SCENE | {f"{name}_{slot}": classes for slot in range(SLOTS) for name, classes in GROUP.items()}
CELLS = 8
"""The image is read in CELLS × CELLS cells."""
# What a cell that holds a thing's middle tells in training; the last object class: no middle here.
CELL = {"object": len(OBJECTS) + 1, "color": len(COLORS), "pattern": len(PRINTS), "slot": SLOTS}
WIDTH = 96
FEATURES = (1 + SLOTS) * WIDTH
IGNORE = -1  # target where there is nothing to read, or where the caption leaves it open


class Checker(nn.Module):
    """(N, 3, 128, 128) in [-1, 1] → logits by head, each (N, classes)."""

    def __init__(self) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, *, size: int = 3, stride: int = 1) -> nn.Sequential:
            convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))

        self.trunk = nn.Sequential(
            block(3, 24, size=5, stride=2),
            block(24, 48, stride=2),
            block(48, 80, stride=2),
            block(80, 80),
            block(80, 96, stride=2),
            block(96, WIDTH),
        )
        self.places = nn.Parameter(0.02 * torch.randn(1, CELLS**2, WIDTH))
        self.readers = nn.Parameter(0.5 * torch.randn(1, 1 + SLOTS, WIDTH))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.scene = nn.ModuleDict({name: nn.Linear(WIDTH, classes) for name, classes in SCENE.items()})
        self.group = nn.ModuleDict({name: nn.Linear(WIDTH, classes) for name, classes in GROUP.items()})
        self.cell = nn.ModuleDict({name: nn.Linear(WIDTH, classes) for name, classes in CELL.items()})

    def tokens(self, images: Tensor) -> Tensor:
        """(N, 4 + 64, 96): the readers of the scene and of the groups, then the cells row by row."""
        cells = self.trunk(images).flatten(2).transpose(1, 2) + self.places
        states = torch.cat([self.readers.expand(len(images), -1, -1), cells], 1)
        for layer in self.layers:
            states = layer(states)
        result: Tensor = self.norm(states)
        return result

    def features(self, images: Tensor) -> Tensor:
        """Features (N, 384) of images (N, 3, 128, 128) in [-1, 1]."""
        return self.tokens(images)[:, : 1 + SLOTS].flatten(1)

    def read_features(self, features: Tensor) -> dict[str, Tensor]:
        """Logits by head, each (N, classes), of features (N, 384)."""
        scene, *groups = features.unflatten(1, (1 + SLOTS, WIDTH)).unbind(1)
        logits = {name: self.scene[name](scene) for name in SCENE}
        return logits | {
            f"{name}_{slot}": self.group[name](group) for slot, group in enumerate(groups) for name in GROUP
        }

    def read_cells(self, tokens: Tensor) -> dict[str, Tensor]:
        """Logits of CELL, each (N, 64, classes), of `tokens`; a training's help, no reading uses them."""
        return {name: head(tokens[:, 1 + SLOTS :]) for name, head in self.cell.items()}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.read_features(self.features(images))


def load_checker(path: Path = WEIGHTS) -> Checker:
    checker = Checker()
    checker.load_state_dict({key: value.float() for key, value in load_file(path).items()}, strict=False)
    return checker.eval()


def targets(specs: Sequence[SceneSpec]) -> dict[str, Tensor]:
    """Class indices by head, each (N,) int64; IGNORE: no such group, or left open."""
    backgrounds = tuple(BACKGROUNDS)
    rows: dict[str, list[int]] = {name: [] for name in HEADS}
    for spec in specs:
        rows["background"].append(IGNORE if spec.background is None else backgrounds.index(spec.background))
        rows["groups"].append(len(spec.groups) - 1)
        rows["axis"].append(IGNORE if spec.axis is None else AXES.index(spec.axis))
        for slot in range(SLOTS):
            group = spec.slots[slot] if slot < len(spec.slots) else None
            rows[f"object_{slot}"].append(IGNORE if group is None else OBJECTS.index(group.object))
            color = None if group is None else group.color
            rows[f"color_{slot}"].append(IGNORE if color is None else COLORS.index(color))
            rows[f"count_{slot}"].append(IGNORE if group is None else group.count - 1)
            rows[f"pattern_{slot}"].append(IGNORE if group is None else PRINTS.index(group.pattern))
            size = None if group is None else group.size
            rows[f"size_{slot}"].append(IGNORE if size is None else SIZES.index(size))
    return {name: torch.tensor(row) for name, row in rows.items()}


def to_input(images: NDArray[np.uint8]) -> Tensor:
    """(N, H, W, 3) uint8 → (N, 3, 128, 128) float32 in [-1, 1]; other sizes are resized (bilinear, anti-aliased)."""
    pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    if pixels.shape[-2:] != (SIZE, SIZE):
        pixels = nn.functional.interpolate(pixels, (SIZE, SIZE), mode="bilinear", antialias=True)
    return pixels


@torch.inference_mode()
def read(checker: Checker, images: NDArray[np.uint8], *, batch: int = 128) -> dict[str, NDArray[np.int64]]:
    """The checker's class index by head, each (N,), for images (N, H, W, 3) uint8."""
    parts: dict[str, list[NDArray[np.int64]]] = {name: [] for name in HEADS}
    for start in range(0, len(images), batch):
        for name, logits in checker(to_input(images[start : start + batch])).items():
            parts[name].append(logits.argmax(-1).numpy())
    return {name: np.concatenate(part) if part else np.zeros(0, np.int64) for name, part in parts.items()}


@torch.inference_mode()
def embed(checker: Checker, images: NDArray[np.uint8], *, batch: int = 128) -> NDArray[np.float32]:
    """Features (N, 384) of images (N, H, W, 3) uint8, for distances between sets of images."""
    parts = [checker.features(to_input(images[i : i + batch])).numpy() for i in range(0, len(images), batch)]
    return np.concatenate(parts)


def judge(found: Mapping[str, NDArray[np.int64]], specs: Sequence[SceneSpec]) -> dict[str, NDArray[np.bool_]]:
    """Per image (N,): is each attribute as the caption says?

    `count` (of groups, and of each group's things); `background`; `objects`, `colors`, `patterns`, `sizes` (each in its
    place); `relation` (the axis, and the two groups not swapped); `all` of them. What is left open is right. Where the
    caption does not order its two groups, the order that agrees better is taken.
    """
    wanted = {name: value.numpy() for name, value in targets(specs).items()}
    pair = np.array([len(spec.groups) == 2 for spec in specs])
    ordered = np.array([spec.ordered for spec in specs])
    attributes = {"objects": "object", "colors": "color", "patterns": "pattern", "sizes": "size", "counts": "count"}

    def right(attribute: str, order: tuple[int, ...]) -> NDArray[np.bool_]:
        """(N, SLOTS): slot by slot, against the groups found in the given order."""
        columns = []
        for slot, place in enumerate(order):
            asked = wanted[f"{attribute}_{slot}"]
            columns.append((asked == IGNORE) | (asked == found[f"{attribute}_{place}"]))
        return np.stack(columns, 1)

    straight = {name: right(attribute, (0, 1, 2)) for name, attribute in attributes.items()}
    swapped = {name: right(attribute, (1, 0, 2)) for name, attribute in attributes.items()}
    score, other = (
        np.sum([side[name].sum(1) for name in ("objects", "colors", "counts")], axis=0) for side in (straight, swapped)
    )
    turned = pair & ~ordered & (other > score)
    verdict = {name: np.where(turned, swapped[name].all(1), straight[name].all(1)) for name in attributes}
    groups = wanted["groups"] == found["groups"]
    axis = (wanted["axis"] == IGNORE) | (wanted["axis"] == found["axis"])
    relation = axis & groups & ~(pair & ordered & (other > score))
    background = (wanted["background"] == IGNORE) | (wanted["background"] == found["background"])
    count = verdict.pop("counts") & groups
    result = {"count": count, "background": background, "relation": relation}
    result |= {name: value & groups for name, value in verdict.items()}
    return result | {"all": np.logical_and.reduce(list(result.values()))}
