"""Claims about references: their features are the images', and what is no reference is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from feature_graphs import mean_color_graph
from PIL import Image

from tiue_cli.bench.quality.extractors import PapercutChecker
from tiue_cli.bench.quality.features import Extractor, Resizing
from tiue_cli.bench.quality.metrics import FeatureSet, Moments
from tiue_cli.bench.quality.onnx_features import OnnxExtractor
from tiue_cli.bench.quality.references import (
    CEILING_SEED,
    REFERENCE_SEED,
    folder_reference,
    open_reference,
    read_statistics,
    render_reference,
    rendered_chunks,
    write_statistics,
)
from tiue_cli.errors import QualityError, UsageError
from tiue_cli.papercut.evaluation import balanced_specs


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> Extractor:
    return OnnxExtractor(mean_color_graph(tmp_path_factory.mktemp("graph") / "mean.onnx", ["n", 3, "h", "w"]))


def save_images(folder: Path, count: int = 6, *, height: int = 20, width: int = 20) -> np.ndarray:
    """PNGs of noise; returns their pixels in the order of names."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.Generator(np.random.Philox(key=5))
    images = random.integers(0, 256, (count, height, width, 3), np.uint8)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    return images


def folder_of(folder: Path, extractor: Extractor, *, resize: int | None = None, size: tuple[int, int] | None = None):
    return folder_reference(folder, extractor=extractor, resizing=Resizing(resize), size=size)


# --- folders -------------------------------------------------------------------------------------------------------


def test_a_folders_features_are_its_images_in_order_whatever_lies_beside(tmp_path: Path, extractor: Extractor) -> None:
    images = save_images(tmp_path / "set" / "inner", 70)
    (tmp_path / "set" / "captions.txt").write_text("no image")
    (tmp_path / "set" / ".cache").mkdir()
    (tmp_path / "set" / ".cache" / "x.png").write_bytes(b"hidden")
    seen: list[tuple[int, int]] = []
    reference = folder_reference(
        tmp_path / "set",
        extractor=extractor,
        resizing=Resizing(),
        size=(20, 20),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert isinstance(reference.features, FeatureSet) and reference.images == 70 and seen == [(64, 70), (70, 70)]
    np.testing.assert_allclose(reference.features.features, extractor(images), rtol=1e-6)
    again = folder_of(tmp_path / "set", extractor)
    Image.fromarray(images[0]).save(tmp_path / "set" / "inner" / "001.png")
    assert reference.sha256 == again.sha256 != folder_of(tmp_path / "set", extractor).sha256


def test_a_damaged_image_is_named(tmp_path: Path, extractor: Extractor) -> None:
    save_images(tmp_path)
    data = (tmp_path / "003.png").read_bytes()
    for content in (data[: len(data) // 2], b"", b"\x89PNG broken"):
        (tmp_path / "003.png").write_bytes(content)
        with pytest.raises(QualityError, match=r"003\.png cannot be read"):
            folder_of(tmp_path, extractor)


def test_sizes_must_agree_or_be_made_to(tmp_path: Path, extractor: Extractor) -> None:
    save_images(tmp_path)
    with pytest.raises(QualityError, match=r"000\.png is 20x20 and the other images are 64x64"):
        folder_of(tmp_path, extractor, size=(64, 64))
    Image.new("RGB", (24, 20), "red").save(tmp_path / "004.png")
    with pytest.raises(QualityError, match=r"004\.png is 20x24 and the other images are 20x20") as raised:
        folder_of(tmp_path, extractor)
    assert "--resize" in (raised.value.hint or "")
    assert folder_of(tmp_path, extractor, resize=16, size=(64, 64)).images == 6
    with pytest.raises(QualityError, match=r"smaller than 32x32"):
        folder_of(tmp_path, extractor, resize=32)


def test_grey_references_are_refused_and_a_few_are_said(tmp_path: Path, extractor: Extractor) -> None:
    save_images(tmp_path)
    Image.new("RGB", (20, 20), (128, 128, 128)).save(tmp_path / "001.png")
    Image.new("L", (20, 20), 3).save(tmp_path / "002.png")
    notes = folder_of(tmp_path, extractor).notes
    assert notes == (
        "2 of 6 references are of one colour, 001.png for one",
        "1 of 6 references were not RGB (grey, palette or transparent): converted",
    )
    for number in range(3, 6):
        Image.new("RGB", (20, 20), (number, 0, 0)).save(tmp_path / f"{number:03d}.png")
    with pytest.raises(QualityError, match="5 of 6 images are of one colour"):
        folder_of(tmp_path, extractor)


def test_a_folder_without_images_is_refused(tmp_path: Path, extractor: Extractor) -> None:
    with pytest.raises(QualityError, match="holds 0 images"):
        folder_of(tmp_path, extractor)


# --- statistics ----------------------------------------------------------------------------------------------------


def test_statistics_written_and_read_are_the_reference(tmp_path: Path, extractor: Extractor) -> None:
    save_images(tmp_path / "set")
    resizing = Resizing(16)
    reference = folder_reference(tmp_path / "set", extractor=extractor, resizing=resizing, size=None)
    path = write_statistics(tmp_path / "stats.npz", reference, extractor=extractor, resizing=resizing)
    found = read_statistics(path, extractor=extractor, resizing=resizing)
    assert isinstance(found.features, FeatureSet) and isinstance(reference.features, FeatureSet)
    assert np.array_equal(found.features.features, reference.features.features)
    assert (found.images, found.notes) == (6, ())
    with np.load(path, allow_pickle=False) as data:
        features = reference.features.features.astype(np.float64)
        np.testing.assert_allclose(data["mu"], features.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(data["sigma"], np.cov(features.T), rtol=1e-6)
        assert int(data["n"]) == 6
    with pytest.raises(QualityError, match="made with another resizing"):
        read_statistics(path, extractor=extractor, resizing=Resizing(18))
    with pytest.raises(QualityError, match="made with another extractor"):
        read_statistics(path, extractor=PapercutChecker(), resizing=resizing)


def test_plain_mean_and_covariance_are_taken_on_trust_and_it_is_said(tmp_path: Path, extractor: Extractor) -> None:
    np.savez(tmp_path / "fid.npz", mu=np.arange(3.0), sigma=np.eye(3))
    reference = read_statistics(tmp_path / "fid.npz", extractor=extractor, resizing=Resizing())
    assert isinstance(reference.features, Moments) and reference.features.count is None and reference.images == 0
    assert len(reference.notes) == 3 and "on trust" in reference.notes[0] and "how many images" in reference.notes[2]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({"mu": np.arange(3.0)}, "holds mu, not mu and sigma"),
        ({"mu": np.arange(3.0), "sigma": np.eye(4)}, r"sigma \(4, 4\)"),
        ({"mu": np.array([0, np.nan, 0]), "sigma": np.eye(3)}, "not finite"),
        ({"mu": np.arange(3.0), "sigma": np.tri(3)}, "not symmetric"),
        ({"mu": np.arange(4.0), "sigma": np.eye(4)}, "holds 4 features"),
        ({"mu": np.array(["a", "b", "c"]), "sigma": np.eye(3)}, "not numbers"),
        ({"mu": np.array([{}]), "sigma": np.eye(1)}, "cannot be read as statistics"),
        ({"features": np.full((9, 3), np.nan)}, "features of image 0 are not finite"),
    ],
)
def test_statistics_that_are_none_are_refused(
    tmp_path: Path, extractor: Extractor, content: dict[str, np.ndarray], what: str
) -> None:
    np.savez(tmp_path / "stats.npz", **content)
    with pytest.raises(QualityError, match=what):
        read_statistics(tmp_path / "stats.npz", extractor=extractor, resizing=Resizing())


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a file", b"text"])
def test_a_damaged_file_of_statistics_is_refused(tmp_path: Path, extractor: Extractor, content: bytes) -> None:
    (tmp_path / "stats.npz").write_bytes(content)
    with pytest.raises(QualityError, match="cannot be read as statistics"):
        read_statistics(tmp_path / "stats.npz", extractor=extractor, resizing=Resizing())


# --- papercut, choice ----------------------------------------------------------------------------------------------


def test_rendered_references_are_other_pictures_than_the_ceilings() -> None:
    specs = balanced_specs(70)
    ours, ceiling = (
        np.concatenate([images for _, images in rendered_chunks(specs, seed)])
        for seed in (REFERENCE_SEED, CEILING_SEED)
    )
    assert len(ours) == 70 and not any(np.array_equal(a, b) for a, b in zip(ours, ceiling, strict=True))
    # The first of the second chunk is not the first of the first one in other clothes.
    assert not np.array_equal(ours[64], ours[0])
    checker = PapercutChecker()
    reference = render_reference(specs, extractor=checker, resizing=Resizing())
    assert isinstance(reference.features, FeatureSet)
    np.testing.assert_allclose(reference.features.features, checker(ours), atol=1e-4)


def test_what_to_compare_with_is_chosen_or_asked_for(tmp_path: Path, extractor: Extractor) -> None:
    settings = {"extractor": extractor, "resizing": Resizing(), "size": (20, 20)}
    save_images(tmp_path / "set")
    assert open_reference(tmp_path / "set", specs=None, **settings).images == 6
    np.savez(tmp_path / "fid.npz", mu=np.arange(3.0), sigma=np.eye(3))
    assert open_reference(tmp_path / "fid.npz", specs=None, **settings).description == "fid.npz"
    with pytest.raises(UsageError, match="needs something to compare with"):
        open_reference(None, specs=None, **settings)
    with pytest.raises(UsageError, match="does not exist"):
        open_reference(tmp_path / "nowhere", specs=None, **settings)
    with pytest.raises(UsageError, match="neither a folder nor"):
        open_reference(tmp_path / "set" / "000.png", specs=None, **settings)
