"""The torch backend: a student in one pass, or its teacher in many steps, on the CPU or a CUDA device."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import numpy as np
import torch

from tiue_cli.backends.base import ProgressFn
from tiue_cli.backends.stages import ToldStages, timed_stage
from tiue_cli.backends.torch_prepared import FastModel, FastOptions, StudentPass, TeacherSteps
from tiue_cli.errors import DeviceError, OutOfMemoryError
from tiue_cli.files.png import LoraUse
from tiue_cli.model.autoencoder import ImageDecoder
from tiue_cli.model.fast.layers import NotFusable
from tiue_cli.model.finite import BadLatentsError, not_finite
from tiue_cli.model.folder import ModelInfo
from tiue_cli.model.lora.adapters import Adapters
from tiue_cli.model.schedule import LinearCombine, combine_for_run, ddim_steps
from tiue_cli.model.shared import SharedUNetDecoder
from tiue_cli.model.student import StudentModel, load_student
from tiue_cli.model.teacher import Teacher, load_teacher
from tiue_cli.model.text import chunk_counts, cut_text, encode_in_chunks, encode_prompts
from tiue_cli.model.unet import UNetEncoder

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_Model = TypeVar("_Model", StudentModel, Teacher)


def choose_device(asked: str) -> str:
    """``cpu`` or ``cuda`` for ``auto``, ``cpu`` or ``cuda``. Raises DeviceError for a CUDA that torch cannot use."""
    usable = torch.cuda.is_available()
    if asked == "auto":
        return "cuda" if usable else "cpu"
    if asked == "cuda" and not usable:
        reason = "is built without it" if torch.version.cuda is None else "finds no usable GPU"
        raise DeviceError(
            f"--device cuda cannot be used: torch {torch.__version__} {reason}",
            hint="leave --device out, or see what is missing: tiue doctor",
        )
    return asked


def choose_dtype(asked: str, device: str) -> str:
    """``fp32``, ``fp16`` or ``bf16``; ``auto`` is fp16 on CUDA and fp32 on a CPU, where half precision is slow."""
    if asked == "auto":
        return "fp16" if device == "cuda" else "fp32"
    return asked


class _TorchBackend(ABC, Generic[_Model]):
    """What students and teachers share: placement, prompts, sizes, and errors in our words."""

    name = "torch"

    def __init__(
        self,
        info: ModelInfo,
        *,
        vae: Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
        chunked: bool = False,
    ) -> None:
        """``info`` is a checked model folder; ``vae`` replaces its autoencoder. Raises DeviceError; loads nothing.

        ``chunked`` reads long prompts in several sequences instead of cutting them.
        """
        self._chunked = chunked
        self._info = info
        self._vae = vae
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        self._model: _Model | None = None
        self._decoder: ImageDecoder | None = None
        self._adapters: Adapters | None = None
        self._fast_notes: list[str] = []

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the loaded model, and about how it was run so far."""
        advice: list[str] = []
        if self.device == "cpu" and self.dtype != "fp32":
            faster = "; OpenVINO is faster in it, with an export: tiue doctor" if self.dtype == "bf16" else ""
            advice.append(f"{self.dtype} is slower than fp32 in torch on a CPU{faster}")
        return (*advice, *self._model_notes, *self._fast_notes)

    @property
    def _model_notes(self) -> tuple[str, ...]:
        """What the loaded model itself has to say."""
        return ()

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the model was made for, with the autoencoder in use."""
        factor = self._entered_decoder.factor
        return self._info.sample_size[0] * factor, self._info.sample_size[1] * factor

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) for an image of ``size`` (H, W) pixels. Raises UsageError."""
        return (self._entered_decoder.latent_channels, *self._entered_decoder.latent_size(size))

    def largest_batch(self, size: tuple[int, int]) -> int | None:
        """None: memory is the limit."""
        return None

    def cut_text(self, prompts: Sequence[str]) -> list[str]:
        """The end of each prompt that does not fit; "" where it does."""
        return [""] * len(prompts) if self._chunked else cut_text(self._entered.tokenizer, prompts)

    def generate(
        self,
        prompts: Sequence[str],
        noise: np.ndarray,
        *,
        steps: int | None = None,
        progress: ProgressFn | None = None,
    ) -> np.ndarray:
        """Images (B, H, W, 3) uint8 from prompts (B) and noise (B, C, h, w) float32; see ``Backend.generate``."""
        placed = torch.from_numpy(noise).to(self.device)
        with _memory_errors(self.device), torch.inference_mode():
            try:
                latents = self._latents_of_any(list(prompts), placed, steps, progress)
                with timed_stage("vae_decoder"):
                    images = self._entered_decoder.decode(latents)
            except BadLatentsError as error:
                raise self._first_not_finite(list(prompts)) from error
        if progress is not None:
            progress(1.0)
        return images

    def latents(self, prompts: Sequence[str], noise: np.ndarray, *, steps: int | None = None) -> np.ndarray:
        """Latents (B, C, h, w) float32 from prompts (B) and noise (B, C, h, w) float32; see ``Backend.latents``."""
        with _memory_errors(self.device), torch.inference_mode():
            latents = self._all_latents(prompts, noise, steps).float().cpu()
        if not bool(torch.isfinite(latents).all()):
            raise self._first_not_finite(list(prompts))
        return latents.numpy()

    def _all_latents(self, prompts: Sequence[str], noise: np.ndarray, steps: int | None) -> torch.Tensor:
        return self._latents_of_any(list(prompts), torch.from_numpy(noise).to(self.device), steps, None)

    def _latents_of_any(
        self, prompts: list[str], noise: torch.Tensor, steps: int | None, progress: ProgressFn | None
    ) -> torch.Tensor:
        """``_latents``, for prompts of one length at a time: a picture must not depend on its neighbours' lengths."""
        counts = self._chunk_counts(prompts)
        if len(set(counts)) == 1:
            return self._latents(prompts, noise, steps, progress)
        found: dict[int, torch.Tensor] = {}
        for count in sorted(set(counts)):
            rows = [row for row, own in enumerate(counts) if own == count]
            latents = self._latents([prompts[row] for row in rows], noise[rows], steps, None)
            found |= dict(zip(rows, latents, strict=True))
        return torch.stack([found[row] for row in range(len(prompts))])

    def _chunk_counts(self, prompts: Sequence[str]) -> list[int]:
        """Sequences that each prompt is read in."""
        return chunk_counts(self._entered.tokenizer, prompts) if self._chunked else [1] * len(prompts)

    def _is_long(self, prompts: Sequence[str]) -> bool:
        """Whether a prompt takes several sequences, which the prepared networks are not made for."""
        return max(self._chunk_counts(prompts)) > 1

    def _text_states(self, prompts: Sequence[str], *, chunks: int) -> torch.Tensor:
        """(B, chunks·L, D)."""
        model = self._entered
        if not self._chunked:
            return encode_prompts(model.tokenizer, model.text_encoder, prompts)
        return encode_in_chunks(model.tokenizer, model.text_encoder, prompts, chunks=chunks)

    @torch.inference_mode()
    def _first_not_finite(self, prompts: list[str]) -> DeviceError:
        """The error that names the first part that is to blame for latents with NaN or infinity."""
        model = self._entered
        text_states = encode_prompts(model.tokenizer, model.text_encoder, prompts)
        if not bool(torch.isfinite(text_states).all()):
            return not_finite("text encoder", model.text_encoder)
        return not_finite("UNet", model.unet)

    def use_loras(self, loras: Sequence[LoraUse]) -> None:
        """See ``TakesLoras.use_loras``. The networks are prepared anew, and on CUDA captured: seconds."""
        if self._adapters is None:
            if not loras:
                return
            model = self._entered
            self._adapters = Adapters(unet=model.unet, text_encoder=model.text_encoder)
        with _memory_errors(self.device):
            if self._adapters.use(loras):
                self._prepare(self._entered)

    def __enter__(self) -> Self:
        with _memory_errors(self.device):
            self._model = self._load(DTYPES[self.dtype])
            self._prepare(self._model)
        self._decoder = ImageDecoder(self._model.vae)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._model = self._decoder = self._adapters = None
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _fast_model(self, model: _Model, options: FastOptions) -> FastModel | None:
        """The prepared networks; None, with a note, for a network that has what Stable Diffusion's has not."""
        for module in (model.unet, model.vae):
            _channels_last(module)  # so that prepared weights are no copies
        try:
            fast = FastModel(text_encoder=model.text_encoder, unet=model.unet, vae=model.vae, options=options)
        except NotFusable as error:
            lacks = "CUDA graphs and fused kernels" if self.device == "cuda" else "prepared networks"
            self._fast_notes.append(f"without {lacks}, which is slower: {error.message}")
            return None
        self._fast_notes = fast.notes
        return fast

    @property
    def _entered(self) -> _Model:
        assert self._model is not None, "the backend is used inside its with block"
        return self._model

    @property
    def _entered_decoder(self) -> ImageDecoder:
        assert self._decoder is not None, "the backend is used inside its with block"
        return self._decoder

    @abstractmethod
    def _load(self, dtype: torch.dtype) -> _Model:
        """Load the model onto the device."""

    @abstractmethod
    def _prepare(self, model: _Model) -> None:
        """Make what is made of the weights as they are now: the prepared networks."""

    @abstractmethod
    def _latents(
        self, prompts: list[str], noise: torch.Tensor, steps: int | None, progress: ProgressFn | None
    ) -> torch.Tensor:
        """``latents`` of placed float32 noise, on the device."""


class StudentTorchBackend(_TorchBackend[StudentModel]):
    """One pass: text encoder, UNet encoder once, shared UNet decoder over all timesteps at once, weighted sum, VAE.

    By prepared networks, on CUDA in CUDA graphs (see ``torch_prepared``); long prompts by diffusers' modules.
    """

    def __init__(
        self,
        info: ModelInfo,
        *,
        vae: Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
        chunked: bool = False,
        compiled: bool = False,
        moves_encoder: bool = False,
    ) -> None:
        """As the base; ``compiled``: through ``torch.compile``, on CUDA only. Raises DeviceError.

        ``moves_encoder``: with fewer steps the UNet encoder runs at the first of them, as in the TiUE authors' script,
        and not where it was trained.
        """
        super().__init__(info, vae=vae, device=device, dtype=dtype, chunked=chunked)
        if compiled and self.device != "cuda":
            raise DeviceError("--compile is for CUDA, and the device is the CPU", hint="leave --compile out")
        self._compiled = compiled
        self._moves_encoder = moves_encoder
        self._pass: StudentPass | None = None

    @property
    def _model_notes(self) -> tuple[str, ...]:
        return tuple(self._entered.notes)

    def _load(self, dtype: torch.dtype) -> StudentModel:
        student = load_student(self._info, device=self.device, dtype=dtype, vae=self._vae)
        self._unet_encoder = UNetEncoder(student.unet)
        self._unet_decoder = SharedUNetDecoder(student.unet)
        return student

    def _prepare(self, model: StudentModel) -> None:
        self._pass = None  # first, so that its memory is free for the next one
        fast = self._fast_model(model, FastOptions(kernels=not self._compiled, compiled=self._compiled))
        if fast is not None:
            timestep = None if self._moves_encoder else model.manifest.encoder_timestep
            self._pass = StudentPass(fast, model.tokenizer, encoder_timestep=timestep)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pass = None
        super().__exit__(kind, error, trace)

    def generate(
        self,
        prompts: Sequence[str],
        noise: np.ndarray,
        *,
        steps: int | None = None,
        progress: ProgressFn | None = None,
    ) -> np.ndarray:
        """See ``Backend.generate``."""
        if self._pass is None or self._is_long(prompts):
            return super().generate(prompts, noise, steps=steps, progress=progress)
        with _memory_errors(self.device), torch.inference_mode():
            # Of a GPU, which is not waited for, the host's clock would say how long launching took.
            clock = ToldStages() if self.device == "cpu" else None
            images = self._pass(prompts, noise, self._combine(steps), clock=clock)
        if progress is not None:
            progress(1.0)
        return images

    def _all_latents(self, prompts: Sequence[str], noise: np.ndarray, steps: int | None) -> torch.Tensor:
        if self._pass is None or self._is_long(prompts):
            return super()._all_latents(prompts, noise, steps)
        return self._pass.latents(prompts, noise, self._combine(steps))

    def _latents(
        self, prompts: list[str], noise: torch.Tensor, steps: int | None, progress: ProgressFn | None
    ) -> torch.Tensor:
        student = self._entered
        combine = self._combine(steps)
        rounded = noise.to(student.unet.dtype)
        chunks = max(self._chunk_counts(prompts))
        with timed_stage("text_encoder"):
            text_states = self._text_states(prompts, chunks=chunks).to(student.unet.dtype)
        first = combine.timesteps[0] if self._moves_encoder else student.manifest.encoder_timestep
        with timed_stage("unet_encoder"):
            features = self._unet_encoder(rounded, text_states, first)
        timesteps = torch.tensor(combine.timesteps, device=noise.device)
        with timed_stage("unet_decoder"):
            predictions = self._unet_decoder(features, timesteps, text_states)
            # The sum takes the unrounded noise: its weight is the largest, and its rounding would show.
            result: torch.Tensor = combine(noise, predictions)
        return result

    def _combine(self, steps: int | None) -> LinearCombine:
        manifest = self._entered.manifest
        return combine_for_run(
            self._entered.scheduler_config, manifest.decoder_timesteps, spacing=manifest.spacing, steps=steps
        )


class TeacherTorchBackend(_TorchBackend[Teacher]):
    """Many steps of DDIM with classifier-free guidance."""

    def __init__(
        self,
        info: ModelInfo,
        *,
        guidance: float,
        vae: Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
        chunked: bool = False,
    ) -> None:
        """As the base; ``guidance`` 1 or less samples without."""
        super().__init__(info, vae=vae, device=device, dtype=dtype, chunked=chunked)
        self._guidance = guidance
        self._steps: TeacherSteps | None = None

    def _load(self, dtype: torch.dtype) -> Teacher:
        return load_teacher(self._info, device=self.device, dtype=dtype, vae=self._vae)

    def _prepare(self, model: Teacher) -> None:
        self._steps = None
        fast = self._fast_model(model, FastOptions())
        if fast is not None:
            self._steps = TeacherSteps(fast, model.tokenizer)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._steps = None
        super().__exit__(kind, error, trace)

    def generate(
        self,
        prompts: Sequence[str],
        noise: np.ndarray,
        *,
        steps: int | None = None,
        progress: ProgressFn | None = None,
    ) -> np.ndarray:
        """See ``Backend.generate``."""
        if self._steps is None or self._is_long(prompts):
            return super().generate(prompts, noise, steps=steps, progress=progress)
        assert steps is not None, "a teacher has no number of steps of its own"
        with _memory_errors(self.device), torch.inference_mode():
            return self._steps(
                prompts,
                noise,
                ddim_steps(self._entered.scheduler_config, steps),
                guidance=self._guidance,
                progress=None if progress is None else lambda done: progress(done / steps),
            )

    def _latents(
        self, prompts: list[str], noise: torch.Tensor, steps: int | None, progress: ProgressFn | None
    ) -> torch.Tensor:
        assert steps is not None, "a teacher has no number of steps of its own"
        report = None if progress is None else lambda done: progress(done / steps)
        chunks = max(self._chunk_counts(prompts))
        if chunks == 1:
            return self._entered.latents(prompts, noise, steps=steps, guidance=self._guidance, progress=report)
        empty = self._text_states([""] * len(prompts), chunks=chunks)
        return self._entered.denoise(
            self._text_states(prompts, chunks=chunks),
            noise,
            unconditional=empty if self._guidance > 1.0 else None,
            steps=steps,
            guidance=self._guidance,
            progress=report,
        )


def _channels_last(module: Any) -> None:  # torch's annotations leave this form of ``to`` out
    move: Any = torch.nn.Module.to
    move(module, memory_format=torch.channels_last)


@contextlib.contextmanager
def _memory_errors(device: str) -> Iterator[None]:
    """Turn running out of memory, on either kind of device, into a DeviceError with what helps."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"the memory of {device} is full", hint="try --batch 1, a smaller --size, or --device cpu"
        ) from error
    except RuntimeError as error:
        # torch has no class of its own for the CPU's allocator.
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise OutOfMemoryError(
            "the memory of this machine is full", hint="try --batch 1 or a smaller --size"
        ) from error
