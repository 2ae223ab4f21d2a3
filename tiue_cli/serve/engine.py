"""The models of a server: checked requests in, pictures with their records out.

The only file here that knows how a model is loaded and called. ``check`` is cheap and may be called anywhere;
``load`` and ``draw`` take time and belong to the model thread.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tiue_cli.errors import TiueError, UsageError
from tiue_cli.files.png import ImageRecord, ImageSpec, LoraUse
from tiue_cli.generate.config import GenerateConfig
from tiue_cli.generate.drawing import Pipeline
from tiue_cli.generate.pictures import Request
from tiue_cli.generate.session import Session
from tiue_cli.generate.target import OPENVINO_DEVICES, ExportInfo
from tiue_cli.model.hub import EMBEDDED, EMBEDDED_NAMES, EMBEDDED_TEACHER
from tiue_cli.serve.loras import LoraShelf

if TYPE_CHECKING:
    import numpy as np

MAX_TEACHER_STEPS = 100
SMALLEST_SHARE, LARGEST_SHARE = 4, 2
"""Sides from a fourth to twice the model's own, where the model itself sets no range."""


@dataclass(frozen=True)
class Job:
    """One picture to draw: which of the server's models, and what."""

    model: str
    spec: ImageSpec


@dataclass(frozen=True)
class Drawn:
    """A picture (H, W, 3) uint8 and what its PNG says about itself."""

    pixels: np.ndarray
    record: ImageRecord


class Engine:
    """The model that is served and, loaded at its first request, its teacher."""

    def __init__(self, config: GenerateConfig, *, teacher: str | None = None, lora_dir: Path | None = None) -> None:
        """Open the target of ``config``: raises what unusable models and LoRAs raise, before a port is opened."""
        self.loras = LoraShelf(lora_dir)
        with Session(config) as session:
            self.target = session.target
            self._config = session.config
        self.name = served_name(config.model)
        if teacher is None and config.model == EMBEDDED and self.target.info.kind == "student":
            teacher = EMBEDDED_TEACHER
        self._configs = {self.name: config}
        if teacher is not None and teacher != config.model:
            name = served_name(teacher)
            name = f"{name}-teacher" if name == self.name else name
            # OpenVINO's devices and 8 bits are for exports; a teacher is a model folder.
            device = "auto" if config.device in OPENVINO_DEVICES else config.device
            dtype = "auto" if config.backend == "openvino" else config.dtype
            self._configs[name] = GenerateConfig(model=teacher, device=device, dtype=dtype)
        self._pipelines: dict[str, Pipeline] = {}
        self._lock = threading.Lock()

    @property
    def models(self) -> tuple[str, ...]:
        """Names that a request's ``model`` may have; the first is the default."""
        return tuple(self._configs)

    @property
    def kind(self) -> str:
        """``student`` or ``teacher``, of the model that is served."""
        return self.target.info.kind

    @property
    def default_steps(self) -> int:
        """K of a student, or a teacher's sampler steps, where a request does not say."""
        return self.target.steps(self._config)

    @property
    def step_choices(self) -> tuple[int, ...]:
        """Every K that the served student can draw with; empty for a teacher."""
        if self.kind == "teacher":
            return ()
        if isinstance(self.target.info, ExportInfo):
            return tuple(sorted(len(combine.timesteps) for combine in self.target.info.manifest.combines))
        return tuple(range(1, self.default_steps + 1))

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels where a request does not say."""
        return self.target.info.image_size

    def load(self, name: str | None = None) -> Pipeline:
        """The pipeline of a model, loaded at the first call. Raises what loading raises."""
        name = self.name if name is None else name
        with self._lock:
            if name not in self._pipelines:
                self._pipelines[name] = Pipeline(self._configs[name])
            return self._pipelines[name]

    def loaded(self, name: str) -> Pipeline | None:
        """The pipeline of a model, None before it is loaded."""
        return self._pipelines.get(name)

    def check(self, requests: Sequence[Request], *, model: str) -> list[Job]:
        """The jobs of ``requests`` for a loaded model. Raises PromptError, UsageError, ProfileError."""
        pipeline = self._pipelines[model]
        for request in requests:
            self._check_range(pipeline, request)
        return [Job(model, spec) for spec in pipeline.check(requests)]

    def cause(self, request: Request, *, model: str) -> str | None:
        """The field without which a refused request would pass: size, steps, lora or prompt; None for several."""
        without = {
            "size": replace(request, size=None),
            "steps": replace(request, steps=None),
            "lora": replace(request, loras=None),
            "prompt": replace(request, prompt="a"),
        }
        for field, other in without.items():
            with suppress(TiueError):
                self.check([other], model=model)
                return field
        return None

    def largest_batch(self, job: Job) -> int:
        """Images like this one that may be computed at once: the engine's range, or what fits the device by size."""
        return self._pipelines[job.model].batch_for(job.spec.size)

    def draw(self, jobs: Sequence[Job]) -> list[Drawn]:
        """Draw one batch: jobs of one model, size and K. Raises what drawing raises."""
        pipeline = self._pipelines[jobs[0].model]
        pictures = pipeline.draw([_request(job.spec) for job in jobs], output="numpy")
        return [Drawn(picture.image, _for_clients(picture.record, model=jobs[0].model)) for picture in pictures]

    def close(self) -> None:
        """Let the models go."""
        for pipeline in self._pipelines.values():
            pipeline.close()
        self._pipelines.clear()

    def _check_range(self, pipeline: Pipeline, request: Request) -> None:
        if pipeline.kind == "teacher" and request.steps is not None and request.steps > MAX_TEACHER_STEPS:
            raise UsageError(f"{request.steps} steps are more than the {MAX_TEACHER_STEPS} that are allowed here")
        if request.size is None:
            return
        own = pipeline.default_size
        for asked, side in zip(request.size, own, strict=True):
            if not side // SMALLEST_SHARE <= asked <= side * LARGEST_SHARE:
                height, width = own
                raise UsageError(
                    f"size {request.size[1]}x{request.size[0]} is out of range: this model draws "
                    f"{width // SMALLEST_SHARE}x{height // SMALLEST_SHARE} to "
                    f"{width * LARGEST_SHARE}x{height * LARGEST_SHARE} (width x height)"
                )


def _request(spec: ImageSpec) -> Request:
    loras = tuple(use.option for use in spec.loras)
    return Request(spec.prompt, spec.seed, spec.size, spec.steps, loras)


def _for_clients(record: ImageRecord, *, model: str) -> ImageRecord:
    """By the names that clients know: where the files lie is nobody's business."""
    loras = tuple(use.model_copy(update={"source": use.name}) for use in record.loras)
    return record.model_copy(update={"model": model, "loras": loras})


def served_name(source: str) -> str:
    """What clients call a model: a hub id and a model of the package by its name, a folder by its last part."""
    folder = Path(source).expanduser()
    return folder.resolve().name if source not in EMBEDDED_NAMES and folder.is_dir() else source


def batch_key(job: Job) -> tuple[str, tuple[int, int], int, tuple[LoraUse, ...]]:
    """What the pictures of one batch have in common."""
    return job.model, job.spec.size, job.spec.steps, job.spec.loras


def warm_up_request(engine: Engine) -> Request:
    """The picture that is drawn before the server says it is ready."""
    return Request("a red heart", seed=0, size=engine.default_size)
