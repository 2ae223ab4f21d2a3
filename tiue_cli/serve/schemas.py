"""Requests as OpenAI's images API and A1111's web interface define them.

Sizes there are width first; everywhere else in tiue they are (height, width). They turn around here and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tiue_cli.base.text import MAX_SIDE_PX
from tiue_cli.files.png import ImageRecord
from tiue_cli.model.noise import MAX_SEED
from tiue_cli.serve.config import MAX_PROMPT_CHARACTERS
from tiue_cli.serve.failures import RequestFailure
from tiue_cli.serve.images import OutputFormat


def _usable_prompt(prompt: str) -> str:
    """Raise ValueError, which becomes a 400, for a prompt that no tokenizer can be given."""
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    if "\0" in prompt:
        raise ValueError("the prompt contains a NUL character")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("the prompt contains a lone surrogate") from None
    return prompt


Prompt = Annotated[
    str,
    Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS, description="What to draw."),
    pydantic.AfterValidator(_usable_prompt),
]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Steps = Annotated[int, Field(ge=1, le=1000)]


LoraName = Annotated[str, Field(min_length=1, max_length=300)]


class ImagesRequest(BaseModel):
    """``POST /v1/images/generations``: OpenAI's fields, and ``seed``, ``steps`` and ``lora`` beside them.

    Fields of OpenAI's that mean nothing to a one-pass model (``quality``, ``style``, …) are taken and ignored.
    """

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    prompt: Prompt
    model: str | None = Field(None, max_length=300, description="One of GET /v1/models; the served one if left out.")
    n: Annotated[int, Field(ge=1)] | None = Field(None, description="How many; image i has seed + i.")
    size: str | None = Field(None, description='"WIDTHxHEIGHT" in pixels, or "auto".')
    response_format: Literal["b64_json", "url"] | None = Field(None, description="b64_json if left out.")
    output_format: OutputFormat | None = Field(None, description="png if left out.")
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = Field(
        None, description="Quality of jpeg and webp."
    )
    user: str | None = Field(None, max_length=1000, description="Taken and not looked at.")
    seed: Seed | None = Field(None, description="Random if left out; the answer names it.")
    steps: Steps | None = Field(None, description="Decoder timesteps K of a student, sampler steps of a teacher.")
    num_inference_steps: Steps | None = Field(None, description="Another name for steps.")
    lora: LoraName | Annotated[list[LoraName], Field(max_length=16)] | None = Field(
        None, description='"NAME" or "NAME:WEIGHT" of the server\'s LoRAs, or several; see GET /v1/models.'
    )

    @field_validator("size")
    @classmethod
    def _is_size(cls, text: str | None) -> str | None:
        if text is not None:
            parse_wxh(text)
        return text

    @model_validator(mode="after")
    def _one_steps(self) -> Self:
        if None not in (self.steps, self.num_inference_steps) and self.steps != self.num_inference_steps:
            raise ValueError("steps and num_inference_steps say different things")
        return self

    @property
    def pixels(self) -> tuple[int, int] | None:
        """(height, width), None for the model's own."""
        return None if self.size is None else parse_wxh(self.size)

    @property
    def loras(self) -> tuple[str, ...] | None:
        """The adapters asked for; None for the server's own."""
        if self.lora is None:
            return None
        return (self.lora,) if isinstance(self.lora, str) else tuple(self.lora)

    @property
    def wanted_steps(self) -> int | None:
        """Whichever of the two names was used."""
        return self.num_inference_steps if self.steps is None else self.steps


class Txt2ImgRequest(BaseModel):
    """``POST /sdapi/v1/txt2img`` as front ends send it; seed -1 is a random one."""

    model_config = ConfigDict(extra="ignore")

    prompt: Prompt
    seed: Annotated[int, Field(ge=-1, le=MAX_SEED)] = -1
    steps: Steps | None = Field(
        None, description="Taken where the student has this K; front ends send a sampler's 20, which means its own."
    )
    width: Annotated[int, Field(ge=1, le=MAX_SIDE_PX)] | None = None
    height: Annotated[int, Field(ge=1, le=MAX_SIDE_PX)] | None = None
    batch_size: Annotated[int, Field(ge=1, le=1000)] = 1
    n_iter: Annotated[int, Field(ge=1, le=1000)] = 1

    @property
    def count(self) -> int:
        """Images asked for."""
        return self.batch_size * self.n_iter


class ImageData(BaseModel):
    """One image of an answer: ``b64_json`` or ``url``, and its seed."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class Timings(BaseModel):
    """Where the time of an answer went: the longest wait, the longest batch, and how many images it held."""

    queue_ms: float
    model_ms: float
    batch: int


class ImagesAnswer(BaseModel):
    """OpenAI's answer, and what was drawn with."""

    model_config = ConfigDict(protected_namespaces=())

    created: int
    data: list[ImageData]
    model: str
    size: str
    steps: int
    seed: int
    output_format: OutputFormat
    timings: Timings


class ModelsAnswer(BaseModel):
    """OpenAI's list of models."""

    object: Literal["list"]
    data: list[dict[str, Any]]


class Txt2ImgAnswer(BaseModel):
    """A1111's answer; ``info`` is JSON as text."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


def parse_wxh(text: str) -> tuple[int, int] | None:
    """(height, width) of ``"WIDTHxHEIGHT"``, None of ``"auto"``. Raises ValueError."""
    if text == "auto":
        return None
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text, flags=re.ASCII)
    if match is None:
        raise ValueError('write "WIDTHxHEIGHT", e.g. "512x768", or "auto"')
    width, height = int(match[1]), int(match[2])
    if not (1 <= width <= MAX_SIDE_PX and 1 <= height <= MAX_SIDE_PX):
        raise ValueError(f"each side is 1 to {MAX_SIDE_PX} pixels")
    return height, width


def wxh(size: tuple[int, int]) -> str:
    """(height, width) as ``"WIDTHxHEIGHT"``."""
    return f"{size[1]}x{size[0]}"


def validation_failure(errors: Sequence[Any]) -> RequestFailure:
    """400 that names the first field that is wrong; never its value, which may be a prompt. ``errors``: pydantic's."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return RequestFailure(400, "the body is not JSON", code="invalid_json")
    place = ".".join(str(part) for part in first["loc"][1:])[:100] or None
    message = str(first["msg"]).removeprefix("Value error, ")
    return RequestFailure(
        400, message if place is None else f"{place}: {message}", code=f"invalid_{first['type']}", param=place
    )


def infotext(records: list[ImageRecord]) -> dict[str, Any]:
    """A1111's ``info``: what was drawn, image by image."""
    first = records[0]
    height, width = first.size
    return {
        "prompt": first.prompt,
        "all_prompts": [record.prompt for record in records],
        "negative_prompt": "",
        "seed": first.seed,
        "all_seeds": [record.seed for record in records],
        "width": width,
        "height": height,
        "sampler_name": "TiUE one pass" if first.kind == "student" else "DDIM",
        "cfg_scale": 1.0 if first.guidance is None else first.guidance,
        "steps": first.steps,
        "batch_size": len(records),
        "sd_model_name": first.model,
        "sd_model_hash": first.model_id[:10],
        "infotexts": [record.parameters() for record in records],
        "job_timestamp": "",
    }
