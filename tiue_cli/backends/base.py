"""What every backend offers: prompts and noise in, pictures out; nothing of how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, runtime_checkable

if TYPE_CHECKING:
    import numpy as np

    from tiue_cli.files.png import LoraUse

ProgressFn = Callable[[float], None]
"""Called with the share of a batch that is done, 0 to 1; from the thread that generates."""


class Backend(Protocol):
    """A model held ready on a device, between ``__enter__`` and ``__exit__``.

    Construction is cheap and loads nothing; everything but the plain attributes needs the backend entered.
    """

    @property
    def name(self) -> str:
        """What ``--backend`` calls it, e.g. ``torch``."""

    @property
    def device(self) -> str:
        """``cpu``, ``cuda``, or OpenVINO's ``gpu`` and ``npu``; never ``auto``."""

    @property
    def dtype(self) -> str:
        """``fp32``, ``fp16`` or ``bf16``, never ``auto``."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the loaded model, one sentence each."""

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the model was made for."""

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image of ``size`` (H, W) pixels. Raises UsageError where sides do not fit."""

    def largest_batch(self, size: tuple[int, int]) -> int | None:
        """The most images of ``size`` (H, W) pixels in one run; None where nothing but memory limits it."""

    def cut_text(self, prompts: Sequence[str]) -> list[str]:
        """The end of each prompt that the text encoder cannot take in; "" where it takes the whole."""

    def generate(
        self,
        prompts: Sequence[str],
        noise: np.ndarray,
        *,
        steps: int | None = None,
        progress: ProgressFn | None = None,
    ) -> np.ndarray:
        """Make one image a prompt from ``noise`` (B, C, h, w) float32; returns (B, H, W, 3) uint8.

        ``steps`` None takes the model's own number. Image i depends on prompt i and noise i only, up to the rounding
        of the backend's arithmetic.
        """

    def latents(self, prompts: Sequence[str], noise: np.ndarray, *, steps: int | None = None) -> np.ndarray:
        """``generate`` before the autoencoder: latents (B, C, h, w) float32, in the scale that the UNet works in."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@runtime_checkable
class TakesLoras(Protocol):
    """What a backend offers besides where adapters can be put on its model."""

    def use_loras(self, loras: Sequence[LoraUse]) -> None:
        """Draw with exactly these adapters from now on; () is the bare model. Raises AdapterError."""
