"""A student's pass and a teacher's steps: prepared networks, on a GPU captured as CUDA graphs.

    prompts ─ tokens ─▶ │ text ▶ UNet encoder ▶ UNet decoder, weighted sum ▶ autoencoder, bytes │ ─▶ pixels
    noise ───────────▶  │            static memory on the device, four graphs a shape           │

Between the two borders nothing is copied from the host and nothing is waited for. On a CPU the same code runs
uncaptured, in two thirds of the time of diffusers' modules. What a network has that Stable Diffusion's has not keeps
its plain module; a note says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import torch
from diffusers.models import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from tiue_cli.backends.few_entries import FewEntries
from tiue_cli.backends.torch_graphs import Captured
from tiue_cli.errors import DeviceError
from tiue_cli.model.autoencoder import ImageDecoder, images_at_once, to_levels
from tiue_cli.model.fast.autoencoder import fast_decoder
from tiue_cli.model.fast.layers import NotFusable
from tiue_cli.model.fast.ops import Ops, TorchOps, TritonOps
from tiue_cli.model.fast.text import FastTextEncoder
from tiue_cli.model.fast.unet import FastUNet
from tiue_cli.model.finite import not_finite
from tiue_cli.model.schedule import LinearCombine
from tiue_cli.model.text import tokenize
from tiue_cli.model.unet import UNetFeatures

SHAPES_HELD: Final = 4
"""Captured shapes at a time: each holds its activations."""
_BYTES_PER_PIXEL: Final = 6144
"""Of Stable Diffusion's image decoder in half precision: about 1.6 GB for 512 x 512 pixels, its largest tensors."""


class Stages(Protocol):
    """What times the stages of a pass; see ``bench``'s clocks."""

    def stage(self, name: Any) -> contextlib.AbstractContextManager[None]:
        """Time the block as part of ``name``."""


class _Untimed:
    def stage(self, name: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


@dataclass(frozen=True)
class FastOptions:
    """How a pass is run. The defaults are what was fastest where it was measured (see ``benchmarks/gpu``)."""

    kernels: bool = True
    """The fused Triton kernels; else torch's own, which a compiler can fuse."""
    shared: bool = True
    """Else the decoder runs as one K-fold batch: as fast at batch 1 (within 3 %), slower from there on."""
    merged: bool = True
    """Each upsampler and its convolution as one transposed convolution: the same sums, less than half of them."""
    compiled: bool = False
    """``torch.compile``: a minute or two for each new shape, and the fastest afterwards."""
    compile_mode: str | None = None
    captured: bool = True
    single: bool = False
    """A student's pass as one graph instead of four, whose stages cannot be timed then. Not measured yet."""
    search: bool = False
    """cuDNN tries its algorithms at each new shape, instead of guessing. Not measured yet."""
    products: bool = False
    """The image decoder's attention as two matrix products and a softmax. Not measured yet."""


class FastModel:
    """The prepared networks of one model, shared by all shapes. Weights are read when it is made."""

    def __init__(
        self,
        *,
        text_encoder: CLIPTextModel,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL | AutoencoderTiny,
        options: FastOptions,
    ) -> None:
        self.options = options
        self.device = unet.device
        self.dtype = unet.dtype
        self.notes: list[str] = []
        self.pool = new_pool(self.device)
        """Memory that all graphs of the model share: they never run at the same time."""
        ops: Ops = TritonOps() if options.kernels and self.device.type == "cuda" else TorchOps()
        self.unet = FastUNet(unet, ops, shared=options.shared, merged=options.merged)
        self.text: Callable[[Tensor], Tensor]
        try:
            self.text = FastTextEncoder(text_encoder, ops)
        except NotFusable as error:
            self.notes.append(f"the text encoder runs as it is: {error.message}")
            self.text = lambda ids: text_encoder(ids)[0]
        self.images = ImageDecoder(vae)
        self._text_encoder, self._unet = text_encoder, unet
        self._decode: Callable[[Tensor], Tensor]
        try:
            self._decode = fast_decoder(vae, ops, merged=options.merged, products=options.products)
        except NotFusable as error:
            self.notes.append(f"the autoencoder runs as it is: {error.message}")
            self._decode = lambda latents: vae.decode(latents, return_dict=False)[0]
        self.encode, self.decode = self.unet.encode, self.unet.decode
        if options.compiled:
            self._compile()

    def _compile(self) -> None:
        compiled: Any = lambda function: torch.compile(function, dynamic=False, mode=self.options.compile_mode)  # noqa: E731
        self.encode, self.decode = compiled(self.unet.encode), compiled(self.unet.decode)
        self._decode = compiled(self._decode)

    def pixels(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Bytes (B, H, W, 3) uint8 and whether all is finite, () bool, from latents (B, C, h, w), in groups."""
        size = latents.shape[-2] * latents.shape[-1] * self.images.factor**2
        found = [self._group(group) for group in latents.split(group_size(self.device, size))]
        finite = torch.stack([flag for _, flag in found]).all()
        return found[0][0] if len(found) == 1 else torch.cat([levels for levels, _ in found]), finite

    def _group(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        images = self._decode(self.images.scaled(latents).to(self.dtype)).float()
        return to_levels(images).contiguous(), torch.isfinite(images).all()

    def not_finite(self, ids: Tensor, latents: Tensor) -> DeviceError:
        """The error that names the first part to blame for pixels with NaN, from what a pass began and ended with.

        ``ids`` (B, L) are its tokens, ``latents`` (B, C, h, w) what was decoded. Raises ModelFolderError where the
        part's own weights are not finite.
        """
        # Encoded anew: of the keys and values that a pass keeps, the UNet made half.
        if not bool(torch.isfinite(self.text(ids)).all()):
            return not_finite("text encoder", self._text_encoder)
        if not bool(torch.isfinite(latents).all()):
            return not_finite("UNet", self._unet)
        return not_finite("autoencoder", self.images.vae, instead="another autoencoder: --vae FOLDER|HUB_ID")


def group_size(device: torch.device, pixels: int) -> int:
    """How many images of so many pixels are decoded at a time: within a quarter of the GPU's memory."""
    if device.type != "cuda":
        return images_at_once(pixels)
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(1, memory // 4 // (_BYTES_PER_PIXEL * pixels))


class StudentPass:
    """One pass of a student at any batch, K and size. Each shape's first run captures it."""

    def __init__(
        self, model: FastModel, tokenizer: CLIPTokenizer, *, encoder_timestep: int | None, held: int | None = None
    ) -> None:
        """``encoder_timestep`` None: the first of each run's own. ``held``: captured shapes at a time, None for
        ``SHAPES_HELD``."""
        self._model = model
        self._tokenizer = tokenizer
        self._encoder_timestep = encoder_timestep
        self._shapes: FewEntries[_StudentShape] = FewEntries(SHAPES_HELD if held is None else held)

    def __call__(
        self, prompts: Sequence[str], noise: np.ndarray, combine: LinearCombine, *, clock: Stages | None = None
    ) -> np.ndarray:
        """Images (B, H, W, 3) uint8. Raises DeviceError where the arithmetic overflows."""
        clock = _Untimed() if clock is None else clock
        return self._shape(noise, combine).run(tokenize(self._tokenizer, prompts), noise, clock=clock)

    def latents(self, prompts: Sequence[str], noise: np.ndarray, combine: LinearCombine) -> Tensor:
        """The sum (B, C, h, w) float32 on the device, before the image decoder; a copy, for the next run writes there.

        Its shape is captured whole, as ``__call__`` does: pictures of the same shape cost no second capture.
        """
        return self._shape(noise, combine).latents(tokenize(self._tokenizer, prompts), noise)

    def _shape(self, noise: np.ndarray, combine: LinearCombine) -> _StudentShape:
        return self._shapes.get((noise.shape, combine.timesteps), lambda: self._make(noise.shape, combine))

    def _make(self, shape: tuple[int, ...], combine: LinearCombine) -> _StudentShape:
        length = int(self._tokenizer.model_max_length)
        first = combine.timesteps[0] if self._encoder_timestep is None else self._encoder_timestep
        arguments = (self._model, shape, length, combine, first)
        try:
            return _StudentShape(*arguments)
        except torch.OutOfMemoryError:
            self._shapes.clear()
            torch.cuda.empty_cache()
            return _StudentShape(*arguments)


class _StudentShape:
    """The static memory of one shape, and its stages."""

    def __init__(
        self,
        model: FastModel,
        shape: tuple[int, ...],
        length: int,
        combine: LinearCombine,
        encoder_timestep: int,
    ) -> None:
        self._model, self._combine = model, combine
        device = model.device
        self._ids = torch.zeros((shape[0], length), dtype=torch.int64, device=device)
        self._noise = torch.zeros(shape, dtype=torch.float32, device=device)
        # The timesteps never change, so what the networks make of them is worked out here, once.
        self._first = model.unet.times(torch.tensor([encoder_timestep], device=device))
        self._times = model.unet.times(torch.tensor(combine.timesteps, device=device))
        self._inputs = pinned((shape[0], length), torch.int64, device), pinned(shape, torch.float32, device)
        self._texts: Tensor
        self._features: UNetFeatures
        self._latents: Tensor
        self._bytes: Tensor
        self._finite: Tensor
        stages = {
            "text": self._text,
            "unet_encoder": self._encode,
            "unet_decoder": self._decode,
            "vae": self._finish,
        }
        self._whole = model.options.single
        self._stages = captured(model, {"pass": self._pass} if self._whole else stages)

    def run(self, ids: Tensor, noise: np.ndarray, *, clock: Stages) -> np.ndarray:
        """Images (B, H, W, 3) uint8."""
        self._run(ids, noise, tuple(self._stages), clock)
        return fetch(self._bytes, self._finite, otherwise=lambda: self._model.not_finite(self._ids, self._latents))

    def latents(self, ids: Tensor, noise: np.ndarray) -> Tensor:
        """Latents (B, C, h, w) float32 on the device."""
        self._run(ids, noise, ("pass",) if self._whole else ("text", "unet_encoder", "unet_decoder"), _Untimed())
        return self._latents.clone()

    def _run(self, ids: Tensor, noise: np.ndarray, stages: Sequence[str], clock: Stages) -> None:
        place(ids, self._inputs[0], self._ids)
        place(torch.from_numpy(noise), self._inputs[1], self._noise)
        for name in stages:
            with clock.stage(name):
                self._stages[name]()

    def _pass(self) -> None:
        for stage in (self._text, self._encode, self._decode, self._finish):
            stage()

    def _text(self) -> None:
        self._texts = self._model.unet.texts(self._model.text(self._ids).to(self._model.dtype))

    def _encode(self) -> None:
        self._features = self._model.encode(self._noise.to(self._model.dtype), self._first, self._texts)

    def _decode(self) -> None:
        predictions = self._model.decode(self._features, self._times, self._texts)
        # The sum takes the unrounded noise: its weight is the largest, and its rounding would show.
        self._latents = self._combine(self._noise, predictions)

    def _finish(self) -> None:
        self._bytes, self._finite = self._model.pixels(self._latents)


class TeacherSteps:
    """A teacher's guided DDIM steps at any batch and size: one captured step, replayed.

    DDIM (Song et al. 2021) with η = 0 is x_next = a·x + b·prediction, with numbers that each step copies in. Latents
    are float32 throughout, as in the student's sum; diffusers rounds them to the UNet's precision after every step.
    """

    def __init__(self, model: FastModel, tokenizer: CLIPTokenizer, *, held: int | None = None) -> None:
        """``held``: captured shapes at a time, None for ``SHAPES_HELD``."""
        self._model = model
        self._tokenizer = tokenizer
        self._shapes: FewEntries[_TeacherShape] = FewEntries(SHAPES_HELD if held is None else held)

    def __call__(
        self,
        prompts: Sequence[str],
        noise: np.ndarray,
        steps: Sequence[tuple[int, float, float]],
        *,
        guidance: float,
        clock: Stages | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Images (B, H, W, 3) uint8; ``steps`` are (timestep, a, b) each, see ``schedule.ddim_steps``."""
        key = (noise.shape, guidance)
        shape = self._shapes.get(key, lambda: _TeacherShape(self._model, noise.shape, self._tokenizer, guidance))
        ids = tokenize(self._tokenizer, [*prompts, *([""] * len(prompts) if guidance > 1.0 else [])])
        return shape.run(ids, noise, steps, clock=_Untimed() if clock is None else clock, progress=progress)


class _TeacherShape:
    """The static memory of one shape, and its stages."""

    def __init__(self, model: FastModel, shape: tuple[int, ...], tokenizer: CLIPTokenizer, guidance: float) -> None:
        self._model, self._guidance = model, guidance
        device, length = model.device, int(tokenizer.model_max_length)
        rows = 2 * shape[0] if guidance > 1.0 else shape[0]
        self._ids = torch.zeros((rows, length), dtype=torch.int64, device=device)
        self._latents = torch.zeros(shape, dtype=torch.float32, device=device)
        self._time = model.unet.times(torch.zeros(1, dtype=torch.int64, device=device))
        self._weights = torch.zeros(2, dtype=torch.float32, device=device)
        self._inputs = pinned((rows, length), torch.int64, device), pinned(shape, torch.float32, device)
        self._texts: Tensor
        self._bytes: Tensor
        self._finite: Tensor
        stages = {"text": self._text, "unet": self._step, "vae": self._finish}
        self._stages = captured(model, stages)

    def run(
        self,
        ids: Tensor,
        noise: np.ndarray,
        steps: Sequence[tuple[int, float, float]],
        *,
        clock: Stages,
        progress: Callable[[int], None] | None,
    ) -> np.ndarray:
        """Images (B, H, W, 3) uint8."""
        device = self._model.device
        place(ids, self._inputs[0], self._ids)
        place(torch.from_numpy(noise), self._inputs[1], self._latents)
        times = self._model.unet.times(torch.tensor([timestep for timestep, _, _ in steps], device=device))
        weights = torch.tensor([(a, b) for _, a, b in steps], dtype=torch.float32, device=device)
        with clock.stage("text"):
            self._stages["text"]()
        with clock.stage("unet"):
            for number in range(len(steps)):
                self._time.copy_(times[number : number + 1])
                self._weights.copy_(weights[number])
                self._stages["unet"]()
                if progress is not None:
                    progress(number + 1)
        with clock.stage("vae"):
            self._stages["vae"]()
        return fetch(self._bytes, self._finite, otherwise=lambda: self._model.not_finite(self._ids, self._latents))

    def _text(self) -> None:
        self._texts = self._model.unet.texts(self._model.text(self._ids).to(self._model.dtype))

    def _step(self) -> None:
        rounded = self._latents.to(self._model.dtype)
        if self._guidance > 1.0:
            rounded = torch.cat([rounded, rounded])
        features = self._model.encode(rounded, self._time, self._texts)
        prediction = self._model.decode(features, self._time, self._texts)[0].float()
        if self._guidance > 1.0:
            conditional, unconditional = prediction.chunk(2)
            prediction = unconditional + self._guidance * (conditional - unconditional)
        self._latents.copy_(self._weights[0] * self._latents + self._weights[1] * prediction)

    def _finish(self) -> None:
        self._bytes, self._finite = self._model.pixels(self._latents)


# --- borders -------------------------------------------------------------------------------------------------------


def pinned(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Host memory that a GPU reads without a stop."""
    return torch.empty(tuple(shape), dtype=dtype, pin_memory=device.type == "cuda")


def place(values: Tensor, host: Tensor, device: Tensor) -> None:
    """Copy to the device by way of pinned memory; the last run has been waited for, so nothing reads it any more."""
    host.copy_(values)
    device.copy_(host, non_blocking=True)


def fetch(pixels: Tensor, finite: Tensor, *, otherwise: Callable[[], DeviceError]) -> np.ndarray:
    """Pixels in main memory, and the one wait of a run. Raises ``otherwise()`` for a picture that is not finite."""
    host = pinned(pixels.shape, pixels.dtype, pixels.device)
    flag = pinned((), torch.bool, pixels.device)
    host.copy_(pixels, non_blocking=True)
    flag.copy_(finite, non_blocking=True)
    if pixels.is_cuda:
        torch.cuda.current_stream().synchronize()
    if not bool(flag):
        raise otherwise()
    return host.numpy()


def new_pool(device: torch.device) -> Any:
    """A pool of memory for graphs; None on a CPU."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


@contextlib.contextmanager
def searching(on: bool) -> Iterator[None]:
    """Within the block cuDNN chooses algorithms by trying them; what it has chosen for a shape holds afterwards."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def captured(model: FastModel, stages: dict[str, Callable[[], None]]) -> dict[str, Callable[[], None]]:
    """The stages as CUDA graphs; as they are, with a note, where one of them cannot be captured.

    All or none: a captured stage reads memory that stays, and a plain one makes its results anew.
    """
    if not model.options.captured or model.device.type != "cuda":
        return stages
    found: dict[str, Callable[[], None]] = {}
    for name, stage in stages.items():
        try:
            with searching(model.options.search):
                found[name] = Captured(stage, pool=model.pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            note = f"no CUDA graph, so each image takes longer: {name} cannot be captured ({lines[0][:160]})"
            if note not in model.notes:
                model.notes.append(note)
            return stages
    return found
