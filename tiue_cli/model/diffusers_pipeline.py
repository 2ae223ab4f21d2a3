"""A student as a diffusers pipeline, for code that is written for diffusers.

The one pass (text encoder, UNet encoder, UNet decoder at all timesteps, weighted sum, VAE) stands where other pipelines
have their loop; around it is what ``DiffusionPipeline`` offers: ``to``, ``components``, ``save_pretrained``.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from tiue_cli.errors import ModelFolderError, UsageError
from tiue_cli.model.autoencoder import ImageDecoder
from tiue_cli.model.components import load_components
from tiue_cli.model.noise import check_seed, draw_noise
from tiue_cli.model.schedule import combine_for_run
from tiue_cli.model.shared import SharedUNetDecoder
from tiue_cli.model.student import StudentModel, save_student, student_of
from tiue_cli.model.text import encode_prompts
from tiue_cli.model.unet import UNetEncoder

if TYPE_CHECKING:
    import numpy as np

OutputType = Literal["pil", "np", "pt", "latent"]

_RANDOM_SEEDS = 2**32


class TiuePipeline(StableDiffusionLoraLoaderMixin, DiffusionPipeline):
    """A one-pass student behind the interface of diffusers' pipelines.

    ``unet``, ``vae``, ``text_encoder`` and ``tokenizer`` are plain diffusers and transformers parts. Same seed, same
    pixels as ``tiue generate`` on the same device and in the same precision. ``load_lora_weights``, ``set_adapters``,
    ``fuse_lora`` and ``unload_lora_weights`` are diffusers' own.

    >>> pipe = tiue.TiuePipeline.from_pretrained("papercut")
    >>> image = pipe("a red heart at night", seed=0).images[0]
    >>> image.size
    (64, 64)
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"  # type: ignore[assignment]  # declared as None by diffusers

    def __init__(
        self, vae: Any, text_encoder: Any, tokenizer: Any, unet: Any, *, student: StudentModel | None = None
    ) -> None:
        """`from_pretrained` makes one; ``student`` says what the manifest and the scheduler config are."""
        super().__init__()
        if student is None:
            raise UsageError(
                "a TiuePipeline needs the student's timesteps", hint="load it: TiuePipeline.from_pretrained(FOLDER)"
            )
        parts: Any = self  # diffusers annotates it in part only
        parts.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet)
        self._student = student

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        torch_dtype: torch.dtype = torch.float32,
        vae: str | Path | None = None,
        **unused: Any,
    ) -> TiuePipeline:
        """Load a student: ``papercut``, a folder, or a hub id ``OWNER/NAME``; ``vae`` replaces its autoencoder.

        The pipeline is on the CPU, in ``torch_dtype``. Raises ModelFolderError, for teachers too, ManifestError, and
        UsageError for keywords of diffusers' that have no meaning here.
        """
        name = pretrained_model_name_or_path
        source = name if isinstance(name, str) else Path(name)
        _refuse_unused("from_pretrained", unused, meaningless=("use_safetensors", "local_files_only"))
        components = load_components(source, dtype=torch_dtype, vae=vae)
        if components.info.kind == "teacher":
            raise ModelFolderError(
                f"{source} is a teacher, which draws in many steps",
                hint="use diffusers' StableDiffusionPipeline or tiue.load, or distil it: tiue distill",
            )
        student = student_of(components, source=str(source))
        return cls(student.vae, student.text_encoder, student.tokenizer, student.unet, student=student)

    def save_pretrained(  # type: ignore[override]  # what is left out of it has no meaning here
        self, save_directory: str | os.PathLike[str], **unused: Any
    ) -> None:
        """Write the student's folder, in the dtype of its weights: `from_pretrained` and every command take it.

        Safetensors only; another student in the way is replaced, anything else never. Raises OutputError, and
        UsageError for keywords of diffusers' that have no meaning here.
        """
        _refuse_unused("save_pretrained", unused, meaningless=("safe_serialization",))
        if _has_adapters(self.unet) or _has_adapters(self.text_encoder):
            raise UsageError(
                "the pipeline has LoRAs beside its weights, which a student's folder cannot hold",
                hint="put them in or take them off first: fuse_lora() and unload_lora_weights()",
            )
        save_student(self.student, Path(save_directory), overwrite=True)

    @property
    def student(self) -> StudentModel:
        """The student with the parts that the pipeline has now."""
        before = self._student
        return StudentModel(
            tokenizer=self.tokenizer,
            text_encoder=self.text_encoder,
            unet=self.unet,
            vae=self.vae,
            scheduler_config=before.scheduler_config,
            manifest=before.manifest,
            source=before.source,
            notes=before.notes,
        )

    def enable_vae_slicing(self) -> None:
        """Decode image by image: less memory for large batches."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decode whole batches again."""
        self.vae.disable_slicing()

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_inference_steps: int | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
    ) -> Any:
        """Draw ``num_images_per_prompt`` images of each prompt in one pass, in order; ``.images`` has them.

        ``num_inference_steps`` is K, how many decoder timesteps are summed (None: the student's own). ``height`` and
        ``width`` are pixels. The noise is one of three: ``seed`` draws it as ``tiue`` does, image number i from
        ``seed`` + i, the same on every device; ``generator`` draws it as diffusers does, which gives other pictures;
        ``latents`` (B, C, h, w) are it. Without any, the seed is random. ``output_type`` is ``pil``, ``np`` (B, H, W,
        3) or ``pt`` (B, 3, H, W) in 0 to 1, or ``latent`` (B, C, h, w) in the UNet's scale. With ``return_dict`` False
        the answer is a tuple. A student has no guidance: other ``guidance_scale`` than None, 0 and 1, and a
        ``negative_prompt`` with words, raise UsageError.

        Raises UsageError for what cannot be.
        """
        _refuse_guidance(guidance_scale, negative_prompt)
        if output_type not in ("pil", "np", "pt", "latent"):
            raise UsageError(f"unknown output_type {output_type!r}", hint="choose among pil, np, pt, latent")
        if num_images_per_prompt < 1:
            raise UsageError(f"num_images_per_prompt {num_images_per_prompt} is out of range", hint="give 1 or more")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise UsageError("no prompt was given", hint='say what to draw: pipe("a red heart at night")')
        rows = [text for text in prompts for _ in range(num_images_per_prompt)]
        decoder = ImageDecoder(self.vae)
        shape = (decoder.latent_channels, *decoder.latent_size(self._size(decoder.factor, height, width)))
        noise = self._noise(len(rows), shape, seed=seed, generator=generator, latents=latents)
        found = self._one_pass(rows, noise, num_inference_steps)
        images: Any = found if output_type == "latent" else _finished(decoder, found, output_type)
        parts: Any = self
        parts.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _one_pass(self, prompts: list[str], noise: torch.Tensor, steps: int | None) -> torch.Tensor:
        """Latents (B, C, h, w) in float32 from noise (B, C, h, w); see ``StudentTorchBackend``."""
        manifest, unet = self._student.manifest, self.unet
        combine = combine_for_run(
            self._student.scheduler_config, manifest.decoder_timesteps, spacing=manifest.spacing, steps=steps
        )
        text_states = encode_prompts(self.tokenizer, self.text_encoder, prompts).to(unet.dtype)
        features = UNetEncoder(unet)(noise.to(unet.dtype), text_states, manifest.encoder_timestep)
        timesteps = torch.tensor(combine.timesteps, device=noise.device)
        # The sum takes the unrounded noise: its weight is the largest, and its rounding would show.
        result: torch.Tensor = combine(noise, SharedUNetDecoder(unet)(features, timesteps, text_states))
        return result

    def _size(self, factor: int, height: int | None, width: int | None) -> tuple[int, int]:
        """(H, W) in pixels, the model's own where nothing is said."""
        sample = self.unet.config["sample_size"]
        own = tuple(sample) if isinstance(sample, (list, tuple)) else (sample, sample)
        return own[0] * factor if height is None else height, own[1] * factor if width is None else width

    def _noise(
        self,
        count: int,
        shape: tuple[int, int, int],
        *,
        seed: int | None,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        latents: torch.Tensor | None,
    ) -> torch.Tensor:
        """Noise (count, C, h, w) float32 on the device. Raises UsageError."""
        ways = {"seed": seed, "generator": generator, "latents": latents}
        given = [name for name, value in ways.items() if value is not None]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} were both given", hint="each of them sets the noise: give one")
        device = self._execution_device
        if latents is not None:
            if tuple(latents.shape) != (count, *shape):
                raise UsageError(f"latents {tuple(latents.shape)} do not fit", hint=f"give {(count, *shape)}")
            return latents.to(device, torch.float32)
        if generator is not None:
            several = generator if isinstance(generator, torch.Generator) else list(generator)
            if isinstance(several, list) and len(several) != count:
                raise UsageError(f"{len(several)} generators for {count} images", hint="give one, or one per image")
            try:
                result: torch.Tensor = randn_tensor(
                    (count, *shape), generator=several, device=device, dtype=torch.float32
                )
                return result
            except ValueError as error:  # it is on another device
                raise UsageError(str(error), hint='make it there: torch.Generator("cpu")') from error
        first = secrets.randbelow(_RANDOM_SEEDS) if seed is None else check_seed(seed)
        return torch.from_numpy(draw_noise([first + number for number in range(count)], shape)).to(device)


def _has_adapters(module: torch.nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(layer, BaseTunerLayer) for layer in module.modules())


def _refuse_unused(method: str, keywords: Mapping[str, Any], *, meaningless: Sequence[str]) -> None:
    others = [name for name, value in keywords.items() if name not in meaningless and value is not None]
    if others:
        raise UsageError(f"{method} of a TiuePipeline does not take {', '.join(others)}", hint="leave it out")


def _refuse_guidance(guidance_scale: float | None, negative_prompt: str | Sequence[str] | None) -> None:
    if guidance_scale not in (None, 0, 1):
        raise UsageError(
            f"guidance_scale {guidance_scale:g} has no meaning: a student makes an image in one pass, without guidance",
            hint="leave it out; how closely prompts are followed was decided when the student was distilled",
        )
    words = [negative_prompt] if isinstance(negative_prompt, str) else list(negative_prompt or ())
    if any(word.strip() for word in words):
        raise UsageError(
            "negative_prompt works through guidance, which a one-pass student does not have",
            hint="leave it out, or draw with the teacher",
        )


def _finished(decoder: ImageDecoder, latents: torch.Tensor, output_type: OutputType) -> Any:
    if output_type == "pil":
        return [Image.fromarray(pixels) for pixels in decoder.decode(latents)]
    images = (decoder.decode_float(latents) * 0.5 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return images
    channels_last: np.ndarray = images.permute(0, 2, 3, 1).cpu().numpy()
    return channels_last
