"""Train papercut's autoencoder: `AutoencoderTiny`, f = 8, twelve latent channels.

    python benchmarks/papercut/train_autoencoder.py --minutes 20

Random 64 × 64 crops; the highest level has no blocks, which keeps decoding cheap. Loss: an edge-weighted L1 + L2, L1 on
gradients (crisp outlines), and a penalty that keeps the latents zero-mean with unit covariance, so that the diffusion
model sees unit scale without a measured factor. A finished one gets sharper with --decoder-only, and what was trained
on its latents stays valid.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from common import (
    WORK,
    Run,
    Workers,
    begin,
    optimizer_state,
    parser,
    restore_optimizer,
    to_tensor,
    training_images,
    trapezoid,
)
from diffusers import AutoencoderTiny
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from torch import nn

CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "encoder_block_out_channels": (32, 32, 32, 32),
    "decoder_block_out_channels": (32, 32, 32, 32),
    "num_encoder_blocks": (0, 1, 1, 2),
    "num_decoder_blocks": (3, 2, 1, 0),
    "latent_channels": 12,
    "act_fn": "silu",  # of its rectified units half died at this learning rate
    "scaling_factor": 1.0,
    "latent_magnitude": 3,
    "latent_shift": 0.5,
}
CROP, BATCH, LEARNING_RATE, LATENT_NOISE = 64, 16, 2e-3, 0.05


def gradients(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return images[..., :, 1:] - images[..., :, :-1], images[..., 1:, :] - images[..., :-1, :]


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor, *, l2: float) -> torch.Tensor:
    """Edge-weighted L1 + l2·L2 plus L1 between gradients; images (N, 3, H, W) in [0, 1]."""
    right, down = gradients(target)
    edge = torch.nn.functional.pad(right.abs(), (0, 1)) + torch.nn.functional.pad(down.abs(), (0, 0, 0, 1))
    weight = 1 + 3 * edge.mean(1, keepdim=True)
    error = output - target
    slopes = sum((a - b).abs().mean() for a, b in zip(gradients(output), (right, down), strict=True))
    return (weight * (error.abs() + l2 * error.square())).mean() + 0.5 * slopes


def whiteness_penalty(latents: torch.Tensor) -> torch.Tensor:
    """Squared distance of the latents' mean from 0 and of their covariance from the identity."""
    flat = latents.transpose(0, 1).flatten(1)
    centered = flat - flat.mean(1, keepdim=True)
    covariance = centered @ centered.T / flat.shape[1]
    return flat.mean(1).square().mean() + (covariance - torch.eye(len(covariance), device=flat.device)).square().mean()


@torch.inference_mode()
def revive(vae: AutoencoderTiny, images: torch.Tensor) -> int:
    """Give units of the blocks that no image (N, 3, H, W) wakes new weights, and no say at first; returns how many.

    At 2e-3 half of the blocks' rectified units died in the first thousand steps, 25 of 32 in the encoder's first block.
    """
    firing: dict[nn.Module, torch.Tensor] = {}
    blocks = [module for module in vae.modules() if isinstance(module, AutoencoderTinyBlock)]
    layers = [(block.conv[i], block.conv[i + 2]) for block in blocks for i in (0, 2)]

    def note(module: nn.Module, _: object, output: torch.Tensor) -> None:
        firing[module] = (output > 0).float().mean((0, 2, 3))

    hooks = [before.register_forward_hook(note) for before, _ in layers]
    vae.decode(vae.encode(images).latents)
    for hook in hooks:
        hook.remove()
    count = 0
    for before, after in layers:
        dead = firing[before] < 1e-3
        count += int(dead.sum())
        fresh = nn.Conv2d(before.in_channels, before.out_channels, 3, padding=1)
        before.weight[dead], before.bias[dead] = fresh.weight[dead], 0.0
        after.weight[:, dead] = 0.0
    return count


def psnr(vae: AutoencoderTiny, images: np.ndarray, device: str) -> tuple[float, float]:
    """PSNR in dB over all pixels, and over the pixels at edges, of the deterministic round trip."""
    errors, edges = [], []
    with torch.inference_mode():
        for start in range(0, len(images), 64):
            target = to_tensor(images[start : start + 64], device)
            output = vae.decode(vae.encode(target).latents).sample.clamp(-1, 1)
            squared = ((output - target) / 2).square().mean(1)
            right, down = gradients(target)
            edge = torch.nn.functional.pad(right.abs(), (0, 1)) + torch.nn.functional.pad(down.abs(), (0, 0, 0, 1))
            errors.append(squared.mean().item())
            edges.append(squared[edge.mean(1) > 0.2].mean().item())
    return -10 * float(np.log10(np.mean(errors))), -10 * float(np.log10(np.mean(edges)))


def main() -> None:
    options = parser(__doc__, minutes=20)
    options.add_argument("--decoder-only", action="store_true", help="leave the latents as they are")
    options.add_argument("--latent-channels", type=int, default=CONFIG["latent_channels"])
    options.add_argument("--revive", action="store_true", help="begin by giving dead units new weights")
    Workers.run(train, options.parse_args())


def train(rank: int, args: argparse.Namespace) -> None:
    begin(args)
    workers = Workers(rank, args.workers)
    images, held_out = training_images(args.data)
    config = CONFIG | {"latent_channels": args.latent_channels}
    vae = AutoencoderTiny(**config).to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    run = Run(args.name or "autoencoder", minutes=args.minutes, fresh=args.fresh and rank == 0)
    if not args.fresh and (states := run.load()) is not None:
        vae.load_state_dict(states["model"])
        if "optimizer" in states and not args.revive:
            restore_optimizer(optimizer, states["optimizer"])
    if run.step > 0 and args.revive:
        run.log(revived=revive(vae, to_tensor(held_out[:32], args.device)))
    if args.decoder_only:
        vae.encoder.requires_grad_(False)
    rng = np.random.default_rng([args.seed, run.step, rank])
    progress, batch, parameters = run.progress, BATCH // args.workers, list(vae.parameters())
    while progress < 1:
        if rank == 0 and run.step % 1000 == 0:
            overall, edge = psnr(vae, held_out[:128], args.device)
            run.log(psnr_db=round(overall, 2), edge_psnr_db=round(edge, 2))
        if rank == 0 and run.step % 250 == 0:
            run.save(model=vae.state_dict(), optimizer=optimizer_state(optimizer))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * trapezoid(progress, warmup=0.02, decay=0.6)
        rows = rng.integers(len(images), size=batch)
        tops, lefts = rng.integers(images.shape[1] - CROP + 1, size=(2, batch))
        crops = np.stack([images[i, t : t + CROP, s : s + CROP] for i, t, s in zip(rows, tops, lefts, strict=True)])
        target = to_tensor(crops, args.device)
        latents = vae.encode(target).latents
        output = vae.decode(latents + LATENT_NOISE * torch.randn_like(latents)).sample
        fit = reconstruction_loss((output + 1) / 2, (target + 1) / 2, l2=2.0 if progress < 0.6 else 8.0)
        loss = fit + 0.05 * whiteness_penalty(latents)
        loss.backward()
        _, progress = workers.average(parameters, loss.item(), run.progress)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.step += 1
    if rank > 0:
        return
    overall, edge = psnr(vae, held_out, args.device)
    run.log(psnr_db=round(overall, 3), edge_psnr_db=round(edge, 3), images=len(held_out), final=True)
    run.save(model=vae.state_dict(), optimizer=optimizer_state(optimizer))
    vae.save_pretrained(WORK / "vae")


if __name__ == "__main__":
    main()
