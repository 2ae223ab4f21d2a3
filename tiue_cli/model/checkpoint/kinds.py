"""What a single checkpoint file is, from the names and shapes of its tensors alone: no torch, no weights in memory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from tiue_cli.errors import ModelFolderError
from tiue_cli.model.weights import safetensors_header, some_of

Prediction = Literal["epsilon", "v_prediction"]

UNET: Final = "model.diffusion_model."
VAE: Final = "first_stage_model."
CLIP_TEXT: Final = "cond_stage_model.transformer."
OPEN_CLIP_TEXT: Final = "cond_stage_model.model."
EMA: Final = "model_ema."
_TO_K: Final = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
_CONV_IN: Final = f"{UNET}input_blocks.0.0.weight"
_PICKLES: Final = (".ckpt", ".pt", ".pth", ".bin", ".pkl")

_HINT: Final = "tiue takes text-to-image files of Stable Diffusion 1.x and 2.x"
_OTHERS: Final = (
    (r"lora_(A|B|up|down|mid)\b|lokr_|hada_w|dora_scale|^lora_", "a LoRA, not a whole model", "give it to --lora"),
    (r"^conditioner\.embedders\.1\.", "SDXL", _HINT),
    (r"^conditioner\.embedders\.0\.model\.", "the SDXL refiner", _HINT),
    (r"joint_blocks\.", "Stable Diffusion 3", _HINT),
    (r"(double|single)_blocks\.|double_stream_blocks|single_stream_modulation", "Flux", _HINT),
    (r"^text_encoders\.", "a model with several text encoders", _HINT),
    (r"^control_model\.|^controlnet_cond_embedding", "a ControlNet", _HINT),
    (r"motion_modules\.", "a motion module (AnimateDiff)", _HINT),
    (r"^(noise_augmentor|embedder)\.", "Stable unCLIP, which draws from pictures", _HINT),
    (rf"^{re.escape(UNET)}label_emb\.", "an SDXL or upscaling UNet", _HINT),
    (r"adaLN|patchify_proj|cap_embedder", "a diffusion transformer", _HINT),
)
_IGNORED: Final = re.compile(
    r"betas$|^alphas_cumprod|^(sqrt|log)_|^posterior_|^lvlb_weights$|^logvar$|^global_step$|^scale_factor$|^v_pred$"
    r"|^ztsnr$|^model_ema\.(decay|num_updates)$|^safety_checker\.|^denoiser\.|position_ids$|\.logit_scale$"
    r"|text_projection$|^first_stage_model\.loss\.|^model_ema_|^cond_stage_model\.model\.visual\."
)
"""Tensors that mean nothing to a picture: tables that the schedule gives, counters, losses."""


@dataclass(frozen=True)
class CheckpointKind:
    """A checkpoint that can be converted. ``prediction`` is None where the file does not say.

    ``text_width`` is the width of the text states that its UNet reads: 768 in SD 1.x, 1024 in 2.x.
    """

    path: Path
    text_width: int
    has_vae: bool
    text: Literal["clip", "open_clip"] | None
    has_ema: bool
    prediction: Prediction | None
    zero_snr: bool


def check_checkpoint(path: Path) -> CheckpointKind:
    """Look at a file that was given as a model; what is none of Stable Diffusion 1.x or 2.x is refused by name.

    Raises ModelFolderError.
    """
    tensors = checkpoint_header(path)
    if _CONV_IN not in tensors or _TO_K not in tensors:
        raise ModelFolderError(f"{path} is {_what_else(tensors)}, not a whole model", hint=_HINT)
    _refuse_other_inputs(path, int(tensors[_CONV_IN]["shape"][1]))
    known = (UNET, VAE, CLIP_TEXT, OPEN_CLIP_TEXT, EMA)
    unknown = sorted(name for name in tensors if not name.startswith(known) and _IGNORED.search(name) is None)
    if unknown:
        raise ModelFolderError(
            f"{path} holds tensors that belong to no part of Stable Diffusion: {some_of(unknown)}", hint=_HINT
        )
    text_width = int(tensors[_TO_K]["shape"][1])
    return CheckpointKind(
        path=path,
        text_width=text_width,
        has_vae=any(name.startswith(VAE) for name in tensors),
        text=_text_kind(tensors),
        has_ema=sum(name.startswith(EMA) for name in tensors) > len(tensors) // 10,
        prediction=_prediction(path, tensors, text_width=text_width),
        zero_snr="ztsnr" in tensors,
    )


def check_vae_checkpoint(path: Path) -> None:
    """Look at a file that was given as an autoencoder, alone or in a whole model. Raises ModelFolderError."""
    tensors = checkpoint_header(path)
    names = {name.removeprefix(VAE).removeprefix("vae.") for name in tensors}
    if not {"decoder.conv_in.weight", "post_quant_conv.weight"} <= names:
        raise ModelFolderError(
            f"{path} holds no autoencoder of Stable Diffusion",
            hint="give a file with decoder.conv_in and post_quant_conv in it, or a folder with config.json",
        )


def checkpoint_header(path: Path) -> dict[str, Any]:
    """The tensor table of a file that was given as a model. Raises ModelFolderError for what no model is in."""
    if path.suffix.lower() in _PICKLES:
        raise ModelFolderError(
            f"{path} is a pickle, which can run code when it is opened",
            hint="look for a .safetensors version of the model",
        )
    if path.suffix.lower() != ".safetensors":
        raise ModelFolderError(
            f"{path} is no model: neither a folder nor a .safetensors file", hint="give a model folder or file"
        )
    tensors = safetensors_header(path)
    for pattern, what, hint in _OTHERS:
        if any(re.search(pattern, name) is not None for name in tensors):
            raise ModelFolderError(f"{path} is {what}", hint=hint)
    return tensors


def _what_else(tensors: Mapping[str, Any]) -> str:
    if any(name.startswith(("down_blocks.", "mid_block.")) for name in tensors):
        return "a UNet in diffusers' layout"
    if any(name.startswith(("encoder.", "decoder.", VAE)) for name in tensors):
        return "an autoencoder"
    if any(name.startswith(("text_model.", "cond_stage_model.")) for name in tensors):
        return "a text encoder"
    return "something else"


def _refuse_other_inputs(path: Path, channels: int) -> None:
    names = {5: "a depth model", 7: "an upscaler", 8: "InstructPix2Pix", 9: "an inpainting model"}
    if channels in names:
        raise ModelFolderError(f"{path} is {names[channels]} (its UNet takes {channels} channels)", hint=_HINT)


def _text_kind(tensors: Mapping[str, Any]) -> Literal["clip", "open_clip"] | None:
    if any(name.startswith(CLIP_TEXT) for name in tensors):
        return "clip"
    return "open_clip" if any(name.startswith(OPEN_CLIP_TEXT) for name in tensors) else None


_SD2_WIDTH: Final = 1024


def _prediction(path: Path, tensors: Mapping[str, Any], *, text_width: int) -> Prediction | None:
    """What the UNet predicts, where the file says; SD 1.x predicts noise unless it says otherwise, 2.x does either."""
    if "v_pred" in tensors:
        return "v_prediction"
    said = checkpoint_metadata(path).get("modelspec.prediction_type", "")
    if said in ("v", "v_prediction"):
        return "v_prediction"
    return "epsilon" if said == "epsilon" or text_width != _SD2_WIDTH else None


def checkpoint_metadata(path: Path) -> dict[str, str]:
    """The texts in the file's header, such as ``modelspec.title``; those of modelspec are what trainers write."""
    import json

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        found = json.loads(file.read(length)).get("__metadata__", {})
    return {str(name): str(text) for name, text in found.items()} if isinstance(found, dict) else {}
