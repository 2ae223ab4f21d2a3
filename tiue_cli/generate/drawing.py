"""Draw from Python: a model that is loaded once and called with prompts.

    prompts ─ Request ─▶ ImageSpec (checked, seeded) ─▶ batches ─▶ Picture

The pictures are those of ``tiue generate`` for the same seed: both go through the same specs, noise and backend.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, overload

from tiue_cli.backends.base import TakesLoras
from tiue_cli.base.text import MAX_SIDE_PX
from tiue_cli.errors import UsageError
from tiue_cli.files.png import ImageSpec, LoraUse
from tiue_cli.generate.config import GenerateConfig
from tiue_cli.generate.pictures import Output, Picture, Request, checked_output, pil_image
from tiue_cli.generate.pipeline import OnePassPipeline
from tiue_cli.generate.plan import RANDOM_SEEDS, row_specs
from tiue_cli.generate.prompts import PromptRow, check_prompt
from tiue_cli.generate.session import Session, image_record
from tiue_cli.model.lora.files import check_weight
from tiue_cli.model.noise import check_seed

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from tiue_cli.backends.base import Backend


class Pipeline:
    """A loaded model: call it with prompts. `tiue.load` makes one; not for several threads at once.

    Use it with ``with``, or ``close`` it: the model's memory is let go then.

    >>> with tiue.load("papercut") as pipe:
    ...     red, blue = pipe(["a red heart", "a blue heart"], seed=0, size=64)
    >>> red.size
    (64, 64)
    """

    def __init__(self, config: GenerateConfig, *, on_note: Callable[[str], None] | None = None) -> None:
        """Open and load the model of ``config``; `tiue.load` says what it raises."""
        self._session = Session(config, note=on_note)
        self._session.__enter__()
        try:
            self._adapters = {use.name: use for use in self._session.target.loras}
            self._backend: Backend | None = self._session.open()
        except BaseException:
            self._session.__exit__(None, None, None)
            raise

    # --- what it is ---

    @property
    def model(self) -> str:
        """What the model was loaded from, as it was asked for."""
        return self._session.target.source

    @property
    def kind(self) -> Literal["student", "teacher"]:
        """A student draws in one pass, a teacher in many steps."""
        return self._session.target.info.kind

    @property
    def backend(self) -> str:
        """``torch``, ``onnx``, ``openvino`` or ``trt``."""
        return self._entered.name

    @property
    def device(self) -> str:
        """``cpu``, ``cuda``, or OpenVINO's ``gpu`` and ``npu``."""
        return self._entered.device

    @property
    def precision(self) -> str:
        """``fp32``, ``fp16`` or ``bf16``."""
        return self._entered.dtype

    @property
    def steps(self) -> int:
        """Decoder timesteps K of a student, or sampler steps of a teacher, where a call does not say."""
        return self._session.target.steps(self._session.config)

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels where a call does not say."""
        return self._session.target.info.image_size

    @property
    def notes(self) -> tuple[str, ...]:
        """What is worth knowing about the model as it was loaded, a sentence each."""
        return tuple(self._session.notes)

    def batch_for(self, size: tuple[int, int] | None = None) -> int:
        """Pictures of ``size`` (H, W) pixels that are computed at once where a call does not say.

        Raises ProfileError where an engine does not take the size.
        """
        return OnePassPipeline(self._entered).batch_for(self.default_size if size is None else size)

    # --- drawing ---

    @overload
    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int | None = ...,
        images: int = ...,
        steps: int | None = ...,
        size: int | tuple[int, int] | None = ...,
        batch: int | None = ...,
        output: Literal["pil"] = ...,
    ) -> list[Image]: ...

    @overload
    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int | None = ...,
        images: int = ...,
        steps: int | None = ...,
        size: int | tuple[int, int] | None = ...,
        batch: int | None = ...,
        output: Literal["numpy", "latents"],
    ) -> list[np.ndarray]: ...

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int | None = None,
        images: int = 1,
        steps: int | None = None,
        size: int | tuple[int, int] | None = None,
        batch: int | None = None,
        output: Output = "pil",
    ) -> list[Any]:
        """Draw ``images`` pictures of each prompt; returns them prompt by prompt, as `Output` says.

        Picture number i of the call has ``seed`` + i; None takes a random seed (`stream` says which). ``steps`` is K of
        a student or the sampler steps of a teacher, ``size`` (height, width) in pixels or one number for a square,
        ``batch`` how many are computed at once: None for each is the model's own, or what fits. Raises UsageError,
        PromptError, and for what the device or an engine cannot do DeviceError and ProfileError.

        >>> with tiue.load("papercut") as pipe:
        ...     images = pipe("a red heart at night", seed=0, images=2, output="numpy")
        >>> images[0].shape, images[0].dtype
        ((64, 64, 3), dtype('uint8'))
        """
        asked = [prompts] if isinstance(prompts, str) else list(prompts)
        drawn = self.stream(asked, seed=seed, images=images, steps=steps, size=size, batch=batch, output=output)
        return [picture.image for picture in drawn]

    @overload
    def stream(
        self,
        prompts: Iterable[str],
        *,
        seed: int | None = ...,
        images: int = ...,
        steps: int | None = ...,
        size: int | tuple[int, int] | None = ...,
        batch: int | None = ...,
        output: Literal["pil"] = ...,
    ) -> Iterator[Picture[Image]]: ...

    @overload
    def stream(
        self,
        prompts: Iterable[str],
        *,
        seed: int | None = ...,
        images: int = ...,
        steps: int | None = ...,
        size: int | tuple[int, int] | None = ...,
        batch: int | None = ...,
        output: Literal["numpy", "latents"],
    ) -> Iterator[Picture[np.ndarray]]: ...

    @overload
    def stream(
        self,
        prompts: Iterable[str],
        *,
        seed: int | None = ...,
        images: int = ...,
        steps: int | None = ...,
        size: int | tuple[int, int] | None = ...,
        batch: int | None = ...,
        output: Output,
    ) -> Iterator[Picture[Any]]: ...

    def stream(
        self,
        prompts: Iterable[str],
        *,
        seed: int | None = None,
        images: int = 1,
        steps: int | None = None,
        size: int | tuple[int, int] | None = None,
        batch: int | None = None,
        output: Output = "pil",
    ) -> Iterator[Picture[Any]]:
        """Draw prompts as they come, however many; yields a `Picture` each, in order.

        Reads ``batch`` images' worth of prompts, draws and yields them, and keeps nothing: any iterable, also an
        endless one, in constant memory. The keywords mean what they mean for a call. A prompt that cannot be used
        raises PromptError with its number when it is reached.

        >>> with tiue.load("papercut") as pipe:
        ...     for picture in pipe.stream(["a red star", "a green tree"], batch=16, seed=5):
        ...         print(picture.seed, picture.prompt, picture.image.size)
        5 a red star (64, 64)
        6 a green tree (64, 64)
        """
        config = self._config(images=images, steps=steps, size=size)
        if isinstance(prompts, str):
            raise UsageError("stream takes many prompts, and one string was given", hint='give a list: ["a red heart"]')
        pair = config.size or self.default_size
        self._entered.latent_shape(pair)
        pipeline = self._pipeline(pair, batch)
        first = secrets.randbelow(RANDOM_SEEDS) if seed is None else check_seed(seed)
        specs = self._specs(prompts, config, first)
        return self._stream(specs, pipeline, batch, pair, checked_output(output))

    @overload
    def draw(self, requests: Sequence[Request], *, output: Literal["pil"] = ...) -> list[Picture[Image]]: ...

    @overload
    def draw(
        self, requests: Sequence[Request], *, output: Literal["numpy", "latents"]
    ) -> list[Picture[np.ndarray]]: ...

    @overload
    def draw(self, requests: Sequence[Request], *, output: Output) -> list[Picture[Any]]: ...

    def draw(self, requests: Sequence[Request], *, output: Output = "pil") -> list[Picture[Any]]:
        """Draw requests that have nothing to do with each other; returns a `Picture` each, in order.

        What shares size, steps and adapters is computed together, in batches that fit (`batch_for`). A picture does not
        depend on its neighbours, up to the rounding of the backend's arithmetic. All requests are checked before one
        is drawn: raises PromptError and UsageError, and what a call raises.

        >>> with tiue.load("papercut") as pipe:
        ...     pictures = pipe.draw([tiue.Request("a red star", seed=5), tiue.Request("a blue tree", seed=1)])
        >>> [picture.seed for picture in pictures]
        [5, 1]
        """
        return list(self._pictures(self.check(requests), OnePassPipeline(self._entered), checked_output(output)))

    def check(self, requests: Sequence[Request]) -> list[ImageSpec]:
        """What the requests ask of this model, checked and with the model's own size and steps filled in; cheap.

        Raises PromptError and UsageError as `draw` does, and ProfileError for a size outside an engine's range.

        >>> with tiue.load("papercut") as pipe:
        ...     spec, = pipe.check([tiue.Request("a red star", seed=5)])
        >>> spec.size, spec.steps
        ((64, 64), 4)
        """
        specs = []
        for number, request in enumerate(requests, 1):
            where = "the prompt" if len(requests) == 1 else f"request {number}"
            config = self._config(images=1, steps=None, size=request.size)
            prompt = check_prompt(request.prompt, where)
            row = PromptRow(prompt, where, request.seed, config.size, request.steps, request.loras)
            specs += self._of_row(config, row, first_seed=request.seed)
        for size in {spec.size for spec in specs}:
            self._entered.latent_shape(size)
        return specs

    # --- adapters ---

    @property
    def adapters(self) -> dict[str, float]:
        """The LoRAs that are on the model now, by name, with their weights."""
        return {name: use.weight for name, use in self._adapters.items() if use in self._session.target.loras}

    def load_lora(self, source: str | Path, *, adapter_name: str | None = None, weight: float | None = None) -> str:
        """Put a LoRA on the model beside those that are on it; returns the name that `set_adapters` knows it by.

        ``source`` is a safetensors file, a folder with one, or a hub id; ``adapter_name`` None takes the file's name.
        ``weight`` 1 is as it was trained, and the default. Where it fails the model stays as it was. Raises
        AdapterError for what is no LoRA of this model, UsageError for an export and for a name that is taken.

        >>> pipe = tiue.load("runs/sd15/student")
        >>> pipe.load_lora("pixel-art.safetensors", weight=0.8)
        'pixel-art'
        >>> pipe.adapters
        {'pixel-art': 0.8}
        """
        (use,) = self._session.target.find_loras([str(source)])
        if weight is not None:
            use = use.model_copy(update={"weight": check_weight(weight, use.name)})
        name = use.name if adapter_name is None else adapter_name
        if name in self._adapters:
            raise UsageError(f"an adapter called {name} is there already", hint='give another name: adapter_name="…"')
        self._use({**self._adapters, name: use}, [*self.adapters, name])
        return name

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Draw with exactly these of the loaded LoRAs from now on; an empty list is the bare model.

        ``adapter_weights`` is one number for all or one each; None keeps the weights that they have. Raises UsageError.

        >>> pipe = tiue.load("runs/sd15/student", loras=["pixel-art.safetensors"])
        >>> pipe.set_adapters(["pixel-art"], [0.5])
        >>> pipe.adapters
        {'pixel-art': 0.5}
        >>> pipe.set_adapters([])
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        unknown = [name for name in names if name not in self._adapters]
        if unknown:
            raise UsageError(
                f"no adapter is called {unknown[0]}",
                hint=f"there are {', '.join(self._adapters)}" if self._adapters else "load it first: load_lora",
            )
        weights = [adapter_weights] * len(names) if isinstance(adapter_weights, int | float) else adapter_weights
        if weights is not None and len(weights) != len(names):
            raise UsageError(f"{len(weights)} weights for {len(names)} adapters", hint="give one weight for each")
        changed = dict(self._adapters)
        for name, weight in zip(names, weights or (), strict=False):
            changed[name] = changed[name].model_copy(update={"weight": check_weight(weight, name)})
        self._use(changed, names)

    def unload_lora(self) -> None:
        """Take all LoRAs off and forget them; the weights are then what they were before, bit for bit.

        >>> pipe = tiue.load("runs/sd15/student", loras=["pixel-art.safetensors"])
        >>> pipe.unload_lora()
        >>> pipe.adapters
        {}
        """
        self._use({}, [])

    def _use(self, adapters: dict[str, LoraUse], active: Sequence[str]) -> None:
        """Put ``active`` of ``adapters`` on the model; a failure changes nothing."""
        uses = tuple(adapters[name] for name in active)
        if isinstance(self._entered, TakesLoras):
            self._entered.use_loras(uses)
        self._adapters = adapters
        self._session.target = replace(self._session.target, loras=uses)

    # --- the end ---

    def close(self) -> None:
        """Let the model's memory go; a closed pipeline draws no more. Twice does no harm."""
        self._backend = None
        self._session.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- inside ---

    @property
    def _entered(self) -> Backend:
        if self._backend is None:
            raise UsageError("this pipeline is closed", hint="draw inside its with block, or load the model again")
        return self._backend

    def _config(self, *, images: int, steps: int | None, size: int | tuple[int, int] | None) -> GenerateConfig:
        """The session's config with a call's own settings. Raises UsageError."""
        if images < 1:
            raise UsageError(f"images {images} is out of range", hint="give 1 or more")
        pair = (size, size) if isinstance(size, int) else size
        if pair is not None and not (len(pair) == 2 and all(0 < side <= MAX_SIDE_PX for side in pair)):
            raise UsageError(
                f"size {size} is not a height and width in pixels",
                hint=f"give (height, width), each 1 to {MAX_SIDE_PX} pixels",
            )
        config = replace(self._session.config, images=images, size=pair)
        if steps is None:
            return config
        if steps < 1:
            raise UsageError(f"steps {steps} is out of range", hint="give 1 or more, or leave it out")
        return replace(config, teacher_steps=steps) if self.kind == "teacher" else replace(config, steps=steps)

    def _pipeline(self, size: tuple[int, int], batch: int | None) -> OnePassPipeline:
        if batch is not None and batch < 1:
            raise UsageError(f"batch {batch} is out of range", hint="give 1 or more, or leave it out")
        limit = self._entered.largest_batch(size)
        return OnePassPipeline(self._entered, batch=batch if batch is None or limit is None else min(batch, limit))

    def _specs(self, prompts: Iterable[str], config: GenerateConfig, first_seed: int) -> Iterator[ImageSpec]:
        for number, prompt in enumerate(prompts):
            where = f"prompt {number + 1}"
            row = PromptRow(check_prompt(prompt, where), where)
            yield from self._of_row(config, row, first_seed=first_seed + number * config.images)

    def _of_row(self, config: GenerateConfig, row: PromptRow, *, first_seed: int) -> list[ImageSpec]:
        if self.kind == "teacher" and row.steps is not None:
            config, row = replace(config, teacher_steps=row.steps), replace(row, steps=None)
        return row_specs(config, self._session.target, row, first_seed=first_seed)

    def _stream(
        self,
        specs: Iterator[ImageSpec],
        pipeline: OnePassPipeline,
        batch: int | None,
        size: tuple[int, int],
        output: Output,
    ) -> Iterator[Picture[Any]]:
        at_once = pipeline.batch_for(size) if batch is None else batch
        while chunk := list(itertools.islice(specs, at_once)):
            yield from self._pictures(chunk, pipeline, output)

    def _pictures(
        self, specs: Sequence[ImageSpec], pipeline: OnePassPipeline, output: Output
    ) -> Iterator[Picture[Any]]:
        """The pictures of ``specs``, in their order."""
        backend = self._entered
        cuts = backend.cut_text([spec.prompt for spec in specs])
        found = dict(pipeline.latents(specs) if output == "latents" else pipeline.images(specs))
        for position, spec in enumerate(specs):
            array = found.pop(position)
            yield Picture(pil_image(array) if output == "pil" else array, image_record(spec, backend), cuts[position])
