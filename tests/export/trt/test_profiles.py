"""Profiles: users speak in images and pixels, TensorRT in tensor shapes; the translation is written out by hand."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from tiny_export import CHANNELS, TOKENS, WIDTH, write_tiny_export

from tiue_cli.errors import ManifestError, ProfileError, UsageError
from tiue_cli.export.trt.profiles import (
    batch_profiles,
    fit_profiles,
    input_shapes,
    load_profiles,
    parse_range,
    parse_sizes,
    shipped_profiles,
)
from tiue_cli.files.engines import PlanSpec, ProfileSpec
from tiue_cli.files.exports import ExportManifest, GraphSpec

FACTOR = 4


def profile(**changes: object) -> ProfileSpec:
    fields = {"name": "p", "batch": (1, 4, 16), "steps": (1, 4, 4), "height": (32,) * 3, "width": (48,) * 3}
    return ProfileSpec.model_validate({**fields, **changes})


def graph_of(manifest: ExportManifest, name: str, size: tuple[int, int] | None = None) -> GraphSpec:
    return next(graph for graph in manifest.graphs if graph.name == name and graph.size == size)


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory) -> ExportManifest:
    return write_tiny_export(tmp_path_factory.mktemp("free"))


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> ExportManifest:
    return write_tiny_export(tmp_path_factory.mktemp("fixed"), sizes=((32, 32), (32, 48)))


# --- shapes --------------------------------------------------------------------------------------------------------


def test_a_profile_in_images_becomes_the_shapes_of_every_input(free: ExportManifest) -> None:
    assert input_shapes(graph_of(free, "text_encoder"), profile(), factor=FACTOR) == {
        "input_ids": ((1, TOKENS), (4, TOKENS), (16, TOKENS))
    }
    text = ((1, TOKENS, WIDTH), (4, TOKENS, WIDTH), (16, TOKENS, WIDTH))
    noise = ((1, CHANNELS, 8, 12), (4, CHANNELS, 8, 12), (16, CHANNELS, 8, 12))
    half = ((1, CHANNELS, 4, 6), (4, CHANNELS, 4, 6), (16, CHANNELS, 4, 6))
    assert input_shapes(graph_of(free, "unet_encoder"), profile(), factor=FACTOR) == {
        "noise": noise,
        "text_states": text,
    }
    # Features come at the batch of images, never times K.
    assert input_shapes(graph_of(free, "unet_decoder"), profile(), factor=FACTOR) == {
        "mid": half,
        "skip_00": noise,
        "skip_01": half,
        "text_states": text,
        "noise": noise,
        "timesteps": ((1,), (4,), (4,)),
        "weights": ((2,), (5,), (5,)),
    }
    assert input_shapes(graph_of(free, "vae_decoder"), profile(), factor=FACTOR) == {"latents": noise}


def test_a_range_of_sizes_goes_down_the_levels_rounded_up(free: ExportManifest) -> None:
    ranged = profile(batch=(1, 1, 1), height=(20, 32, 64), width=(32, 32, 44))
    shapes = input_shapes(graph_of(free, "unet_decoder"), ranged, factor=FACTOR)
    # 20 pixels are 5 latents, and a strided convolution makes 3 of them.
    assert shapes["mid"] == ((1, CHANNELS, 3, 4), (1, CHANNELS, 4, 4), (1, CHANNELS, 8, 6))
    assert shapes["noise"] == ((1, CHANNELS, 5, 8), (1, CHANNELS, 8, 8), (1, CHANNELS, 16, 11))


def test_a_fixed_graph_has_shapes_for_its_own_size_only(fixed: ExportManifest) -> None:
    wide, square = profile(), profile(width=(32,) * 3)
    graph = graph_of(fixed, "unet_encoder", (32, 48))
    assert input_shapes(graph, square, factor=FACTOR) == {}
    assert input_shapes(graph, wide, factor=FACTOR)["noise"][2] == (16, CHANNELS, 8, 12)
    assert input_shapes(graph_of(fixed, "text_encoder"), square, factor=FACTOR) != {}


def test_a_dimension_without_meaning_is_refused(free: ExportManifest) -> None:
    graph = graph_of(free, "text_encoder")
    odd = graph.inputs[0].model_copy(update={"shape": ("batch", "sequence")})
    with pytest.raises(ManifestError, match="'sequence'"):
        input_shapes(graph.model_copy(update={"inputs": (odd,)}), profile(), factor=FACTOR)


def test_equal_shapes_share_one_profile_inside_a_plan(fixed: ExportManifest) -> None:
    profiles = batch_profiles(fixed, ((1, 1, 1), (1, 2, 4)))
    assert [one.name for one in profiles] == [
        "32x32-batch-1",
        "32x32-batch-1-2-4",
        "32x48-batch-1",
        "32x48-batch-1-2-4",
    ]

    def plan(name: str, size: tuple[int, int] | None) -> PlanSpec:
        graph = graph_of(fixed, name, size)
        shapes = tuple(input_shapes(graph, one, factor=FACTOR) for one in profiles)
        file = {"file": "x.plan", "sha256": "0" * 64, "size_bytes": 0}
        fields = {"graph": name, "size": size, "plan": file, "onnx_sha256": "0" * 64, "build_s": 0.0}
        return PlanSpec(inputs=graph.inputs, outputs=graph.outputs, shapes=shapes, **fields)

    text = plan("text_encoder", None)
    assert len(text.distinct_shapes) == 2
    assert [text.plan_profile(index) for index in range(4)] == [0, 1, 0, 1]
    wide = plan("unet_decoder", (32, 48))
    assert len(wide.distinct_shapes) == 2
    assert [wide.plan_profile(index) for index in (2, 3)] == [0, 1]


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15-512", "sd21-512", "papercut"])
def test_what_ships_has_one_image_exactly_and_one_to_sixteen_for_every_k(name: str) -> None:
    shipped = load_profiles(name)
    assert shipped.precision == "fp16"
    assert [one.batch for one in shipped.profiles] == [(1, 1, 1), (1, 4, 16)]
    assert {one.steps for one in shipped.profiles} == {(1, 4, 4)}
    side = 64 if name == "papercut" else 512
    assert shipped.sizes == ((side, side),)
    # The first profile that fits is used: the exact one must come first.
    assert shipped.profiles[0].refusal(batch=1, steps=4, size=(side, side)) is None
    assert shipped.profiles[1].refusal(batch=16, steps=1, size=(side, side)) is None
    assert "batch 17" in (shipped.profiles[1].refusal(batch=17, steps=4, size=(side, side)) or "")


def test_profiles_are_packaged() -> None:
    root = Path(__file__).resolve().parents[3]
    config = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    included = config["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included["engines/profiles"] == "tiue_cli/engine_profiles"
    assert set(shipped_profiles()) == {path.stem for path in (root / "engines" / "profiles").glob("*.toml")}


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


GOOD = """
format_version = 1
precision = "fp16"
[model]
family = "tiny"
[[profile]]
name = "wide"
batch = "1:2:3"
steps = 4
size = "32x48"
"""


def test_a_file_of_the_users_own(tmp_path: Path, free: ExportManifest) -> None:
    own = load_profiles(write(tmp_path / "own.toml", GOOD))
    assert own.name == "own" and own.sizes == ((32, 48),)
    (fitted,) = fit_profiles(own, free)
    assert (fitted.batch, fitted.steps) == ((1, 2, 3), (4, 4, 4))
    assert (fitted.height, fitted.width) == ((32,) * 3, (48,) * 3)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("precision", "precission", "precision"),
        ('"fp16"', '"int4"', "precision"),
        ("format_version = 1", "format_version = 2", "format_version"),
        ('"1:2:3"', '"3:2:1"', "profile 'wide'"),
        ('"1:2:3"', '"1:2"', "is not understood"),
        ("steps = 4", "steps = 0", "does not hold"),
        ('"32x48"', '"big"', "size 'big'"),
        ("steps = 4", "steps = 4\nspeed = 9", "speed"),
        ('name = "wide"', 'name = "A B"', "name"),
        ("[[profile]]", "[[profile", "cannot be read"),
    ],
)
def test_a_wrong_file_is_refused_with_the_field(tmp_path: Path, before: str, after: str, message: str) -> None:
    path = write(tmp_path / "bad.toml", GOOD.replace(before, after, 1))
    with pytest.raises(ProfileError) as caught:
        load_profiles(path)
    assert message in caught.value.message and "bad.toml" in caught.value.message


def test_unknown_names_are_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_profiles("sd3")
    assert caught.value.hint is not None and "sd15-512" in caught.value.hint
    with pytest.raises(UsageError, match="does not exist"):
        load_profiles(str(tmp_path / "nothing.toml"))


# --- fitting -------------------------------------------------------------------------------------------------------


def test_steps_are_cut_to_those_of_the_student(tmp_path: Path) -> None:
    two_steps = write_tiny_export(tmp_path / "two", steps=2)
    own = load_profiles(write(tmp_path / "own.toml", GOOD.replace("steps = 4", 'steps = "1:4:4"')))
    assert fit_profiles(own, two_steps)[0].steps == (1, 2, 2)
    assert {one.steps for one in batch_profiles(two_steps)} == {(1, 2, 2)}
    only_four = load_profiles(write(tmp_path / "four.toml", GOOD))
    with pytest.raises(ProfileError, match="this student has 1 to 2"):
        fit_profiles(only_four, two_steps)


def test_a_profile_of_another_model_is_refused(free: ExportManifest) -> None:
    with pytest.raises(ProfileError, match=r"Stable Diffusion 1.x models with text_width 768"):
        fit_profiles(load_profiles("sd15-512"), free)


def test_a_profile_of_another_precision_is_refused(tmp_path: Path) -> None:
    export = write_tiny_export(tmp_path / "fp32", precision="fp32")
    with pytest.raises(ProfileError, match="is for fp16") as caught:
        fit_profiles(load_profiles(write(tmp_path / "own.toml", GOOD)), export)
    assert caught.value.hint is not None and "--precision fp16" in caught.value.hint


def test_a_size_that_the_export_lacks_is_refused(tmp_path: Path, fixed: ExportManifest, free: ExportManifest) -> None:
    tall = load_profiles(write(tmp_path / "tall.toml", GOOD.replace("32x48", "64x48")))
    with pytest.raises(ProfileError, match="fixed to 32x32, 32x48") as caught:
        fit_profiles(tall, fixed)
    assert caught.value.hint is not None and "--size 64x48" in caught.value.hint
    assert fit_profiles(tall, free)
    odd = load_profiles(write(tmp_path / "odd.toml", GOOD.replace("32x48", "33x48")))
    with pytest.raises(ProfileError, match="not multiples of 4"):
        fit_profiles(odd, free)


def test_a_range_of_sizes_needs_free_graphs(tmp_path: Path, fixed: ExportManifest, free: ExportManifest) -> None:
    ranged = load_profiles(write(tmp_path / "ranged.toml", GOOD.replace("32x48", "16x16:32x32:64x64")))
    assert ranged.sizes == ()
    assert fit_profiles(ranged, free)[0].height == (16, 32, 64)
    with pytest.raises(ProfileError, match="16x16:32x32:64x64"):
        fit_profiles(ranged, fixed)


# --- ranges --------------------------------------------------------------------------------------------------------


def test_ranges_as_users_write_them() -> None:
    assert parse_range("4") == (4, 4, 4)
    assert parse_range("1:4:16") == (1, 4, 16)
    assert parse_sizes("512") == ((512,) * 3, (512,) * 3)
    assert parse_sizes("256:512x640:768") == ((256, 512, 768), (256, 640, 768))


@pytest.mark.parametrize("text", ["", "0", "1:2", "1:2:3:4", "4:2:8", "1:8:4", "a", "1:-2:3", "1.5", "9999"])
def test_ranges_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_range(text)
    assert caught.value.hint is not None and "1:4:16" in caught.value.hint
