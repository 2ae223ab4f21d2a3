"""What a PNG of ours says about itself: which request made it, in two text chunks.

``parameters`` is the line-based text that image viewers and web interfaces read; ``tiue`` is JSON, exact and typed,
from which the image can be made again.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import pydantic
from pydantic import ConfigDict, Field

from tiue_cli.errors import ManifestError, TakenError, TiueError, UsageError
from tiue_cli.files.access import open_file
from tiue_cli.files.atomic import atomic_file

if TYPE_CHECKING:
    import numpy as np

CHUNK = "tiue"
PARAMETERS_CHUNK = "parameters"


class ImageSpec(pydantic.BaseModel):
    """All that decides a picture, up to rounding.

    ``size`` is (height, width) in pixels. ``steps`` counts the decoder timesteps of a student, or the sampler steps of
    a teacher, which alone has ``guidance``. ``model_id`` and ``vae_id`` are fingerprints of the weights; where ``vae``
    is None, the model's own autoencoder decodes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    prompt: str
    seed: int
    size: tuple[int, int]
    kind: Literal["student", "teacher"]
    steps: int
    guidance: float | None = None
    model: str
    model_id: str
    vae: str | None = None
    vae_id: str | None = None

    def differences(self, other: ImageSpec) -> list[str]:
        """Say what makes ``other`` a different picture, e.g. ``["steps 4, not 2"]``; empty where nothing does.

        Names and places of models do not count, their fingerprints do.
        """
        found = []
        for name in ("prompt", "seed", "size", "kind", "steps", "guidance"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                found.append(f"{name} {_shown(mine)}, not {_shown(theirs)}")
        if self.model_id != other.model_id:
            named = self.model != other.model
            found.append(f"model {self.model}, not {other.model}" if named else f"other weights of {self.model}")
        if self.vae_id != other.vae_id:
            found.append(f"autoencoder {self.vae or 'of the model'}, not {other.vae or 'of the model'}")
        return found


class ImageRecord(ImageSpec):
    """What a PNG says: the picture's specification, and what computed it (which moves it by rounding only)."""

    format_version: int = 1
    record: Literal["image"] = "image"
    backend: str
    device: str
    dtype: str
    tiue_version: str

    def parameters(self) -> str:
        """The usual ``parameters`` text: the prompt, then one line of settings; its Size is width x height."""
        height, width = self.size
        fields = {
            "Steps": self.steps,
            "Sampler": "DDIM" if self.kind == "teacher" else "TiUE one pass",
            "CFG scale": self.guidance if self.guidance is not None else 1,
            "Seed": self.seed,
            "Size": f"{width}x{height}",
            "Model hash": self.model_id[:10],
            "Model": self.model,
            "Version": f"tiue {self.tiue_version}",
        }
        return f"{self.prompt}\n" + ", ".join(f"{name}: {_quoted(value)}" for name, value in fields.items())

    def command(self) -> str:
        """The command that makes this image again, quoted for a POSIX shell."""
        height, width = self.size
        words = ["tiue", "generate", "--model", self.model, "--seed", str(self.seed), "--size", f"{height}x{width}"]
        if self.kind == "teacher":
            words += ["--teacher-steps", str(self.steps), "--guidance", str(self.guidance)]
        else:
            words += ["--steps", str(self.steps)]
        if self.vae is not None:
            words += ["--vae", self.vae]
        words += ["--backend", self.backend, "--device", self.device, "--dtype", self.dtype]
        # Without the two dashes a prompt that begins with one would be read as an option.
        words += ["--", self.prompt] if self.prompt.startswith("-") else [self.prompt]
        return shlex.join(words)


class GridRecord(pydantic.BaseModel):
    """What a contact sheet says: the pictures on it, row by row."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = 1
    record: Literal["grid"] = "grid"
    columns: int = Field(ge=1)
    images: tuple[ImageSpec, ...] = Field(min_length=1)
    tiue_version: str

    def differences(self, specs: Sequence[ImageSpec]) -> list[str]:
        """Say what makes the sheet of ``specs`` another one; empty where nothing does."""
        if len(self.images) != len(specs):
            return [f"{len(self.images)} images, not {len(specs)}"]
        pairs = enumerate(zip(self.images, specs, strict=True), 1)
        return [f"image {number}: {found}" for number, (mine, spec) in pairs for found in mine.differences(spec)]

    def parameters(self) -> str:
        """One line an image: seed and prompt."""
        return "\n".join(f"{image.seed}: {image.prompt}" for image in self.images)


Record = ImageRecord | GridRecord
_RECORD: pydantic.TypeAdapter[Record] = pydantic.TypeAdapter(Annotated[Record, Field(discriminator="record")])


def save_png(path: Path, image: np.ndarray, record: Record | None) -> None:
    """Write ``image`` (H, W, 3) uint8 to ``path``, with the record's two text chunks unless it is None."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = None
    if record is not None:
        info = PngInfo()
        # Pillow turns this into an international text chunk where the prompt is not Latin-1.
        info.add_text(PARAMETERS_CHUNK, record.parameters())
        # pydantic's JSON is UTF-8; the JSON chunk too becomes international where that is needed.
        info.add_text(CHUNK, record.model_dump_json())
    Image.fromarray(image).save(path, format="PNG", pnginfo=info)


def write_picture(path: Path, image: np.ndarray, record: Record | None, *, replace: bool) -> None:
    """``save_png``, whole or not at all; without ``replace`` never over a file that appeared there meanwhile.

    A picture that another run made of the same request is as good as this one. Raises OutputError, TakenError.
    """
    try:
        with atomic_file(path, replace=replace) as temporary:
            save_png(temporary, image, record)
    except TakenError:
        if record is None or not _holds(path, record):
            raise


def _holds(path: Path, record: Record) -> bool:
    try:
        return read_record(path) == record
    except TiueError:  # whatever it is, it is not this picture
        return False


def read_text_chunks(path: Path, *, whole: bool = True) -> dict[str, str]:
    """The text chunks of a PNG by keyword. Raises UsageError where ``path`` is no readable PNG.

    ``whole`` False stops at the pixels, before which our own chunks lie: no decoding.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with open_file(path, error=UsageError) as file, Image.open(file, formats=["PNG"]) as image:
            if whole:
                image.load()
            return {str(name): text for name, text in image.info.items() if isinstance(text, str)}
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist", hint="check the path") from None
    except UnidentifiedImageError:
        raise UsageError(f"{path} is not a PNG", hint="give an image that tiue generate wrote") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path} cannot be read: {error}", hint="the file may be damaged; make it again") from error


def read_record(path: Path) -> Record | None:
    """The record in a PNG, or None where it carries none. Raises UsageError, or ManifestError for a damaged record."""
    text = read_text_chunks(path, whole=False).get(CHUNK)
    if text is None:
        return None
    try:
        return _RECORD.validate_json(text)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "record"
        raise ManifestError(
            f"{path}: its tiue record cannot be read ({place}: {first['msg']})",
            hint="it was written by another version of tiue, or edited",
        ) from None


def read_pixels(path: Path) -> np.ndarray:
    """The pixels of a PNG as (H, W, 3) uint8. Raises UsageError."""
    import numpy as np
    from PIL import Image

    try:
        with open_file(path, error=UsageError) as file, Image.open(file, formats=["PNG"]) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}", hint="the file may be damaged; make it again") from error


def _quoted(value: object) -> str:
    """A value of the settings line; one that would break the line apart goes in JSON quotes, as its readers expect."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return "x".join(str(part) for part in value)
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else value[:39] + "…")
    return str(value)
