"""The student folder: load it, save it, and make an untrained one from a teacher."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

from tiue_cli import __version__
from tiue_cli.errors import ModelFolderError, OutputError, SchedulerError, UsageError
from tiue_cli.files.access import exists, user_path
from tiue_cli.files.atomic import atomic_folder
from tiue_cli.files.manifests import write_json
from tiue_cli.files.students import STUDENT_MANIFEST, StudentManifest
from tiue_cli.model.components import Components, load_components, quiet
from tiue_cli.model.folder import ModelInfo
from tiue_cli.model.hub import is_hub_id, resolve_model
from tiue_cli.model.identity import model_sha256
from tiue_cli.model.schedule import (
    RELEASED_SPACING,
    SPACINGS,
    STEPS,
    LinearCombine,
    combine_for_run,
    ddim_config,
    decoder_timesteps,
)
from tiue_cli.model.text import cut_text, encode_prompts
from tiue_cli.model.weights import read_json

__all__ = [
    "StudentModel",
    "cut_text",
    "encode_prompts",
    "load_student",
    "resolve_model",
    "save_student",
    "student_from_teacher",
]


@dataclass
class StudentModel:
    """A one-pass model: plain diffusers and transformers modules, and what the manifest says about them."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL | AutoencoderTiny
    scheduler_config: dict[str, Any]
    manifest: StudentManifest
    source: str
    """What it was loaded from, as it was asked for."""
    notes: list[str] = field(default_factory=list)
    """What the user should be told, one sentence each."""

    def linear_combine(self) -> LinearCombine:
        """The weighted sum over all of the student's timesteps."""
        return LinearCombine.from_scheduler_config(self.scheduler_config, self.manifest.decoder_timesteps)

    def respaced(self, steps: int) -> StudentModel:
        """The same weights as a student of ``steps`` timesteps, its encoder at the first, as the authors have it.

        ``--steps K`` below the trained number keeps the encoder at the timestep that it was trained at (751 for leading
        spacing); the TiUE authors' inference script moves it to the first of the K (501 for K = 2, 667 for K = 3). The
        latents differ by about 1e-2. Save the result (``save_student``) to draw with it or to export it. Raises
        UsageError.
        """
        combine = combine_for_run(
            self.scheduler_config, self.manifest.decoder_timesteps, spacing=self.manifest.spacing, steps=steps
        )
        update = {"decoder_timesteps": combine.timesteps, "encoder_timestep": combine.timesteps[0]}
        return replace(self, manifest=self.manifest.model_copy(update=update))


def load_student(
    source: str | Path | ModelInfo,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    vae: str | Path | None = None,
) -> StudentModel:
    """Load a student from the embedded name, a folder, a hub id or a checked folder; ``vae`` replaces its autoencoder.

    A folder without ``tiue.json``, as the TiUE authors released theirs, gets the paper's four leading timesteps
    ([751, 501, 251, 1] for Stable Diffusion's schedule) and a note that says so; a teacher loaded that way makes poor
    pictures. Raises ModelFolderError, ManifestError, SchedulerError or DeviceError.
    """
    name = source.path if isinstance(source, ModelInfo) else source
    return student_of(load_components(source, device=device, dtype=dtype, vae=vae), source=str(name))


def student_of(components: Components, *, source: str) -> StudentModel:
    """``load_student`` once the parts are there; ``source`` is what notes call them."""
    manifest, notes = components.info.manifest, list(components.info.notes)
    if manifest is None:
        manifest = assumed_manifest(components)
        notes.append(
            f"no {STUDENT_MANIFEST} in {source}: taken as trained with the timesteps"
            f" {list(manifest.decoder_timesteps)}; a model that is not a one-pass student draws noise that way"
        )
    return _student(components, manifest, source=source, notes=notes)


def student_from_teacher(
    teacher: str | Path,
    *,
    steps: int = STEPS,
    spacing: str | None = None,
    timesteps: Sequence[int] | None = None,
    encoder_timestep: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> StudentModel:
    """An untrained student: the teacher's parts, and a manifest with ``steps`` timesteps or the ones given.

    ``spacing`` None takes the scheduler config's own, ``encoder_timestep`` None the first of the timesteps. Raises
    ModelFolderError, SchedulerError, UsageError, DeviceError.
    """
    components = load_components(teacher, device=device, dtype=dtype)
    refuse_student(components.info)
    manifest = _manifest(components, teacher, steps=steps, spacing=spacing, timesteps=timesteps)
    if encoder_timestep is not None:
        check_encoder_timestep(components.scheduler_config, encoder_timestep)
        manifest = manifest.model_copy(update={"encoder_timestep": encoder_timestep})
    return _student(components, manifest, source=str(teacher), notes=[])


def check_encoder_timestep(scheduler_config: Mapping[str, Any], timestep: int) -> None:
    """Raise UsageError where ``timestep`` lies outside the noise schedule."""
    length = ddim_config(scheduler_config)["num_train_timesteps"]
    if timestep >= length:
        raise UsageError(
            f"encoder_timestep {timestep} lies outside the schedule of {length}",
            hint=f"give one from 0 to {length - 1}",
        )


def refuse_student(info: ModelInfo) -> None:
    """Raise ModelFolderError where a student was given as a teacher."""
    if info.manifest is not None:
        raise ModelFolderError(
            f"{info.path} is a student ({STUDENT_MANIFEST} lies in it), not a teacher",
            hint=f"give its teacher: {info.manifest.teacher}",
        )


def choose_timesteps(
    scheduler_config: Mapping[str, Any],
    *,
    steps: int,
    spacing: str | None,
    timesteps: Sequence[int] | None,
    folder: Path | None = None,
) -> tuple[tuple[int, ...], str]:
    """The decoder timesteps of a student to be, and how they are spaced; ``folder`` is named where it is to blame.

    Raises SchedulerError, UsageError.
    """
    if timesteps is not None:
        if spacing is not None:
            raise UsageError("timesteps and a spacing were both given", hint="give one of them")
        chosen, how = tuple(timesteps), "explicit"
    else:
        own = ddim_config(scheduler_config)["timestep_spacing"]
        if spacing is None and own not in SPACINGS:
            file = Path("scheduler", "scheduler_config.json")
            raise SchedulerError(
                f"{file if folder is None else folder / file}: timestep_spacing {own!r} is not supported",
                hint="choose the student's own spacing: --set student.spacing=trailing (or leading)",
            )
        chosen = decoder_timesteps(scheduler_config, steps, spacing=spacing)
        # A single step is the last timestep whatever the spacing: what "trailing" means.
        how = "trailing" if steps == 1 else spacing or str(ddim_config(scheduler_config)["timestep_spacing"])
    # Here rather than after hours of training: what cannot be combined cannot be a student.
    LinearCombine.from_scheduler_config(scheduler_config, chosen)
    return chosen, how


def save_student(
    student: StudentModel, out: Path | str, *, dtype: torch.dtype | None = None, overwrite: bool = False
) -> Path:
    """Write a student folder that plain diffusers can load as well; returns the absolute path.

    Safetensors only, in ``dtype`` or as the weights are; written to a temporary sibling and renamed. Another student
    may be replaced with ``overwrite``, anything else in the way never. Raises OutputError.
    """
    out = user_path(out, error=OutputError).resolve()
    with atomic_folder(out, overwrite=overwrite, marker=STUDENT_MANIFEST) as folder:
        write_parts(student, folder, dtype=dtype)
        write_json(folder / STUDENT_MANIFEST, student.manifest)
        (folder / "README.md").write_text(_model_card(student, name=out.name), encoding="utf-8")
    return out


def write_parts(model: StudentModel | Components, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write what plain diffusers loads into an empty ``folder``: weights, configs, tokenizer and model_index.json."""
    with quiet():
        model.tokenizer.save_pretrained(folder / "tokenizer")
    _drop(folder / "tokenizer" / "tokenizer_config.json", "is_local", "local_files_only", "name_or_path")
    _save_module(model.text_encoder, folder / "text_encoder", name="model", dtype=dtype)
    _save_module(model.unet, folder / "unet", name="diffusion_pytorch_model", dtype=dtype)
    _save_module(model.vae, folder / "vae", name="diffusion_pytorch_model", dtype=dtype)
    write_json(folder / "scheduler" / "scheduler_config.json", model.scheduler_config)
    write_json(folder / "model_index.json", _model_index(model))


def _student(components: Components, manifest: StudentManifest, *, source: str, notes: list[str]) -> StudentModel:
    return StudentModel(
        tokenizer=components.tokenizer,
        text_encoder=components.text_encoder,
        unet=components.unet,
        vae=components.vae,
        scheduler_config=components.scheduler_config,
        manifest=manifest,
        source=source,
        notes=notes,
    )


def assumed_manifest(
    components: Components, *, spacing: str = RELEASED_SPACING, teacher: str = "unknown"
) -> StudentManifest:
    """What a model without tiue.json is taken for: the paper's number of timesteps, spaced as the released students'.

    Raises SchedulerError for a schedule that has no such timesteps.
    """
    timesteps = decoder_timesteps(components.scheduler_config, STEPS, spacing=spacing)
    return _manifest_of(components, timesteps=timesteps, spacing=spacing, teacher=teacher)


def _manifest(
    components: Components,
    teacher: str | Path,
    *,
    steps: int,
    spacing: str | None,
    timesteps: Sequence[int] | None,
) -> StudentManifest:
    chosen, how = choose_timesteps(
        components.scheduler_config, steps=steps, spacing=spacing, timesteps=timesteps, folder=components.info.path
    )
    local = not isinstance(teacher, str) or exists(teacher, error=ModelFolderError)
    named = Path(teacher).resolve().name if local else str(teacher)
    manifest = _manifest_of(components, timesteps=chosen, spacing=how, teacher=named)
    return manifest.model_copy(update={"teacher_sha256": model_sha256(components.info.path)})


def _manifest_of(components: Components, *, timesteps: tuple[int, ...], spacing: str, teacher: str) -> StudentManifest:
    return StudentManifest.model_validate(
        {
            "decoder_timesteps": timesteps,
            "encoder_timestep": timesteps[0],
            "spacing": spacing,
            "prediction_type": ddim_config(components.scheduler_config)["prediction_type"],
            "teacher": teacher,
            "license": components.info.license,
            "tiue_version": __version__,
        }
    )


def _save_module(
    module: CLIPTextModel | UNet2DConditionModel | AutoencoderKL | AutoencoderTiny,
    folder: Path,
    *,
    name: str,
    dtype: torch.dtype | None,
) -> None:
    """Write config.json and NAME.safetensors as the libraries' own save_pretrained does, in ``dtype``.

    Not through save_pretrained: that would write the path it was loaded from, and could not cast without a copy.
    """
    stored = module.dtype if dtype is None else dtype
    if isinstance(module, CLIPTextModel):
        config = module.config.to_diff_dict() | {"architectures": ["CLIPTextModel"]}
        config["dtype"] = str(stored).removeprefix("torch.")
    else:
        config = json.loads(module.to_json_string())
    write_json(folder / "config.json", config)
    _drop(folder / "config.json", "_name_or_path")
    weights = {key: value.detach().to("cpu", stored).contiguous() for key, value in module.state_dict().items()}
    path = folder / f"{name}.safetensors"
    # Its full disk and its mode (the owner's alone, whatever the umask) are ``atomic_folder``'s business.
    save_file(weights, path, metadata={"format": "pt"})


def _drop(path: Path, *fields: str) -> None:
    """Take out what the libraries remember of where the files came from: it is nobody's business, and moves hashes."""
    write_json(path, {key: value for key, value in read_json(path).items() if key not in fields})


def _model_index(model: StudentModel | Components) -> dict[str, Any]:
    """model_index.json as ``StableDiffusionPipeline.save_pretrained`` writes it."""
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", model.scheduler_config["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", type(model.vae).__name__],
    }


def _model_card(student: StudentModel, *, name: str) -> str:
    """README.md: the front matter that the hub reads, and how to use the folder."""
    manifest = student.manifest
    base = f"base_model: {manifest.teacher}\n" if is_hub_id(manifest.teacher) else ""
    trained = f"{manifest.training_steps:,} training steps" if manifest.training_steps else "untrained"
    return (
        "---\n"
        f"license: {manifest.license}\n"
        f"{base}"
        "library_name: diffusers\n"
        "pipeline_tag: text-to-image\n"
        "tags: [tiue, one-pass, distillation]\n"
        "---\n\n"
        f"# {name}\n\n"
        f"A one-pass text-to-image student of `{manifest.teacher}` ({trained}): the UNet encoder runs once, at timestep"
        f" {manifest.encoder_timestep}; the UNet decoder runs once over the timesteps"
        f" {list(manifest.decoder_timesteps)} as one batch; a weighted sum gives the latents.\n\n"
        "```\n"
        f'tiue generate "a prompt" --model {name}\n'
        "```\n\n"
        "Plain diffusers can load the folder, but its samplers do not take the one pass that these weights are for.\n"
    )
