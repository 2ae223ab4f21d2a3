"""What ``tiue inspect`` says of pictures and folders, and the records that pictures carry."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny_export import write_tiny_export

from tiue_cli.cli.app import main
from tiue_cli.cli.inspection import inspect_source
from tiue_cli.errors import ManifestError, UsageError
from tiue_cli.files.hashes import BLOCK_BYTES, BLOCKS, fingerprint
from tiue_cli.files.png import GridRecord, ImageRecord, ImageSpec, read_record, save_png
from tiue_cli.files.sheet import MAX_SHEET_PX, ContactSheet, columns_for

PIXELS = np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)
RECORD = ImageRecord(
    prompt="a red heart, 夜 \N{GRINNING FACE}\nwith 'quotes'",
    seed=0,
    size=(8, 12),
    kind="teacher",
    steps=25,
    guidance=7.5,
    model="some, model",
    model_id="ab" * 16,
    backend="torch",
    device="cpu",
    dtype="fp32",
    tiue_version="0.1.0",
)


def test_record_and_pixels_survive_the_png(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", PIXELS, RECORD)
    assert read_record(tmp_path / "a.png") == RECORD
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), PIXELS)


def test_parameters_text_has_the_form_other_programs_read(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", PIXELS, RECORD)
    prompt, _, settings = Image.open(tmp_path / "a.png").info["parameters"].rpartition("\n")
    assert prompt == RECORD.prompt
    assert settings == (
        "Steps: 25, Sampler: DDIM, CFG scale: 7.5, Seed: 0, Size: 12x8, Model hash: ababababab, "
        'Model: "some, model", Version: tiue 0.1.0'
    )


@pytest.mark.parametrize("change", [{"seed": 1}, {"prompt": "b"}, {"steps": 3}, {"guidance": 2.0}, {"size": (8, 8)}])
def test_every_part_of_a_request_makes_another_picture(change: dict[str, object]) -> None:
    spec = ImageSpec.model_validate({name: getattr(RECORD, name) for name in ImageSpec.model_fields})
    assert RECORD.differences(spec) == []
    assert len(RECORD.differences(spec.model_copy(update=change))) == 1


def test_inspect_shows_the_settings_and_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_png(tmp_path / "a.png", PIXELS, RECORD)
    assert main(["inspect", str(tmp_path / "a.png")]) == 0
    shown = capsys.readouterr().out
    assert "--seed 0 --size 8x12 --teacher-steps 25 --guidance 7.5" in shown
    assert main(["inspect", str(tmp_path / "a.png"), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["record"]["seed"] == 0
    assert found["command"] == RECORD.command()


def test_picture_of_another_program_is_shown_without_a_command(tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("parameters", "a cat\nSteps: 20, Seed: 5")
    Image.fromarray(PIXELS).save(tmp_path / "a.png", pnginfo=info)
    report = inspect_source(str(tmp_path / "a.png")).as_dict()
    assert report["parameters"] == "a cat\nSteps: 20, Seed: 5"
    assert report["command"] is None


def test_damaged_record_is_one_clear_error(tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("tiue", '{"record": "image", "prompt": 5}')
    Image.fromarray(PIXELS).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(ManifestError, match="its tiue record cannot be read"):
        inspect_source(str(tmp_path / "a.png"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.png", None, "does not exist"),
        ("text.png", b"hello", "is not a PNG"),
        ("notes.txt", b"hello", "is not a PNG"),
        ("plain.png", "plain", "does not say how it was made"),
        ("cut.png", "cut", "cannot be read"),
    ],
)
def test_other_files_are_one_clear_error(tmp_path: Path, name: str, content: object, said: str) -> None:
    file = tmp_path / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        save_png(file, noise, None if content == "plain" else RECORD)
        if content == "cut":
            file.write_bytes(file.read_bytes()[:-4000])
    with pytest.raises(UsageError, match=said):
        inspect_source(str(file))


def test_hub_id_is_not_downloaded_to_be_inspected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="local files only"):
        inspect_source("owner/name")


def test_folder_report_says_what_a_student_is(tiny_student_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_student_folder)]) == 0
    shown = capsys.readouterr().out
    for expected in ("a student", "32x32 pixels", "751, 501, 251, 1", "leading", "licence", "teacher"):
        assert expected in shown
    assert main(["inspect", str(tiny_student_folder), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["what"], found["kind"]) == ("model", "student")
    assert found["decoder_timesteps"] == [751, 501, 251, 1]
    assert found["image_size"] == [32, 32]


def test_folder_report_says_what_a_teacher_is(tiny_teacher_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_teacher_folder)]) == 0
    shown = capsys.readouterr().out
    assert "a teacher" in shown
    assert "many-step" in shown


def test_grid_record_lists_its_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = ImageSpec.model_validate({name: getattr(RECORD, name) for name in ImageSpec.model_fields})
    record = GridRecord(columns=2, images=(spec, spec.model_copy(update={"seed": 9})), tiue_version="0.1.0")
    save_png(tmp_path / "sheet.png", PIXELS, record)
    assert read_record(tmp_path / "sheet.png") == record
    assert main(["inspect", str(tmp_path / "sheet.png")]) == 0
    assert "seed 9" in capsys.readouterr().out


# --- contact sheets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (2, 2), (3, 2), (4, 2), (5, 3), (8, 3), (9, 3), (10, 4)])
def test_sheet_is_nearly_square(count: int, columns: int) -> None:
    assert columns_for(count) == columns


def test_sheet_centres_pictures_of_other_sizes() -> None:
    sheet = ContactSheet([(10, 20), (20, 10)])
    black = np.zeros((10, 20, 3), np.uint8)
    sheet.place(0, black)
    sheet.place(1, black.transpose(1, 0, 2))
    dark = (sheet.pixels == 0).all(axis=2)
    assert dark.sum() == 400
    assert dark[4 + 5 : 4 + 15, 4:24].all()
    assert dark[4:24, 28 + 5 : 28 + 15].all()


def test_huge_sheet_is_scaled_down() -> None:
    sheet = ContactSheet([(1024, 1024)] * 400)
    assert max(sheet.pixels.shape) <= MAX_SHEET_PX
    sheet.place(399, np.zeros((1024, 1024, 3), np.uint8))
    assert (sheet.pixels[-10:-5, -10:-5] == 0).all()


# --- exports -------------------------------------------------------------------------------------------------------


def test_an_export_is_shown_with_the_ports_of_its_graphs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_export(tmp_path / "tiny")
    assert main(["inspect", str(tmp_path / "tiny")]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert rows["text_encoder"].endswith("input_ids → text_states")
    assert rows["unet_encoder"].endswith("noise, text_states → mid, skip_00 … skip_01")
    assert rows["unet_decoder"].endswith("mid, skip_00 … skip_01, text_states, noise, timesteps, weights → latents")
    assert rows["vae_decoder"].endswith("latents → images")


# --- fingerprints --------------------------------------------------------------------------------------------------


def test_fingerprint_tells_models_apart_and_not_their_places(tmp_path: Path) -> None:
    def write(folder: Path, *, weights: bytes = b"w" * 100, config: str = "{}") -> Path:
        (folder / "unet").mkdir(parents=True)
        (folder / "unet" / "a.safetensors").write_bytes(weights)
        (folder / "unet" / "config.json").write_text(config)
        return folder

    first = fingerprint(write(tmp_path / "one"))
    second = write(tmp_path / "two")
    (second / "README.md").write_text("a card")
    (second / ".cache").mkdir()
    (second / ".cache" / "x.json").write_text("{}")
    assert fingerprint(second) == first
    assert fingerprint(write(tmp_path / "three", weights=b"v" + b"w" * 99)) != first
    assert fingerprint(write(tmp_path / "four", config="{ }")) != first
    (second / "unet" / "a.safetensors").rename(second / "unet" / "b.safetensors")
    assert fingerprint(second) != first


def test_fingerprint_of_large_weights_sees_any_training(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).standard_normal(BLOCKS * BLOCK_BYTES, dtype=np.float32)
    file = tmp_path / "model.safetensors"
    file.write_bytes(weights.tobytes())
    before = fingerprint(tmp_path)
    # 5 % of the weights, in one piece of a layer each, moved by the smallest step that float32 has.
    trained = weights.reshape(1024, -1).copy()
    trained[::20] = np.nextafter(trained[::20], np.float32(9))
    file.write_bytes(trained.tobytes())
    assert fingerprint(tmp_path) != before


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a star\nSteps: 20, Seed: 5", ("a star", "", "Steps: 20, Seed: 5")),
        (
            "a castle,\non a hill\nNegative prompt: fog,\nrain\nSteps: 20, Sampler: Euler a",
            ("a castle,\non a hill", "fog,\nrain", "Steps: 20, Sampler: Euler a"),
        ),
        ("Steps: of stone\nSteps: 4", ("Steps: of stone", "", "Steps: 4")),
        ("only a prompt", ("only a prompt", "", "")),
        ("", ("", "", "")),
    ],
)
def test_parameters_of_other_programs_are_taken_apart(text: str, parts: tuple[str, str, str]) -> None:
    from tiue_cli.files.png import Parameters, split_parameters

    assert split_parameters(text) == Parameters(*parts)


def test_utf8_in_a_latin1_chunk_is_read_as_utf8(tmp_path: Path) -> None:
    """As several web interfaces write it, against the standard."""
    import struct
    import zlib

    from PIL import Image

    from tiue_cli.files.png import read_text_chunks

    Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
    raw, chunk = (tmp_path / "p.png").read_bytes(), b"tEXtparameters\0" + "猫\nSteps: 20".encode()
    written = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "p.png").write_bytes(raw[:33] + written + raw[33:])
    assert read_text_chunks(tmp_path / "p.png")["parameters"] == "猫\nSteps: 20"


def test_hashes_of_an_export_are_those_of_sha256sum(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import hashlib

    write_tiny_export(tmp_path / "e")
    assert main(["inspect", str(tmp_path / "e")]) == 0
    shown = capsys.readouterr().out
    for file in (*(tmp_path / "e").glob("*.onnx"), *(tmp_path / "e").glob("*.data")):
        assert hashlib.sha256(file.read_bytes()).hexdigest()[:12] in shown, file.name
