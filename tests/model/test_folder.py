"""Model folders: what a good one says about itself, and one clear error for each way to be a wrong one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import (
    TINY_FACTOR,
    TINY_SAMPLE_SIZE,
    TINY_TOKENS,
    build_old_sd_folder,
    build_sd_folder,
    copy_folder,
    edit_json,
)

from tiue_cli.errors import ManifestError, ModelFolderError, TiueError
from tiue_cli.files.manifests import write_json
from tiue_cli.files.students import STUDENT_MANIFEST, StudentManifest
from tiue_cli.model.folder import check_model_folder, check_vae_folder

UNET = "unet/diffusion_pytorch_model.safetensors"


def student_manifest(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "decoder_timesteps": (751, 501, 251, 1),
        "encoder_timestep": 751,
        "spacing": "leading",
        "prediction_type": "epsilon",
        "teacher": "owner/teacher",
        "tiue_version": "0.1.0",
    }
    return StudentManifest(**{**fields, **changes}).model_dump(mode="json")


@pytest.fixture
def folder(tiny_teacher_folder: Path, tmp_path: Path) -> Path:
    """A good folder that a test may damage."""
    return copy_folder(tiny_teacher_folder, tmp_path / "model")


# --- good folders


def test_a_teacher_says_what_it_is(tiny_teacher_folder: Path) -> None:
    info = check_model_folder(tiny_teacher_folder)
    assert (info.kind, info.manifest, info.decoder_timesteps, info.teacher) == ("teacher", None, None, None)
    assert info.sample_size == (TINY_SAMPLE_SIZE, TINY_SAMPLE_SIZE)
    assert info.factor == TINY_FACTOR
    assert info.image_size == (TINY_SAMPLE_SIZE * TINY_FACTOR,) * 2
    assert info.text_tokens == TINY_TOKENS
    assert (info.scheduler_class, info.prediction_type) == ("PNDMScheduler", "epsilon")


def test_weights_are_counted_as_the_modules_count_them(tiny_teacher_folder: Path) -> None:
    from tiue_cli.model.components import load_components

    components = load_components(tiny_teacher_folder)
    for name in ("text_encoder", "unet", "vae"):
        parameters = sum(parameter.numel() for parameter in getattr(components, name).parameters())
        info = components.info.component(name)
        assert (info.parameters, info.size_bytes, info.dtypes) == (parameters, 4 * parameters, ("F32",))


def test_a_student_says_what_it_is(folder: Path) -> None:
    write_json(folder / STUDENT_MANIFEST, student_manifest(license="apache-2.0"))
    info = check_model_folder(folder)
    assert (info.kind, info.teacher, info.license) == ("student", "owner/teacher", "apache-2.0")
    assert info.decoder_timesteps == (751, 501, 251, 1)
    assert json.loads(info.model_dump_json())["decoder_timesteps"] == [751, 501, 251, 1]


def test_the_old_hub_layout_is_a_model_folder(tmp_path: Path) -> None:
    info = check_model_folder(build_old_sd_folder(tmp_path / "old", kind="sd21"))
    assert (info.kind, info.text_tokens) == ("teacher", TINY_TOKENS)
    new = check_model_folder(build_sd_folder(tmp_path / "new", kind="sd21"))
    assert info.parameters == new.parameters, "the position buffer of old text encoders is no parameter"


@pytest.mark.parametrize("name", ["loopfree-sd1.5", "models--senmaonk--loopfree-sd2.1-base/snapshots/0123abc"])
def test_a_released_student_is_known_by_its_name(tiny_teacher_folder: Path, tmp_path: Path, name: str) -> None:
    info = check_model_folder(copy_folder(tiny_teacher_folder, tmp_path / name))
    assert (info.kind, info.manifest) == ("student", None)
    assert STUDENT_MANIFEST in info.notes[0]


def test_tiny_autoencoders_have_their_own_factor(tmp_path: Path) -> None:
    info = check_model_folder(build_sd_folder(tmp_path / "model", vae="tiny"))
    assert (info.vae_class, info.factor) == ("AutoencoderTiny", TINY_FACTOR)


def test_half_precision_variants_and_shards_are_accepted(folder: Path) -> None:
    plain = check_model_folder(folder)
    (folder / UNET).rename(folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    text = folder / "text_encoder"
    (text / "model.safetensors").rename(text / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (text / "model.safetensors.index.json").write_text(json.dumps(index))
    info = check_model_folder(folder)
    assert info.component("unet").variant == "fp16"
    assert info.component("text_encoder").files == ("model-00001-of-00001.safetensors",)
    assert info.parameters == plain.parameters


def test_plain_weights_win_over_variants(folder: Path) -> None:
    (folder / "unet/diffusion_pytorch_model.non_ema.safetensors").write_bytes((folder / UNET).read_bytes())
    assert check_model_folder(folder).component("unet").variant is None


@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        ("---\nlicense: creativeml-openrail-m\ntags:\n- x\n---\nText", "creativeml-openrail-m"),
        ('---\nlicense: other\nlicense_name: "my-licence"\n---\n', "my-licence"),
        ("---\ntags: [x]\n---\nlicense: not here\n", "unknown"),
        ("# No front matter\nlicense: mit\n", "unknown"),
        ("", "unknown"),
    ],
)
def test_the_licence_is_read_from_the_model_card(folder: Path, readme: str, licence: str) -> None:
    (folder / "README.md").write_text(readme)
    assert check_model_folder(folder).license == licence


def test_the_check_needs_no_torch(tiny_teacher_folder: Path) -> None:
    program = (
        "import sys; from tiue_cli.model.folder import check_model_folder; import tiue_cli.model.hub\n"
        "check_model_folder(sys.argv[1])\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tiny_teacher_folder)], check=False).returncode == 0


# --- wrong folders


def pickle_only(folder: Path) -> None:
    (folder / UNET).unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x02")


def truncate(folder: Path) -> None:
    (folder / UNET).write_bytes((folder / UNET).read_bytes()[:-1])


def truncate_in_the_header(folder: Path) -> None:
    (folder / UNET).write_bytes((folder / UNET).read_bytes()[:100])


def damage_the_header(folder: Path) -> None:
    content = bytearray((folder / UNET).read_bytes())
    content[8:12] = b"\xff\xff\xff\xff"
    (folder / UNET).write_bytes(content)


def lfs_pointer(folder: Path) -> None:
    (folder / UNET).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3438167540\n")


def missing_shard(folder: Path) -> None:
    (folder / UNET).unlink()
    index = {"weight_map": {"a": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def only_unet(folder: Path) -> None:
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        (folder / part).rename(folder.parent / part)
    (folder / "model_index.json").unlink()


def dit(folder: Path) -> None:
    (folder / "unet").rename(folder / "transformer")
    index = json.loads((folder / "model_index.json").read_text())
    index.pop("unet")
    index |= {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))


def export(folder: Path) -> None:
    (folder / "model_index.json").unlink()
    (folder / "manifest.json").write_text("{}")
    (folder / "unet_encoder.onnx").write_bytes(b"")


def single_file(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for file in sorted(folder.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        (folder / "v1-5-pruned.ckpt").write_bytes(b"\x80\x02")
        (folder / name).write_bytes(b"")

    return damage


def lora(folder: Path) -> None:
    (folder / "model_index.json").unlink()
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"")


def no_vocabulary(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / name, **changes)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


WRONG: dict[str, tuple[Callable[[Path], object], str, str]] = {
    # what is done to the folder, what the message must name, what the hint must say
    "pickle only": (pickle_only, r"diffusion_pytorch_model\.bin is a pickle", "safe_serialization=True"),
    "missing weights": (remove(UNET), r"unet/diffusion_pytorch_model\.safetensors is missing", "download"),
    "missing config": (remove("vae/config.json"), r"vae/config\.json is missing", "download"),
    "missing index": (
        remove("model_index.json"),
        "one component|UNet without|model_index.json is missing",
        "scheduler",
    ),
    "truncated": (truncate, r"diffusion_pytorch_model\.safetensors is truncated", "again"),
    "truncated header": (truncate_in_the_header, "truncated or not a safetensors file", "again"),
    "damaged header": (damage_the_header, "header is damaged", "again"),
    "empty weights": (write(UNET, ""), "truncated or not a safetensors file", "again"),
    "git lfs pointer": (lfs_pointer, "Git LFS pointer", "git lfs pull"),
    "missing shard": (missing_shard, r"00001-of-00002\.safetensors is missing", "download"),
    "config is no JSON": (write("unet/config.json", "{"), r"unet/config\.json is not JSON", "again"),
    "config is a list": (write("unet/config.json", "[]"), r"unet/config\.json must hold a JSON object", "again"),
    "config of a wrong type": (
        edit("unet/config.json", block_out_channels="wide"),
        r"unet/config\.json: field 'block_out_channels'",
        "restore",
    ),
    "config without size": (edit("unet/config.json", sample_size=...), "field 'sample_size'", "restore"),
    "SDXL by its UNet": (
        edit("unet/config.json", addition_embed_type="text_time"),
        "addition_embed_type",
        "1.x or 2.x",
    ),
    "SDXL by its index": (
        edit("model_index.json", _class_name="StableDiffusionXLPipeline", text_encoder_2=["transformers", "CLIP"]),
        "SDXL",
        "1.x and 2.x",
    ),
    "diffusion transformer": (dit, "diffusion transformer", "1.x and 2.x"),
    "inpainting": (edit("unet/config.json", in_channels=9), "in_channels", "text-to-image"),
    "guidance-distilled": (edit("unet/config.json", time_cond_proj_dim=256), "time_cond_proj_dim", "1.x or 2.x"),
    "another autoencoder": (edit("vae/config.json", _class_name="VQModel"), "VQModel", "another autoencoder"),
    "T5": (
        edit("text_encoder/config.json", model_type="t5", architectures=["T5"]),
        "not a CLIPTextModel",
        "1.x and 2.x",
    ),
    "another tokenizer": (
        edit("tokenizer/tokenizer_config.json", tokenizer_class="T5Tokenizer"),
        "T5Tokenizer",
        "1.x and 2.x",
    ),
    "no vocabulary": (no_vocabulary, r"tokenizer/vocab\.json is missing", "again"),
    "text of another model": (edit("text_encoder/config.json", hidden_size=64), "cross_attention_dim 32", "from one"),
    "latents of another model": (edit("vae/config.json", latent_channels=16), "latent_channels 16", "from one"),
    "export folder": (export, r"exported student \(ONNX graphs\)", "student folder"),
    "single-file checkpoint": (
        single_file("b.safetensors"),
        r"single-file checkpoint \(b\.safetensors\)",
        "give the file",
    ),
    "pickled checkpoint": (single_file("a.txt"), r"single-file checkpoint \(v1-5-pruned\.ckpt\)", "it is a pickle"),
    "LoRA": (lora, "LoRA weights", "folder of the model"),
    "UNet alone": (only_unet, "a UNet without the rest", "copy the teacher's"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_folder_is_one_clear_error(folder: Path, name: str) -> None:
    damage, message, hint = WRONG[name]
    damage(folder)
    with pytest.raises(ModelFolderError, match=message) as caught:
        check_model_folder(folder)
    assert str(folder) in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint is not None
    assert hint in caught.value.hint


def test_every_truncation_of_the_weights_is_found(folder: Path) -> None:
    whole = (folder / "vae/diffusion_pytorch_model.safetensors").read_bytes()
    random = np.random.default_rng(0)
    for length in [*range(20), *random.integers(20, len(whole), 60).tolist()]:
        (folder / "vae/diffusion_pytorch_model.safetensors").write_bytes(whole[:length])
        with pytest.raises(ModelFolderError, match=r"vae/diffusion_pytorch_model\.safetensors"):
            check_model_folder(folder)


def test_what_is_no_folder_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="does not exist"):
        check_model_folder(tmp_path / "missing")
    with pytest.raises(ModelFolderError, match="not a model folder"):
        check_model_folder(tmp_path)
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(ModelFolderError, match="single file"):
        check_model_folder(tmp_path / "model.ckpt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction_type": "v_prediction"}, "contradicts epsilon"),
        ({"decoder_timesteps": (1999, 1), "encoder_timestep": 1999}, "outside the schedule of 1000"),
        ({"encoder_timestep": 1999}, "1999 lies outside the schedule of 1000"),
    ],
)
def test_a_manifest_that_contradicts_the_scheduler_is_refused(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    write_json(folder / STUDENT_MANIFEST, student_manifest(**changes))
    with pytest.raises(ModelFolderError, match=message):
        check_model_folder(folder)


def test_a_damaged_manifest_is_a_manifest_error(folder: Path) -> None:
    (folder / STUDENT_MANIFEST).write_text("{}")
    with pytest.raises(ManifestError, match="decoder_timesteps"):
        check_model_folder(folder)


def test_an_autoencoder_folder_is_found_with_or_without_its_model(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    assert check_vae_folder(tiny_teacher_folder) == tiny_teacher_folder / "vae"
    assert check_vae_folder(tiny_teacher_folder / "vae") == tiny_teacher_folder / "vae"
    for wrong in (tmp_path, tmp_path / "missing", tiny_teacher_folder / "unet"):
        with pytest.raises(TiueError):
            check_vae_folder(wrong)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("vae/config.json", {"layers_per_block": 2**63}),
        ("vae/config.json", {"layers_per_block": 400}),
        ("vae/config.json", {"layers_per_block": -1}),
        ("vae/config.json", {"scaling_factor": "0.18"}),
        ("vae/config.json", {"scaling_factor": 0}),
        ("unet/config.json", {"down_block_types": 5}),
        ("unet/config.json", {"down_block_types": [["DownBlock2D"]]}),
        ("unet/config.json", {"only_cross_attention": 2}),
        ("unet/config.json", {"norm_eps": "1e-5"}),
        ("unet/config.json", {"freq_shift": None}),
        ("unet/config.json", {"layers_per_block": [2**40]}),
        ("unet/config.json", {"in_channels": 4.5}),
        ("text_encoder/config.json", {"layer_norm_eps": []}),
        ("text_encoder/config.json", {"num_hidden_layers": 300}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**15}),
        ("model_index.json", {"unet": 5}),
        ("model_index.json", {"tokenizer": []}),
        ("model_index.json", {"text_encoder": {"a": 1}}),
    ],
)
def test_a_value_of_another_kind_is_refused_before_anything_is_built(
    tiny_teacher_folder: Path, tmp_path: Path, file: str, change: dict[str, object]
) -> None:
    shutil.copytree(tiny_teacher_folder, tmp_path / "m")
    path = tmp_path / "m" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelFolderError) as caught:
        check_model_folder(tmp_path / "m")
    assert caught.value.hint
    assert next(iter(change)) in caught.value.message or "blocks" in caught.value.message


@pytest.mark.parametrize(
    "tensor",
    [
        {"dtype": "F32", "shape": [1], "data_offsets": [0, float("inf")]},
        {"dtype": "F32", "shape": [1], "data_offsets": [[0], 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]},
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "X9", "shape": ["1"], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        [],
        None,
    ],
)
def test_a_header_of_other_types_is_damaged(tiny_teacher_folder: Path, tmp_path: Path, tensor: object) -> None:
    shutil.copytree(tiny_teacher_folder, tmp_path / "m")
    header = json.dumps({"w": tensor}).encode()
    weights = tmp_path / "m" / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(ModelFolderError, match="header is damaged"):
        check_model_folder(tmp_path / "m")
