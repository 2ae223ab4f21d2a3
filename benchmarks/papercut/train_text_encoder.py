"""Make papercut's tokenizer and train its text encoder, a small `CLIPTextModel`, to understand captions.

    python benchmarks/papercut/train_text_encoder.py --minutes 3

Stable Diffusion's text encoder arrives trained; so does this one. The task is reading comprehension: linear probes on
the states must tell what the caption says. Binding (which colour belongs to which object, and where it stands) is thus
learned from text in minutes instead of from diffusion in hours. Captions are roughened (articles dropped, foreign words
put in), so that free wording still works.
"""

from __future__ import annotations

import random

import torch
from common import WORK, Run, optimizer_state, parser, restore_optimizer, trapezoid
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tiue_cli.papercut.captions import COLORS, OBJECTS, WORDS, SceneSpec, random_specs
from tiue_cli.papercut.checker import HEADS, IGNORE, targets

TOKENS, WIDTH, LAYERS, BATCH, LEARNING_RATE = 24, 128, 3, 128, 1e-3
START, END = "<|startoftext|>", "<|endoftext|>"


def make_tokenizer() -> CLIPTokenizer:
    """A real CLIP tokenizer whose byte-pair merges make one token of each of papercut's words."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator([" ".join(WORDS)] * 4, trainers.BpeTrainer(
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
    for word in WORDS:
        ids = tokenizer(word).input_ids
        assert len(ids) == 3, f"{word} is {len(ids) - 2} tokens"
    return tokenizer


def roughen(spec: SceneSpec, rng: random.Random) -> str:
    """A caption as people write it: other wordings, articles missing, words that papercut does not know."""
    words = spec.phrase(long_relation=rng.random() < 0.25, swap=rng.random() < 0.5).split()
    if rng.random() < 0.1:
        words = [word for word in words if word not in ("a", "an", "the")]
    if rng.random() < 0.1:
        foreign = "".join(rng.choice("abcdefghijklmnoprstuvwy") for _ in range(rng.randint(1, 4)))
        words.insert(rng.randrange(len(words) + 1), foreign)
    return " ".join(words)


def batch_of(count: int, seed: int) -> tuple[list[SceneSpec], list[str]]:
    rng = random.Random(seed)
    specs = random_specs(count, seed, pair_share=0.75)
    specs = [SceneSpec(s.things, s.relation, None) if rng.random() < 0.15 else s for s in specs]
    return specs, [roughen(spec, rng) for spec in specs]


class Reader(nn.Module):
    """The text encoder with linear probes: the scene's attributes at every position from the end token on, and an
    object's own kind and colour at its word."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.text_encoder = CLIPTextModel(config)
        self.probes = nn.ModuleDict({name: nn.Linear(WIDTH, classes) for name, classes in HEADS.items()})
        self.own_color = nn.Linear(WIDTH, len(COLORS))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.text_encoder(input_ids=ids).last_hidden_state


def main() -> None:
    args = parser(__doc__, minutes=3).parse_args()
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=4, max_position_embeddings=TOKENS, hidden_act="quick_gelu", projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    reader = Reader(config).to(args.device)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    run = Run(args.name or "text_encoder", minutes=args.minutes, fresh=args.fresh)
    if (states := run.load()) is not None:
        reader.load_state_dict(states["model"])
        restore_optimizer(optimizer, states["optimizer"])
    object_ids = torch.tensor([tokenizer(word).input_ids[1] for word in OBJECTS])
    color_ids = torch.tensor([tokenizer(word).input_ids[1] for word in COLORS])
    while run.progress < 1:
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * trapezoid(run.progress, warmup=0.03, decay=0.6)
        specs, captions = batch_of(BATCH, args.seed * 10_000_000 + run.step)
        loss, accuracy = step_loss(reader, tokenizer, specs, captions, (object_ids, color_ids))
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
        _, accuracy = step_loss(reader.eval(), tokenizer, specs, captions, (object_ids, color_ids))
    run.log(final=True, held_out_probe_accuracy=round(accuracy, 5))
    reader.text_encoder.save_pretrained(WORK / "text_encoder")
    tokenizer.save_pretrained(WORK / "tokenizer")


def step_loss(
    reader: Reader,
    tokenizer: CLIPTokenizer,
    specs: list[SceneSpec],
    captions: list[str],
    word_ids: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, float]:
    """Cross-entropy over all probes, and the share of attributes read right at the end token."""
    device = reader.own_color.weight.device
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
    states = reader(ids)
    after_end = ids == tokenizer.eos_token_id
    first_end = after_end.int().argmax(1)
    wanted = targets(specs)
    # An open background is a class of its own for the reader's targets: it is left out.
    loss = states.new_zeros(())
    right = total = 0
    for name, probe in reader.probes.items():
        logits, target = probe(states), wanted[name].to(device)
        spread = torch.where(after_end, target[:, None], IGNORE)
        loss = loss + nn.functional.cross_entropy(logits.flatten(0, 1), spread.flatten(), ignore_index=IGNORE)
        known = target != IGNORE
        read = logits[torch.arange(len(ids)), first_end].argmax(-1)
        right, total = right + int((read == target)[known].sum()), total + int(known.sum())
    object_ids, color_ids = word_ids
    is_object, is_color = torch.isin(ids, object_ids.to(device)), torch.isin(ids, color_ids.to(device))
    place = torch.arange(ids.shape[1], device=device).expand_as(ids)
    last_color = torch.where(is_color, place, 0).cummax(1).values
    own = torch.searchsorted(color_ids.to(device).sort().values, ids.gather(1, last_color).contiguous())
    own = color_ids.to(device).argsort()[own.clamp(max=len(COLORS) - 1)]
    own = torch.where(is_object & (last_color > 0), own, IGNORE)
    own_loss = nn.functional.cross_entropy(reader.own_color(states).flatten(0, 1), own.flatten(), ignore_index=IGNORE)
    return loss + own_loss, right / total


if __name__ == "__main__":
    main()
