"""CLIP's tokenizer as the files of a model folder, for checkpoints, which have none.

Vocabulary and merges are the same in all of Stable Diffusion 1.x and 2.x; only the padding differs. The vocabulary
follows from the merges (Radford et al. 2021, released code, ``simple_tokenizer.py``), which lie beside this file.
"""

from __future__ import annotations

import lzma
from pathlib import Path
from typing import Final

from tiue_cli.files.manifests import write_json

_MERGES: Final = Path(__file__).with_name("clip_merges.txt.xz")
START: Final = "<|startoftext|>"
END: Final = "<|endoftext|>"
TOKENS: Final = 77


def write_clip_tokenizer(folder: Path, *, pad: str = END) -> None:
    """Write the files that ``CLIPTokenizer.from_pretrained`` reads; ``pad`` is ``!`` in SD 2.x."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = lzma.decompress(_MERGES.read_bytes()).decode("utf-8").splitlines()
    write_json(folder / "vocab.json", vocabulary(merges))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    specials = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "do_lower_case": True,
            "errors": "replace",
            "model_max_length": TOKENS,
            "tokenizer_class": "CLIPTokenizer",
            **specials,
        },
    )
    write_json(folder / "special_tokens_map.json", specials)


def vocabulary(merges: list[str]) -> dict[str, int]:
    """Token → id: bytes, bytes at the ends of words, merges, the two specials."""
    # CLIP numbers the printable bytes first, then the others under letters beyond Latin-1.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in printable] + [chr(256 + number) for number in range(256 - len(printable))]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge.split()) for merge in merges)]
    return {token: number for number, token in enumerate([*tokens, START, END])}
