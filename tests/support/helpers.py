"""Builders of small but real Stable Diffusion folders, with random weights, for the tests.

Everything is seeded: the same call writes the same weights. Nothing here is downloaded.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tiue_cli.model.sd_configs import SD15_TEXT, SD15_UNET, SD15_VAE, SD21_TEXT, SD21_UNET

Kind = Literal["sd15", "sd21"]
Vae = Literal["kl", "tiny"]

TINY_TOKENS = 16
"""Sequence length of the tiny models: not 77, so that a hard-coded 77 shows."""
TINY_FACTOR = 4
"""Pixels per latent of the tiny autoencoders: not 8, for the same reason."""
TINY_SAMPLE_SIZE = 8
TINY_TEXT_WIDTH = 32

SD_SCHEDULER: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
"""scheduler_config.json of Stable Diffusion 1.5 as it lies on the hub."""

# "tree" before "red": its merge (t, r) must rank before (r, e), or "tree" falls apart.
_WORDS = ("a", "tree", "red", "blue", "star", "house", "above")


def seeded_noise(shape: tuple[int, ...], *, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal noise that does not touch the global generator."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- tokenizer -----------------------------------------------------------------------------------------------------


def _bpe(vocab_size: int | None = None) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's byte-level vocabulary (bytes, bytes at word ends, merges, the two specials) for a few words.

    ``"!"`` gets id 0 as in CLIP's own vocabulary. ``vocab_size`` fills up with tokens that no text reaches.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(char + "</w>" for char in alphabet)]
    merges: list[tuple[str, str]] = []
    for word in _WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            if pair not in merges:
                merges.append(pair)
                tokens.append("".join(pair))
            pieces = ["".join(pair), *pieces[2:]]
    if vocab_size is not None:
        tokens += [f"filler{index}</w>" for index in range(vocab_size - 2 - len(tokens))]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}, merges


def build_tokenizer(
    *, max_length: int = TINY_TOKENS, pad_token: str = "<|endoftext|>", vocab_size: int | None = None
) -> CLIPTokenizer:
    """A real CLIPTokenizer in which every known word is one token and any other text falls into bytes."""
    vocab, merges = _bpe(vocab_size)
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=max_length)
    assert len(tokenizer) == len(vocab)
    for word in _WORDS:
        assert len(tokenizer(word).input_ids) == 3, word
    return tokenizer


def _write_old_tokenizer(path: Path, *, max_length: int, pad_token: str) -> None:
    """The tokenizer files of transformers 4: vocab.json, merges.txt and two JSON files, no tokenizer.json."""
    path.mkdir(parents=True)
    vocab, merges = _bpe()

    def special(content: str) -> dict[str, Any]:
        return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}

    specials = {"bos_token": special("<|startoftext|>"), "eos_token": special("<|endoftext|>")}
    specials["unk_token"] = special("<|endoftext|>")
    _write_json(path / "vocab.json", vocab)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _write_json(path / "special_tokens_map.json", {**specials, "pad_token": pad_token})
    config = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": max_length,
        "name_or_path": "openai/clip-vit-large-patch14",
        "pad_token": pad_token,
        "special_tokens_map_file": "./special_tokens_map.json",
        "tokenizer_class": "CLIPTokenizer",
    }
    added = {name: {"__type": "AddedToken", **value} for name, value in specials.items()}
    _write_json(path / "tokenizer_config.json", {**config, **added})


# --- tiny models ---------------------------------------------------------------------------------------------------


def tiny_unet_config(
    kind: Kind = "sd15", *, head_dim: int = 16, sample_size: int = TINY_SAMPLE_SIZE, levels: int = 3
) -> dict[str, Any]:
    """UNet2DConditionModel arguments with SD 1.5's or SD 2.1's structure at three levels, or two."""
    widths = (2 * head_dim, 4 * head_dim, 4 * head_dim)[:levels]
    common: dict[str, Any] = {
        "sample_size": sample_size,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": (*("CrossAttnDownBlock2D",) * (levels - 1), "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * (levels - 1)),
        "block_out_channels": widths,
        "layers_per_block": 1,
        "cross_attention_dim": TINY_TEXT_WIDTH,
        "norm_num_groups": 8,
    }
    if kind == "sd15":
        # Historical name: this is the number of heads, one for all levels.
        return {**common, "attention_head_dim": 2}
    return {
        **common,
        "attention_head_dim": tuple(width // head_dim for width in widths),
        "use_linear_projection": True,
    }


def tiny_unet(kind: Kind = "sd15", *, seed: int = 0, head_dim: int = 16, levels: int = 3) -> UNet2DConditionModel:
    """A random UNet2DConditionModel in float32, in evaluation mode."""
    with _seeded(seed):
        return UNet2DConditionModel(**tiny_unet_config(kind, head_dim=head_dim, levels=levels)).eval()


def tiny_vae(vae: Vae = "kl", *, seed: int = 0) -> AutoencoderKL | AutoencoderTiny:
    """A random autoencoder with 4 latent channels and TINY_FACTOR pixels per latent."""
    with _seeded(seed):
        if vae == "tiny":
            return AutoencoderTiny(
                encoder_block_out_channels=(8, 8, 8),
                decoder_block_out_channels=(8, 8, 8),
                num_encoder_blocks=(1, 1, 1),
                num_decoder_blocks=(1, 1, 1),
            ).eval()
        return AutoencoderKL(
            block_out_channels=(8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=TINY_SAMPLE_SIZE * TINY_FACTOR,
            scaling_factor=0.18215,
        ).eval()


def tiny_text_encoder(kind: Kind = "sd15", *, tokenizer: CLIPTokenizer, seed: int = 0) -> CLIPTextModel:
    """A random CLIPTextModel that fits ``tokenizer``."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TINY_TEXT_WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=int(tokenizer.model_max_length),
        hidden_act="quick_gelu" if kind == "sd15" else "gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=TINY_TEXT_WIDTH,
    )
    with _seeded(seed):
        return CLIPTextModel(config).eval()


def build_sd_folder(
    path: Path,
    *,
    kind: Kind = "sd15",
    vae: Vae = "kl",
    prediction_type: str = "epsilon",
    seed: int = 0,
    head_dim: int = 16,
    levels: int = 3,
    scheduler: Mapping[str, Any] | None = None,
) -> Path:
    """Write a tiny teacher folder as the current diffusers writes it; ``scheduler`` replaces the config's fields."""
    tokenizer = build_tokenizer(pad_token=_pad_token(kind))
    fields = {**SD_SCHEDULER, "prediction_type": prediction_type, **(scheduler or {})}
    StableDiffusionPipeline(
        tokenizer=tokenizer,
        text_encoder=tiny_text_encoder(kind, tokenizer=tokenizer, seed=seed),
        unet=tiny_unet(kind, seed=seed + 1, head_dim=head_dim, levels=levels),
        vae=tiny_vae(vae, seed=seed + 2),
        scheduler=PNDMScheduler.from_config({**SD_SCHEDULER, "prediction_type": prediction_type}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(path, safe_serialization=True)
    # Written last and by hand: the pipeline corrects some configs, and a test may want the uncorrected one.
    _write_json(path / "scheduler" / "scheduler_config.json", fields)
    return path


def build_old_sd_folder(path: Path, *, kind: Kind = "sd15", seed: int = 0) -> Path:
    """The same tiny model laid out as on the hub years ago: same weights as ``build_sd_folder(kind=, seed=)``.

    tokenizer in vocab.json and merges.txt; text encoder keys with ``text_model.`` and a position buffer; attention of
    the autoencoder as query/key/value/proj_attn; a safety checker named in model_index.json (and not there: nobody
    needs its 1.2 GB); a DDIM-compatible PNDM config.
    """
    tokenizer = build_tokenizer(pad_token=_pad_token(kind))
    text_encoder = tiny_text_encoder(kind, tokenizer=tokenizer, seed=seed)
    unet = tiny_unet(kind, seed=seed + 1)
    autoencoder = tiny_vae("kl", seed=seed + 2)

    _write_old_tokenizer(path / "tokenizer", max_length=TINY_TOKENS, pad_token=_pad_token(kind))
    _write_json(path / "scheduler" / "scheduler_config.json", SD_SCHEDULER)

    for folder, module in (("unet", unet), ("vae", autoencoder)):
        config = {key: value for key, value in module.config.items() if not key.startswith("_")}
        config |= {"_class_name": type(module).__name__, "_diffusers_version": "0.9.0"}
        config.pop("scaling_factor", None)  # later addition; its default is SD's
        _write_json(path / folder / "config.json", config)
    _save(path / "unet" / "diffusion_pytorch_model.safetensors", unet.state_dict())
    renames = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old_vae = autoencoder.state_dict()
    for new, old in renames.items():
        old_vae = {key.replace(f".attentions.0.{new}.", f".attentions.0.{old}."): old_vae[key] for key in old_vae}
    _save(path / "vae" / "diffusion_pytorch_model.safetensors", old_vae)

    config = text_encoder.config.to_dict() | {"architectures": ["CLIPTextModel"], "transformers_version": "4.22.0.dev0"}
    config.pop("dtype", None)
    config["torch_dtype"] = "float32"
    _write_json(path / "text_encoder" / "config.json", config)
    old_text = {f"text_model.{key}": value for key, value in text_encoder.state_dict().items()}
    old_text["text_model.embeddings.position_ids"] = torch.arange(TINY_TOKENS)[None]
    _save(path / "text_encoder" / "model.safetensors", old_text)

    _write_json(
        path / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": "0.9.0",
            "feature_extractor": ["transformers", "CLIPImageProcessor"],
            "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
            "scheduler": ["diffusers", "PNDMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )
    return path


def copy_folder(source: Path, target: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(source, target)
    return target


def edit_json(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file in place; ``...`` as a value removes the field."""
    data = json.loads(path.read_text(encoding="utf-8")) | changes
    _write_json(path, {key: value for key, value in data.items() if value is not ...})


# --- full size -----------------------------------------------------------------------------------------------------


def build_full_size_folder(path: Path, *, kind: Kind = "sd15", seed: int = 0, hollow: bool = False) -> Path:
    """Write a real configuration with random float16 weights: 2.1 GB of disk (SD 2.1: 2.6), little memory.

    The modules exist on the meta device only; each tensor is drawn, written and forgotten. Weights are scaled by
    their fan-in, so that a forward pass stays finite. ``hollow`` leaves holes in the files for zeros: no disk, no time.
    """
    text_config, unet_config = (SD15_TEXT, SD15_UNET) if kind == "sd15" else (SD21_TEXT, SD21_UNET)
    tokenizer = build_tokenizer(max_length=77, pad_token=_pad_token(kind), vocab_size=text_config["vocab_size"])
    tokenizer.save_pretrained(path / "tokenizer")
    _write_json(path / "scheduler" / "scheduler_config.json", SD_SCHEDULER)
    with torch.device("meta"):
        text_encoder = CLIPTextModel(CLIPTextConfig(**text_config))
        unet = UNet2DConditionModel(**unet_config)
        vae = AutoencoderKL(**SD15_VAE)
    text_encoder.config.architectures = ["CLIPTextModel"]
    text_encoder.config.save_pretrained(path / "text_encoder")
    unet.save_config(path / "unet")
    vae.save_config(path / "vae")
    random = None if hollow else np.random.Generator(np.random.Philox(key=seed))
    _stream_random(path / "text_encoder" / "model.safetensors", text_encoder, random)
    _stream_random(path / "unet" / "diffusion_pytorch_model.safetensors", unet, random)
    _stream_random(path / "vae" / "diffusion_pytorch_model.safetensors", vae, random)
    _write_json(
        path / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": "0.42.1",
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "PNDMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )
    return path


def _stream_random(path: Path, module: torch.nn.Module, random: np.random.Generator | None) -> None:
    """Write a safetensors file for ``module``'s parameters, one tensor at a time; holes where ``random`` is None."""
    shapes = {name: tuple(value.shape) for name, value in module.named_parameters()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        if random is None:
            file.truncate(8 + len(encoded) + end)
            return
        block = random.standard_normal(2**20, dtype=np.float32)
        for name, shape in shapes.items():
            for values in _random_pieces(name, shape, block=block, random=random):
                file.write(values.astype("<f2").tobytes())


def _random_pieces(
    name: str, shape: tuple[int, ...], *, block: np.ndarray, random: np.random.Generator
) -> Iterator[np.ndarray]:
    """Values of one tensor in pieces of at most a block: ones and zeros for norms and biases, else fan-in scaled."""
    count = int(np.prod(shape))
    if len(shape) == 1:
        yield np.full(count, 1.0 if name.endswith("weight") else 0.0, dtype=np.float32)
        return
    scale = 0.02 if "embedding.weight" in name else float(np.prod(shape[1:])) ** -0.5
    while count > 0:
        size = min(count, block.size)
        # Fresh draws for a thousand million weights take minutes; a rolled block is random enough for a smoke test.
        yield scale * np.roll(block, int(random.integers(block.size)))[:size]
        count -= size


# --- small things --------------------------------------------------------------------------------------------------


def _pad_token(kind: Kind) -> str:
    """SD 1.5 pads with the end token, SD 2.1 with ``!`` (id 0)."""
    return "<|endoftext|>" if kind == "sd15" else "!"


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator for a block, and give it back as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _save(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata={"format": "pt"})
