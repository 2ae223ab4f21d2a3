"""Prompts to token ids with nothing but the ``tokenizers`` library: the ids that ``CLIPTokenizer`` gives.

The whole of it (byte-pair merges, start and end token, padding and truncation to the text encoder's length) lies in
``tokenizer.json``; this reads it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tiue_cli.base.text import excerpt
from tiue_cli.errors import ManifestError
from tiue_cli.files.access import read_bytes

if TYPE_CHECKING:
    import numpy as np

_HINT: Final = "export the student again"
_LONGEST: Final = 2**16
"""No text encoder reads more tokens; a damaged file that says so would take the memory of the machine."""


class PromptTokenizer:
    """A tokenizer.json that pads and truncates to one length. Raises ManifestError for a file that is none."""

    def __init__(self, path: Path | str) -> None:
        from tokenizers import Tokenizer

        self._path = path
        with self._damaged("is not a tokenizer"):
            text = read_bytes(path, error=ManifestError).decode("utf-8")
            self._fixed = Tokenizer.from_str(text)
            self._open = Tokenizer.from_str(text)
        if self._fixed.truncation is None or self._fixed.padding is None:
            raise ManifestError(f"{path} does not say to which length it pads and truncates", hint=_HINT)
        self.length = int(self._fixed.truncation["max_length"])
        """Tokens of every row, start and end token included."""
        if not _fits(self.length, padding=self._fixed.padding, truncation=self._fixed.truncation):
            raise ManifestError(f"{path} does not pad and truncate to one length of 3 to {_LONGEST} tokens", hint=_HINT)
        self._open.no_truncation()
        self._open.no_padding()

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Token ids (B, L) int64 of B prompts; longer ones are cut, see ``cut_text``.

        Raises ManifestError for a tokenizer that cannot encode them: a damaged file may show it only now.
        """
        import numpy as np

        with self._damaged("cannot encode a prompt"):
            rows = self._fixed.encode_batch(list(prompts), add_special_tokens=True)
            return np.array([row.ids for row in rows], dtype=np.int64).reshape(len(rows), self.length)

    def cut_text(self, prompts: Sequence[str]) -> list[str]:
        """The end of each prompt that does not fit, as it was written; "" where all of it fits. Raises as a call."""
        room = self.length - 2  # start and end token
        with self._damaged("cannot encode a prompt"):
            rows = self._open.encode_batch(list(prompts), add_special_tokens=False)
        return [
            prompt[row.offsets[room][0] :].strip() if len(row.ids) > room else ""
            for prompt, row in zip(prompts, rows, strict=True)
        ]

    @contextlib.contextmanager
    def _damaged(self, what: str) -> Iterator[None]:
        """The library's errors in our words."""
        try:
            yield
        except ManifestError:
            raise
        except Exception as error:  # plain Exception is what the library raises for a damaged file
            raise ManifestError(f"{self._path} {what}: {excerpt(str(error), 200)}", hint=_HINT) from error


def _fits(length: int, *, padding: Mapping[str, Any], truncation: Mapping[str, Any]) -> bool:
    """Whether every row gets ``length`` tokens: what does not fit ends the process inside the library, unasked."""
    multiple = padding.get("pad_to_multiple_of") or 1
    return (
        3 <= length <= _LONGEST
        and padding.get("length") == length
        and length % multiple == 0
        and truncation.get("stride", 0) == 0
    )
