"""What the runtimes of exported graphs share: an export folder held ready, four graphs in a row, and what is checked.

    prompts ─ tokenizer ─▶ text_encoder ─▶ unet_encoder ─▶ unet_decoder ─▶ vae_decoder ─▶ pixels

A runtime says how a graph is opened and run; what passes between the graphs stays in the runtime's own tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from tiue_cli.backends.stages import timed_stage
from tiue_cli.backends.tokenizer import PromptTokenizer
from tiue_cli.errors import DeviceError
from tiue_cli.files.exports import GRAPHS, ExportManifest, GraphName, GraphSpec, check_files, read_export_manifest
from tiue_cli.files.external_data import check_external_data

if TYPE_CHECKING:
    import numpy as np

    from tiue_cli.backends.base import ProgressFn

PIXELS_AT_ONCE = 4 * 512 * 512
"""Images are decoded in groups of at most this many pixels, as the torch backend does, to bound the memory."""
_MISMATCH = "it is damaged, or manifest.json belongs to another export: write the folder again with tiue export"

_Graph = TypeVar("_Graph")
"""What a runtime makes of an ONNX file."""


class ExportBackend(ABC, Generic[_Graph]):
    """An export folder held ready in a runtime; see ``backends.base.Backend``."""

    name: str

    def __init__(self, folder: Path | str) -> None:
        """Read the manifest and nothing else. Raises ManifestError."""
        self.folder = Path(folder)
        self.manifest: ExportManifest = read_export_manifest(self.folder)
        self._graphs: dict[str, _Graph] = {}
        self._tokenizer: PromptTokenizer | None = None

    # --- what a runtime says of itself ---

    @property
    @abstractmethod
    def device(self) -> str:
        """Where the graphs run, as ``--device`` calls it."""

    @property
    @abstractmethod
    def dtype(self) -> str:
        """What they compute in, as ``--precision`` calls it."""

    @abstractmethod
    def _open(self, graph: GraphSpec) -> _Graph:
        """Read one graph; called from several threads at once. Raises DeviceError."""

    @abstractmethod
    def _call(self, opened: _Graph, graph: GraphSpec, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """One graph's outputs by name, in the runtime's own tensors; inputs are such tensors or arrays."""

    @staticmethod
    @abstractmethod
    def _array(value: Any) -> np.ndarray:
        """One of the runtime's tensors as an array."""

    def _prepare(self, *, batch: int, steps: int, size: tuple[int, int]) -> None:
        """Called before a run of ``batch`` images of ``size`` (H, W) with K ``steps``; what it makes ready."""

    # --- what is the same for all ---

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the export."""
        if self.manifest.parity is None:
            return ("this export was not checked against its student (--no-check)",)
        return ()

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the model was made for."""
        return self.manifest.default_size

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) for an image of ``size`` (H, W) pixels. Raises UsageError for a size that does not fit."""
        return self.manifest.latent_shape(size)

    def largest_batch(self, size: tuple[int, int]) -> int | None:
        """None: memory is the limit."""
        return None

    def cut_text(self, prompts: Sequence[str]) -> list[str]:
        """The end of each prompt that does not fit; "" where it does."""
        return self._entered.cut_text(prompts)

    def generate(
        self,
        prompts: Sequence[str],
        noise: np.ndarray,
        *,
        steps: int | None = None,
        progress: ProgressFn | None = None,
    ) -> np.ndarray:
        """Images (B, H, W, 3) uint8 from prompts (B) and noise (B, C, h, w) float32; see ``Backend.generate``.

        Raises UsageError for steps or a size that the export lacks, DeviceError where memory or range do not suffice.
        """
        report = progress or (lambda share: None)
        size = self._size_of(noise)
        images = self._decode(self._latents(prompts, noise, steps, report), size)
        report(1.0)
        return images

    def latents(self, prompts: Sequence[str], noise: np.ndarray, *, steps: int | None = None) -> np.ndarray:
        """Latents (B, C, h, w) float32; see ``Backend.latents``. Raises as ``generate``."""
        return self._latents(prompts, noise, steps, lambda share: None)

    def _size_of(self, noise: np.ndarray) -> tuple[int, int]:
        factor = self.manifest.latent_factor
        return noise.shape[2] * factor, noise.shape[3] * factor

    def _latents(self, prompts: Sequence[str], noise: np.ndarray, steps: int | None, report: ProgressFn) -> np.ndarray:
        """Raises DeviceError for latents that are NaN or infinite."""
        import numpy as np

        combine, size = self.manifest.combine(steps), self._size_of(noise)
        self._prepare(batch=len(noise), steps=combine.steps, size=size)
        text_states = self._run("text_encoder", None, {"input_ids": self._entered(prompts)})
        report(0.1)
        features = self._run("unet_encoder", size, {"noise": noise, **text_states})
        report(0.35)
        sums = {
            "timesteps": np.array(combine.timesteps, dtype=np.int64),
            "weights": np.array(combine.weights, dtype=np.float32),
        }
        inputs = {**features, **text_states, "noise": noise, **sums}
        latents = self._array(self._run("unet_decoder", size, inputs)["latents"])
        report(0.75)
        if not np.isfinite(latents).all():
            # Every later part passes them on: the first one is to blame.
            made = {"text encoder": text_states, "UNet encoder": features}
            part = next((part for part, values in made.items() if not self._finite(values)), "UNet decoder")
            raise DeviceError(f"the {part} produced NaN or infinity in {self.dtype}", hint=self._finite_hint)
        return latents

    def _finite(self, values: Mapping[str, Any]) -> bool:
        import numpy as np

        return all(bool(np.isfinite(self._array(value)).all()) for value in values.values())

    @property
    def _finite_hint(self) -> str:
        """What to do about latents that are no numbers."""
        return "export it with --precision fp32"

    def __enter__(self) -> Self:
        files = {spec.file: spec for graph in self.manifest.graphs for spec in (graph.onnx, *graph.data)}
        specs = [self.manifest.tokenizer, *files.values()]
        # Hashing and opening release the interpreter; what a run needs first is opened while the rest is hashed.
        with ThreadPoolExecutor(max_workers=2) as pool:
            checks = [pool.submit(check_files, self.folder, [spec], hint=_MISMATCH) for spec in specs]
            for check in checks:
                check.result()
            for graph in self.manifest.graphs:
                check_external_data(self.folder, graph, hint=_MISMATCH)
            self._tokenizer = PromptTokenizer(self.folder / self.manifest.tokenizer.file)
            eager = [self.manifest.graph(name) for name in GRAPHS]  # those of the default size
            for graph, opened in zip(eager, pool.map(self._open, eager), strict=True):
                self._graphs[graph.onnx.file] = opened
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._graphs.clear()
        self._tokenizer = None

    @property
    def _entered(self) -> PromptTokenizer:
        assert self._tokenizer is not None, "the backend is used inside its with block"
        return self._tokenizer

    def _run(self, name: GraphName, size: tuple[int, int] | None, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """One graph's outputs, on the device."""
        graph = self.manifest.graph(name, size=size)
        opened = self._graph(graph)
        with timed_stage(name):
            return self._call(opened, graph, inputs)

    def _graph(self, graph: GraphSpec) -> _Graph:
        """The graph as the runtime holds it, opened where it is not yet."""
        if graph.onnx.file not in self._graphs:
            self._graphs[graph.onnx.file] = self._open(graph)
        return self._graphs[graph.onnx.file]

    def _decode(self, latents: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Pixels of latents (B, C, h, w)."""
        import numpy as np

        at_once = max(1, PIXELS_AT_ONCE // (size[0] * size[1]))
        groups = [latents[start : start + at_once] for start in range(0, len(latents), at_once)]
        return np.concatenate(
            [self._array(self._run("vae_decoder", size, {"latents": group})["images"]) for group in groups]
        )
