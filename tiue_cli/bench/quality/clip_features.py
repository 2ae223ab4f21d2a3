"""A CLIP model as a feature extractor, and as the reader of the CLIP score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer, CLIPVisionModelWithProjection

from tiue_cli.bench.quality.features import Images
from tiue_cli.errors import QualityError
from tiue_cli.files.access import has_file
from tiue_cli.files.hashes import sha256_folder
from tiue_cli.model.pretrained import load_pretrained
from tiue_cli.model.weights import read_json

_BATCH = 32
_HINT = "give a local folder with a CLIPModel in safetensors, its tokenizer and preprocessor_config.json"


class ClipExtractor:
    """Projected image embeddings (N, F) of a transformers folder: a CLIPModel, or a CLIPVisionModelWithProjection.

    Images are prepared as the folder's preprocessor_config.json says (OpenAI's settings where there is none). Raises
    QualityError.
    """

    def __init__(self, folder: Path) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = _config(folder)
        has_text = "text_config" in config
        self._model: Any = _load(CLIPModel if has_text else CLIPVisionModelWithProjection, folder).to(self._device)
        self._tokenizer: Any = _load(CLIPTokenizer, folder) if has_text else None
        has_settings = has_file(folder / "preprocessor_config.json", error=QualityError)
        side = int(self._model.config.vision_config.image_size if has_text else self._model.config.image_size)
        self._processor: Any = (
            _load(CLIPImageProcessorPil, folder)
            if has_settings
            else CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        )
        self.name = f"{folder.resolve().name} (CLIP image embeddings)"
        self.sha256 = sha256_folder(folder)
        self.width = int(self._model.config.projection_dim)
        source = "preprocessor_config.json" if has_settings else "OpenAI's settings"
        self.resize = f"shorter side to {side}, then centre crop, bicubic, 8 bit ({source})"

    @property
    def reads_text(self) -> bool:
        """Whether the folder holds a text encoder, so that there is a CLIP score."""
        return self._tokenizer is not None

    @torch.inference_mode()
    def __call__(self, images: Images) -> NDArray[np.float32]:
        """See ``Extractor``."""
        parts = []
        for start in range(0, len(images), _BATCH):
            pictures = [Image.fromarray(image) for image in images[start : start + _BATCH]]
            pixels = self._processor(images=pictures, return_tensors="pt")["pixel_values"].to(self._device)
            if isinstance(self._model, CLIPModel):
                embeddings: Any = self._model.get_image_features(pixel_values=pixels)
                parts.append(getattr(embeddings, "pooler_output", embeddings))
            else:
                parts.append(self._model(pixel_values=pixels).image_embeds)
        return torch.cat(parts).float().cpu().numpy()

    @torch.inference_mode()
    def texts(self, prompts: Sequence[str]) -> NDArray[np.float32]:
        """Projected text embeddings (N, F) of prompts as they are, cut at the model's length."""
        if self._tokenizer is None:
            raise QualityError(f"{self.name} has no text encoder, and the CLIP score needs one", hint=_HINT)
        longest = int(self._model.config.text_config.max_position_embeddings)
        parts = []
        for start in range(0, len(prompts), _BATCH):
            tokens = self._tokenizer(
                list(prompts[start : start + _BATCH]),
                padding=True,
                truncation=True,
                max_length=longest,
                return_tensors="pt",
            ).to(self._device)
            embeddings: Any = self._model.get_text_features(**tokens)
            parts.append(getattr(embeddings, "pooler_output", embeddings))
        return torch.cat(parts).float().cpu().numpy()


def _config(folder: Path) -> dict[str, Any]:
    if not has_file(folder / "config.json", error=QualityError):
        raise QualityError(f"{folder} holds no config.json", hint=_HINT)
    config = read_json(folder / "config.json")
    if config.get("model_type") not in ("clip", "clip_vision_model"):
        raise QualityError(f"{folder} holds a {config.get('model_type')} model, not CLIP", hint=_HINT)
    return config


def _load(class_: Any, folder: Path) -> Any:
    return load_pretrained(class_, folder, what=str(folder), hint=_HINT, error=QualityError, local_files_only=True)
