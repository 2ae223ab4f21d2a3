"""The packaged student on a CPU: its graphs, which start in a fraction of a second, and torch while it has adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Self

from tiue_cli.backends.base import Backend, ProgressFn, TakesLoras

if TYPE_CHECKING:
    import numpy as np

    from tiue_cli.files.png import LoraUse


class PackagedBackend:
    """See ``backends.base.Backend`` and ``TakesLoras``. Without adapters a picture never depends on those before it."""

    def __init__(self, graphs: Backend, torch: Callable[[], Backend]) -> None:
        """``torch`` makes the backend that takes adapters; it is called at the first adapter."""
        self._graphs, self._make_torch = graphs, torch
        self._torch: Backend | None = None
        self._used = graphs
        self._stack = ExitStack()

    def use_loras(self, loras: Sequence[LoraUse]) -> None:
        """Draw with exactly these adapters from now on. Raises AdapterError, and what loading the model raises."""
        if self._torch is None and loras:
            self._torch = self._stack.enter_context(self._make_torch())
        if isinstance(self._torch, TakesLoras):
            self._torch.use_loras(loras)
        self._used = self._torch if loras and self._torch is not None else self._graphs

    @property
    def name(self) -> str:
        """``onnx``, or ``torch`` with adapters."""
        return self._used.name

    @property
    def device(self) -> str:
        """``cpu``."""
        return self._used.device

    @property
    def dtype(self) -> str:
        """``fp32``."""
        return self._used.dtype

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the model."""
        return self._used.notes

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the model was made for."""
        return self._used.default_size

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) for an image of ``size`` (H, W) pixels. Raises UsageError for a size that does not fit."""
        return self._used.latent_shape(size)

    def largest_batch(self, size: tuple[int, int]) -> int | None:
        """None: memory is the limit."""
        return self._used.largest_batch(size)

    def cut_text(self, prompts: Sequence[str]) -> list[str]:
        """The end of each prompt that does not fit; "" where it does."""
        return self._used.cut_text(prompts)

    def generate(
        self, prompts: Sequence[str], noise: np.ndarray, *, steps: int | None = None, progress: ProgressFn | None = None
    ) -> np.ndarray:
        """Images (B, H, W, 3) uint8; see ``Backend.generate``."""
        return self._used.generate(prompts, noise, steps=steps, progress=progress)

    def latents(self, prompts: Sequence[str], noise: np.ndarray, *, steps: int | None = None) -> np.ndarray:
        """Latents (B, C, h, w) float32; see ``Backend.latents``."""
        return self._used.latents(prompts, noise, steps=steps)

    def __enter__(self) -> Self:
        self._stack.enter_context(self._graphs)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._used, self._torch = self._graphs, None
        self._stack.close()
