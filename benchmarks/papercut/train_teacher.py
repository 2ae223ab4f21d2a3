"""Train papercut's teacher: a small Stable Diffusion UNet on the latents of rendered scenes.

    python benchmarks/papercut/train_teacher.py --minutes 100 --workers 2

Needs the autoencoder, tokenizer and text encoder of the other scripts (both frozen here). v prediction with Stable
Diffusion's noise schedule; the loss is clipped in signal-to-noise ratio (Hang et al. 2023, min-SNR) so that layout and
colour, decided at high noise, get their share. The optimizer is Muon, and beside the noise the UNet's features have to
say what stands where (`layout_head.py`). Every few minutes the log gets the checker's figures on samples. With
--workers 2 two processes of one thread each share a batch and average their gradients.
"""

from __future__ import annotations

import argparse
import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    SCENES,
    WORK,
    Run,
    Workers,
    begin,
    optimizer_state,
    parser,
    restore_optimizer,
    scenes,
    to_tensor,
    training_images,
    trapezoid,
)
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from layout_head import LayoutHead, layout_maps
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from tiue_cli.distill.muon import Muon
from tiue_cli.papercut.world.captions import rough_phrase
from tiue_cli.papercut.world.evaluation import balanced_specs, shares

CONFIG: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 12,
    "out_channels": 12,
    "block_out_channels": (32, 64, 128),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 160,
    "attention_head_dim": 4,  # diffusers' historical name: the number of heads
    "norm_num_groups": 8,
}
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "v_prediction",
    "timestep_spacing": "leading",
}
BATCH, LEARNING_RATE, DECAY, EMA, DROPOUT, GAMMA, FLOOR = 64, 2e-3, 0.01, 0.998, 0.1, 5.0, 1.0
WEIGHTS = "diffusion_pytorch_model.safetensors"
PHRASINGS = 2
"""How many captions each scene has."""


def _digest(*files: Path) -> str:
    """What these files hold, in eight hexadecimal digits."""
    digest = hashlib.sha256()
    for each in files:
        with each.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:8]


def _kept(path: Path, parts: Any) -> np.ndarray:
    """An array that is computed once, in parts, and then read from disk; those of other sources make room for it."""
    if not path.exists():
        for stale in path.parent.glob(path.name.rsplit("_", 1)[0] + "_????????.npy"):
            stale.unlink()
        aside = path.with_suffix(".part.npy")
        np.save(aside, np.concatenate(list(parts())))
        aside.rename(path)
    return np.load(path, mmap_mode="r")


def cached_inputs(device: str, data: Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Latents (N, C, H, W) and text states (PHRASINGS·N, 24, 160) of the pictures, float16.

    Cached on disk by what they are made of: another autoencoder, text encoder or folder of pictures gives new ones.
    """
    step, name = 250, str(SCENES) if data is None else data.name
    pictures, said = ((), ()) if data is None else ((data / "images.npy",), (data / "captions.txt",))
    vae = _digest(WORK / "vae" / "config.json", WORK / "vae" / WEIGHTS, *pictures)
    encoder = _digest(WORK / "tokenizer" / "tokenizer.json", WORK / "text_encoder" / "model.safetensors", *said)

    def latents() -> Any:
        images, _ = training_images(data)
        vae = AutoencoderTiny.from_pretrained(WORK / "vae").to(device, memory_format=torch.channels_last)
        with torch.inference_mode():
            for i in range(0, len(images), step):
                yield vae.encode(to_tensor(images[i : i + step], device)).latents.half().cpu().numpy()

    def states() -> Any:
        text, captions = Text(device), all_captions(data)
        for i in range(0, len(captions), step):
            yield text(captions[i : i + step]).half().cpu().numpy()

    return _kept(WORK / f"latents_{name}_{vae}.npy", latents), _kept(WORK / f"states_{name}_{encoder}.npy", states)


def cached_layouts() -> np.ndarray:
    """What stands where in the pictures (N, CHANNELS, 16, 16) uint8, cached on disk."""
    return _kept(WORK / f"layouts_{SCENES}.npy", lambda: layout_maps(scenes(SCENES, seed=10)[0], 10))


def all_captions(data: Path | None) -> list[str]:
    """The captions of all pictures, PHRASINGS times: of each picture one, then of each the other."""
    if data is not None:
        return (data / "captions.txt").read_text().splitlines()
    rng, specs = random.Random(3), scenes(SCENES, seed=10)[0]
    return [rough_phrase(spec, rng) for _ in range(PHRASINGS) for spec in specs]


def unet_config(latents: np.ndarray, widths: Sequence[int]) -> dict[str, Any]:
    """CONFIG for latents (N, C, H, H) and these widths of the levels."""
    channels, side = latents.shape[1:3]
    return CONFIG | {
        "sample_size": side, "in_channels": channels, "out_channels": channels, "block_out_channels": tuple(widths),
    }  # fmt: skip


def make_unet(config: dict[str, Any] = CONFIG) -> UNet2DConditionModel:
    """A UNet whose residual branches and output start at zero: the identity is where training begins."""
    unet = UNet2DConditionModel(**config)
    for name, module in unet.named_modules():
        if name.endswith((".conv2", ".proj_out")) or name == "conv_out":
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return unet


class Text:
    """Captions to frozen text states."""

    def __init__(self, device: str) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(WORK / "tokenizer")
        self.model = CLIPTextModel.from_pretrained(WORK / "text_encoder").to(device).eval().requires_grad_(False)

    def __call__(self, captions: Sequence[str]) -> torch.Tensor:
        ids = self.tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():  # not inference mode: these tensors enter a graph
            return self.model(input_ids=ids.to(self.model.device)).last_hidden_state


@torch.inference_mode()
def sample(
    unet: UNet2DConditionModel,
    text: Text,
    captions: list[str],
    *,
    steps: int,
    guidance: float,
    seed: int,
    batch: int = 64,
) -> torch.Tensor:
    """Guided DDIM; returns latents (N, 12, 16, 16)."""
    scheduler = DDIMScheduler(**SCHEDULER)
    scheduler.set_timesteps(steps)
    device, shape = unet.device, (CONFIG["in_channels"], 16, 16)
    parts = []
    for start in range(0, len(captions), batch):
        part = captions[start : start + batch]
        latents = torch.randn(len(part), *shape, generator=torch.Generator().manual_seed(seed + start)).to(device)
        states = torch.cat([text([""] * len(part)), text(part)])
        for t in scheduler.timesteps:
            without, guided = unet(torch.cat([latents] * 2), t, states).sample.chunk(2)
            latents = scheduler.step(without + guidance * (guided - without), t, latents).prev_sample
        parts.append(latents)
    return torch.cat(parts)


def evaluate(
    unet: UNet2DConditionModel,
    text: Text,
    name: str,
    *,
    count: int,
    steps: int = 20,
    guidance: float = 3.0,
    batch: int = 64,
) -> dict[str, float]:
    """The checker's verdict on samples of held-out captions, and a contact sheet of them."""
    from tiue_cli.papercut.world.checker import load_checker, read

    vae = AutoencoderTiny.from_pretrained(WORK / "vae").to(unet.device)
    specs = balanced_specs(count, seed=77)
    captions = [spec.caption for spec in specs]
    latents = sample(unet, text, captions, steps=steps, guidance=guidance, seed=5, batch=batch)
    with torch.inference_mode():
        images = torch.cat([vae.decode(part).sample for part in latents.split(64)]).clamp(-1, 1).cpu()
    pixels = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    columns, size = 12, pixels.shape[1]
    tiles = pixels[:: max(1, len(pixels) // 96)][:96]
    tiles = tiles[: len(tiles) // columns * columns]
    sheet = tiles.reshape(-1, columns, size, size, 3).transpose(0, 2, 1, 3, 4).reshape(-1, columns * size, 3)
    Image.fromarray(sheet).save(WORK / f"{name}.png")
    if not (WORK / "checker.safetensors").exists():
        return {}
    figures = shares(read(load_checker(WORK / "checker.safetensors"), pixels), specs)
    return {key: round(value, 3) for key, value in figures.items() if "_" not in key or key.endswith("_all")}


def main() -> None:
    options = parser(__doc__, minutes=100)
    options.add_argument("--evaluate-minutes", type=float, default=12.0)
    options.add_argument("--widths", type=int, nargs="+", default=list(CONFIG["block_out_channels"]))
    args = options.parse_args()
    if args.workers > 1:
        cached_inputs(args.device, args.data)
        if args.data is None:
            cached_layouts()
    Workers.run(train, args)


class Teacher:
    """The UNet in training, its running mean, and the head that its features have to satisfy beside the noise."""

    def __init__(self, config: dict[str, Any], args: argparse.Namespace) -> None:
        self.device = args.device
        self.unet = make_unet(config).to(self.device, memory_format=torch.channels_last)
        self.ema = UNet2DConditionModel(**config).to(self.device, memory_format=torch.channels_last)
        self.ema.requires_grad_(False).load_state_dict(self.unet.state_dict())
        # Of pictures that nobody rendered here it is not known what stands where.
        self.head = LayoutHead(self.unet).to(self.device) if args.data is None else None
        self.layouts = None if self.head is None else cached_layouts()
        self.parameters = [*self.unet.parameters(), *(() if self.head is None else self.head.parameters())]
        self.optimizer = Muon(self.parameters, lr=LEARNING_RATE, weight_decay=DECAY)

    def states(self) -> dict[str, dict[str, torch.Tensor]]:
        """What a checkpoint holds."""
        parts = {} if self.head is None else {"head": self.head.state_dict()}
        networks = {"model": self.unet.state_dict(), "ema": self.ema.state_dict(), **parts}
        return networks | {"optimizer": optimizer_state(self.optimizer)}

    def resume(self, saved: dict[str, dict[str, torch.Tensor]]) -> None:
        self.unet.load_state_dict(saved["model"])
        self.ema.load_state_dict(saved["ema"])
        if self.head is not None and "head" in saved:
            self.head.load_state_dict(saved["head"])
        # The moments of a training without the head are of other parameters.
        if "optimizer" in saved and ("head" in saved) == (self.head is not None):
            restore_optimizer(self.optimizer, saved["optimizer"])

    def layout_loss(self, rows: torch.Tensor) -> torch.Tensor | float:
        """How wrong the features of the UNet's last pass, on these rows' pictures, are about what stands where."""
        if self.head is None or self.layouts is None:
            return 0.0
        return self.head.loss(torch.from_numpy(self.layouts[rows.numpy()]).to(self.device).float() / 255)

    def update(self, rate: float, step: int) -> None:
        """One step of the optimizer at this share of the learning rate, by the gradients that are there."""
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(EMA, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.unet.parameters()), 1 - decay)


def train(rank: int, args: argparse.Namespace) -> None:
    begin(args)
    workers = Workers(rank, args.workers)
    latents, states = cached_inputs(args.device, args.data)
    text = Text(args.device)
    empty = text([""])
    teacher = Teacher(unet_config(latents, args.widths), args)
    name = args.name or "teacher"
    run = Run(name, minutes=args.minutes, fresh=args.fresh and rank == 0)
    if not args.fresh and (saved := run.load()) is not None:
        teacher.resume(saved)
    alphas = DDIMScheduler(**SCHEDULER).alphas_cumprod.to(args.device)
    generator = torch.Generator().manual_seed((args.seed * 1_000_003 + run.step) * 16 + rank)
    progress, losses = run.progress, []
    next_evaluation = run.elapsed_s + 60 * args.evaluate_minutes
    while progress < 1:
        rows = torch.randint(len(latents), (BATCH // args.workers,), generator=generator)
        captions = rows + len(latents) * torch.randint(PHRASINGS, rows.shape, generator=generator)
        said = torch.from_numpy(states[captions.numpy()]).float().to(args.device)
        dropped = torch.rand(len(rows), generator=generator) < DROPOUT
        said = torch.where(dropped[:, None, None].to(args.device), empty, said)
        clean = torch.from_numpy(latents[rows.numpy()]).float()
        rate = trapezoid(progress, decay=0.5)
        loss = training_loss(teacher.unet, clean, said, alphas, generator)
        # The layout is of most use early on: it fades with the learning rate.
        (loss + rate * teacher.layout_loss(rows)).backward()
        mean, progress = workers.average(teacher.parameters, loss.item(), run.progress)
        losses.append(mean)
        teacher.update(rate, run.step)
        run.step += 1
        if rank == 0 and run.step % 200 == 0:
            speed = run.step * BATCH / run.elapsed_s
            run.log(loss=round(float(np.mean(losses[-200:])), 4), images_per_s=round(speed, 1))
            run.save(**teacher.states())
        if rank == 0 and args.data is None and run.elapsed_s > next_evaluation:
            next_evaluation = run.elapsed_s + 60 * args.evaluate_minutes
            run.log(**evaluate(teacher.ema.eval(), text, name, count=100))
    if rank == 0:
        run.save(**teacher.states())
        teacher.ema.save_pretrained(WORK / "unet")
        figures = evaluate(teacher.ema.eval(), text, name, count=500) if args.data is None else {}
        run.log(final=True, **figures)


def training_loss(
    unet: UNet2DConditionModel,
    clean: torch.Tensor,
    states: torch.Tensor,
    alphas: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """The weighted v loss on clean latents (B, 12, 16, 16); timesteps are stratified over the batch."""
    count = len(clean)
    spread = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    timesteps = (spread * len(alphas)).long().clamp(max=len(alphas) - 1)
    noise = torch.randn(clean.shape, generator=generator)
    clean, noise = (each.to(alphas.device, memory_format=torch.channels_last) for each in (clean, noise))
    return velocity_loss(unet, clean, noise, timesteps.to(alphas.device), states, alphas)


def velocity_loss(
    unet: UNet2DConditionModel,
    clean: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    states: torch.Tensor,
    alphas: torch.Tensor,
) -> torch.Tensor:
    """The weighted v loss on clean latents and noise (B, 12, 16, 16) at timesteps (B,)."""
    alpha = alphas[timesteps][:, None, None, None]
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
    prediction = unet(noisy, timesteps, states).sample
    # v's squared error is (SNR + 1) times that of x_0. With 12 channels a cell, layout and shapes are decided where the
    # SNR is nearly zero: there v's own error counts in full, and less only beyond γ, where grain is.
    snr = alpha / (1 - alpha)
    weight = (snr.clamp(max=GAMMA) + FLOOR) / (snr + 1)
    return (weight * (prediction - velocity).square()).mean()


if __name__ == "__main__":
    main()
