"""Prompts to text states, with diffusers' pipeline as the oracle, and what is said of a prompt that is too long."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers import TINY_TEXT_WIDTH, TINY_TOKENS, build_sd_folder

from tiue_cli.model.components import Components, load_components
from tiue_cli.model.text import chunk_counts, cut_text, encode_in_chunks, encode_prompts

PROMPTS = ["a red star", "", "a blue tree above a house " * 8, "Zürich 日本 !"]


@pytest.fixture(scope="module", params=["sd15", "sd21"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sd_folder(tmp_path_factory.mktemp("text") / request.param, kind=request.param)


@pytest.fixture(scope="module")
def components(folder: Path) -> Components:
    return load_components(folder)


def test_text_states_equal_those_of_diffusers(folder: Path, components: Components) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    expected, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)
    text_states = encode_prompts(components.tokenizer, components.text_encoder, PROMPTS)
    assert text_states.shape == (len(PROMPTS), TINY_TOKENS, TINY_TEXT_WIDTH)
    torch.testing.assert_close(text_states, expected, rtol=0, atol=0)


def test_a_prompt_has_the_same_states_alone_and_in_a_batch(components: Components) -> None:
    together = encode_prompts(components.tokenizer, components.text_encoder, PROMPTS)
    for row, prompt in zip(together, PROMPTS, strict=True):
        alone = encode_prompts(components.tokenizer, components.text_encoder, [prompt])[0]
        torch.testing.assert_close(row, alone, rtol=1e-5, atol=1e-6)


def test_the_cut_text_is_exactly_what_does_not_matter(components: Components) -> None:
    """The oracle: leaving the reported end away changes nothing, and one more word would have changed something."""
    words = ["red", "star", "blue", "tree"] * 8
    prompt = " ".join(words)
    (cut,) = cut_text(components.tokenizer, [prompt])
    kept = prompt.removesuffix(cut)
    assert len(kept.split()) == TINY_TOKENS - 2
    states = encode_prompts(components.tokenizer, components.text_encoder, [prompt, kept, kept.rsplit(maxsplit=1)[0]])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_the_cut_text_is_as_it_was_written(components: Components) -> None:
    prompt = "a " * (TINY_TOKENS - 2) + "RED  Star, Zürich 日本!"
    assert cut_text(components.tokenizer, [prompt, "a star", ""]) == ["RED  Star, Zürich 日本!", "", ""]


def test_a_prompt_that_just_fits_is_not_cut(components: Components) -> None:
    assert cut_text(components.tokenizer, ["a " * (TINY_TOKENS - 2), "a " * (TINY_TOKENS - 1)]) == ["", "a"]


# --- prompts in several sequences ---------------------------------------------------------------------------------

WORDS = "a red tree above a blue house " * 5  # one token a word: 35, where one sequence takes 14


def test_chunks_are_sequences_of_their_own_side_by_side(components: Components) -> None:
    tokenizer, encoder = components.tokenizer, components.text_encoder
    room = TINY_TOKENS - 2
    assert chunk_counts(tokenizer, ["", "a", "a " * room, "a " * (room + 1), WORDS]) == [1, 1, 1, 2, 3]
    words = WORDS.split()
    pieces = [" ".join(words[first : first + room]) for first in range(0, len(words), room)]
    expected = torch.cat([encode_prompts(tokenizer, encoder, [piece])[0] for piece in pieces])
    found = encode_in_chunks(tokenizer, encoder, [WORDS, "a star"], chunks=3)
    assert found.shape == (2, 3 * TINY_TOKENS, TINY_TEXT_WIDTH)
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-6)
    short = torch.cat([encode_prompts(tokenizer, encoder, [text])[0] for text in ("a star", "", "")])
    torch.testing.assert_close(found[1], short, rtol=1e-5, atol=1e-6)
