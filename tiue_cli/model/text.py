"""From prompts to text states, exactly as diffusers' Stable Diffusion pipeline does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import CLIPTextModel, CLIPTokenizer


@torch.no_grad()
def encode_prompts(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, prompts: Sequence[str]) -> torch.Tensor:
    """Text states (B, L, D) in the text encoder's dtype and on its device; L is the tokenizer's ``model_max_length``.

    The last hidden state with the final layer norm; SD 2.x takes the last but one layer of its original encoder by
    having one layer less in its config. Longer prompts are cut: ``cut_text`` says where.
    """
    tokens = _tokenized(tokenizer, prompts)
    # Stable Diffusion was trained without the padding mask; a config may ask for it all the same.
    masked = bool(getattr(text_encoder.config, "use_attention_mask", False))
    mask = tokens.attention_mask.to(text_encoder.device) if masked else None
    text_states: torch.Tensor = text_encoder(tokens.input_ids.to(text_encoder.device), attention_mask=mask)[0]
    return text_states


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> torch.Tensor:
    """Token ids (B, L) int64, as ``encode_prompts`` makes them."""
    input_ids: torch.Tensor = _tokenized(tokenizer, prompts).input_ids
    return input_ids


def _tokenized(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Any:
    return tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )


def cut_text(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> list[str]:
    """The end of each prompt that does not fit into the token sequence, as it was written; "" where all of it fits."""
    room = tokenizer.model_max_length - 2  # start and end token
    encoded = tokenizer(
        list(prompts), add_special_tokens=False, truncation=False, return_offsets_mapping=True, verbose=False
    )
    return [
        prompt[offsets[room][0] :].strip() if len(offsets) > room else ""
        for prompt, offsets in zip(prompts, encoded["offset_mapping"], strict=True)
    ]
