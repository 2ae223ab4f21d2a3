"""Train papercut's teacher: a small Stable Diffusion UNet on the latents of rendered scenes.

    python benchmarks/papercut/train_teacher.py --minutes 100

Needs the autoencoder, tokenizer and text encoder of the other scripts (both frozen here). v prediction with Stable
Diffusion's noise schedule; the loss is clipped in signal-to-noise ratio (Hang et al. 2023, min-SNR) so that layout and
colour, decided at high noise, get their share. Every few minutes the log gets the checker's figures on samples.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from common import WORK, Run, optimizer_state, parser, restore_optimizer, scenes, to_tensor, trapezoid
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from train_text_encoder import roughen
from transformers import CLIPTextModel, CLIPTokenizer

from tiue_cli.papercut.captions import SceneSpec, random_specs

CONFIG: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64, 96),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 128,
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
SCENES, BATCH, LEARNING_RATE, EMA, DROPOUT, GAMMA, FLOOR = 120_000, 64, 1.5e-3, 0.999, 0.1, 5.0, 0.08


def latents_of(count: int, device: str) -> tuple[list[SceneSpec], torch.Tensor]:
    """The scenes' latents (N, 4, 16, 16) float16, cached on disk."""
    specs, images = scenes(count, seed=10, pair_share=0.7)
    path = WORK / f"latents_{count}.npy"
    if not path.exists():
        vae = AutoencoderTiny.from_pretrained(WORK / "vae").to(device, memory_format=torch.channels_last)
        with torch.inference_mode():
            parts = [
                vae.encode(to_tensor(images[i : i + 128], device)).latents.half().cpu().numpy()
                for i in range(0, count, 128)
            ]
        np.save(path.with_suffix(".part.npy"), np.concatenate(parts))
        path.with_suffix(".part.npy").rename(path)
    return specs, torch.from_numpy(np.load(path))


def make_unet() -> UNet2DConditionModel:
    """A UNet whose residual branches and output start at zero: the identity is where training begins."""
    unet = UNet2DConditionModel(**CONFIG)
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

    def __call__(self, captions: list[str]) -> torch.Tensor:
        ids = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():  # not inference mode: these tensors enter a graph
            return self.model(input_ids=ids.to(self.model.device)).last_hidden_state


@torch.inference_mode()
def sample(unet: UNet2DConditionModel, text: Text, captions: list[str], *, steps: int, guidance: float, seed: int):
    """Guided DDIM; returns latents (N, 4, 16, 16)."""
    scheduler = DDIMScheduler(**SCHEDULER)
    scheduler.set_timesteps(steps)
    device = unet.device
    parts = []
    for start in range(0, len(captions), 64):
        part = captions[start : start + 64]
        latents = torch.randn(len(part), 4, 16, 16, generator=torch.Generator().manual_seed(seed + start)).to(device)
        states = torch.cat([text([""] * len(part)), text(part)])
        for t in scheduler.timesteps:
            without, guided = unet(torch.cat([latents] * 2), t, states).sample.chunk(2)
            latents = scheduler.step(without + guidance * (guided - without), t, latents).prev_sample
        parts.append(latents)
    return torch.cat(parts)


def evaluate(unet: UNet2DConditionModel, text: Text, name: str, *, count: int, steps: int = 25) -> dict[str, float]:
    """The checker's verdict on samples of held-out captions, and a contact sheet of them."""
    from tiue_cli.papercut.checker import judge, load_checker, read

    vae = AutoencoderTiny.from_pretrained(WORK / "vae").to(unet.device)
    specs = random_specs(count, seed=77)
    latents = sample(unet, text, [spec.caption for spec in specs], steps=steps, guidance=3.0, seed=5)
    with torch.inference_mode():
        images = torch.cat([vae.decode(part).sample for part in latents.split(64)]).clamp(-1, 1).cpu()
    pixels = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    tiles = pixels[: len(pixels) // 16 * 16][:96]
    sheet = tiles.reshape(-1, 16, 64, 64, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 16 * 64, 3)
    Image.fromarray(sheet).save(WORK / f"{name}.png")
    if not (WORK / "checker.safetensors").exists():
        return {}
    verdict = judge(read(load_checker(WORK / "checker.safetensors"), pixels), specs)
    pair = np.array([spec.relation is not None for spec in specs])
    return {
        "background": round(float(verdict["background"].mean()), 3),
        "count": round(float(verdict["count"].mean()), 3),
        "single_all": round(float(verdict["all"][~pair].mean()), 3),
        "pair_all": round(float(verdict["all"][pair].mean()), 3),
        "pair_objects": round(float(verdict["objects"][pair].mean()), 3),
        "pair_colors": round(float(verdict["colors"][pair].mean()), 3),
        "pair_relation": round(float(verdict["relation"][pair].mean()), 3),
    }


def main() -> None:
    options = parser(__doc__, minutes=100)
    options.add_argument("--evaluate-minutes", type=float, default=8.0)
    args = options.parse_args()
    torch.manual_seed(args.seed)
    specs, latents = latents_of(SCENES, args.device)
    text = Text(args.device)
    unet = make_unet().to(args.device, memory_format=torch.channels_last)
    ema = UNet2DConditionModel(**CONFIG).to(args.device, memory_format=torch.channels_last).requires_grad_(False)
    ema.load_state_dict(unet.state_dict())
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    name = args.name or "teacher"
    run = Run(name, minutes=args.minutes, fresh=args.fresh)
    if (states := run.load()) is not None:
        unet.load_state_dict(states["model"])
        ema.load_state_dict(states["ema"])
        restore_optimizer(optimizer, states["optimizer"])
    alphas = DDIMScheduler(**SCHEDULER).alphas_cumprod.to(args.device)
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + run.step)
    rng = random.Random(f"{args.seed}-{run.step}")
    next_evaluation, losses = run.elapsed_s + 120, []
    while run.progress < 1:
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * trapezoid(run.progress, decay=0.6)
        rows = torch.randint(len(specs), (BATCH,), generator=generator)
        captions = ["" if rng.random() < DROPOUT else caption_of(specs[i], rng) for i in rows.tolist()]
        losses.append(training_step(unet, latents[rows].float(), text(captions), alphas, generator))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(EMA, (1 + run.step) / (10 + run.step))
        torch._foreach_lerp_(list(ema.parameters()), list(unet.parameters()), 1 - decay)
        run.step += 1
        if run.step % 200 == 0:
            run.log(loss=round(float(np.mean(losses)), 4), images_per_s=round(run.step * BATCH / run.elapsed_s, 1))
            losses.clear()
            run.save(model=unet.state_dict(), ema=ema.state_dict(), optimizer=optimizer_state(optimizer))
        if run.elapsed_s > next_evaluation:
            next_evaluation = run.elapsed_s + 60 * args.evaluate_minutes
            run.log(**evaluate(ema.eval(), text, name, count=192, steps=20))
    run.save(model=unet.state_dict(), ema=ema.state_dict(), optimizer=optimizer_state(optimizer))
    run.log(final=True, **evaluate(ema.eval(), text, name, count=1024))
    ema.save_pretrained(WORK / "unet")


def caption_of(spec: SceneSpec, rng: random.Random) -> str:
    if rng.random() < 0.12:
        spec = SceneSpec(spec.things, spec.relation, None)
    return roughen(spec, rng)


def training_step(
    unet: UNet2DConditionModel,
    clean: torch.Tensor,
    states: torch.Tensor,
    alphas: torch.Tensor,
    generator: torch.Generator,
) -> float:
    """Backward of the weighted v loss on clean latents (B, 4, 16, 16); timesteps are stratified over the batch."""
    count = len(clean)
    spread = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    timesteps = (spread * len(alphas)).long().clamp(max=len(alphas) - 1)
    noise = torch.randn(clean.shape, generator=generator)
    device = alphas.device
    clean, noise, timesteps = clean.to(device), noise.to(device), timesteps.to(device)
    alpha = alphas[timesteps][:, None, None, None]
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
    prediction = unet(noisy.to(memory_format=torch.channels_last), timesteps, states).sample
    # v's squared error is (SNR + 1) times that of x_0. A little is added to min(SNR, γ), so that layout, which is
    # decided where SNR is nearly zero, is not forgotten.
    snr = alpha / (1 - alpha)
    weight = (snr.clamp(max=GAMMA) + FLOOR) / (snr + 1)
    loss = (weight * (prediction - velocity).square()).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
    return loss.item()


if __name__ == "__main__":
    main()
