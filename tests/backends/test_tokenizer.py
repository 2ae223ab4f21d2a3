"""The torch-free tokenizer against CLIPTokenizer itself, on text that tokenizers differ about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import TINY_TOKENS, build_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from tiue_cli.backends.tokenizer import PromptTokenizer
from tiue_cli.errors import ManifestError
from tiue_cli.export.onnx.export import write_tokenizer
from tiue_cli.model.text import cut_text

PROMPTS = [
    "a red star above a blue house",
    "A  RED\tStar,above... a—house!!",
    "",
    "a",
    "wörter für ein Haus, 42 Bäume und 🌲🌲",
    "<|endoftext|> a <|startoftext|> tree",
    "it's the tree's; we'll see they're red",
    "a " * 60 + "tree",
    "treestarhouse" * 4,
    "\ufb01ne \u00bc \uff21\uff22 e\u0301",
]


@pytest.fixture(params=["<|endoftext|>", "!"], ids=["padded-like-sd15", "padded-like-sd21"])
def pad_token(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_ids_equal_cliptokenizers(pad_token: str, tmp_path: Path) -> None:
    original = build_tokenizer(pad_token=pad_token)
    write_tokenizer(original, tmp_path / "tokenizer.json")
    found = PromptTokenizer(tmp_path / "tokenizer.json")(PROMPTS)
    expected = original(PROMPTS, padding="max_length", max_length=TINY_TOKENS, truncation=True, return_tensors="np")
    assert found.dtype == "int64"
    assert found.tolist() == expected.input_ids.tolist()


def test_cut_text_equals_the_torch_sides(pad_token: str, tmp_path: Path) -> None:
    original = build_tokenizer(pad_token=pad_token)
    write_tokenizer(original, tmp_path / "tokenizer.json")
    found = PromptTokenizer(tmp_path / "tokenizer.json").cut_text(PROMPTS)
    assert found == cut_text(original, PROMPTS)
    assert found[7].endswith("tree") and found[0] == ""


def test_writing_leaves_the_original_as_it_was(tmp_path: Path) -> None:
    original = build_tokenizer()
    write_tokenizer(original, tmp_path / "tokenizer.json")
    assert len(original("a red star").input_ids) == 5


@pytest.mark.parametrize("text", ["", "{}", "not json", '{"version": "1.0", "model": {}}'])
def test_a_damaged_file_is_one_clear_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(ManifestError, match=r"tokenizer\.json is not a tokenizer"):
        PromptTokenizer(path)


def test_a_tokenizer_without_a_length_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    build_tokenizer().backend_tokenizer.save(str(path))
    with pytest.raises(ManifestError, match="does not say to which length"):
        PromptTokenizer(path)


@pytest.mark.parametrize(
    ("padding", "truncation"),
    [
        ({"strategy": {"Fixed": 2**40}}, {}),
        ({"strategy": {"Fixed": TINY_TOKENS + 1}}, {}),
        ({"strategy": "BatchLongest"}, {}),
        ({"pad_to_multiple_of": 7}, {}),
        ({"pad_to_multiple_of": 2**40}, {}),
        ({}, {"max_length": 0}),
        ({}, {"max_length": 2**40}),
        ({}, {"stride": 2**40}),
    ],
)
def test_a_length_that_would_take_all_memory_or_fit_no_row_is_refused(
    padding: dict[str, Any], truncation: dict[str, Any], tmp_path: Path
) -> None:
    """The library ends the whole process where it gets no memory: there is nothing to catch."""
    tokenizer = build_tokenizer().backend_tokenizer
    tokenizer.enable_padding(length=TINY_TOKENS)
    tokenizer.enable_truncation(TINY_TOKENS)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    data = json.loads(path.read_text())
    PromptTokenizer(path)
    data["padding"] |= padding
    data["truncation"] |= truncation
    path.write_text(json.dumps(data))
    with pytest.raises(ManifestError, match="one length of 3 to 65536 tokens"):
        PromptTokenizer(path)


def test_a_damage_that_shows_at_the_first_prompt_is_one_clear_error(tmp_path: Path) -> None:
    """A model whose vocabulary lacks its unknown token is read without complaint, and fails at an unknown word."""
    vocabulary = {"[PAD]": 0, "a": 1}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.enable_padding(length=TINY_TOKENS)
    tokenizer.enable_truncation(TINY_TOKENS)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    damaged = PromptTokenizer(path)
    for encode in (damaged, damaged.cut_text):
        with pytest.raises(ManifestError, match=r"tokenizer\.json cannot encode a prompt"):
            encode(["unknown"])
