"""Train the emoji world's text encoder, a small CLIP: captions and pictures that belong together are to be near.

    PAPERCUT_WORK=benchmarks/emoji/work python benchmarks/emoji/train_clip.py --data benchmarks/emoji/work --minutes 10

Stable Diffusion's text encoder arrives trained against pictures; so does this one. What is written below work/ is the
tokenizer, text encoder (a `CLIPTextModel`) and the half that sees pictures; `emoji_measure.py` uses its features.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

sys.path.insert(0, str(Path(__file__).parent.parent / "papercut"))

from common import WORK, Run, begin, optimizer_state, parser, restore_optimizer, to_tensor, trapezoid
from train_text_encoder import WIDTH, make_tokenizer, text_config

BATCH, LEARNING_RATE, SHIFT = 128, 1e-3, 3


class Pictures(nn.Module):
    """Pictures (N, 3, 64, 64) in [-1, 1] to features (N, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        widths, layers = (3, 32, 64, 96, 128), []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * 16, WIDTH))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)

    @classmethod
    def load(cls) -> Pictures:
        pictures = cls()
        pictures.load_state_dict(load_file(WORK / "pictures.safetensors"))
        return pictures.eval().requires_grad_(False)


class Clip(nn.Module):
    """Both halves, and how sharply they tell pairs apart."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.text_encoder = CLIPTextModel(config)
        self.projection = nn.Linear(WIDTH, WIDTH)
        self.pictures = Pictures()
        self.sharpness = nn.Parameter(torch.tensor(2.3))

    def forward(self, ids: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Similarities (captions, pictures)."""
        text = nn.functional.normalize(self.projection(self.text_encoder(input_ids=ids).pooler_output), dim=-1)
        seen = nn.functional.normalize(self.pictures(images), dim=-1)
        return self.sharpness.exp().clamp(max=100) * text @ seen.T


def loss_of(similarities: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    """Cross-entropy both ways; `same` (B, B) says which captions are true of which pictures."""
    wanted = same.float()
    rows = -(wanted / wanted.sum(1, keepdim=True) * similarities.log_softmax(1)).sum(1).mean()
    columns = -(wanted / wanted.sum(0, keepdim=True) * similarities.log_softmax(0)).sum(0).mean()
    return (rows + columns) / 2


def main() -> None:
    options = parser(__doc__, minutes=10)
    args = options.parse_args()
    if args.data is None:
        options.error("--data FOLDER: what emoji_data.py wrote")
    begin(args)
    images = np.load(args.data / "images.npy")
    captions = (args.data / "captions.txt").read_text().splitlines()
    count = len(images)
    names = np.unique(captions[count:], return_inverse=True)[1]
    tokenizer = make_tokenizer(sorted({word.strip(",") for line in captions for word in line.split()}))
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    clip = Clip(text_config(tokenizer)).to(args.device)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    run = Run(args.name or "clip", minutes=args.minutes, fresh=args.fresh)
    if (states := run.load()) is not None:
        clip.load_state_dict(states["model"])
        restore_optimizer(optimizer, states["optimizer"])
    rng, right = np.random.default_rng([args.seed, run.step]), []
    while run.progress < 1:
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * trapezoid(run.progress, warmup=0.03, decay=0.7)
        rows = rng.choice(count, BATCH, replace=False)
        bare = rng.random(BATCH) < 0.3
        shifted = np.roll(images[rows], rng.integers(-SHIFT, SHIFT + 1, size=2), axis=(1, 2))
        similarities = clip(ids[rows + count * bare].to(args.device), to_tensor(shifted, args.device))
        same = (rows[:, None] == rows) | (bare[:, None] & (names[rows][:, None] == names[rows]))
        loss = loss_of(similarities, torch.from_numpy(same).to(args.device))
        loss.backward()
        nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found = similarities.detach().argmax(1).cpu().numpy()
        right.append(same[np.arange(BATCH), found].mean())
        run.step += 1
        if run.step % 200 == 0:
            run.log(loss=round(loss.item(), 4), found=round(float(np.mean(right[-200:])), 4))
            run.save(model=clip.state_dict(), optimizer=optimizer_state(optimizer))
    run.save(model=clip.state_dict(), optimizer=optimizer_state(optimizer))
    clip.text_encoder.save_pretrained(WORK / "text_encoder")
    tokenizer.save_pretrained(WORK / "tokenizer")
    save_file(clip.pictures.state_dict(), WORK / "pictures.safetensors")
    run.log(final=True, **retrieval(clip.eval(), ids, images, args.device))


@torch.inference_mode()
def retrieval(clip: Clip, ids: torch.Tensor, images: np.ndarray, device: str) -> dict[str, float]:
    """Of how many captions with an artist the nearest of all pictures is theirs."""
    count = len(images)
    seen = torch.cat([clip.pictures(to_tensor(images[i : i + 256], device)) for i in range(0, count, 256)])
    said = torch.cat([clip.text_encoder(input_ids=part.to(device)).pooler_output for part in ids[:count].split(256)])
    text = nn.functional.normalize(clip.projection(said), dim=-1)
    nearest = (text @ nn.functional.normalize(seen, dim=-1).T).argmax(1).cpu()
    return {"nearest_of_all": round((nearest == torch.arange(count)).float().mean().item(), 4)}


if __name__ == "__main__":
    main()
