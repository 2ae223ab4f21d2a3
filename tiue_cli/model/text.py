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


def chunk_counts(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> list[int]:
    """How many sequences each prompt fills, at least one: 75 tokens each where the text encoder takes 77."""
    return [max(1, -(-len(ids) // _room(tokenizer))) for ids in _all_ids(tokenizer, prompts)]


@torch.no_grad()
def encode_in_chunks(
    tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, prompts: Sequence[str], *, chunks: int
) -> torch.Tensor:
    """Text states (B, chunks·L, D): each prompt in sequences of its own start and end tokens, side by side.

    As AUTOMATIC1111's web interface reads long prompts. No prompt may fill more than ``chunks`` sequences; missing ones
    are those of the empty prompt. Where one sequence is enough its states are those of ``encode_prompts``.
    """
    room, start, end = _room(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id
    rows = []
    for ids in _all_ids(tokenizer, prompts):
        for first in range(0, chunks * room, room):
            piece = [start, *ids[first : first + room], end]
            rows.append(piece + [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(piece)))
    input_ids = torch.tensor(rows, device=text_encoder.device)
    masked = bool(getattr(text_encoder.config, "use_attention_mask", False))
    mask = _used(input_ids, end) if masked else None
    states: torch.Tensor = text_encoder(input_ids, attention_mask=mask)[0]
    return states.reshape(len(prompts), -1, states.shape[-1])


def _used(input_ids: torch.Tensor, end: int) -> torch.Tensor:
    """1 up to and with the first end token of each row, 0 on its padding."""
    seen = (input_ids == end).int().cumsum(dim=1)
    return ((seen == 0) | ((seen == 1) & (input_ids == end))).int()


def _room(tokenizer: CLIPTokenizer) -> int:
    return int(tokenizer.model_max_length) - 2  # start and end token


def _all_ids(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> list[list[int]]:
    found: list[list[int]] = tokenizer(
        list(prompts), add_special_tokens=False, truncation=False, verbose=False
    ).input_ids
    return found


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
    room = _room(tokenizer)
    encoded = tokenizer(
        list(prompts), add_special_tokens=False, truncation=False, return_offsets_mapping=True, verbose=False
    )
    return [
        prompt[offsets[room][0] :].strip() if len(offsets) > room else ""
        for prompt, offsets in zip(prompts, encoded["offset_mapping"], strict=True)
    ]
