"""The attribute checker: reads objects, colours, relation and background off an image of the papercut world.

A small convolutional network with one head per attribute. Its penultimate features also serve as the embedding of
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

from tiue_cli.papercut.captions import BACKGROUNDS, COLORS, OBJECTS, SceneSpec
from tiue_cli.papercut.scenes import SIZE

WEIGHTS = Path(__file__).parent / "model" / "checker.safetensors"
AXES = (None, "horizontal", "vertical")
# Head sizes. Slot 0 is the left or upper thing (or the only one), slot 1 the right or lower one.
HEADS = {
    "background": len(BACKGROUNDS),
    "axis": len(AXES),
    "object_0": len(OBJECTS),
    "color_0": len(COLORS),
    "object_1": len(OBJECTS),
    "color_1": len(COLORS),
}
FEATURES = 192
IGNORE = -1  # target of slot 1 in a scene with one thing


class Checker(nn.Module):
    """(N, 3, 64, 64) in [-1, 1] → logits by head, each (N, classes)."""

    def __init__(self) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, *, size: int = 3, stride: int = 1) -> nn.Sequential:
            convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))

        self.trunk = nn.Sequential(
            block(3, 32, size=5, stride=2),
            block(32, 64, stride=2),
            block(64, 64),
            block(64, 96, stride=2),
            block(96, 96),
            nn.Conv2d(96, 24, 1),
            nn.Flatten(),
            nn.Linear(24 * (SIZE // 8) ** 2, FEATURES),
            nn.ReLU(inplace=True),
        )
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, classes) for name, classes in HEADS.items()})

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features (N, 192) of images (N, 3, 64, 64) in [-1, 1]."""
        result: Tensor = self.trunk(images)
        return result

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.features(images)
        return {name: head(features) for name, head in self.heads.items()}


def load_checker(path: Path = WEIGHTS) -> Checker:
    checker = Checker()
    checker.load_state_dict({key: value.float() for key, value in load_file(path).items()}, strict=False)
    return checker.eval()


def targets(specs: Sequence[SceneSpec]) -> dict[str, Tensor]:
    """Class indices by head, each (N,) int64; IGNORE: no second thing, or the background is left open."""
    backgrounds = tuple(BACKGROUNDS)
    rows: dict[str, list[int]] = {name: [] for name in HEADS}
    for spec in specs:
        rows["background"].append(IGNORE if spec.background is None else backgrounds.index(spec.background))
        rows["axis"].append(AXES.index(spec.axis))
        for slot in range(2):
            thing = spec.slots[slot] if slot < len(spec.slots) else None
            rows[f"object_{slot}"].append(IGNORE if thing is None else OBJECTS.index(thing.object))
            rows[f"color_{slot}"].append(IGNORE if thing is None else COLORS.index(thing.color))
    return {name: torch.tensor(row) for name, row in rows.items()}


def to_input(images: NDArray[np.uint8]) -> Tensor:
    """(N, H, W, 3) uint8 → (N, 3, 64, 64) float32 in [-1, 1]; other sizes are resized (bilinear, anti-aliased)."""
    pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    if pixels.shape[-2:] != (SIZE, SIZE):
        pixels = nn.functional.interpolate(pixels, (SIZE, SIZE), mode="bilinear", antialias=True)
    return pixels


@torch.inference_mode()
def read(checker: Checker, images: NDArray[np.uint8], *, batch: int = 256) -> dict[str, NDArray[np.int64]]:
    """The checker's class index by head, each (N,), for images (N, H, W, 3) uint8."""
    parts: dict[str, list[NDArray[np.int64]]] = {name: [] for name in HEADS}
    for start in range(0, len(images), batch):
        for name, logits in checker(to_input(images[start : start + batch])).items():
            parts[name].append(logits.argmax(-1).numpy())
    return {name: np.concatenate(part) if part else np.zeros(0, np.int64) for name, part in parts.items()}


@torch.inference_mode()
def embed(checker: Checker, images: NDArray[np.uint8], *, batch: int = 256) -> NDArray[np.float32]:
    """Features (N, 192) of images (N, H, W, 3) uint8, for distances between sets of images."""
    parts = [checker.features(to_input(images[i : i + batch])).numpy() for i in range(0, len(images), batch)]
    return np.concatenate(parts)


def judge(found: Mapping[str, NDArray[np.int64]], specs: Sequence[SceneSpec]) -> dict[str, NDArray[np.bool_]]:
    """Per image (N,): is each attribute as the caption says?

    `count`; `background` (true where left open); `objects` and `colors` (in their places); `relation` (the axis, and
    not the two things swapped); `all` of them.
    """
    wanted = {name: value.numpy() for name, value in targets(specs).items()}
    pair = np.array([spec.relation is not None for spec in specs])

    def right(name: str) -> NDArray[np.bool_]:
        result: NDArray[np.bool_] = (wanted[name] == IGNORE) | (wanted[name] == found[name])
        return result

    objects, colors = right("object_0") & right("object_1"), right("color_0") & right("color_1")
    things_found = [(found["object_0"], found["color_0"]), (found["object_1"], found["color_1"])]
    things_wanted = [(wanted["object_0"], wanted["color_0"]), (wanted["object_1"], wanted["color_1"])]

    def agreement(order: tuple[int, int]) -> NDArray[np.int64]:
        parts = [a == b for i, j in enumerate(order) for a, b in zip(things_found[j], things_wanted[i], strict=True)]
        result: NDArray[np.int64] = np.sum(parts, axis=0)
        return result

    axis = wanted["axis"] == found["axis"]
    relation = ~pair | (axis & (agreement((0, 1)) >= agreement((1, 0))))
    count = pair == (found["axis"] != AXES.index(None))
    background = right("background")
    return {
        "count": count,
        "background": background,
        "objects": objects & count,
        "colors": colors & count,
        "relation": relation,
        "all": count & background & objects & colors & relation & axis,
    }
