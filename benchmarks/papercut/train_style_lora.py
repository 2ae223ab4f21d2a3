"""Train a style for papercut as a LoRA on its teacher: blueprints of rendered scenes.

    python benchmarks/papercut/train_style_lora.py --minutes 15
    python benchmarks/papercut/measure_style_lora.py work/papercut-blueprint.safetensors

The teacher's UNet is frozen; rank-8 adapters of its attention, feed-forward and convolution layers learn to denoise
blueprints of the scenes that their captions say (the teacher's own loss). Nothing of a student is used: how well the
file works there is what `measure_style_lora.py` measures.

Without the convolutions ten minutes gave the style in all of 200 pictures of teacher and student, in outlines that
nobody would recognise.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from blueprint import blueprint
from common import WORK, Run, begin, parser, to_tensor, trapezoid
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from worlds import world_of

from tiue_cli.model.components import Components, load_components
from tiue_cli.model.schedule import ddim_config
from tiue_cli.model.text import encode_prompts

NAME = "papercut-blueprint"
TARGETS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
    "proj_in",
    "proj_out",
    "conv1",
    "conv2",
    "conv_in",
]
BATCH, LEARNING_RATE, SCENES, RENDER_SEED = 32, 1e-3, 4000, 77


@torch.no_grad()
def inputs(parts: Components, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(latents, text states) of blueprints, in the UNet's scale."""
    world = world_of(int(parts.info.image_size[0]))
    specs = world.random_specs(count, RENDER_SEED)
    latents, states = [], []
    for start in range(0, count, 100):
        some = specs[start : start + 100]
        images = blueprint(world.render(some, RENDER_SEED * 1_000_003 + start))
        encoded = parts.vae.encode(to_tensor(images, parts.unet.device))
        found = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mean
        latents.append(found * parts.vae.config.scaling_factor)
        states.append(encode_prompts(parts.tokenizer, parts.text_encoder, [spec.caption for spec in some]))
    return torch.cat(latents), torch.cat(states)


def train(args: argparse.Namespace) -> Path:
    """Train within the budget; returns the LoRA file."""
    begin(args)
    parts = load_components(args.model, device=args.device)
    unet = parts.unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=TARGETS))
    adapters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=LEARNING_RATE, weight_decay=0)
    scheduler = DDIMScheduler.from_config(ddim_config(parts.scheduler_config))
    latents, states = inputs(parts, args.scenes)
    run = Run(args.name or NAME, minutes=args.minutes, fresh=True)
    generator = torch.Generator().manual_seed(args.seed)
    losses: list[float] = []
    while run.progress < 1 and run.step < args.steps:
        rows = torch.randint(len(latents), (BATCH,), generator=generator)
        noise = torch.randn((BATCH, *latents.shape[1:]), generator=generator).to(args.device)
        times = torch.randint(scheduler.config.num_train_timesteps, (BATCH,), generator=generator).to(args.device)
        clean = latents[rows]
        prediction = unet(scheduler.add_noise(clean, noise, times), times, states[rows], return_dict=False)[0]
        is_v = scheduler.config.prediction_type == "v_prediction"
        wanted = scheduler.get_velocity(clean, noise, times) if is_v else noise
        loss = torch.nn.functional.mse_loss(prediction.float(), wanted)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * trapezoid(max(run.progress, run.step / args.steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        run.step += 1
        if run.step % 50 == 0 or run.step == args.steps:
            run.log(loss=round(sum(losses) / len(losses), 5))
            losses.clear()
    return save(unet, WORK / f"{args.name or NAME}.safetensors")


def save(unet: torch.nn.Module, path: Path) -> Path:
    """Write the adapter as diffusers does, alpha included."""
    named = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    layers = {name: value.half() for name, value in named.items()}
    config = unet.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(
        path.parent, unet_lora_layers=layers, weight_name=path.name, unet_lora_adapter_metadata=config
    )
    return path


def main() -> None:
    options = parser(__doc__ or "", minutes=15)
    options.add_argument("--model", default="papercut-teacher")
    options.add_argument("--rank", type=int, default=8)
    options.add_argument("--scenes", type=int, default=SCENES)
    options.add_argument("--steps", type=int, default=100_000, help="stop here at the latest")
    print(train(options.parse_args()))


if __name__ == "__main__":
    main()
