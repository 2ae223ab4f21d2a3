"""What is asked of a loaded model from Python, and the pictures that come of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Literal, TypeVar, get_args

from tiue_cli.errors import OutputError, UsageError
from tiue_cli.files.atomic import atomic_file
from tiue_cli.files.png import ImageRecord, save_png

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

Output = Literal["pil", "numpy", "latents"]
"""What a picture comes as: a PIL image, (H, W, 3) uint8, or latents (C, h, w) float32 in the scale of the UNet."""

_Image = TypeVar("_Image", covariant=True)


@dataclass(frozen=True)
class Request:
    """One picture to draw, for `Pipeline.draw`.

    ``seed`` is 0 to 2**63 - 1 and decides the noise alone. ``size`` is (height, width) in pixels and ``steps`` the
    decoder timesteps K of a student, or the sampler steps of a teacher; None takes the model's own. ``loras`` are the
    adapters of this picture, ``SOURCE[:WEIGHT]`` each; None takes those on the pipeline, () none.

    >>> tiue.Request("a red heart", seed=3, size=(48, 64))
    Request(prompt='a red heart', seed=3, size=(48, 64), steps=None, loras=None)
    """

    prompt: str
    seed: int
    size: tuple[int, int] | None = None
    steps: int | None = None
    loras: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Picture(Generic[_Image]):
    """A picture and what it is of.

    ``image`` is what ``output`` asked for (see `Output`). ``cut_text`` is the end of the prompt that was too long for
    the text encoder, "" where it read the whole. ``record`` is what a PNG of it says about itself.
    """

    image: _Image
    record: ImageRecord
    cut_text: str = ""

    @property
    def prompt(self) -> str:
        """The prompt, without the blanks around it."""
        return self.record.prompt

    @property
    def seed(self) -> int:
        """The seed of its noise."""
        return self.record.seed

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.record.size

    def save(self, path: Path | str, *, metadata: bool = True) -> Path:
        """Write the PNG that ``tiue generate`` writes, record included unless ``metadata`` is False; returns its path.

        A file that is there is replaced. Raises UsageError for latents, OutputError.

        >>> with tiue.load("papercut") as pipe:
        ...     picture = next(pipe.stream(["a blue house"], seed=7))
        >>> picture.save("house.png").name
        'house.png'
        """
        import numpy as np

        path = Path(path)
        pixels = np.asarray(self.image)
        if pixels.dtype != np.uint8:
            raise UsageError("latents are not a picture", hint='draw it with output="pil"')
        if path.suffix.lower() != ".png":
            raise OutputError(f"{path}: images are written as PNG", hint=f"give {path.with_suffix('.png')}")
        with atomic_file(path) as temporary:
            save_png(temporary, pixels, self.record if metadata else None)
        return path


def checked_output(output: str) -> Output:
    """``output`` where it is one. Raises UsageError."""
    known: tuple[Output, ...] = get_args(Output)
    for name in known:
        if output == name:
            return name
    raise UsageError(f"unknown output {output!r}", hint=f"choose among {', '.join(known)}")


def pil_image(pixels: np.ndarray) -> Image:
    """(H, W, 3) uint8 as PIL has it."""
    from PIL import Image

    return Image.fromarray(pixels)
