"""What a PNG of ours says about itself: which request made it, in two text chunks.

``parameters`` is the line-based text that image viewers and web interfaces read; ``tiue`` is JSON, exact and typed,
from which the image can be made again.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Final, Literal

import pydantic
from pydantic import ConfigDict, Field

from tiue_cli.base.text import excerpt
from tiue_cli.errors import ManifestError, TakenError, TiueError, UsageError
from tiue_cli.files.access import open_file
from tiue_cli.files.atomic import atomic_file
from tiue_cli.files.marking import XMP_KEYWORD, XMP_PACKET
from tiue_cli.files.structured import parse_json

if TYPE_CHECKING:
    import numpy as np
    from PIL.PngImagePlugin import PngInfo

CHUNK = "tiue"
PARAMETERS_CHUNK = "parameters"
_QUALITY: Final = 95
"""Of JPEG and WebP where none is asked for."""


class LoraUse(pydantic.BaseModel):
    """An adapter that takes part in a picture: what was named, how strongly, and the SHA-256 of its file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    weight: float = Field(allow_inf_nan=False)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")

    @property
    def name(self) -> str:
        """What it is called: its file's or folder's name, without the ending."""
        return Path(self.source).name.removesuffix(".safetensors")

    @property
    def option(self) -> str:
        """As ``--lora`` takes it."""
        return self.source if self.weight == 1.0 else f"{self.source}:{self.weight!r}"


def same_effect(loras: Sequence[LoraUse], others: Sequence[LoraUse]) -> bool:
    """Whether both change a model alike: the same files with the same weights, wherever they lie."""
    return [(use.sha256, use.weight) for use in loras] == [(use.sha256, use.weight) for use in others]


class ImageSpec(pydantic.BaseModel):
    """All that decides a picture, up to rounding.

    ``size`` is (height, width) in pixels. ``steps`` counts the decoder timesteps of a student, or the sampler steps of
    a teacher, which alone has ``guidance``. ``model_id`` and ``vae_id`` are fingerprints of the weights; where ``vae``
    is None, the model's own autoencoder decodes. ``loras`` are the adapters on the model.
    ``long_prompts`` says whether what the text encoder does not take at once is cut or read in several sequences.
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
    # Left out where there are none: records without adapters are as they always were.
    loras: tuple[LoraUse, ...] = Field(default=(), exclude_if=lambda loras: not loras)
    # Likewise where a student's UNet encoder runs as trained; else the timestep that it was moved to.
    encoder_timestep: int | None = Field(default=None, exclude_if=lambda timestep: timestep is None)
    long_prompts: Literal["cut", "chunk"] = Field(default="cut", exclude_if=lambda way: way == "cut")

    def differences(self, other: ImageSpec) -> list[str]:
        """Say what makes ``other`` a different picture, e.g. ``["steps 4, not 2"]``; empty where nothing does.

        Names and places of models do not count, their fingerprints do.
        """
        found = []
        for name in ("prompt", "seed", "size", "kind", "steps", "guidance", "encoder_timestep", "long_prompts"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                found.append(f"{name} {_shown(mine)}, not {_shown(theirs)}")
        if self.model_id != other.model_id:
            named = self.model != other.model
            found.append(f"model {self.model}, not {other.model}" if named else f"other weights of {self.model}")
        if self.vae_id != other.vae_id:
            found.append(f"autoencoder {self.vae or 'of the model'}, not {other.vae or 'of the model'}")
        if not same_effect(self.loras, other.loras):
            found.append(f"LoRA {_listed(self.loras)}, not {_listed(other.loras)}")
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
        if self.loras:
            fields["Lora hashes"] = ", ".join(f"{use.name}: {use.sha256[:12]}" for use in self.loras)
            fields["Lora weights"] = ", ".join(f"{use.name}: {use.weight:g}" for use in self.loras)
        return f"{self.prompt}\n" + ", ".join(f"{name}: {_quoted(value)}" for name, value in fields.items())

    def command(self) -> str:
        """The command that makes this image again, quoted for a POSIX shell."""
        height, width = self.size
        words = ["tiue", "generate", "--model", self.model, "--seed", str(self.seed), "--size", f"{height}x{width}"]
        if self.kind == "teacher":
            words += ["--teacher-steps", str(self.steps), "--guidance", str(self.guidance)]
        else:
            words += ["--steps", str(self.steps)]
        if self.encoder_timestep is not None:
            words += ["--encoder-timestep", "first"]
        if self.vae is not None:
            words += ["--vae", self.vae]
        for use in self.loras:
            words += ["--lora", use.option]
        if self.long_prompts != "cut":
            words += ["--long-prompts", self.long_prompts]
        words += ["--backend", self.backend, "--device", self.device, "--precision", self.dtype]
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
    encode_picture(path, image, record)


def encode_picture(
    target: Path | IO[bytes],
    image: np.ndarray,
    record: Record | None,
    *,
    image_format: Literal["png", "jpeg", "webp"] = "png",
    quality: int | None = None,
) -> None:
    """Encode ``image`` (H, W, 3) uint8 into ``target``, marked as machine-made, with the record unless it is None.

    A PNG carries the record in two text chunks, JPEG and WebP carry ``parameters`` as their EXIF comment, which is
    where image viewers look for it there. ``quality`` is 0 to 100; None takes 95. PNG has none.
    """
    from PIL import Image

    picture = Image.fromarray(image)
    if image_format == "png":
        picture.save(target, format="PNG", pnginfo=_png_chunks(record))
        return
    extra = {} if record is None else {"exif": _exif_comment(record.parameters())}
    quality = _QUALITY if quality is None else quality
    picture.save(target, format=image_format.upper(), quality=quality, xmp=XMP_PACKET.encode(), **extra)


def _png_chunks(record: Record | None) -> PngInfo:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt(XMP_KEYWORD, XMP_PACKET)
    if record is not None:
        # Pillow turns this into an international text chunk where the prompt is not Latin-1.
        info.add_text(PARAMETERS_CHUNK, record.parameters())
        # pydantic's JSON is UTF-8; the JSON chunk too becomes international where that is needed.
        info.add_text(CHUNK, record.model_dump_json())
    return info


def _exif_comment(text: str) -> bytes:
    """EXIF whose UserComment is ``text`` (Exif 2.32, 4.6.5: an 8-byte code, then UTF-16 as other tools write it)."""
    from PIL import Image
    from PIL.ExifTags import IFD, Base

    exif = Image.Exif()
    exif.get_ifd(IFD.Exif)[Base.UserComment] = b"UNICODE\0" + text.encode("utf-16-be")
    return exif.tobytes()


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
            found = {str(name): text for name, text in image.info.items() if isinstance(text, str)}
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist", hint="check the path") from None
    except UnidentifiedImageError:
        raise UsageError(f"{path} is not a PNG", hint="give an image that tiue generate wrote") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path} cannot be read: {error}", hint="the file may be damaged; make it again") from error
    # Ours are as the standard has them.
    return found if CHUNK in found else {name: _text_of(text) for name, text in found.items()}


def _text_of(chunk: str) -> str:
    """A ``tEXt`` chunk is Latin-1 by the standard, and UTF-8 from many programs: bytes that are UTF-8 are taken so."""
    try:
        return chunk.encode("latin-1").decode("utf-8")
    except UnicodeError:  # beyond Latin-1 it came from an international chunk, which is UTF-8 already
        return chunk


def read_record(path: Path) -> Record | None:
    """The record in a PNG, or None where it carries none. Raises UsageError, or ManifestError for a damaged record."""
    text = read_text_chunks(path, whole=False).get(CHUNK)
    if text is None:
        return None
    try:
        return _RECORD.validate_json(json.dumps(parse_json(text)))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "record"
        raise ManifestError(
            f"{path}: its tiue record cannot be read ({excerpt(place)}: {excerpt(first['msg'])})",
            hint=_RECORD_HINT,
        ) from None
    except ValueError as error:
        raise ManifestError(f"{path}: its tiue record is not JSON: {error}", hint=_RECORD_HINT) from None


_RECORD_HINT = "it was written by another version of tiue, or edited"


@dataclass(frozen=True)
class Parameters:
    """The ``parameters`` text of a web interface, taken apart; "" where a part is missing."""

    prompt: str
    negative_prompt: str
    settings: str


def split_parameters(text: str) -> Parameters:
    """Prompt, ``Negative prompt:`` and the line of settings, as the AUTOMATIC1111 interface and its readers write them.

    Both prompts may have several lines; the settings are the last line that begins with ``Steps:``.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    last = next((number for number in reversed(range(len(lines))) if lines[number].startswith("Steps:")), len(lines))
    settings = "\n".join(lines[last:])
    before = lines[:last]
    first = next((number for number, line in enumerate(before) if line.startswith(_NEGATIVE)), len(before))
    negative = "\n".join(before[first:]).removeprefix(_NEGATIVE)
    return Parameters("\n".join(before[:first]).strip(), negative.strip(), settings.strip())


_NEGATIVE = "Negative prompt:"


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


def _listed(loras: Sequence[LoraUse]) -> str:
    return ", ".join(f"{use.name}:{use.weight:g}" for use in loras) or "none"


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return "x".join(str(part) for part in value)
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else value[:39] + "…")
    return str(value)
