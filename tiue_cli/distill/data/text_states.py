"""Text states of the training prompts: computed once and read from disk, or encoded batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from tiue_cli.files.rows import RowCache
from tiue_cli.model.text import encode_prompts

_ENCODE_ROWS = 64


class TextStates:
    """Text states by the number of the prompt. With ``folder`` they are cached there, in float16 unless ``exact``."""

    def __init__(
        self,
        prompts: Sequence[str],
        *,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        folder: Path | None,
        device: torch.device,
        exact: bool,
    ) -> None:
        self.prompts, self.count, self.device = prompts, len(prompts), device
        self._tokenizer, self._text_encoder = tokenizer, text_encoder
        self.empty = self._encode([""]).to(device)
        """Text states of the empty prompt, (1, L, D)."""
        shape = tuple(self.empty.shape[1:])
        dtype = "float32" if exact else "float16"
        self.cache = None if folder is None else RowCache(folder / dtype, self.count, shape, dtype)

    def fill(self, *, process: tuple[int, int]) -> Iterator[int]:
        """Encode the missing chunks that fall to this ``process`` (index, count); yields the rows of each batch."""
        if self.cache is None:
            return
        for chunk in self.cache.missing(process):
            rows, parts = self.cache.chunk_range(chunk), []
            for start in range(rows.start, rows.stop, _ENCODE_ROWS):
                batch = range(start, min(start + _ENCODE_ROWS, rows.stop))
                parts.append(self._encode([self.prompts[row] for row in batch]).cpu())
                yield len(batch)
            self.cache.write(chunk, torch.cat(parts).numpy())

    def rows(self, indices: Sequence[int]) -> Tensor:
        """Text states (len(indices), L, D) on the device."""
        if self.cache is None:
            return self._encode([self.prompts[index] for index in indices]).to(self.device)
        return torch.from_numpy(self.cache.rows(indices)).to(self.device, self.empty.dtype)

    def _encode(self, prompts: Sequence[str]) -> Tensor:
        return encode_prompts(self._tokenizer, self._text_encoder, prompts)
