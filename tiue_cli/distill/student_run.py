"""A student's training from start to end: load, fill the caches, train, save; yields events and never prints.

prepare (cheap checks first) ─▶ text states ─▶ what the kind of training needs ─▶ steps, checkpoints, grids ─▶ student
"""

from __future__ import annotations

import contextlib
import os
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from tiue_cli.base.events import Event, Finished, Note, Progress, Saved
from tiue_cli.distill.acceleration import HALF, StopRequest, describe, log_image, make_accelerator, memory_bytes
from tiue_cli.distill.checkpoint import latest_checkpoint, read_checkpoint, remove_leftovers, step_of, write_checkpoint
from tiue_cli.distill.config import DistillConfig, flatten, recipe_sha256
from tiue_cli.distill.data.prompts import TrainingPrompts, read_training_prompts
from tiue_cli.distill.data.text_states import TextStates
from tiue_cli.distill.run_folder import (
    RunFolder,
    RunRecord,
    card_section,
    check_places,
    check_resumable,
    run_lock,
    write_record,
)
from tiue_cli.distill.student_trainer import StudentTrainer
from tiue_cli.distill.validation import Validation, save_grid
from tiue_cli.errors import DeviceError
from tiue_cli.files.atomic import atomic_file
from tiue_cli.files.rows import RowCache, cache_key
from tiue_cli.files.students import StudentManifest
from tiue_cli.model.autoencoder import ImageDecoder
from tiue_cli.model.finite import refuse_bad_weights
from tiue_cli.model.schedule import LinearCombine
from tiue_cli.model.student import StudentModel, save_student
from tiue_cli.model.text import encode_prompts

_RATE_STEPS = 20
"""Steps over which the speed is averaged."""
OTHER_DISK = "free some space, or give the caches another disk: --set cache=FOLDER"

_Trainer = TypeVar("_Trainer", bound=StudentTrainer)


class StudentRun(ABC, Generic[_Trainer]):
    """A run in folder ``out``. ``events`` does the work; SIGINT and SIGTERM end it after the step, saved."""

    _room_hints: ClassVar[Mapping[str, str]] = {
        "text states": f"{OTHER_DISK}; or encode each batch anew: --set text_cache=false",
    }
    """What to do where the disk is too small, by what is cached."""

    def __init__(
        self, config: DistillConfig, out: Path, *, resume: bool = False, acknowledge: Callable[[], None] | None = None
    ) -> None:
        """Checks that need no model are made here; ``acknowledge``: see StopRequest. Raises TiueError."""
        check_places(out, config, resume=resume)
        self.config, self.out, self.resume = config, out, resume
        self.prompts: TrainingPrompts = read_training_prompts(
            config.prompts, column=config.prompt_column, limit=config.max_prompts
        )
        self.folder = RunFolder(out)
        self._stop = StopRequest(acknowledge)

    def events(self) -> Iterator[Event]:
        """Run, and tell. Raises TiueError; what was saved before stays."""
        # The first process of a launch answers for all of them.
        is_first = os.environ.get("RANK", "0") == "0"
        lock = run_lock(self.out, resume=self.resume) if is_first else contextlib.nullcontext()
        with self._stop, lock:
            try:
                yield from self._run()
            except torch.OutOfMemoryError as error:
                raise DeviceError(
                    "the GPU's memory is used up",
                    hint="lower batch_size and raise accumulation, or set gradient_checkpointing=true; see --dry-run",
                ) from error
            except RuntimeError as error:
                # Asked last: looking for torch._dynamo imports it, seconds which no other error should cost.
                if not self.config.compile or not isinstance(error, torch._dynamo.exc.TorchDynamoException):
                    raise
                first, *others = str(error).strip().splitlines()
                says = f"{first} {others[0]}" if first.endswith("raised:") and others else first
                raise DeviceError(f"torch.compile does not work here: {says}", hint="set compile=false") from error

    def prepare(self) -> _Trainer:
        """Load everything and return the trainer before its first step; only caches are written."""
        self._load()
        for _ in self._texts.fill(process=self._process):
            pass
        return self._make_trainer()

    def _run(self) -> Iterator[Event]:
        yield Note(self.prompts.describe())
        self._load()
        yield Note(describe(self._accelerator, self.config))
        yield from (Note(note) for note in self._student.notes)
        self._open_folder()
        yield from self._fill(self._texts.cache, self._texts.fill(process=self._process), "text states")
        found = latest_checkpoint(self.folder.checkpoints) if self.resume else None
        yield from self._before_training(found)
        if self._stopping:
            yield Finished(self.out, None, step=step_of(found), interrupted=True, signal=self._stop.signal)
            return
        trainer = self._make_trainer()
        if found is not None:
            trainer.restore(read_checkpoint(found))
        if self._is_main:
            self.folder.cut_log(trainer.state.step)
        yield from self._begin(trainer)
        yield from self._train(trainer)
        yield from self._finish(trainer)

    # --- what the kind of training says ----------------------------------------------------------------------------

    @abstractmethod
    def _load_student(self) -> StudentModel:
        """The student before its first step, on the CPU in float32. Raises TiueError."""

    @abstractmethod
    def _load_networks(self) -> None:
        """Put the networks where they are trained; the student's are loaded, and ``_latent_shape`` is known."""

    @abstractmethod
    def _make_trainer(self) -> _Trainer:
        """The trainer before its first step."""

    def _before_training(self, found: Path | None) -> Iterator[Event]:
        """What is computed and kept before the trainer is made; ``found`` is the checkpoint that it will go on from."""
        yield from ()

    def _begin(self, trainer: _Trainer) -> Iterator[Event]:
        """What the trainer, new or restored, needs before it steps."""
        yield from ()

    @abstractmethod
    def _teacher_latents(self, noise: Tensor, states: Tensor) -> Tensor:
        """What the grids show above the student's: latents (B, C, h, w)."""

    @property
    @abstractmethod
    def _teacher_sha256(self) -> str:
        """Of the folder that the student learns from."""

    @property
    @abstractmethod
    def _combine(self) -> LinearCombine:
        """The student's weighted sum."""

    def _write_student(self, manifest: StudentManifest) -> Path:
        """The student's folder, written. Raises OutputError."""
        self._student.manifest = manifest
        return save_student(self._student, self.folder.student, overwrite=True)

    # --- loading ---------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        config = self.config
        self._accelerator = make_accelerator(config, logs=self.folder.trackers)
        self._is_main = self._accelerator.is_main_process
        self._student = self._load_student()
        student = self._student
        for part, module in (
            ("text encoder", student.text_encoder),
            ("UNet", student.unet),
            ("autoencoder", student.vae),
        ):
            refuse_bad_weights(part, module)
        decoder = ImageDecoder(student.vae)
        sample = student.unet.config["sample_size"]
        latent_size = tuple(sample) if isinstance(sample, (list, tuple)) else (sample, sample)
        if config.size is not None:
            latent_size = decoder.latent_size(config.size)
        self._latent_shape = (int(student.unet.config["in_channels"]), *latent_size)
        self._load_networks()
        key = cache_key({"teacher": self._teacher_sha256, "prompts": self.prompts.sha256})
        self._texts = TextStates(
            self.prompts.prompts,
            tokenizer=student.tokenizer,
            text_encoder=student.text_encoder,
            folder=config.cache_folder / f"text-{key}" if config.text_cache else None,
            device=self._accelerator.device,
            exact=self._half is None,
        )

    @property
    def _half(self) -> torch.dtype | None:
        """The type of mixed precision, None in fp32."""
        return HALF.get(self._accelerator.mixed_precision)

    def _place_student(self) -> None:
        """The student on its device: the UNet to be trained, the rest frozen."""
        student, device = self._student, self._accelerator.device
        student.unet.requires_grad_(True).to(device, memory_format=torch.channels_last)
        if self.config.gradient_checkpointing:
            student.unet.enable_gradient_checkpointing()
        for module in (student.text_encoder, student.vae):
            module.requires_grad_(False).to(device)

    def _open_folder(self) -> None:
        """Write down what this run is, or check that it is the run in this folder."""
        record = RunRecord(
            config=self.config,
            prompts_sha256=self.prompts.sha256,
            teacher_sha256=self._teacher_sha256,
            processes=self._accelerator.num_processes,
        )
        if self.resume:
            check_resumable(self.out, record)
        self._accelerator.wait_for_everyone()  # nobody writes before everybody has checked
        if self._is_main:
            write_record(self.out, record)
            settings = {key: str(value) for key, value in flatten(self.config.model_dump(mode="json"))}
            self._accelerator.init_trackers(self.config.tracking.project, config=settings)
            self.folder.remove_leftovers()
            remove_leftovers(self.folder.checkpoints)
        self._accelerator.wait_for_everyone()

    # --- caches ----------------------------------------------------------------------------------------------------

    def _fill(self, cache: RowCache | None, batches: Iterator[int], stage: Any) -> Iterator[Event]:
        """Drive a filling generator to its end, or to the stop; then all processes have all of it."""
        if cache is None:
            return
        cache.check_room(f"the {stage}", hint=self._room_hints[stage])
        missing = sum(len(cache.chunk_range(chunk)) for chunk in cache.missing())
        done = cache.count - missing
        if missing:
            for rows in batches:
                done += rows * self._accelerator.num_processes
                yield Progress(stage, min(done, cache.count), cache.count)
                if self._stop:
                    break
        self._stopping = self._agree(bool(self._stop))

    # --- training --------------------------------------------------------------------------------------------------

    def _train(self, trainer: _Trainer) -> Iterator[Event]:
        config, validation = self.config, self._make_validation()
        if trainer.state.step == 0:
            yield from self._draw(validation, trainer)
            self._stopping = self._agree(bool(self._stop))
        ends = deque([time.perf_counter()], maxlen=_RATE_STEPS + 1)
        while trainer.state.step < config.max_steps and not self._stopping:
            images = self._images_a_step(trainer)
            figures = trainer.step()
            step = trainer.state.step
            ends.append(time.perf_counter())
            spent = (ends[-1] - ends[0]) / (len(ends) - 1)
            figures |= {"seconds_per_step": spent, "images_per_s": images / spent, "memory_bytes": memory_bytes()}
            self._log(trainer, figures)
            if step <= config.warm_start.steps:
                yield Progress("warm start", step, min(config.warm_start.steps, config.max_steps), figures=figures)
            else:
                yield Progress("distillation", step, config.max_steps, figures=figures)
            self._stopping = self._agree(bool(self._stop))
            if step % config.checkpoint.every == 0 or step == config.max_steps or self._stopping:
                yield from self._save(trainer)
            if config.validation.every and (step % config.validation.every == 0 or step == config.max_steps):
                yield from self._draw(validation, trainer)

    def _images_a_step(self, trainer: _Trainer) -> int:
        config = self.config
        batch = config.warm_start.batch_size if trainer.in_warm_start else None
        result: int = (batch or config.batch_size) * config.accumulation * self._accelerator.num_processes
        return result

    def _log(self, trainer: _Trainer, figures: Mapping[str, float]) -> None:
        step = trainer.state.step
        if step % self.config.tracking.every != 0 and step != self.config.max_steps:
            return
        values = torch.tensor(list(figures.values()), dtype=torch.float64, device=self._accelerator.device)
        if self._accelerator.num_processes > 1:
            values = self._accelerator.reduce(values.float(), reduction="mean")
        shown = {name: float(f"{value:.6g}") for name, value in zip(figures, values.tolist(), strict=True)}
        state = trainer.state
        shown |= {"skipped_steps": state.skipped_steps, "teacher_evaluations": state.teacher_evaluations}
        if self._is_main:
            self.folder.log({"step": step, **shown})
        self._accelerator.log(shown, step=step)

    def _save(self, trainer: _Trainer) -> Iterator[Event]:
        trainer.check_finite()
        path = None
        if self._is_main:
            path = write_checkpoint(self.folder.checkpoints, trainer.checkpoint(), keep=self.config.checkpoint.keep)
        self._accelerator.wait_for_everyone()
        if path is not None:
            yield Saved("checkpoint", path)

    def _make_validation(self) -> Validation | None:
        settings, student = self.config.validation, self._student
        if settings.every == 0 or not self._is_main:
            return None
        prompts: Sequence[str] = settings.prompts or self.prompts.prompts[: settings.count]
        return Validation(
            prompts,
            encode_prompts(student.tokenizer, student.text_encoder, prompts),
            decoder=ImageDecoder(student.vae),
            latent_shape=self._latent_shape,
            seed=settings.seed,
            teacher=self._teacher_latents,
        )

    def _draw(self, validation: Validation | None, trainer: _Trainer) -> Iterator[Event]:
        if validation is not None:

            def one_pass(noise: Tensor, states: Tensor) -> Tensor:
                result: Tensor = self._combine(noise, trainer.predictions(noise, states))
                return result

            with trainer.averaged_weights():
                pixels = validation.grid(one_pass, stop=self._stop)
            if pixels is not None:
                step = trainer.state.step
                yield Saved("grid", save_grid(self.folder.grids / f"step_{step:08d}.png", pixels))
                log_image(self._accelerator, "teacher above student", pixels, step=step)
        self._accelerator.wait_for_everyone()

    def _finish(self, trainer: _Trainer) -> Iterator[Event]:
        path = None
        if trainer.state.skipped_steps:
            yield Note(f"{trainer.state.skipped_steps} steps had no finite gradient and were skipped")
        if self._is_main:
            path = self._save_student(trainer)
            yield Saved("student", path)
        self._accelerator.wait_for_everyone()
        self._accelerator.end_training()
        step = trainer.state.step
        interrupted = step < self.config.max_steps
        yield Finished(self.out, path, step, interrupted, signal=self._stop.signal if interrupted else None)

    def _save_student(self, trainer: _Trainer) -> Path:
        manifest = self._student.manifest.model_copy(
            update={
                "recipe_sha256": recipe_sha256(self.config, self.prompts.sha256),
                "training_steps": self._trained_before + trainer.state.step,
            }
        )
        with trainer.averaged_weights():
            path = self._write_student(manifest)
        card = path / "README.md"
        text = card.read_text(encoding="utf-8") + card_section(self.config, self.prompts)
        with atomic_file(card) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return path

    _trained_before = 0
    """Steps that the student had when it was loaded."""

    # --- processes -------------------------------------------------------------------------------------------------

    _stopping = False
    """What all processes agreed on last."""

    @property
    def _process(self) -> tuple[int, int]:
        return self._accelerator.process_index, self._accelerator.num_processes

    def _agree(self, wish: bool) -> bool:
        """True on all processes when any of them wishes it; a signal does not reach all in the same step."""
        if self._accelerator.num_processes == 1:
            return wish
        wishes = torch.tensor([float(wish)], device=self._accelerator.device)
        return bool(self._accelerator.reduce(wishes, reduction="sum").item() > 0)
