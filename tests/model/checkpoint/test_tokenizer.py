"""The tokenizer that is written for checkpoints is CLIP's: known ids of known texts."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from tiue_cli.model.checkpoint.tokenizer import write_clip_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_clip_tokenizer(folder)
    return CLIPTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        # As printed in the documentation and tests of CLIP and transformers.
        ("hello world", [3306, 1002]),
        ("Hello world!", [3306, 1002, 256]),
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("a photo of a dog", [320, 1125, 539, 320, 1929]),
    ],
)
def test_ids_are_those_of_clip(tokenizer: CLIPTokenizer, text: str, ids: list[int]) -> None:
    assert tokenizer(text).input_ids == [49406, *ids, 49407]


def test_vocabulary_and_padding(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    assert len(tokenizer) == 49408
    assert tokenizer.model_max_length == 77
    assert tokenizer("a", padding="max_length").input_ids[-1] == 49407
    write_clip_tokenizer(tmp_path, pad="!")
    assert CLIPTokenizer.from_pretrained(tmp_path)("a", padding="max_length").input_ids[-1] == 0
