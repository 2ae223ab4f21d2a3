"""Other people's text-to-image pipelines, as diffusers runs them: under their own sampler, with our noise."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from tiue_cli.bench.config import PeerSpec
from tiue_cli.bench.measure.clock import clock_for
from tiue_cli.bench.report.schema import Stage, SubjectRecord
from tiue_cli.bench.subjects.models import DTYPES, parameter_bytes
from tiue_cli.bench.subjects.subject import Subject
from tiue_cli.errors import ModelFolderError, UsageError
from tiue_cli.files.access import exists, is_file, user_path
from tiue_cli.model.components import quiet

_PARTS = ("text_encoder", "text_encoder_2", "unet", "transformer", "vae")


def peer_subject(
    record: SubjectRecord, pipeline: Any, stack: ExitStack, *, size: tuple[int, int], seed: int
) -> Subject:
    """One pipeline, whose modules are listened to until ``stack`` closes; ``size`` is (H, W) in pixels.

    Stages are told by when its UNet (or transformer) and its autoencoder's decoder first begin. Noise goes in as
    ``latents``, which pipelines scale as their sampler wants; samplers that draw more noise on the way get a generator
    a picture with the same seeds.
    """
    clock = clock_for(record.device)
    running = ExitStack()
    """The stage that runs."""
    begun: list[Stage] = []

    def begin(stage: Stage) -> None:
        if stage not in begun:
            running.close()
            running.enter_context(clock.stage(stage))
            begun.append(stage)

    denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    decoder = getattr(getattr(pipeline, "vae", None), "decoder", None)
    modules: dict[Stage, Any] = {"unet": denoiser, "vae": decoder}
    for stage, module in modules.items():
        if isinstance(module, torch.nn.Module):
            stack.callback(module.register_forward_pre_hook(lambda *_, stage=stage: begin(stage)).remove)

    @torch.inference_mode()
    def draw(prompts: Sequence[str], noise: np.ndarray) -> np.ndarray:
        options = {} if record.guidance is None else {"guidance_scale": record.guidance}
        generators = [torch.Generator(record.device).manual_seed(seed + index) for index in range(len(prompts))]
        placed = torch.from_numpy(noise).to(record.device, DTYPES[record.precision])
        begun.clear()
        with quiet(), running:
            begin("text")
            (pixels,) = pipeline(
                list(prompts),
                num_inference_steps=record.steps,
                height=size[0],
                width=size[1],
                latents=placed,
                generator=generators,
                output_type="np",
                return_dict=False,
                **options,
            )[:1]
        if len(begun) < 3:
            clock.take_ms()  # a pipeline that showed no such parts has no stages
        return (np.asarray(pixels) * 255.0).round().astype(np.uint8)

    return Subject(record, draw, clock)


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
