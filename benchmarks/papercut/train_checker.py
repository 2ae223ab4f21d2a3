"""Train papercut's attribute checker on rendered scenes.

    python benchmarks/papercut/train_checker.py --minutes 30

While it trains, each cell of the image also tells which thing has its middle there: the readers of the groups learn
many times faster from cells that know. The last line of the log: accuracy by head on held-out renders, and on their
round trip through the autoencoder.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from common import (
    SCENES,
    WORK,
    Run,
    Workers,
    begin,
    chunks,
    optimizer_state,
    parser,
    restore_optimizer,
    scenes,
    to_tensor,
    trapezoid,
)
from diffusers import AutoencoderTiny
from safetensors.torch import save_file

from tiue_cli.papercut.world.captions import COLORS, OBJECTS, SceneSpec
from tiue_cli.papercut.world.checker import CELL, CELLS, IGNORE, PRINTS, Checker, judge, read, targets
from tiue_cli.papercut.world.paper import UNITS
from tiue_cli.papercut.world.scenes import Composition, compositions

BATCH, LEARNING_RATE = 64, 1.5e-3


def what_was_drawn(specs: list[SceneSpec], seed: int) -> list[Composition]:
    """The compositions of `scenes(..., seed)`: what was left open as it was drawn, and where."""
    return [composition for _, part, its_seed in chunks(specs, seed) for composition in compositions(part, its_seed)]


def cell_targets(drawn: list[Composition]) -> dict[str, torch.Tensor]:
    """Classes of CELL, each (N, 64): what has its middle in the cell; IGNORE for all but the object elsewhere."""
    result = {name: torch.full((len(drawn), CELLS**2), IGNORE) for name in CELL}
    result["object"].fill_(len(OBJECTS))
    for row, composition in enumerate(drawn):
        for slot, (group, pieces) in enumerate(zip(composition.scene.slots, composition.groups, strict=True)):
            for piece in pieces:
                x, y = (min(CELLS - 1, max(0, int(place * CELLS / UNITS))) for place in (piece.x, piece.y))
                assert group.color is not None
                classes = (OBJECTS.index(group.object), COLORS.index(group.color), PRINTS.index(group.pattern), slot)
                for name, value in zip(CELL, classes, strict=True):
                    result[name][row, y * CELLS + x] = value
    return result


def round_trip(images: np.ndarray) -> np.ndarray:
    """Images (N, 128, 128, 3) uint8 after the autoencoder."""
    vae = AutoencoderTiny.from_pretrained(WORK / "vae").eval()
    parts = []
    with torch.inference_mode():
        for start in range(0, len(images), 64):
            output = vae.decode(vae.encode(to_tensor(images[start : start + 64])).latents).sample
            parts.append(((output.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(parts)


def accuracy(checker: Checker, images: np.ndarray, specs: list[SceneSpec]) -> dict[str, float]:
    """The share of right readings by head, and of pictures that are judged right by attribute."""
    found, wanted = read(checker, images), targets(specs)
    heads = {
        name: float((found[name] == target.numpy())[target.numpy() != IGNORE].mean()) for name, target in wanted.items()
    }
    judged = {name: float(value.mean()) for name, value in judge(found, specs).items()}
    return {name: round(value, 4) for name, value in (heads | judged).items()}


def disturbed(pixels: torch.Tensor) -> torch.Tensor:
    """Generated pictures are a little soft or noisy: neither may decide."""
    soft = torch.nn.functional.avg_pool2d(pixels, 3, 1, 1, count_include_pad=False)
    share, noise = torch.rand(2, len(pixels), 1, 1, 1, device=pixels.device)
    pixels = torch.lerp(pixels, soft, share.clamp(max=0.9))
    return pixels + 0.06 * noise * torch.randn_like(pixels)


def training_loss(
    checker: Checker, pixels: torch.Tensor, wanted: dict[str, torch.Tensor], cells: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Cross-entropies of the heads, and of the cells."""
    tokens = checker.tokens(pixels)
    logits = checker.read_features(tokens[:, : tokens.shape[1] - CELLS**2].flatten(1))
    loss = tokens.new_zeros(())
    for name, target in wanted.items():
        loss = loss + cross_entropy(logits[name], target)
    for name, value in checker.read_cells(tokens).items():
        weight = 4.0 if name == "object" else 0.5  # few cells hold a middle
        loss = loss + weight * cross_entropy(value.flatten(0, 1), cells[name].flatten())
    return loss


def cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean over targets (N,) that say something; 0 where none does, and without waiting to know."""
    total = torch.nn.functional.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
    return total / (target != IGNORE).sum().clamp(min=1)


def main() -> None:
    Workers.run(train, parser(__doc__, minutes=30).parse_args())


def train(rank: int, args: argparse.Namespace) -> None:
    begin(args)
    workers = Workers(rank, args.workers)
    specs, images = scenes(SCENES, seed=10)
    drawn = what_was_drawn(specs, 10)
    wanted, cells = targets([composition.scene for composition in drawn]), cell_targets(drawn)
    checker = Checker().to(memory_format=torch.channels_last)
    parameters = list(checker.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.02)
    run = Run(args.name or "checker", minutes=args.minutes, fresh=args.fresh and rank == 0)
    if not args.fresh and (states := run.load()) is not None:
        checker.load_state_dict(states["model"])
        if "optimizer" in states:
            restore_optimizer(optimizer, states["optimizer"])
    rng = np.random.default_rng([args.seed, run.step, rank])
    torch.manual_seed(args.seed + 1000 * run.step + rank)
    progress = run.progress
    while progress < 1:
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * trapezoid(progress, warmup=0.04, decay=0.6)
        rows = np.sort(rng.integers(len(images), size=BATCH // args.workers))
        loss = training_loss(
            checker,
            disturbed(to_tensor(images[rows])),
            {name: value[rows] for name, value in wanted.items()},
            {name: value[rows] for name, value in cells.items()},
        )
        loss.backward()
        mean, progress = workers.average(parameters, loss.item(), run.progress)
        torch.nn.utils.clip_grad_norm_(parameters, 2.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.step += 1
        if rank == 0 and run.step % 100 == 0:
            run.log(loss=round(mean, 4))
            run.save(model=checker.state_dict(), optimizer=optimizer_state(optimizer))
    if rank == 0:
        finish(checker.eval(), run.log)


def finish(checker: Checker, log: Callable[..., None]) -> None:
    """The figures on held-out scenes, and the weights in fp16."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in checker.state_dict().items()}
    save_file({k: v.contiguous() for k, v in state.items()}, WORK / "checker.safetensors")
    specs, images = scenes(2000, seed=4)
    seen = [composition.scene for composition in what_was_drawn(specs, 4)]
    log(final=True, renders=accuracy(checker, np.array(images), seen))
    if (WORK / "vae").exists():
        log(final=True, round_trips=accuracy(checker, round_trip(np.array(images)), seen))


if __name__ == "__main__":
    main()
