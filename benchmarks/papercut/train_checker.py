"""Train papercut's attribute checker on fresh renders.

    python benchmarks/papercut/train_checker.py --minutes 4

The last line of the log: accuracy by head on held-out renders, and on their round trip through the autoencoder.
"""

from __future__ import annotations

import numpy as np
import torch
from common import WORK, Run, optimizer_state, parser, restore_optimizer, scenes, to_tensor, trapezoid
from diffusers import AutoencoderTiny
from safetensors.torch import save_file

from tiue_cli.papercut.checker import IGNORE, Checker, judge, read, targets

BATCH, LEARNING_RATE = 128, 3e-3


def round_trip(images: np.ndarray) -> np.ndarray:
    """Images (N, 64, 64, 3) uint8 after the autoencoder."""
    vae = AutoencoderTiny.from_pretrained(WORK / "vae").eval()
    parts = []
    with torch.inference_mode():
        for start in range(0, len(images), 64):
            output = vae.decode(vae.encode(to_tensor(images[start : start + 64])).latents).sample
            parts.append(((output.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(parts)


def accuracy(checker: Checker, images: np.ndarray, specs: list) -> dict[str, float]:
    found = read(checker, images)
    wanted = targets(specs)
    heads = {
        name: float((found[name] == target.numpy())[target.numpy() != IGNORE].mean()) for name, target in wanted.items()
    }
    return {**heads, "all": float(judge(found, specs)["all"].mean())}


def main() -> None:
    args = parser(__doc__, minutes=4).parse_args()
    torch.manual_seed(args.seed)
    specs, images = scenes(20_000, seed=3)
    wanted = targets(specs)
    checker = Checker().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(checker.parameters(), lr=LEARNING_RATE, weight_decay=0.02)
    run = Run(args.name or "checker", minutes=args.minutes, fresh=args.fresh)
    if (states := run.load()) is not None:
        checker.load_state_dict(states["model"])
        restore_optimizer(optimizer, states["optimizer"])
    rng = np.random.default_rng([args.seed, run.step])
    while run.progress < 1:
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * trapezoid(run.progress, decay=0.7)
        rows = np.sort(rng.integers(len(images), size=BATCH))
        pixels = to_tensor(images[rows])
        # Generated pictures are a little soft or noisy: neither may decide.
        pixels = pixels + 0.06 * torch.rand(BATCH, 1, 1, 1) * torch.randn_like(pixels)
        logits = checker(pixels)
        loss = sum(
            torch.nn.functional.cross_entropy(logits[name], wanted[name][rows], ignore_index=IGNORE) for name in logits
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.step += 1
        if run.step % 200 == 0:
            run.log(loss=round(loss.item(), 4))
            run.save(model=checker.state_dict(), optimizer=optimizer_state(optimizer))
    checker.eval()
    held_specs, held_images = scenes(2000, seed=4)
    run.log(final=True, renders=accuracy(checker, np.array(held_images), held_specs))
    if (WORK / "vae").exists():
        run.log(final=True, round_trips=accuracy(checker, round_trip(np.array(held_images)), held_specs))
    state = {k: v.half() if v.is_floating_point() else v for k, v in checker.state_dict().items()}
    save_file({k: v.contiguous() for k, v in state.items()}, WORK / "checker.safetensors")


if __name__ == "__main__":
    main()
