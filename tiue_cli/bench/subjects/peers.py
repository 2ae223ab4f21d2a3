"""Other people's text-to-image pipelines, as diffusers runs them: under their own sampler, with our noise."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
from safetensors import SafetensorError

from tiue_cli.bench.config import PeerSpec
from tiue_cli.bench.measure.clock import clock_for
from tiue_cli.bench.report.schema import Stage, SubjectRecord
from tiue_cli.bench.subjects.models import DTYPES, parameter_bytes
from tiue_cli.bench.subjects.torch_subjects import Outcome, Subject
from tiue_cli.errors import ModelFolderError, UsageError
from tiue_cli.files.access import exists, is_file, user_path
from tiue_cli.model.components import quiet

_PARTS = ("text_encoder", "text_encoder_2", "unet", "transformer", "vae")


class PeerSubject(Subject):
    """One pipeline. Its stages are told by when its UNet (or transformer) and its autoencoder's decoder begin.

    Noise goes in as ``latents``, which pipelines scale as their sampler wants; samplers that draw more noise on the way
    get a generator a picture with the same seeds.
    """

    def __init__(self, record: SubjectRecord, pipeline: Any, *, size: tuple[int, int], seed: int) -> None:
        super().__init__(record)
        self._pipeline = pipeline
        self._size = size
        self._seed = seed
        self._clock = clock_for(record.device)
        self._marks = _Marks(pipeline, record.device)

    @property
    def clock_kind(self) -> Literal["wall", "cuda-events"]:
        """``wall`` on a CPU, ``cuda-events`` on a GPU."""
        return self._clock.kind

    def run(self, prompts: Sequence[str], noise: np.ndarray) -> Outcome:
        """See ``Subject.run``."""
        record = self.record
        generators = [torch.Generator(record.device).manual_seed(self._seed + index) for index in range(len(prompts))]
        options = {} if record.guidance is None else {"guidance_scale": record.guidance}
        placed = torch.from_numpy(noise).to(record.device, DTYPES[record.precision])
        with quiet(), torch.inference_mode():
            self._marks.begin()
            (pixels,) = self._pipeline(
                list(prompts),
                num_inference_steps=record.steps,
                height=self._size[0],
                width=self._size[1],
                latents=placed,
                generator=generators,
                output_type="np",
                return_dict=False,
                **options,
            )[:1]
            stage_ms = self._marks.end()
        return Outcome((np.asarray(pixels) * 255.0).round().astype(np.uint8), stage_ms)

    def __enter__(self) -> Self:
        self._marks.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self._marks.detach()


class _Marks:
    """Points in time at which a pipeline's denoiser first begins, and its autoencoder's decoder begins."""

    def __init__(self, pipeline: Any, device: str) -> None:
        self._denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
        self._decoder = getattr(getattr(pipeline, "vae", None), "decoder", None)
        self._device = device
        self._handles: list[Any] = []
        self._points: dict[str, Any] = {}

    def attach(self) -> None:
        """Listen to the modules."""
        for name, module in (("unet", self._denoiser), ("vae", self._decoder)):
            if isinstance(module, torch.nn.Module):
                self._handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._mark(name)))

    def detach(self) -> None:
        """Leave the modules as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def begin(self) -> None:
        """A run starts."""
        self._points = {}
        self._mark("text")

    def end(self) -> dict[Stage, float]:
        """Milliseconds of text, UNet and autoencoder; empty where the pipeline showed no such parts."""
        self._mark("end")
        if set(self._points) != {"text", "unet", "vae", "end"}:
            return {}
        if self._device == "cuda":
            torch.cuda.synchronize()
        return {
            "text": self._between("text", "unet"),
            "unet": self._between("unet", "vae"),
            "vae": self._between("vae", "end"),
        }

    def _mark(self, name: str) -> None:
        if name in self._points:
            return
        if self._device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._points[name] = event
        else:
            self._points[name] = time.perf_counter()

    def _between(self, first: str, second: str) -> float:
        start, end = self._points[first], self._points[second]
        return float(start.elapsed_time(end)) if self._device == "cuda" else (end - start) * 1000.0


def load_peer(peer: PeerSpec, *, device: str, precision: str) -> tuple[Any, float]:
    """(pipeline, seconds it took) from a folder or hub id: safetensors only, and code in repositories is never run.

    Raises ModelFolderError.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    started = time.perf_counter()
    path = user_path(peer.source, error=ModelFolderError)
    like_a_path = peer.source.startswith((".", "/", "~")) or peer.source.count("/") != 1
    looks_local = like_a_path or exists(path, error=ModelFolderError)
    if looks_local and not is_file(path / "model_index.json", error=ModelFolderError):
        raise ModelFolderError(
            f"--peer {peer.name}: {path} is not a diffusers folder (no model_index.json)",
            hint="give a folder that diffusers wrote, or a hub id OWNER/NAME",
        )
    loader: Any = DiffusionPipeline
    try:
        with quiet():
            pipeline = loader.from_pretrained(
                path if looks_local else peer.source,
                dtype=DTYPES[precision],
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=looks_local,
                safety_checker=None,
            ).to(device)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ModelFolderError(
            f"--peer {peer.name}: {peer.source} cannot be loaded: {lines[0] if lines else type(error).__name__}",
            hint="it must be a text-to-image pipeline with .safetensors weights",
        ) from error
    if getattr(pipeline, "vae", None) is None or not callable(pipeline):
        raise UsageError(
            f"--peer {peer.name}: {type(pipeline).__name__} makes no pictures from latents",
            hint="give a text-to-image pipeline",
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, time.perf_counter() - started


def pipeline_bytes(pipeline: Any) -> int:
    """Bytes of the parameters of its parts."""
    parts = (getattr(pipeline, name, None) for name in _PARTS)
    return sum(parameter_bytes(part) for part in parts if isinstance(part, torch.nn.Module))
