"""Requests in, images out, on any backend.

    Session.plan(prompts) ─▶ Plan ─ Session.run ─▶ one Made an image, as soon as it is on disk

Nothing here prints, and nothing heavy is imported before a backend has work to do.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from tiue_cli import __version__
from tiue_cli.base.text import excerpt
from tiue_cli.errors import full_installation
from tiue_cli.files.atomic import check_writable
from tiue_cli.files.png import GridRecord, ImageRecord, ImageSpec, read_pixels, write_picture
from tiue_cli.files.sheet import ContactSheet
from tiue_cli.files.temporary import remove_leftovers
from tiue_cli.generate.config import GenerateConfig
from tiue_cli.generate.pipeline import OnePassPipeline
from tiue_cli.generate.plan import Plan, PlannedImage, plan_images
from tiue_cli.generate.prompts import PromptRow
from tiue_cli.generate.target import ExportInfo, ModelTarget, open_target
from tiue_cli.model.folder import ModelInfo
from tiue_cli.model.hub import EMBEDDED

if TYPE_CHECKING:
    from tiue_cli.backends.base import Backend, ProgressFn


_WEIGHTED = re.compile(r"\([^()]+:\s*[0-9]*\.?[0-9]+\s*\)")
FAR_FROM_TRAINED = 2.0
"""Ratio of sides from which on a size looks like a slip."""


# --- the run -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """One image that is ready; ``path`` None is on the contact sheet only, ``skipped`` lay there already."""

    index: int
    spec: ImageSpec
    path: Path | None
    skipped: bool


class Session:
    """A model and, once there is work, a loaded backend; used with ``with``.

    ``note`` is called with each sentence that the user should know; ``notes`` keeps them. ``load_s`` and ``generate_s``
    are seconds spent so far, ``generated`` counts images.
    """

    def __init__(self, config: GenerateConfig, *, note: Callable[[str], None] | None = None) -> None:
        """Nothing is opened before ``__enter__``, and nothing loaded before ``run``."""
        self.config = config
        self.backend: Backend | None = None
        self.notes: list[str] = []
        self.load_s = 0.0
        self.generate_s = 0.0
        self.generated = 0
        self.left_behind = ""
        """What the last plan left on the disk, in words, where it was interrupted."""
        self._note = note
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self.target = open_target(self.config, note=self._say)
        for text in (*self.target.info.notes, *_embedded_note(self.config, self.target)):
            self._say(text)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self.backend = None

    def plan(self, rows: Sequence[PromptRow], config: GenerateConfig | None = None) -> Plan:
        """``plan_images`` for this session's model; ``config`` may differ in anything but model, backend and device."""
        return plan_images(self.config if config is None else config, self.target, rows)

    def run(self, plan: Plan, *, progress: ProgressFn | None = None) -> Iterator[Made]:
        """Make what is not done yet; yields each image when it is on disk, skipped ones first.

        ``progress`` is called with the number of images made so far. A contact sheet is written at the end. Raises
        OutputError, DeviceError, and what loading the model raises.
        """
        todo = plan.todo
        if not todo and (isinstance(self.target.info, ExportInfo) or self.config.device == "cuda"):
            # A damaged export, or a device that was named and cannot run, is said even where no image is left to make.
            self.open()
        for index in sorted(set(range(len(plan.images))) - set(todo)):
            image = plan.images[index]
            yield Made(index, image.spec, image.path, skipped=True)
        writes_sheet = plan.sheet is not None and not plan.sheet_done
        if not todo and not writes_sheet:
            return
        check_writable(plan.folder)
        remove_leftovers(plan.folder)
        sheet = ContactSheet([image.spec.size for image in plan.images]) if writes_sheet else None
        if todo:
            yield from self._make(plan, todo, sheet=sheet, progress=progress)
        if sheet is not None and plan.sheet is not None:
            self._write_sheet(plan, plan.sheet, sheet)

    def _make(
        self, plan: Plan, todo: Sequence[int], *, sheet: ContactSheet | None, progress: ProgressFn | None
    ) -> Iterator[Made]:
        backend = self.open()
        specs = [plan.images[index].spec for index in todo]
        for size in {spec.size for spec in specs}:
            backend.latent_shape(size)
        self._note_cuts(backend, [plan.images[index] for index in todo])
        self._note_weights(specs)
        note = self.target.vocabulary_note(spec.prompt for spec in specs)
        if note is not None:
            self._say(note)
        self._note_sizes(specs)
        pipeline = OnePassPipeline(backend, batch=plan.config.batch)
        started = time.perf_counter()
        for position, pixels in pipeline.images(specs, progress=progress):
            index = todo[position]
            image = plan.images[index]
            if image.path is not None:
                record = image_record(image.spec, backend) if plan.config.metadata else None
                write_picture(image.path, pixels, record, replace=plan.config.overwrite)
            if sheet is not None:
                sheet.place(index, pixels)
            self.generated += 1
            self.generate_s += time.perf_counter() - started
            yield Made(index, image.spec, image.path, skipped=False)
            started = time.perf_counter()

    def _write_sheet(self, plan: Plan, path: Path, sheet: ContactSheet) -> None:
        for index, image in enumerate(plan.images):
            if image.done and image.path is not None:
                sheet.place(index, read_pixels(image.path))
        specs = tuple(image.spec for image in plan.images)
        record = GridRecord(columns=sheet.columns, images=specs, tiue_version=__version__)
        write_picture(path, sheet.pixels, record if plan.config.metadata else None, replace=plan.config.overwrite)

    def open(self) -> Backend:
        """Load the model, unless it is loaded; ``run`` does it by itself. Raises what loading raises."""
        if self.backend is None:
            started = time.perf_counter()
            self.backend = self._stack.enter_context(open_backend(self.config, self.target))
            self.load_s = time.perf_counter() - started
            for text in self.backend.notes:
                self._say(text)
        return self.backend

    def _note_cuts(self, backend: Backend, images: Sequence[PlannedImage]) -> None:
        prompts = {image.spec.prompt: image.where for image in images}
        for (prompt, where), cut in zip(prompts.items(), backend.cut_text(list(prompts)), strict=True):
            if cut:
                kept = self.target.info.text_tokens
                self._say(
                    f"{where} is longer than the {kept} tokens that the model reads; "
                    f"it does not see the last {len(cut)} of {len(prompt)} characters: {_ends_of(cut)}"
                )

    def _note_weights(self, specs: Sequence[ImageSpec]) -> None:
        """Other programs read ``(word:1.3)`` as more of the word; here it is text like any other."""
        found = next((match for spec in specs if (match := _WEIGHTED.search(spec.prompt)) is not None), None)
        if found is not None:
            self._say(f"{excerpt(found[0], 40)} is read literally, brackets and number included: there are no weights")

    def _note_sizes(self, specs: Sequence[ImageSpec]) -> None:
        """Far from the size that it was trained for a model repeats its motifs, or draws a crop."""
        own = self.target.info.image_size
        for size in sorted({spec.size for spec in specs}):
            ratios = [side / trained for side, trained in zip(size, own, strict=True)]
            if max(ratios) > FAR_FROM_TRAINED or min(ratios) < 1 / FAR_FROM_TRAINED:
                self._say(
                    f"{size[0]}x{size[1]} pixels are far from the {own[0]}x{own[1]} that the model was trained for:"
                    f" expect repeated motifs or crops; its own size is --size {own[0]}x{own[1]}"
                )

    def _say(self, text: str) -> None:
        if text in self.notes:
            return
        self.notes.append(text)
        if self._note is not None:
            self._note(text)


def image_record(spec: ImageSpec, backend: Backend) -> ImageRecord:
    """What a picture says about itself: what was asked for, and what drew it."""
    return ImageRecord(
        **spec.model_dump(),
        backend=backend.name,
        device=backend.device,
        dtype=backend.dtype,
        tiue_version=__version__,
    )


def open_backend(config: GenerateConfig, target: ModelTarget) -> Backend:
    """The backend that ``config`` asks for, not yet entered. Raises DeviceError and what the backends raise."""
    info = target.info
    if isinstance(info, ExportInfo):
        return _open_export(info, target, config)
    if target.graphs is None:
        return _open_torch(config, target, info)
    graphs = _open_export(target.graphs, target, config)
    if config.backend != "auto":
        return graphs
    from tiue_cli.generate.packaged import PackagedBackend

    return PackagedBackend(graphs, lambda: _open_torch(config, target, info))


def _open_torch(config: GenerateConfig, target: ModelTarget, info: ModelInfo) -> Backend:
    with full_installation(f"{target.source}, a model folder,"):
        from tiue_cli.backends.torch_backend import StudentTorchBackend, TeacherTorchBackend

    if info.kind == "student":
        return StudentTorchBackend(
            info,
            vae=target.vae_folder,
            device=config.device,
            dtype=config.dtype,
            chunked=config.long_prompts == "chunk",
            compiled=config.compiled,
            moves_encoder=config.encoder_timestep == "first",
        )
    guidance = target.guidance(config)
    assert guidance is not None
    return TeacherTorchBackend(
        info,
        vae=target.vae_folder,
        device=config.device,
        dtype=config.dtype,
        chunked=config.long_prompts == "chunk",
        guidance=guidance,
    )


def _open_export(info: ExportInfo, target: ModelTarget, config: GenerateConfig) -> Backend:
    if target.backend == "openvino":
        from tiue_cli.backends.openvino_backend import OpenvinoBackend

        return OpenvinoBackend(info.path, device=config.device, precision=config.dtype)
    if target.backend == "trt":
        from tiue_cli.backends.trt_backend import TrtBackend

        return TrtBackend(info.path, engine=info.engine)
    from tiue_cli.backends.onnx_backend import OnnxBackend

    return OnnxBackend(info.path, provider=target.provider)


def report(session: Session, plan: Plan, made: Sequence[Made]) -> dict[str, Any]:
    """What a run did, as plain data: the document of ``--format json``. Sizes are [height, width], times in seconds."""
    backend = session.backend
    seconds = session.generate_s
    return {
        "images": [
            {
                "path": None if image.path is None else str(image.path),
                "prompt": image.spec.prompt,
                "seed": image.spec.seed,
                "size": list(image.spec.size),
                "steps": image.spec.steps,
                "guidance": image.spec.guidance,
                "model": image.spec.model,
                "loras": [use.model_dump() for use in image.spec.loras],
                "skipped": image.skipped,
            }
            for image in sorted(made, key=lambda image: image.index)
        ],
        "grid": None if plan.sheet is None else str(plan.sheet),
        "seed": plan.seed,
        "model": {"source": session.target.source, "kind": session.target.info.kind, "id": session.target.model_id},
        "backend": None if backend is None else backend.name,
        "device": None if backend is None else backend.device,
        "dtype": None if backend is None else backend.dtype,
        "timings": {
            "load_s": round(session.load_s, 3),
            "generate_s": round(seconds, 3),
            "images_per_s": round(session.generated / seconds, 3) if seconds > 0 else None,
        },
        "notes": list(session.notes),
    }


def _embedded_note(config: GenerateConfig, target: ModelTarget) -> tuple[str, ...]:
    if config.model != EMBEDDED or target.info.kind != "teacher":
        return ()
    return (
        f"{EMBEDDED} has no one-pass student in this version: its teacher draws, "
        f"in {target.steps(config)} sampler steps",
    )


def _ends_of(text: str) -> str:
    flat = " ".join(text.split())
    return repr(flat) if len(flat) <= 60 else repr(f"{flat[:40]} … {flat[-16:]}")
