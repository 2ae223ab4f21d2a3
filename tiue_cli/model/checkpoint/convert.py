"""A checkpoint file becomes a model folder: names by diffusers' converters, every tensor accounted for.

    FILE ─ check_checkpoint ─▶ configs (ours, or another folder's) ─▶ UNet, autoencoder, text encoder ─▶ FOLDER

Nothing is asked of the hub. A tensor that a part lacks, and one that it has no place for, are refused by name.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import diffusers
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from tiue_cli.errors import ModelFolderError, UsageError
from tiue_cli.files.atomic import atomic_folder
from tiue_cli.files.manifests import write_json
from tiue_cli.model.checkpoint.kinds import (
    CLIP_TEXT,
    EMA,
    OPEN_CLIP_TEXT,
    UNET,
    VAE,
    CheckpointKind,
    Prediction,
    check_checkpoint,
    check_vae_checkpoint,
)
from tiue_cli.model.checkpoint.tokenizer import write_clip_tokenizer
from tiue_cli.model.components import quiet
from tiue_cli.model.folder import check_model_folder
from tiue_cli.model.parts import part_folder
from tiue_cli.model.sd_configs import SD15_SCHEDULER, SD15_TEXT, SD15_UNET, SD15_VAE, SD21_TEXT, SD21_UNET
from tiue_cli.model.weights import WEIGHT_STEMS, read_json, some_of

_INDEX: Final = "model_index.json"
_V_SIZE: Final = 96
"""Latents of the 2.x models that predict v: 768 pixels."""
_UNCOUNTED: Final = re.compile(r"position_ids$|logit_scale$|text_projection(\.weight)?$|\.in_proj_(weight|bias)$")
"""Tensors of a text encoder without a counterpart of their own: tables, the other half of CLIP, joined q, k and v."""


@dataclass(frozen=True)
class _Parts:
    """What a family's folder is built of: configs by part, and the folder that the rest is copied from."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, Any]
    scheduler: dict[str, Any]
    pad: str
    like: Path | None


def convert_checkpoint(
    path: Path,
    out: Path,
    *,
    prediction: Prediction | None = None,
    ema: bool = False,
    like: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the checkpoint at ``path`` as the model folder ``out``; returns it, checked.

    ``prediction`` says what the UNet predicts where the file does not. ``ema`` takes the averaged weights of a file
    that has both. ``like`` is a model folder of the same family: its configs, tokenizer and schedule are used instead
    of Stable Diffusion's, and parts that the file lacks are copied from it. Weights stay in the file's precision.

    Raises ModelFolderError, UsageError, OutputError.
    """
    kind = check_checkpoint(path)
    if ema and not kind.has_ema:
        raise UsageError(f"{path} holds no averaged weights (EMA)", hint="leave --ema out: its weights are all it has")
    parts = _own_parts(kind, prediction) if like is None else _parts_like(like, prediction)
    tensors = _read(path)
    converters: dict[str, Callable[[], dict[str, Tensor]]] = {
        "unet": lambda: _unet(tensors, parts.unet, ema=ema, where=path),
        "vae": lambda: _vae(tensors, parts.vae, where=path),
        "text_encoder": lambda: _text(tensors, kind, parts.text, where=path),
    }
    lacking = {"vae": not kind.has_vae, "text_encoder": kind.text is None}
    for name, absent in lacking.items():
        if absent and like is None:
            what = "autoencoder" if name == "vae" else "text encoder"
            raise ModelFolderError(
                f"{path} holds no {what}",
                hint=f"take it from a folder of the same family: tiue convert {path.name} FOLDER --like MODEL",
            )
    with atomic_folder(out, overwrite=overwrite, marker=_INDEX) as folder:
        for name, convert in converters.items():
            if lacking.get(name) and like is not None:
                shutil.copytree(part_folder(like, name), folder / name)
                continue
            config = {"unet": parts.unet, "vae": parts.vae, "text_encoder": parts.text}[name]
            _write_part(folder / name, name, convert(), config)
        _write_rest(folder, parts)
        check_model_folder(folder)
    return out


def convert_vae(path: Path, out: Path, *, overwrite: bool = False) -> Path:
    """Write the autoencoder in a file, which may hold a whole model, as a folder with config.json. Raises as above."""
    check_vae_checkpoint(path)
    config = {"_class_name": "AutoencoderKL", **_plain(SD15_VAE)}
    tensors = {name.removeprefix("vae."): tensor for name, tensor in _read(path).items()}
    bare = {
        name: tensor for name, tensor in tensors.items() if name.startswith(("encoder.", "decoder.", "quant_", "post_"))
    }
    named = {f"{VAE}{name}": tensor for name, tensor in bare.items()} or tensors
    with atomic_folder(out, overwrite=overwrite, marker="config.json") as folder:
        _write_part(folder, "vae", _vae(named, config, where=path), config)
    return out


# --- configs -------------------------------------------------------------------------------------------------------


def _own_parts(kind: CheckpointKind, asked: Prediction | None) -> _Parts:
    """Stable Diffusion's own configs. Raises ModelFolderError for another width, and for 2.x without a prediction."""
    families = {768: (SD15_UNET, SD15_TEXT, "<|endoftext|>"), 1024: (SD21_UNET, SD21_TEXT, "!")}
    if kind.text_width not in families:
        raise ModelFolderError(
            f"{kind.path}: its UNet reads text states of width {kind.text_width}, neither SD 1.x's 768 nor 2.x's 1024",
            hint=f"give a folder of its family: tiue convert {kind.path.name} FOLDER --like MODEL",
        )
    prediction = asked or kind.prediction
    if prediction is None:
        raise ModelFolderError(
            f"{kind.path} is of Stable Diffusion 2.x and does not say whether it predicts noise or v",
            hint=f"say it: tiue convert {kind.path.name} FOLDER --prediction v_prediction (768 px) or epsilon (512)",
        )
    unet, text, pad = families[kind.text_width]
    large = kind.text_width == 1024 and prediction == "v_prediction"
    scheduler = {**SD15_SCHEDULER, "prediction_type": prediction}
    if kind.zero_snr:
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return _Parts(
        unet={
            "_class_name": "UNet2DConditionModel",
            **_plain(unet),
            # In half precision the attention of these models overflows otherwise.
            **({"sample_size": _V_SIZE, "upcast_attention": True} if large else {}),
        },
        vae={"_class_name": "AutoencoderKL", **_plain(SD15_VAE)},
        text={"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **text},
        scheduler=scheduler,
        pad=pad,
        like=None,
    )


def _parts_like(like: Path, asked: Prediction | None) -> _Parts:
    check_model_folder(like)
    scheduler = read_json(part_folder(like, "scheduler") / "scheduler_config.json")
    return _Parts(
        unet=read_json(part_folder(like, "unet") / "config.json"),
        vae=read_json(part_folder(like, "vae") / "config.json"),
        text=read_json(part_folder(like, "text_encoder") / "config.json"),
        scheduler=scheduler if asked is None else {**scheduler, "prediction_type": asked},
        pad="",
        like=like,
    )


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}


# --- parts ---------------------------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _unet(tensors: Mapping[str, Tensor], config: Mapping[str, Any], *, ema: bool, where: Path) -> dict[str, Tensor]:
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(UNET)}
    if ema:
        flat = {name: EMA + "".join(name.split(".")[1:]) for name in own}
        absent = sorted(name for name in flat.values() if name not in tensors)
        if absent:
            raise ModelFolderError(f"{where}: the averaged weights lack {some_of(absent)}", hint="leave --ema out")
        own = {name: tensors[flat[name]] for name in own}
    found = _converted(lambda: convert_ldm_unet_checkpoint(own, config=dict(config)), "UNet", where)
    return _complete(found, own, _expected(UNet2DConditionModel, config), part="UNet", where=where)


def _vae(tensors: Mapping[str, Tensor], config: Mapping[str, Any], *, where: Path) -> dict[str, Tensor]:
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(VAE) and ".loss." not in name}
    found = _converted(lambda: convert_ldm_vae_checkpoint(own, config=dict(config)), "autoencoder", where)
    return _complete(found, own, _expected(AutoencoderKL, config), part="autoencoder", where=where)


def _text(
    tensors: Mapping[str, Tensor], kind: CheckpointKind, config: Mapping[str, Any], *, where: Path
) -> dict[str, Tensor]:
    if kind.text == "clip":
        own = {name: tensor for name, tensor in tensors.items() if name.startswith(CLIP_TEXT)}
        found = _converted(lambda: convert_ldm_clip_checkpoint(own), "text encoder", where)
    else:
        # Stable Diffusion 2.x reads the last layer but one: what comes after it is in the file and not in the model.
        layers = int(config["num_hidden_layers"])
        last = re.compile(rf"{re.escape(OPEN_CLIP_TEXT)}(transformer\.resblocks\.{layers}\.|visual\.)")
        own = {name: t for name, t in tensors.items() if name.startswith(OPEN_CLIP_TEXT) and last.match(name) is None}
        stand_in = SimpleNamespace(config=SimpleNamespace(hidden_size=int(config["hidden_size"])))
        own = {name: tensor for name, tensor in own.items() if not name.endswith("text_projection")}
        found = _converted(lambda: convert_open_clip_checkpoint(stand_in, own), "text encoder", where)
    found = {name: tensor for name, tensor in found.items() if _UNCOUNTED.search(name) is None}
    expected = _expected(lambda **fields: CLIPTextModel(CLIPTextConfig(**fields)), config)
    if not any(name.startswith("text_model.") for name in expected):
        # transformers 5 has one level of modules less; folders keep the older names, which it reads.
        expected = {f"text_model.{name}": shape for name, shape in expected.items()}
    return _complete(found, own, expected, part="text encoder", where=where)


def _converted(convert: Callable[[], dict[str, Tensor]], part: str, where: Path) -> dict[str, Tensor]:
    try:
        with quiet():
            return convert()
    except (KeyError, IndexError, AttributeError, ValueError, TypeError) as error:
        raise ModelFolderError(
            f"{where}: its {part} has another layout than Stable Diffusion's ({type(error).__name__}: {error})",
            hint="download the file again, or use the model's folder",
        ) from error


def _expected(build: Callable[..., Any], config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a part's weights, without any memory for them."""
    fields = {name: value for name, value in config.items() if not name.startswith("_")}
    with torch.device("meta"), quiet():
        module = build(**fields)
    return {name: tuple(value.shape) for name, value in module.state_dict().items() if _UNCOUNTED.search(name) is None}


def _complete(
    found: dict[str, Tensor],
    own: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    *,
    part: str,
    where: Path,
) -> dict[str, Tensor]:
    """``found``, if it is the whole part and nothing of ``own`` was left out. Raises ModelFolderError."""
    hint = "download the file again; for another family than Stable Diffusion's own: --like MODEL"
    lacking = sorted(name for name in expected if found.get(name) is None)
    if lacking:
        raise ModelFolderError(f"{where}: its {part} lacks {some_of(lacking)}", hint=hint)
    extra = sorted(found.keys() - expected.keys())
    used = {tensor.data_ptr() for tensor in found.values()}
    extra += [name for name, t in own.items() if t.data_ptr() not in used and _UNCOUNTED.search(name) is None]
    if extra:
        raise ModelFolderError(f"{where}: there is no place in the {part} for {some_of(extra)}", hint=hint)
    for name, shape in expected.items():
        if tuple(found[name].shape) != shape:
            raise ModelFolderError(
                f"{where}: {name} of its {part} is {tuple(found[name].shape)}, and the config says {shape}", hint=hint
            )
    return found


# --- writing -------------------------------------------------------------------------------------------------------


def _write_part(folder: Path, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", dict(config))
    weights = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(weights, folder / f"{WEIGHT_STEMS[name]}.safetensors", metadata={"format": "pt"})


def _write_rest(folder: Path, parts: _Parts) -> None:
    if parts.like is None:
        write_clip_tokenizer(folder / "tokenizer", pad=parts.pad)
    else:
        shutil.copytree(part_folder(parts.like, "tokenizer"), folder / "tokenizer")
    write_json(folder / "scheduler" / "scheduler_config.json", parts.scheduler)
    write_json(
        folder / _INDEX,
        {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": diffusers.__version__,
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", parts.scheduler["_class_name"]],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", str(parts.vae.get("_class_name", "AutoencoderKL"))],
        },
    )
