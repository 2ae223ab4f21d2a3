"""What a model folder is, read from its configs and weight headers alone: no torch, no weights in memory.

A model folder is what ``StableDiffusionPipeline.save_pretrained`` writes; a student has ``tiue.json`` beside it.
Everything that makes a folder unusable is found here, before gigabytes are read, and said in one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, computed_field

from tiue_cli.base.text import excerpt
from tiue_cli.errors import AccessError, ManifestError, ModelFolderError
from tiue_cli.files.access import has_file, is_folder, kind_of, list_folder, read_bytes
from tiue_cli.files.manifests import read_manifest
from tiue_cli.files.students import STUDENT_MANIFEST, StudentManifest
from tiue_cli.model.component_configs import (
    SchedulerConfig,
    TextConfig,
    TokenizerConfig,
    UNetConfig,
    VaeConfig,
    class_in_index,
)
from tiue_cli.model.parts import part_folder
from tiue_cli.model.sd_configs import check_unet_config
from tiue_cli.model.weights import DOWNLOAD_AGAIN, WEIGHT_STEMS, ComponentInfo, inspect_weights, read_json

Kind = Literal["student", "teacher"]

COMPONENTS = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")
"""The sub-folders of a Stable Diffusion folder that we use; a safety checker beside them is ignored."""

_VAE_CLASSES = ("AutoencoderKL", "AutoencoderTiny")
_SUPPORTED = "tiue handles Stable Diffusion 1.x and 2.x: one CLIP text encoder, one UNet2DConditionModel"

_Config = TypeVar("_Config", bound=BaseModel)
_CARD_BYTES = 2**20


# --- what is found -------------------------------------------------------------------------------------------------


class ModelInfo(BaseModel):
    """A model folder that has passed all checks. Sizes are (height, width)."""

    model_config = ConfigDict(frozen=True)

    path: Path
    kind: Kind
    manifest: StudentManifest | None
    """None for a teacher, and for a student that was released without tiue.json."""
    sample_size: tuple[int, int]
    """Latents (h, w) at the size that the model was trained for."""
    factor: int
    """Pixels per latent, along each side."""
    latent_channels: int
    text_tokens: int
    """Length of the token sequence that the text encoder takes, start and end token included."""
    text_width: int
    unet_widths: tuple[int, ...]
    vae_class: str
    scheduler_class: str
    prediction_type: Literal["epsilon", "v_prediction", "sample"]
    components: tuple[ComponentInfo, ...]
    license: str
    notes: tuple[str, ...] = ()

    @computed_field  # type: ignore[prop-decorator]
    @property
    def image_size(self) -> tuple[int, int]:
        """Pixels (H, W) at the size that the model was trained for."""
        return (self.sample_size[0] * self.factor, self.sample_size[1] * self.factor)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def decoder_timesteps(self) -> tuple[int, ...] | None:
        """The student's timesteps; None where the folder does not say."""
        return None if self.manifest is None else self.manifest.decoder_timesteps

    @computed_field  # type: ignore[prop-decorator]
    @property
    def teacher(self) -> str | None:
        """What the student was distilled from; None for a teacher."""
        return None if self.manifest is None else self.manifest.teacher

    @computed_field  # type: ignore[prop-decorator]
    @property
    def parameters(self) -> int:
        """Number of weights in all components."""
        return sum(component.parameters for component in self.components)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def size_bytes(self) -> int:
        """Bytes of all weights as stored."""
        return sum(component.size_bytes for component in self.components)

    def component(self, name: str) -> ComponentInfo:
        """The component ``text_encoder``, ``unet`` or ``vae``; KeyError for another name."""
        for component in self.components:
            if component.name == name:
                return component
        raise KeyError(name)

    def folder(self, name: str) -> Path:
        """Where a component, the tokenizer or the scheduler lies."""
        return part_folder(self.path, name)


# --- the check -----------------------------------------------------------------------------------------------------


def check_model_folder(path: Path | str) -> ModelInfo:
    """Read what a local model folder is. ModelFolderError or ManifestError says what is wrong, where, and what next."""
    path = Path(path)
    _refuse_other_things(path)
    index = read_json(path / "model_index.json")
    refuse_other_pipelines(index, path)
    _refuse_missing_parts(path)

    folders = {name: part_folder(path, name) for name in COMPONENTS}
    config_files = {name: folders[name] / "config.json" for name in WEIGHT_STEMS}
    check_unet_config(read_json(config_files["unet"]), where=str(config_files["unet"]))
    unet = _read_config(config_files["unet"], UNetConfig)
    vae = _read_config(config_files["vae"], VaeConfig)
    text = _read_config(config_files["text_encoder"], TextConfig)
    scheduler = _read_config(folders["scheduler"] / "scheduler_config.json", SchedulerConfig)
    tokens = _check_tokenizer(folders["tokenizer"], positions=text.max_position_embeddings)
    _check_text_class(config_files["text_encoder"], text)
    _check_vae_class(config_files["vae"], vae)
    text_width = _check_fit(config_files["unet"], unet=unet, vae=vae, text=text)

    classes = {"text_encoder": "CLIPTextModel", "unet": unet.class_name, "vae": vae.class_name}
    components = tuple(inspect_weights(folders[name], name=name, class_name=classes[name]) for name in classes)
    configs: tuple[TextConfig | UNetConfig | VaeConfig, ...] = (text, unet, vae)
    for component, config in zip(components, configs, strict=True):
        _refuse_more_blocks_than_tensors(config_files[component.name], component, config.blocks)
    manifest = _read_student_manifest(path, scheduler=scheduler)
    released = manifest is None and _looks_released(path)
    return ModelInfo(
        path=path,
        kind="student" if manifest is not None or released else "teacher",
        manifest=manifest,
        sample_size=(unet.sample_size, unet.sample_size) if isinstance(unet.sample_size, int) else unet.sample_size,
        factor=vae.factor,
        latent_channels=vae.latent_channels,
        text_tokens=tokens,
        text_width=text_width,
        unet_widths=unet.block_out_channels,
        vae_class=vae.class_name,
        scheduler_class=scheduler.class_name,
        prediction_type=scheduler.prediction_type,
        components=components,
        license=_license(path, manifest),
        notes=(f"no {STUDENT_MANIFEST}: taken for a released TiUE student by its name",) if released else (),
    )


def check_vae_folder(path: Path | str) -> Path:
    """The folder with an autoencoder's own config.json: ``path``, or ``path``/vae. Raises ModelFolderError."""
    path = Path(path)
    kind = kind_of(path, error=ModelFolderError)
    if kind == "file":
        raise ModelFolderError(
            f"{path} is a single file; give an autoencoder's folder (config.json and its weights)",
            hint="convert it: AutoencoderKL.from_single_file(FILE).save_pretrained(FOLDER), then --vae FOLDER",
        )
    if kind != "folder":
        raise ModelFolderError(f"autoencoder folder {path} does not exist", hint="check the path")
    folder = path if _has(path / "config.json") else part_folder(path, "vae")
    config = _read_config(folder / "config.json", VaeConfig)
    _check_vae_class(folder / "config.json", config)
    component = inspect_weights(folder, name="vae", class_name=config.class_name)
    _refuse_more_blocks_than_tensors(folder / "config.json", component, config.blocks)
    return folder


def _refuse_other_things(path: Path) -> None:
    """Refuse what is no Stable Diffusion folder at all, each kind in its own words."""
    kind = kind_of(path, error=ModelFolderError)
    if kind == "file":
        raise ModelFolderError(
            f"{path} is a single file, and a model folder is needed",
            hint=f"convert it: tiue convert {path} FOLDER"
            if path.suffix.lower() == ".safetensors"
            else "give a model folder (model_index.json, unet, vae, …), or a .safetensors checkpoint",
        )
    if kind == "special":
        raise ModelFolderError(f"{path} is neither a file nor a folder", hint="give a model folder")
    if kind == "nothing":
        raise ModelFolderError(
            f"model folder {path} does not exist", hint="check the path, or give a hub id OWNER/NAME"
        )
    if _has(path / "model_index.json"):
        return
    if _has(path / "engine.json"):
        raise ModelFolderError(
            f"{path} holds TensorRT engines, not a model", hint="give the student folder that they were built from"
        )
    files = list_folder(path, error=ModelFolderError)
    if _has(path / "manifest.json") and any(file.suffix == ".onnx" for file in files):
        raise ModelFolderError(
            f"{path} holds an exported student (ONNX graphs), not a model folder",
            hint="give the student folder that it was exported from; its manifest.json names it",
        )
    if any(file.match("*lora*.safetensors") for file in files) or _has(path / "adapter_config.json"):
        raise ModelFolderError(
            f"{path} holds LoRA weights, not a whole model", hint="give the folder of the model that they belong to"
        )
    if _has(path / "config.json") or _has(path / "unet" / "config.json"):
        what = "one component" if _has(path / "config.json") else "a UNet without the rest"
        raise ModelFolderError(
            f"{path} holds {what}: model_index.json is missing",
            hint="copy the teacher's model_index.json, tokenizer, text_encoder, vae and scheduler beside unet",
        )
    checkpoint = next((file for suffix in (".safetensors", ".ckpt") for file in files if file.suffix == suffix), None)
    if checkpoint is not None:
        raise ModelFolderError(
            f"{path} holds a single-file checkpoint ({checkpoint.name}) and no model_index.json",
            hint=f"give the file itself: {checkpoint}"
            if checkpoint.suffix == ".safetensors"
            else "it is a pickle, which can run code when it is opened: look for a .safetensors version of the model",
        )
    raise ModelFolderError(
        f"{path} is not a model folder: model_index.json is missing",
        hint="give the folder that holds model_index.json, unet, vae, text_encoder, tokenizer and scheduler",
    )


def refuse_other_pipelines(index: Mapping[str, Any], where: Path | str) -> None:
    """Refuse, by model_index.json alone, families that are built otherwise. Raises ModelFolderError."""
    name = excerpt(str(index.get("_class_name", "")))
    if "transformer" in index or any(part in name for part in ("StableDiffusion3", "Flux", "PixArt", "Sana", "DiT")):
        raise ModelFolderError(
            f"{where} holds a diffusion transformer ({name or 'transformer/'}), and tiue needs a UNet with an encoder"
            " and a decoder",
            hint=_SUPPORTED,
        )
    if "StableDiffusionXL" in name or class_in_index(index, "text_encoder_2") is not None:
        raise ModelFolderError(f"{where} holds an SDXL model ({name}) with two text encoders", hint=_SUPPORTED)
    missing = [part for part in COMPONENTS if class_in_index(index, part) is None]
    if missing:
        raise ModelFolderError(
            f"{Path(where) / 'model_index.json'} does not name {' or '.join(missing)} ({name or 'no _class_name'})",
            hint=_SUPPORTED,
        )


def _refuse_missing_parts(path: Path) -> None:
    missing = [name for name in COMPONENTS if not is_folder(part_folder(path, name), error=ModelFolderError)]
    if missing:
        raise ModelFolderError(
            f"{path} is incomplete: {', '.join(name + '/' for name in missing)} missing",
            hint="download or copy the folder again, or copy the parts from the teacher's folder",
        )


def _check_tokenizer(folder: Path, *, positions: int) -> int:
    """Length of the token sequence. Raises ModelFolderError for missing or foreign tokenizer files."""
    whole = _has(folder / "tokenizer.json")
    missing = [name for name in ("vocab.json", "merges.txt") if not _has(folder / name)]
    if not whole and missing:
        raise ModelFolderError(
            f"{folder / missing[0]} is missing (and there is no tokenizer.json)", hint=DOWNLOAD_AGAIN
        )
    for name in ("tokenizer.json",) if whole else ("vocab.json",):
        read_json(folder / name)
    config_path = folder / "tokenizer_config.json"
    if not _has(config_path):
        return positions
    config = _read_config(config_path, TokenizerConfig)
    if config.tokenizer_class not in ("CLIPTokenizer", "CLIPTokenizerFast"):
        raise ModelFolderError(
            f"{config_path}: tokenizer_class is {excerpt(config.tokenizer_class)}, not CLIPTokenizer", hint=_SUPPORTED
        )
    length = positions if config.model_max_length is None else config.model_max_length
    return int(min(length, positions))


def _check_text_class(path: Path, config: TextConfig) -> None:
    classes = config.architectures or ("CLIPTextModel",)
    if "clip" not in config.model_type or not any(name.startswith("CLIPTextModel") for name in classes):
        raise ModelFolderError(
            f"{path}: {classes[0]} (model_type {config.model_type}) is not a CLIPTextModel", hint=_SUPPORTED
        )


def _check_vae_class(path: Path, config: VaeConfig) -> None:
    if config.class_name not in _VAE_CLASSES:
        raise ModelFolderError(
            f"{path}: _class_name is {config.class_name}, not one of {', '.join(_VAE_CLASSES)}",
            hint="give another autoencoder",
        )


def _check_fit(config_file: Path, *, unet: UNetConfig, vae: VaeConfig, text: TextConfig) -> int:
    """The text width that all parts agree on. Raises ModelFolderError for parts of different models."""
    widths = {unet.cross_attention_dim} if isinstance(unet.cross_attention_dim, int) else set(unet.cross_attention_dim)
    if widths != {text.hidden_size}:
        raise ModelFolderError(
            f"{config_file}: cross_attention_dim {unet.cross_attention_dim} does not fit the text"
            f" encoder's hidden_size {text.hidden_size}",
            hint="the parts come from different models: take all of them from one",
        )
    if unet.in_channels != vae.latent_channels:
        raise ModelFolderError(
            f"{config_file}: in_channels {unet.in_channels} does not fit the autoencoder's"
            f" latent_channels {vae.latent_channels}",
            hint="the parts come from different models: take all of them from one",
        )
    return text.hidden_size


def _read_student_manifest(path: Path, *, scheduler: SchedulerConfig) -> StudentManifest | None:
    if not has_file(path / STUDENT_MANIFEST, error=ManifestError):
        return None
    manifest = read_manifest(path / STUDENT_MANIFEST, StudentManifest)
    if manifest.prediction_type != scheduler.prediction_type:
        raise ModelFolderError(
            f"{path / STUDENT_MANIFEST}: prediction_type {manifest.prediction_type} contradicts"
            f" {scheduler.prediction_type} in scheduler/scheduler_config.json",
            hint="restore the file that was changed",
        )
    latest = max(manifest.decoder_timesteps[0], manifest.encoder_timestep)
    if latest >= scheduler.num_train_timesteps:
        raise ModelFolderError(
            f"{path / STUDENT_MANIFEST}: timestep {latest} lies outside the schedule of"
            f" {scheduler.num_train_timesteps} in scheduler/scheduler_config.json",
            hint="restore the file that was changed",
        )
    return manifest


def _looks_released(path: Path) -> bool:
    """The TiUE authors released whole pipelines as ``loopfree-sd…`` without a manifest: only the name tells them.

    In the hub's cache the repository's name is two levels up: models--OWNER--NAME/snapshots/COMMIT.
    """
    names = [path.resolve().name, *(part.rpartition("--")[2] for part in path.parts if part.startswith("models--"))]
    return any(name.lower().startswith("loopfree-sd") for name in names)


def _has(path: Path) -> bool:
    """Whether a file of the folder's own is there. ModelFolderError for anything else that bears its name."""
    return has_file(path, error=ModelFolderError)


def _refuse_more_blocks_than_tensors(path: Path, component: ComponentInfo, blocks: int) -> None:
    """Before anything is built: a config of other weights may ask for more than memory and patience hold."""
    if blocks > component.tensors:
        raise ModelFolderError(
            f"{path} asks for {blocks:,} blocks, but the weights beside it have only {component.tensors:,} tensors",
            hint="restore the config that belongs to these weights",
        )


def _read_config(path: Path, type_: type[_Config]) -> _Config:
    try:
        return type_.model_validate(read_json(path))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][:1])
        raise ModelFolderError(
            f"{path}: field {excerpt(field)!r}: {excerpt(first['msg'])}",
            hint="restore the config that belongs to these weights",
        ) from error


def _license(path: Path, manifest: StudentManifest | None) -> str:
    """The licence that the folder states: its manifest's, else the front matter of README.md, else ``unknown``."""
    if manifest is not None and manifest.license != "unknown":
        return manifest.license
    try:
        lines = read_bytes(path / "README.md", limit_bytes=_CARD_BYTES).decode("utf-8").splitlines()
    except (OSError, AccessError, UnicodeDecodeError):
        return "unknown"
    if not lines or lines[0].strip() != "---":
        return "unknown"
    fields: dict[str, str] = {}
    for line in lines[1:]:
        if line.strip() == "---":
            break
        key, colon, value = line.partition(":")
        if colon and not line.startswith((" ", "-")):
            fields[key.strip()] = value.strip().strip("\"'")
    # "other" is the hub's word for a licence with a name of its own.
    named = fields.get("license_name", "")
    return named if fields.get("license") == "other" and named else fields.get("license") or "unknown"
