"""Make papercut's tokenizer and train its text encoder, a small `CLIPTextModel`, to understand captions.

    python benchmarks/papercut/train_text_encoder.py --minutes 3

Stable Diffusion's text encoder arrives trained; so does this one. The task is reading comprehension: linear probes on
the states must tell what the caption says. Binding (which colour belongs to which object, and where it stands) is thus
learned from text in minutes instead of from diffusion in hours. Captions are roughened (articles dropped, foreign words
put in), so that free wording still works.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from common import WORK, Run, begin, optimizer_state, parser, restore_optimizer, trapezoid
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tiue_cli.papercut.world.captions import (
    COLORS,
    OBJECTS,
    PLURALS,
    WORDS,
    SceneSpec,
    random_specs,
    rough_phrase,
)
from tiue_cli.papercut.world.checker import HEADS, IGNORE, PRINTS, SLOTS, targets

TOKENS, WIDTH, LAYERS, BATCH, LEARNING_RATE = 24, 160, 3, 128, 1e-3
START, END = "<|startoftext|>", "<|endoftext|>"


def make_tokenizer(words: Sequence[str] = WORDS) -> CLIPTokenizer:
    """A real CLIP tokenizer whose byte-pair merges make one token of each of the words, by default papercut's."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator([" ".join(words)] * 4, trainers.BpeTrainer(
        vocab_size=4096, end_of_word_suffix="</w>", show_progress=False))  # fmt: skip
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained = bpe.get_vocab()
    import json

    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    tokens += [token for token, _ in sorted(trained.items(), key=lambda item: item[1]) if token not in set(tokens)]
    tokens += [START, END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=END, model_max_length=TOKENS)
    for word in words:
        ids = tokenizer(word).input_ids
        assert len(ids) == 3, f"{word} is {len(ids) - 2} tokens"
    return tokenizer


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=4, max_position_embeddings=TOKENS, hidden_act="quick_gelu", projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


# What a noun's own word must tell: the attributes of its group. A class more than the checker's, for what is left open.
OWN = {"color": len(COLORS) + 1, "size": 3, "pattern": len(PRINTS) + 1, "count": 4}


def batch_of(count: int, seed: int) -> tuple[list[SceneSpec], list[str]]:
    rng = random.Random(seed)
    specs = random_specs(count, seed)
    return specs, [rough_phrase(spec, rng) for spec in specs]


class Reader(nn.Module):
    """The text encoder with linear probes: the scene's attributes at every position from the end token on, and at each
    noun the attributes of its own group that were said before it."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.text_encoder = CLIPTextModel(config)
        self.probes = nn.ModuleDict({name: nn.Linear(WIDTH, classes + 1) for name, classes in HEADS.items()})
        self.own = nn.ModuleDict({name: nn.Linear(WIDTH, classes) for name, classes in OWN.items()})

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.text_encoder(input_ids=ids).last_hidden_state


def main() -> None:
    args = parser(__doc__, minutes=5).parse_args()
    begin(args)
    tokenizer = make_tokenizer()
    config = text_config(tokenizer)
    reader = Reader(config).to(args.device)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    run = Run(args.name or "text_encoder", minutes=args.minutes, fresh=args.fresh)
    if (states := run.load()) is not None:
        reader.load_state_dict(states["model"])
        restore_optimizer(optimizer, states["optimizer"])
    nouns = torch.tensor([tokenizer(word).input_ids[1] for word in sorted({*OBJECTS, *PLURALS.values(), "fishes"})])
    while run.progress < 1:
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * trapezoid(run.progress, warmup=0.03, decay=0.6)
        specs, captions = batch_of(BATCH, args.seed * 10_000_000 + run.step)
        loss, accuracy = step_loss(reader, tokenizer, specs, captions, nouns)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.step += 1
        if run.step % 200 == 0:
            run.log(loss=round(loss.item(), 4), accuracy=round(accuracy, 4))
            run.save(model=reader.state_dict(), optimizer=optimizer_state(optimizer))
    with torch.inference_mode():
        specs, captions = batch_of(4096, 2**40)
        _, accuracy = step_loss(reader.eval(), tokenizer, specs, captions, nouns)
    run.log(final=True, held_out_probe_accuracy=round(accuracy, 5))
    reader.text_encoder.save_pretrained(WORK / "text_encoder")
    tokenizer.save_pretrained(WORK / "tokenizer")


def own_targets(specs: list[SceneSpec]) -> dict[str, torch.Tensor]:
    """For each caption and each of its nouns in the order of words, the classes of OWN; (N, SLOTS), IGNORE beyond."""
    wanted = targets(specs)
    result = {name: torch.full((len(specs), SLOTS), IGNORE) for name in OWN}
    for row, spec in enumerate(specs):
        for word, group in enumerate(spec.groups):
            slot = spec.slots.index(group)
            for name in OWN:
                value = int(wanted[f"{name}_{slot}"][row])
                result[name][row, word] = value if value != IGNORE else OWN[name] - 1
    return result


def step_loss(
    reader: Reader,
    tokenizer: CLIPTokenizer,
    specs: list[SceneSpec],
    captions: list[str],
    nouns: torch.Tensor,
) -> tuple[torch.Tensor, float]:
    """Cross-entropy over all probes, and the share of attributes read right at the end token."""
    device = next(reader.parameters()).device
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
    states = reader(ids)
    after_end = ids == tokenizer.eos_token_id
    first_end = after_end.int().argmax(1)
    loss = states.new_zeros(())
    right = total = 0
    ends = states[after_end]
    rows = torch.arange(len(ids), device=device)[:, None].expand_as(ids)[after_end]
    for name, target in targets(specs).items():
        target = torch.where(target == IGNORE, HEADS[name], target).to(device)  # open: a class of its own
        loss = loss + nn.functional.cross_entropy(reader.probes[name](ends), target[rows])
        read = reader.probes[name](states[torch.arange(len(ids)), first_end]).argmax(-1)
        right, total = right + int((read == target).sum()), total + len(target)
    is_noun = torch.isin(ids, nouns.to(device))
    rank = (is_noun.cumsum(1) - 1)[is_noun]
    noun_rows = torch.arange(len(ids), device=device)[:, None].expand_as(ids)[is_noun]
    known = rank < SLOTS
    words = states[is_noun][known]
    for name, target in own_targets(specs).items():
        wanted = target.to(device)[noun_rows[known], rank[known]]
        loss = loss + 0.5 * nn.functional.cross_entropy(reader.own[name](words), wanted, ignore_index=IGNORE)
    return loss, right / total


if __name__ == "__main__":
    main()
