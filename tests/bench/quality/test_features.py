"""Claims about extractors: an ONNX graph gets the pixels that it asks for, a CLIP folder what CLIP's own code gives."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from feature_graphs import mean_color_graph
from helpers import build_tokenizer, edit_json
from onnx import TensorProto, helper
from PIL import Image, ImageFilter
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPVisionConfig
from transformers import CLIPVisionModelWithProjection as ClipVision

from tiue_cli.bench.quality.clip_features import ClipExtractor
from tiue_cli.bench.quality.extractors import PapercutChecker, Sharpness, open_extractor
from tiue_cli.bench.quality.features import Resizing
from tiue_cli.bench.quality.metrics import clip_score
from tiue_cli.bench.quality.onnx_features import OnnxExtractor
from tiue_cli.errors import QualityError, TiueError, UsageError
from tiue_cli.papercut.checker import embed, load_checker
from tiue_cli.papercut.evaluation import balanced_specs
from tiue_cli.papercut.scenes import render


def pictures(count: int = 5, height: int = 12, width: int = 12) -> np.ndarray:
    random = np.random.Generator(np.random.Philox(key=3))
    return random.integers(0, 256, (count, height, width, 3), np.uint8)


def features_of(images: np.ndarray) -> np.ndarray:
    """What the graph must give."""
    return images.mean(axis=(1, 2)) + np.array([1, 2, 3])


# --- ONNX ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [["n", 3, "h", "w"], ["n", "h", "w", 3], ["n", 3, 12, 12], [2, 3, 12, 12]])
def test_a_graph_gets_every_image_in_its_own_layout_and_batch(tmp_path: Path, shape: list[int | str]) -> None:
    extractor = OnnxExtractor(mean_color_graph(tmp_path / "mean.onnx", shape))
    images = pictures()
    assert extractor.width == 3
    np.testing.assert_allclose(extractor(images), features_of(images), rtol=1e-5)


def test_images_of_another_size_are_resized_as_pillow_does_and_it_is_said(tmp_path: Path) -> None:
    extractor = OnnxExtractor(mean_color_graph(tmp_path / "mean.onnx", ["n", 3, 5, 7]))
    images = pictures(2, 16, 16)
    expected = [np.asarray(Image.fromarray(i).resize((7, 5), Image.Resampling.BICUBIC)) for i in images]
    np.testing.assert_allclose(extractor(images), features_of(np.stack(expected)), rtol=1e-5)
    assert "5x7" in extractor.resize and "8 bit" in extractor.resize


def test_a_float_graph_says_its_range_and_gets_unrounded_pixels(tmp_path: Path) -> None:
    shape: list[int | str] = ["n", 3, 5, 7]
    silent = mean_color_graph(tmp_path / "silent.onnx", shape, dtype=TensorProto.FLOAT)
    with pytest.raises(QualityError, match="does not say which values"):
        OnnxExtractor(silent)
    stated = {"pixels": "0..255", "resize": "inside the graph"}
    extractor = OnnxExtractor(mean_color_graph(tmp_path / "mean.onnx", shape, dtype=TensorProto.FLOAT, metadata=stated))
    # A ramp: whatever the filter, the mean of an unrounded symmetric resize is the mean; rounding moves it.
    ramp = np.broadcast_to(np.arange(8, dtype=np.uint8)[None, :, None] * 3, (1, 8, 8, 3))
    np.testing.assert_allclose(extractor(ramp), features_of(ramp), atol=2e-4)
    assert "not rounded" in extractor.resize and extractor.resize.endswith("then inside the graph")


def test_the_hash_of_a_graph_counts_the_weights_beside_it(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        mean_color_graph(tmp_path / name / "mean.onnx", ["n", 3, "h", "w"], external=True)
    weights = tmp_path / "b" / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    first, second = (OnnxExtractor(tmp_path / name / "mean.onnx") for name in ("a", "b"))
    assert first.sha256 != second.sha256
    weights.unlink()
    with pytest.raises(QualityError, match=r"lacks its weights, weights\.bin"):
        OnnxExtractor(tmp_path / "b" / "mean.onnx")


@pytest.mark.parametrize("shape", [["n", 4, "h", "w"], ["n", 3], ["n", 3, 12, "w"]])
def test_a_graph_that_takes_no_images_is_refused(tmp_path: Path, shape: list[int | str]) -> None:
    value = helper.make_tensor_value_info("images", TensorProto.UINT8, shape)
    out = helper.make_tensor_value_info("features", TensorProto.UINT8, shape)
    graph = helper.make_graph([helper.make_node("Identity", ["images"], ["features"])], "no", [value], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "no.onnx")
    with pytest.raises(QualityError, match="not \\(N, 3, H, W\\)"):
        OnnxExtractor(tmp_path / "no.onnx")


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"not a graph")
    with pytest.raises(QualityError, match="cannot be read as ONNX"):
        OnnxExtractor(tmp_path / "bad.onnx")


# --- CLIP ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("clip"), build_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14,
        projection_dim=8,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(
            CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
        ).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


PROMPTS = ["a red star", "a tree above a house", "a blue star " * 20, "a tree"]


def test_clip_embeddings_and_score_are_those_of_the_models_own_forward(clip_folder: Path) -> None:
    """logits = scale · cosine; a prompt that is too long is cut; images are wider than high."""
    extractor, images = ClipExtractor(clip_folder), pictures(4, 30, 40)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    tokens = build_tokenizer()(PROMPTS, padding=True, truncation=True, max_length=16, return_tensors="pt")
    processor = CLIPImageProcessorPil.from_pretrained(clip_folder)
    pixels = processor(images=[Image.fromarray(image) for image in images], return_tensors="pt")
    with torch.no_grad():
        output = model(**tokens, pixel_values=pixels["pixel_values"])
        cosines = (output.logits_per_image / model.logit_scale.exp()).diagonal().numpy()
    found = extractor(images)
    assert found.shape == (4, 8) and extractor.width == 8
    directions = found / np.linalg.norm(found, axis=1, keepdims=True)
    np.testing.assert_allclose(directions, output.image_embeds.numpy(), atol=1e-5)
    expected = 100 * max(0.0, float(cosines.mean()))
    assert clip_score(found, extractor.texts(PROMPTS)) == pytest.approx(expected, rel=1e-4)
    assert abs(float(cosines.mean())) > 1e-3


def test_clip_score_is_torchmetrics(clip_folder: Path) -> None:
    """torchmetrics takes a model and images; the same embeddings come out of stand-ins for both."""
    from torchmetrics.functional.multimodal import clip_score as reference

    random = torch.Generator().manual_seed(1)
    seen, said = torch.rand(4, 8, generator=random), torch.rand(4, 8, generator=random)

    class Model(torch.nn.Module):
        config = type("Config", (), {})()

        def get_image_features(self, pixels: torch.Tensor) -> torch.Tensor:
            return seen

        def get_text_features(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return said

    def processor(**_: object) -> dict[str, torch.Tensor]:
        return {name: torch.zeros(1) for name in ("pixel_values", "input_ids", "attention_mask")}

    images = list(torch.zeros(4, 3, 8, 8, dtype=torch.uint8))
    expected = float(reference(images, PROMPTS, lambda: (Model(), processor)))  # type: ignore[arg-type]
    assert clip_score(seen.numpy(), said.numpy()) == pytest.approx(expected, rel=1e-5)


def test_a_vision_model_alone_gives_embeddings_and_no_score(clip_folder: Path, tmp_path: Path) -> None:
    ClipVision.from_pretrained(clip_folder).save_pretrained(tmp_path)
    extractor, images = ClipExtractor(tmp_path), pictures(3, 28, 28)
    assert not extractor.reads_text and "OpenAI" in extractor.resize
    np.testing.assert_allclose(extractor(images), ClipExtractor(clip_folder)(images), atol=1e-5)
    with pytest.raises(QualityError, match="no text encoder"):
        extractor.texts(["a star"])


def test_a_folder_that_is_no_clip_model_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(QualityError, match=r"no config\.json"):
        ClipExtractor(tmp_path)
    other = shutil.copytree(clip_folder, tmp_path / "other")
    edit_json(other / "config.json", model_type="bert")
    with pytest.raises(QualityError, match="bert model, not CLIP"):
        ClipExtractor(other)
    damaged = shutil.copytree(clip_folder, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(TiueError, match="cannot be loaded"):
        ClipExtractor(damaged)


# --- choice, resizing ----------------------------------------------------------------------------------------------


def test_the_extractor_is_papercuts_on_papercut_and_asked_for_elsewhere(clip_folder: Path, tmp_path: Path) -> None:
    assert isinstance(open_extractor(None, papercut=True), PapercutChecker)
    with pytest.raises(UsageError, match="needs a feature extractor") as raised:
        open_extractor(None, papercut=False)
    assert "--extractor" in (raised.value.hint or "")
    assert isinstance(open_extractor(clip_folder, papercut=True), ClipExtractor)
    graph = mean_color_graph(tmp_path / "mean.onnx", ["n", 3, "h", "w"])
    assert isinstance(open_extractor(graph, papercut=False), OnnxExtractor)
    for path, what in ((tmp_path / "none.onnx", "does not exist"), (tmp_path / "w.pth", "neither")):
        if what == "neither":
            path.touch()
        with pytest.raises(TiueError, match=what):
            open_extractor(path, papercut=False)


def test_the_checkers_features_are_its_penultimate_layer_over_eight() -> None:
    images = pictures(3, 64, 64)
    np.testing.assert_array_equal(PapercutChecker()(images) * 8, embed(load_checker(), images))


def test_sharpness_is_the_slope_of_a_ramp_and_blur_lowers_it() -> None:
    down, right = np.mgrid[:20, :30]
    ramp = np.repeat((3 * down + 4 * right)[..., None], 3, axis=2).astype(np.uint8)
    assert Sharpness()(ramp[None]) == pytest.approx(np.array([[5.0]]), rel=1e-5)  # hypot(3, 4)
    green = np.zeros((1, 9, 9, 3), np.uint8)
    green[0, :, ::2, 1] = 100
    assert Sharpness()(green) == pytest.approx(np.array([[58.7]]), rel=1e-5)
    images = render(balanced_specs(6), 0)
    blurred = np.stack([np.asarray(Image.fromarray(i).filter(ImageFilter.GaussianBlur(1))) for i in images])
    assert (Sharpness()(blurred) < 0.85 * Sharpness()(images)).all()


def test_resizing_crops_the_centre_and_then_resizes_as_pillow_does() -> None:
    images = pictures(2, 20, 30)
    square = images[:, :, 5:25]
    expected = [np.asarray(Image.fromarray(i).resize((8, 8), Image.Resampling.LANCZOS)) for i in square]
    assert np.array_equal(Resizing(8)(images), np.stack(expected))
    assert np.array_equal(Resizing(20)(images), square)
    assert np.array_equal(Resizing(None)(images), images)
    assert Resizing(8).describe() == "centre crop to a square, 8x8 by lanczos (Pillow, anti-aliased)"
