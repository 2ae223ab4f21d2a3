"""Load the parts of a model folder: diffusers' and transformers' loaders, with their silence turned into errors.

Both libraries initialise missing weights at random and warn; both print progress bars. Here missing weights are an
error, and nothing is printed. Safetensors only, and code in repositories is never run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.models import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from tiue_cli.base.text import excerpt
from tiue_cli.errors import DeviceError, ModelFolderError, TiueError
from tiue_cli.model.folder import ModelInfo, check_model_folder, check_vae_folder
from tiue_cli.model.hub import resolve_model, resolve_vae
from tiue_cli.model.weights import IGNORABLE_TENSORS, inspect_weights, read_json, some_of

_Part = TypeVar("_Part")
_AUTOENCODERS = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
_FIT_HINT = "the config and the weights come from different models: download or copy the folder again"


@dataclass
class Components:
    """The parts of a Stable Diffusion folder, loaded. ``scheduler_config`` is the file's content."""

    info: ModelInfo
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL | AutoencoderTiny
    scheduler_config: dict[str, Any]


def load_components(
    source: str | Path | ModelInfo,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    vae: str | Path | None = None,
) -> Components:
    """Check, load and move all parts of ``source`` (see ``resolve_model``); ``vae`` replaces its autoencoder.

    What ``check_model_folder`` has found out already is not looked at again.
    Modules come in evaluation mode. Raises ModelFolderError, ManifestError or DeviceError.
    """
    device = _checked_device(device)
    info = source if isinstance(source, ModelInfo) else check_model_folder(resolve_model(source))
    with quiet():
        text_encoder = _load_module(CLIPTextModel, "text_encoder", info=info, dtype=dtype)
        components = Components(
            info=info,
            tokenizer=_load_tokenizer(info, vocabulary=int(text_encoder.config.vocab_size)),
            text_encoder=text_encoder,
            unet=_load_module(UNet2DConditionModel, "unet", info=info, dtype=dtype),
            vae=_own_vae(info, dtype=dtype) if vae is None else load_vae(resolve_vae(vae), dtype=dtype),
            scheduler_config=read_json(info.folder("scheduler") / "scheduler_config.json"),
        )
    _check_vae_fits(components, vae)
    for module in (components.text_encoder, components.unet, components.vae):
        _move(module, device)
    return components


def load_vae(folder: Path | str, *, dtype: torch.dtype = torch.float32) -> AutoencoderKL | AutoencoderTiny:
    """Load an autoencoder from its own folder or from a model folder's ``vae``, on the CPU. Raises ModelFolderError."""
    folder = check_vae_folder(folder)
    class_ = _AUTOENCODERS[read_json(folder / "config.json")["_class_name"]]
    variant = inspect_weights(folder, name="vae", class_name=class_.__name__).variant
    with quiet():
        result: AutoencoderKL | AutoencoderTiny = _from_pretrained(class_, folder, variant=variant, dtype=dtype)
        return result


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' progress bars and warnings for a block; what matters of them is checked here."""
    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    try:
        for library in libraries:
            library.set_verbosity_error()
            library.disable_progress_bar()
        yield
    finally:
        for library, (verbosity, bars) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()


def _own_vae(info: ModelInfo, *, dtype: torch.dtype) -> AutoencoderKL | AutoencoderTiny:
    vae: AutoencoderKL | AutoencoderTiny = _load_module(_AUTOENCODERS[info.vae_class], "vae", info=info, dtype=dtype)
    return vae


def _load_module(class_: type[_Part], name: str, *, info: ModelInfo, dtype: torch.dtype) -> _Part:
    return _from_pretrained(class_, info.folder(name), variant=info.component(name).variant, dtype=dtype)


def _from_pretrained(class_: type[_Part], folder: Path, *, variant: str | None, dtype: torch.dtype) -> _Part:
    """``class_.from_pretrained``, refusing weights that are missing or of another shape. Raises ModelFolderError."""
    loader: Callable[..., Any] = class_.from_pretrained  # type: ignore[attr-defined]
    with _as_folder_error(folder):
        module, loading = loader(
            folder,
            dtype=dtype,
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    absent = sorted(str(key) for key in loading["missing_keys"])
    if absent:
        raise ModelFolderError(
            f"{folder}: the weights lack {some_of(absent)}",
            hint=_FIT_HINT,
        )
    unknown = sorted(str(key) for key in loading["unexpected_keys"] if IGNORABLE_TENSORS.search(str(key)) is None)
    if unknown:
        raise ModelFolderError(
            f"{folder}: {class_.__name__} has no place for {some_of(unknown)}, and would draw without them",
            hint=_FIT_HINT,
        )
    if loading["mismatched_keys"]:
        key = sorted(str(mismatch[0]) for mismatch in loading["mismatched_keys"])[0]
        raise ModelFolderError(f"{folder}: the shape of {key} is not the one that config.json asks for", hint=_FIT_HINT)
    evaluated: _Part = module.eval()
    return evaluated


def _load_tokenizer(info: ModelInfo, *, vocabulary: int) -> CLIPTokenizer:
    folder = info.folder("tokenizer")
    with _as_folder_error(folder):
        tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    # Files that the installed library does not understand silently give a tokenizer of special tokens alone.
    if len(tokenizer) < 4:
        raise ModelFolderError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens and no words",
            hint="download or copy the tokenizer files again",
        )
    if len(tokenizer) > vocabulary:
        raise ModelFolderError(
            f"{folder}: {len(tokenizer)} tokens, but the text encoder knows only {vocabulary}",
            hint=_FIT_HINT,
        )
    tokenizer.model_max_length = info.text_tokens
    return tokenizer


def _check_vae_fits(components: Components, source: str | Path | None) -> None:
    channels, wanted = components.vae.config["latent_channels"], components.unet.config["in_channels"]
    if channels != wanted:
        raise ModelFolderError(
            f"autoencoder {source} takes {channels} latent channels, but the UNet makes {wanted}",
            hint="use an autoencoder of the same family (Stable Diffusion 1.x and 2.x share theirs)",
        )


@contextlib.contextmanager
def _as_folder_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except (TiueError, MemoryError):
        raise
    except Exception as error:  # only library calls are inside: their assertions and plain Exceptions are the folder's
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ModelFolderError(
            f"{folder} cannot be loaded: {excerpt(lines[0], 300) if lines else type(error).__name__}", hint=_FIT_HINT
        ) from error


def _checked_device(device: str | torch.device) -> torch.device:
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError("CUDA is not available to torch", hint="use --device cpu, or see tiue doctor")
    return device


def _move(module: torch.nn.Module, device: torch.device) -> None:
    try:
        module.to(device)
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"the model does not fit into the memory of {device}", hint="use --precision fp16, or --device cpu"
        ) from error
