"""From requests to files: what is made, under which name, what is skipped, and what a stopped run leaves.

Most tests replace the model by a backend of a few lines whose pixels tell prompt and noise; the last ones run the real
torch backend on tiny models.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from PIL import Image
from tiny_export import write_tiny_export

from tiue_cli.cli.app import main
from tiue_cli.errors import OutputError, UsageError
from tiue_cli.files.naming import slug
from tiue_cli.files.png import read_record
from tiue_cli.generate import session as generate
from tiue_cli.generate.config import GenerateConfig
from tiue_cli.generate.pipeline import OnePassPipeline
from tiue_cli.generate.prompts import PromptRow
from tiue_cli.generate.session import Session
from tiue_cli.model.noise import MAX_SEED, draw_noise

SIZE = (32, 32)


class FakeBackend:
    """Pixels are a hash of the prompt and the noise's own values: wrong pairing or wrong noise shows."""

    name, device, dtype, default_size = "fake", "cpu", "fp32", SIZE
    notes: tuple[str, ...] = ()

    def __init__(self, *, fails_at: int | None = None, failure: BaseException | None = None) -> None:
        self.batches: list[list[str]] = []
        self.entered = False
        self._fails_at, self._failure = fails_at, failure

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        return (4, size[0] // 4, size[1] // 4)

    def largest_batch(self, size: tuple[int, int]) -> int | None:
        return None

    def cut_text(self, prompts: Sequence[str]) -> list[str]:
        return [prompt[40:] for prompt in prompts]

    def generate(
        self, prompts: Sequence[str], noise: np.ndarray, *, steps: int | None = None, progress: Any = None
    ) -> np.ndarray:
        assert self.entered
        if self._failure is not None and len(self.batches) == self._fails_at:
            raise self._failure
        self.batches.append(list(prompts))
        if progress is not None:
            progress(0.5)
        return np.stack([fake_pixels(prompt, row) for prompt, row in zip(prompts, noise, strict=True)])

    def __enter__(self) -> Self:
        self.entered = True
        return self

    def __exit__(self, *_: object) -> None:
        self.entered = False


def fake_pixels(prompt: str, noise: np.ndarray) -> np.ndarray:
    levels = (np.clip(noise[:3], -3, 3) * 20 + 128 + sum(prompt.encode()) % 50).astype(np.uint8)
    return levels.transpose(1, 2, 0).repeat(4, axis=0).repeat(4, axis=1)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeBackend:
    backend = FakeBackend()
    monkeypatch.setattr(generate, "open_backend", lambda config, target: backend)
    return backend


@pytest.fixture
def student(tiny_student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return str(tiny_student_folder)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(["generate", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    status, out, err = run(capsys, *arguments, "--format", "json")
    assert status == 0, err
    return json.loads(out)


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def names(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


# --- requests ------------------------------------------------------------------------------------------------------


def test_seed_of_image_i_is_seed_plus_i_over_the_whole_list(fake, student, capsys) -> None:
    found = document(capsys, "a red star", "a blue tree", "--model", student, "--seed", "5", "--images", "2")
    asked = [(image["prompt"], image["seed"]) for image in found["images"]]
    assert asked == [("a red star", 5), ("a red star", 6), ("a blue tree", 7), ("a blue tree", 8)]
    for image in found["images"]:
        noise = draw_noise([image["seed"]], (4, 8, 8))[0]
        assert np.array_equal(pixels(image["path"]), fake_pixels(image["prompt"], noise))


def test_seed_zero_is_a_seed(fake, student, capsys) -> None:
    assert document(capsys, "a", "--model", student, "--seed", "0")["images"][0]["seed"] == 0
    assert read_record(Path("images/a-0.png")).seed == 0  # type: ignore[union-attr]


def test_random_seed_is_said_and_makes_the_same_again(fake, student, capsys) -> None:
    status, out, err = run(capsys, "a", "--model", student)
    seed = read_record(Path(out.strip())).seed  # type: ignore[union-attr]
    assert status == 0
    assert f"--seed {seed}" in err
    again = document(capsys, "a", "--model", student, "--seed", str(seed), "--out", "again")
    assert np.array_equal(pixels(out.strip()), pixels(again["images"][0]["path"]))


def test_batch_size_changes_no_image(fake, student, capsys) -> None:
    for batch in ("1", "3"):
        document(capsys, "a", "b", "--images", "4", "--model", student, "--seed", "1", "--batch", batch, "--out", batch)
    assert [len(batch) for batch in fake.batches] == [1] * 8 + [3, 3, 2]
    for name in names("1"):
        assert np.array_equal(pixels(f"1/{name}"), pixels(f"3/{name}"))


def test_rows_override_and_group_by_size_and_steps(fake, student, capsys) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b", "size": "32x48"}, {"prompt": "c", "seed": 40, "steps": 2}, {"prompt": "d"}]
    Path("rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    found = document(capsys, "--prompts", "rows.jsonl", "--model", student, "--seed", "10")["images"]
    assert [(image["seed"], image["size"], image["steps"]) for image in found] == [
        (10, [32, 32], 4),
        (11, [32, 48], 4),
        (40, [32, 32], 2),
        (13, [32, 32], 4),
    ]
    assert [image["prompt"] for image in found] == ["a", "b", "c", "d"]
    assert fake.batches == [["a", "d"], ["b"], ["c"]]


def test_same_name_twice_in_one_call_gets_a_number(fake, student, capsys) -> None:
    rows = [{"prompt": "a", "seed": 1}, {"prompt": "A!", "seed": 1}, {"prompt": "a", "seed": 1, "size": 64}]
    Path("rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    found = document(capsys, "--prompts", "rows.jsonl", "--model", student)["images"]
    names = [Path(image["path"]).name for image in found]
    assert names[0] == "a-1.png"
    assert len(set(names)) == 3
    again = document(capsys, "--prompts", "rows.jsonl", "--model", student)["images"]
    assert all(image["skipped"] for image in again)


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A red heart, left of a BLUE house!", "a-red-heart-left-of-a-blue-house"),
        ("../../etc/passwd", "etc-passwd"),
        ("夜の家", "夜の家"),
    ],
)
def test_slug_is_a_plain_file_name(prompt: str, name: str) -> None:
    assert slug(prompt) == name


def test_slug_keeps_long_and_unspellable_prompts_apart() -> None:
    long = "a very long prompt " * 10
    assert slug(long + "1") != slug(long + "2")
    assert len(slug("夜" * 500).encode()) < 200
    assert slug("!?") != slug("?!")
    assert slug("!?").startswith("image-")


# --- what is there already -----------------------------------------------------------------------------------------


def test_second_run_skips_what_is_there_and_loads_nothing(fake, student, capsys) -> None:
    command = ("a", "b", "--model", student, "--seed", "3", "--grid")
    first = document(capsys, *command)
    fake.batches.clear()
    second = document(capsys, *command)
    assert fake.batches == []
    assert [image["skipped"] for image in second["images"]] == [True, True]
    assert [image["path"] for image in second["images"]] == [image["path"] for image in first["images"]]
    assert second["grid"] == first["grid"]


def test_longer_run_makes_only_what_is_missing(fake, student, capsys) -> None:
    document(capsys, "a", "--model", student, "--seed", "3", "--images", "2")
    fake.batches.clear()
    found = document(capsys, "a", "--model", student, "--seed", "3", "--images", "4")
    assert [image["skipped"] for image in found["images"]] == [True, True, False, False]
    assert fake.batches == [["a", "a"]]


@pytest.mark.parametrize(
    ("change", "said"),
    [(("--steps", "2"), "steps 4, not 2"), (("--size", "64"), "size 32x32, not 64x64")],
)
def test_other_picture_in_the_way_is_not_overwritten(fake, student, capsys, change, said) -> None:
    command = ("a", "--model", student, "--seed", "3")
    document(capsys, *command)
    before = Path("images/a-3.png").read_bytes()
    status, out, err = run(capsys, *command, *change)
    assert status == 1
    assert out == ""
    assert said in err
    assert "--overwrite" in err
    assert Path("images/a-3.png").read_bytes() == before
    document(capsys, *command, *change, "--overwrite")
    assert Path("images/a-3.png").read_bytes() != before


def test_other_weights_under_the_same_name_are_another_picture(fake, student, capsys, tmp_path) -> None:
    from helpers import copy_folder

    folder = copy_folder(Path(student), tmp_path / "copy")
    command = ("a", "--model", str(folder), "--seed", "3")
    document(capsys, *command)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    # The last bit of every weight in the second half: what any training changes, and more.
    data[len(data) // 2 :: 4] = bytes(byte ^ 1 for byte in data[len(data) // 2 :: 4])
    weights.write_bytes(data)
    status, _, err = run(capsys, *command)
    assert status == 1
    assert "other weights" in err


def test_same_weights_in_another_place_are_the_same_picture(fake, student, capsys, tmp_path) -> None:
    from helpers import copy_folder

    folder = copy_folder(Path(student), tmp_path / "moved")
    document(capsys, "a", "--model", student, "--seed", "3")
    assert document(capsys, "a", "--model", str(folder), "--seed", "3")["images"][0]["skipped"]


@pytest.mark.parametrize("content", [b"", b"not a picture"])
def test_foreign_file_in_the_way_is_not_overwritten(fake, student, capsys, content) -> None:
    Path("mine.png").write_bytes(content)
    status, _, err = run(capsys, "a", "--model", student, "--seed", "3", "--out", "mine.png")
    assert status == 1
    assert "mine.png exists" in err
    assert Path("mine.png").read_bytes() == content


def test_picture_without_record_is_not_taken_for_done(fake, student, capsys) -> None:
    command = ("a", "--model", student, "--seed", "3", "--no-metadata")
    document(capsys, *command)
    assert set(Image.open("images/a-3.png").info) == {"XML:com.adobe.xmp", "xmp"}
    status, _, err = run(capsys, *command)
    assert status == 1
    assert "does not say what it is a picture of" in err


# --- places --------------------------------------------------------------------------------------------------------


def test_one_image_goes_to_a_file(fake, student, capsys) -> None:
    status, out, _ = run(capsys, "a", "--model", student, "--seed", "3", "--out", "new/star.png")
    assert (status, out) == (0, "new/star.png\n")
    assert names("new") == ["star.png"]


def test_several_images_do_not_go_to_one_file(fake, student, capsys) -> None:
    status, _, err = run(capsys, "a", "--images", "2", "--model", student, "--out", "star.png")
    assert status == 2
    assert "can hold one image" in err
    assert not Path("star.png").exists()


def test_grid_file_holds_all_images_row_by_row(fake, student, capsys) -> None:
    found = document(capsys, "a", "--images", "3", "--model", student, "--seed", "3", "--out", "sheet.png", "--grid")
    assert found["grid"] == "sheet.png"
    assert [image["path"] for image in found["images"]] == [None] * 3
    sheet = pixels("sheet.png")
    assert sheet.shape == (2 * 32 + 3 * 4, 2 * 32 + 3 * 4, 3)
    third = fake_pixels("a", draw_noise([5], (4, 8, 8))[0])
    assert np.array_equal(sheet[40:72, 4:36], third)
    assert (sheet[40:72, 40:72] == sheet[0, 0]).all()
    assert [image.seed for image in read_record(Path("sheet.png")).images] == [3, 4, 5]  # type: ignore[union-attr]


def test_grid_takes_skipped_images_from_the_disk(fake, student, capsys) -> None:
    first = document(capsys, "a", "--images", "2", "--model", student, "--seed", "3")
    fake.batches.clear()
    found = document(capsys, "a", "--images", "2", "--model", student, "--seed", "3", "--grid")
    assert fake.batches == []
    sheet = pixels(found["grid"])
    for number, image in enumerate(first["images"]):
        assert np.array_equal(sheet[4:36, 4 + 36 * number : 36 + 36 * number], pixels(image["path"]))


@pytest.mark.parametrize(("out", "status"), [("star.jpg", 2), ("taken", 1), ("taken/deeper", 1), ("/proc/none", 1)])
def test_out_that_cannot_be_written_is_said_before_anything_is_loaded(fake, student, capsys, out, status) -> None:
    Path("taken").write_text("a file")
    found, stdout, err = run(capsys, "a", "--model", student, "--out", out)
    assert (found, stdout) == (status, "")
    assert err.count("error:") == 1
    assert err.count("hint:") == 1
    assert not fake.batches


def test_full_disk_is_one_clear_error_and_leaves_no_half_file(fake, student, capsys, monkeypatch) -> None:
    def write_half_then_fail(self: Image.Image, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"\x89PNG half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", write_half_then_fail)
    status, out, err = run(capsys, "a", "--model", student, "--seed", "3")
    assert (status, out) == (1, "")
    assert "the disk is full" in err
    assert "hint: free some space" in err
    assert names("images") == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_device_without_space_is_reported_by_the_real_writer(tmp_path: Path) -> None:
    from tiue_cli.files.atomic import atomic_file
    from tiue_cli.files.png import save_png

    with pytest.raises(OutputError, match="the disk is full"), atomic_file(tmp_path / "a.png") as temporary:
        temporary.symlink_to("/dev/full")
        save_png(temporary, np.zeros((64, 64, 3), np.uint8), None)
    assert list(tmp_path.iterdir()) == []


# --- stopping ------------------------------------------------------------------------------------------------------


def test_interrupted_run_says_what_is_there_and_goes_on(student, capsys, monkeypatch) -> None:
    stopping = FakeBackend(fails_at=2, failure=KeyboardInterrupt())
    monkeypatch.setattr(generate, "open_backend", lambda config, target: stopping)
    command = ("a", "--images", "4", "--batch", "1", "--model", student, "--grid")
    status, out, err = run(capsys, *command)
    assert status == 130
    assert len(out.splitlines()) == 2
    assert "stopped: 2 of 4 images are in images" in err
    assert "Traceback" not in err
    assert all(name.endswith(".png") and not name.startswith(".") for name in names("images"))
    seed = err.rpartition("--seed ")[2].split()[0]

    whole = FakeBackend()
    monkeypatch.setattr(generate, "open_backend", lambda config, target: whole)
    found = document(capsys, *command, "--seed", seed)
    assert [image["skipped"] for image in found["images"]] == [True, True, False, False]
    assert len(names("images")) == 5


def test_interrupt_before_the_first_image_says_so(student, capsys, monkeypatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "open_target", interrupted)
    status, out, err = run(capsys, "a", "--model", student)
    assert (status, out, err) == (130, "", "stopped: nothing was written\n")


# --- what is said --------------------------------------------------------------------------------------------------


def test_quiet_prints_paths_and_nothing_else(fake, student, capsys) -> None:
    status, out, err = run(capsys, "a", "b", "--model", student, "--seed", "3", "--format", "quiet")
    assert (status, out, err) == (0, "images/a-3.png\nimages/b-4.png\n", "")


def test_json_is_one_document_and_stderr_stays_empty(fake, student, capsys) -> None:
    status, out, err = run(capsys, "夜 \\ [red]x[/red]", "--model", student, "--seed", "3", "--format", "json")
    found = json.loads(out)
    assert (status, err) == (0, "")
    assert found["images"][0]["prompt"] == "夜 \\ [red]x[/red]"
    assert (found["backend"], found["device"], found["dtype"]) == ("fake", "cpu", "fp32")
    assert found["timings"]["generate_s"] > 0


def test_prompt_beyond_the_models_reach_is_cut_and_said(fake, student, capsys) -> None:
    prompt = "a" * 39 + " " + "b" * 10_000
    status, _, err = run(capsys, "short", prompt, "--model", student, "--seed", "3")
    assert status == 0
    note = next(line for line in err.splitlines() if "longer than" in line)
    assert "prompt 2 is longer than the 16 tokens" in note
    assert "the last 10000 of 10040 characters" in note
    assert len(note) < 300
    assert read_record(next(Path("images").glob("a*.png"))).prompt == prompt  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([""], 1, "is empty"),
        (["a", "--size", "30x32"], 2, "multiples of 4"),
        (["a", "--steps", "9"], 2, "trained with 4 steps"),
        (["a", "--guidance", "3"], 2, "--guidance is for teachers"),
        (["a", "--teacher-steps", "3"], 2, "--teacher-steps is for teachers"),
        (["a", "--backend", "onnx"], 2, "runs exported students"),
        (["a", "--images", "0"], 2, "--images"),
        (["a", "--seed", "-1"], 2, "--seed"),
        (["a", "--seed", str(MAX_SEED), "--images", "2"], 2, "out of range"),
        (["a", "--dtype", "int8"], 2, "--precision int8 is for exports"),
        (["a", "--dtype", "int4"], 2, "--dtype"),
        (["a", "--prompts", "none.txt"], 1, "does not exist"),
        (["a", "--vae", "none"], 1, "none does not exist"),
        (["a", "--compile", "--device", "cpu"], 1, "--compile is for CUDA"),
        ([], 2, "no prompt was given"),
        (["a", "--interactive"], 2, "reads its prompts from stdin"),
    ],
)
def test_bad_request_is_one_clear_error(student, capsys, arguments, status, said) -> None:
    found, out, err = run(capsys, *arguments, "--model", student)
    assert (found, out) == (status, "")
    assert said in err
    assert "Traceback" not in err
    assert not Path("images").exists()


def test_steps_on_a_teacher_is_a_usage_error(tiny_teacher_folder, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, "a", "--steps", "4", "--model", str(tiny_teacher_folder))
    assert status == 2
    assert "is a teacher" in err
    assert "--teacher-steps" in err
    Path("rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "steps": 4}\n')
    status, _, err = run(capsys, "--prompts", "rows.jsonl", "--model", str(tiny_teacher_folder))
    assert status == 1
    assert "rows.jsonl:2" in err


@pytest.mark.parametrize("guidance", ["nan", "inf", "-1"])
def test_a_guidance_that_is_no_number_is_a_usage_error_and_not_a_broken_unet(
    tiny_teacher_folder, capsys, guidance
) -> None:
    """NaN is neither below 0 nor above 100, so that the option's range lets it pass."""
    status, _, err = run(capsys, "a", "--model", str(tiny_teacher_folder), "--guidance", guidance)
    assert status == 2 and "guidance" in err and "UNet" not in err


def test_a_moved_encoder_is_another_picture_and_no_option_of_teachers_or_exports(
    tiny_student_folder, tiny_teacher_folder, capsys, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    moved = ("--encoder-timestep", "first")
    drawn = ("a", "--seed", "1", "--steps", "2", "--model", str(tiny_student_folder))
    assert run(capsys, *drawn, "--out", "a.png")[0] == 0
    assert b"encoder_timestep" not in Path("a.png").read_bytes()
    status, _, err = run(capsys, *drawn, *moved, "--out", "a.png")
    assert status == 1 and "encoder_timestep" in err
    # With all of the steps there is nothing to move: it is the same picture.
    whole = ("a", "--seed", "1", "--model", str(tiny_student_folder), "--out", "b.png")
    assert run(capsys, *whole)[0] == 0
    assert "there already" in run(capsys, *whole, *moved)[2]
    write_tiny_export(tmp_path / "export")
    for other in (str(tiny_teacher_folder), "export"):
        status, _, err = run(capsys, "a", "--model", other, *moved)
        assert status == 2 and "--encoder-timestep is for student folders" in err


def test_bad_size_in_a_row_names_its_line(fake, student, capsys) -> None:
    Path("rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "size": 30}\n')
    status, _, err = run(capsys, "--prompts", "rows.jsonl", "--model", student)
    assert status == 1
    assert "rows.jsonl:2: size 30x30" in err


def test_truncated_model_folder_is_one_clear_error(student, capsys, tmp_path) -> None:
    from helpers import copy_folder

    folder = copy_folder(Path(student), tmp_path / "broken")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    status, out, err = run(capsys, "a", "--model", str(folder))
    assert (status, out) == (1, "")
    assert "truncated" in err
    assert err.count("\n") == 2


# --- interactive ---------------------------------------------------------------------------------------------------


def test_interactive_reads_prompts_and_settings_and_survives_a_bad_line(fake, student, capsys, monkeypatch) -> None:
    import io

    typed = ":seed 5\na\n\n:images 2\nb\n:size 30\nc\n:size 64\n:nonsense\n:seed x\n:steps 2\nd\n:quit\nnever\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed.encode()), encoding="utf-8"))
    status, out, err = run(capsys, "--interactive", "--model", student, "--format", "json")
    documents = [json.loads(line) for line in out.splitlines()]
    made = [
        [(image["prompt"], image["seed"], image["size"][0], image["steps"]) for image in found["images"]]
        for found in documents
        if "images" in found
    ]
    assert made == [
        [("a", 5, 32, 4)],
        [("b", 5, 32, 4), ("b", 6, 32, 4)],
        [("c", 5, 32, 4), ("c", 6, 32, 4)],  # a size that does not fit is refused when it is set
        [("d", 5, 64, 2), ("d", 6, 64, 2)],
    ]
    assert status == 1
    assert err.count("error:") == 3
    assert [found["error"]["type"] for found in documents if "error" in found] == ["UsageError"] * 3


def test_interactive_understands_what_people_type(fake, student, capsys, monkeypatch) -> None:
    import io

    typed = f"help\n--seed 7\n:seed {'9' * 5000}\n:seed {10**22}\n:images {10**22}\n--size=32\na\nexit\nnever\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed.encode()), encoding="utf-8"))
    status, out, err = run(capsys, "--interactive", "--model", student)
    assert (status, out.splitlines()) == (1, ["images/a-7.png"])
    assert err.count("error:") == 3
    assert max(len(line) for line in err.splitlines() if line.startswith("error:")) < 200


def test_interactive_survives_bytes_that_are_no_utf8(fake, student, capsys, monkeypatch) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\na\n"), encoding="utf-8"))
    status, out, err = run(capsys, "--interactive", "--model", student, "--seed", "1", "--format", "quiet")
    assert (status, out) == (1, "images/a-1.png\n")
    assert "UTF-8" in err


# --- the real backend ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_step_student(tiny_teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiue_cli.model.student import save_student, student_from_teacher

    student = student_from_teacher(tiny_teacher_folder, steps=1)
    return save_student(student, tmp_path_factory.mktemp("models") / "one-step")


def ddim_pipeline(folder: Path, **scheduler: Any) -> Any:
    """diffusers' own pipeline over a folder, with deterministic DDIM: the oracle."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    unclipped = {"clip_sample": False, "set_alpha_to_one": False, **scheduler}
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **unclipped)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def close(mine: np.ndarray, theirs: np.ndarray) -> None:
    """At most one level apart, and that in few places: rounding."""
    difference = np.abs(mine.astype(int) - theirs.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


def test_one_step_student_equals_diffusers_own_single_step(one_step_student, capsys, tmp_path, monkeypatch) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    found = document(capsys, "a red star", "a tree", "--seed", "3", "--size", "32x48", "--model", str(one_step_student))
    pipeline = ddim_pipeline(one_step_student, timestep_spacing="trailing")
    noise = torch.from_numpy(draw_noise([3, 4], (4, 8, 12)))
    with torch.no_grad():
        states = pipeline.encode_prompt(["a red star", "a tree"], "cpu", 1, False)[0]
        pipeline.scheduler.set_timesteps(1)
        (timestep,) = pipeline.scheduler.timesteps
        prediction = pipeline.unet(noise, timestep, states).sample
        latents = pipeline.scheduler.step(prediction, timestep, noise).prev_sample
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    expected = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    for image, wanted in zip(found["images"], expected, strict=True):
        close(pixels(image["path"]), wanted)


def test_teacher_equals_diffusers_pipeline(tiny_teacher_folder, capsys, tmp_path, monkeypatch) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    model = ("--model", str(tiny_teacher_folder), "--teacher-steps", "3", "--guidance", "4")
    found = document(capsys, "a red star", "--seed", "3", *model)
    pipeline = ddim_pipeline(tiny_teacher_folder)
    noise = torch.from_numpy(draw_noise([3], (4, 8, 8)))
    wanted = pipeline("a red star", latents=noise, num_inference_steps=3, guidance_scale=4.0, output_type="np").images
    close(pixels(found["images"][0]["path"]), (wanted[0] * 255).round())
    assert found["images"][0]["guidance"] == 4.0
    assert found["model"]["kind"] == "teacher"


def test_same_seed_gives_the_same_image_whatever_the_batch(tiny_student_folder, tmp_path) -> None:
    config = GenerateConfig(model=str(tiny_student_folder), seed=0, images=3, out=tmp_path)
    with Session(config) as session:
        specs = [
            image.spec for image in session.plan([PromptRow("a red star", "it"), PromptRow("a tree", "it")]).images
        ]
        backend = session.open()
        alone = dict(OnePassPipeline(backend, batch=1).images(specs))
        together = dict(OnePassPipeline(backend, batch=4).images(specs))
    assert sorted(alone) == sorted(together) == list(range(6))
    for index, image in alone.items():
        close(image, together[index])
    assert not np.array_equal(alone[0], alone[1])


@pytest.mark.parametrize(("where", "encoder_timestep"), [("trained", 751), ("first", 501)])
def test_fewer_steps_are_spaced_anew_and_the_encoder_stays_unless_it_is_told_to_move(
    tiny_student_folder, tmp_path, where, encoder_timestep
) -> None:
    import torch

    from tiue_cli.model.autoencoder import ImageDecoder
    from tiue_cli.model.schedule import LinearCombine
    from tiue_cli.model.student import load_student
    from tiue_cli.model.text import encode_prompts
    from tiue_cli.model.unet import UNetDecoder, UNetEncoder

    config = GenerateConfig(model=str(tiny_student_folder), seed=0, steps=2, encoder_timestep=where, out=tmp_path)
    with Session(config) as session:
        specs = [image.spec for image in session.plan([PromptRow("a red star", "it")]).images]
        ((_, image),) = OnePassPipeline(session.open()).images(specs)
    student = load_student(tiny_student_folder)
    noise = torch.from_numpy(draw_noise([0], (4, 8, 8)))
    states = encode_prompts(student.tokenizer, student.text_encoder, ["a red star"])
    with torch.no_grad():
        features = UNetEncoder(student.unet)(noise, states, encoder_timestep)
        predictions = UNetDecoder(student.unet)(features, torch.tensor([501, 1]), states)
    combine = LinearCombine.from_scheduler_config(student.scheduler_config, (501, 1))
    close(image, ImageDecoder(student.vae).decode(combine(noise, predictions))[0])


@pytest.mark.parametrize("more", [(), ("--encoder-timestep", "first")])
def test_recorded_command_makes_the_same_file_again(tiny_student_folder, capsys, tmp_path, monkeypatch, more) -> None:
    import shlex

    monkeypatch.chdir(tmp_path)
    prompt = "-a 'quoted' \"red\" $HOME star; rm *\nsecond line"
    options = ("--seed", "7", "--size", "32x48", "--steps", "3", "--model", str(tiny_student_folder), *more)
    status, _, err = run(capsys, *options, "--out", "first.png", "--", prompt)
    assert status == 0, err
    record = read_record(Path("first.png"))
    program, *words = shlex.split(record.command())  # type: ignore[union-attr]
    assert program == "tiue"
    words[1:1] = ["--out", "second.png"]
    assert main(words) == 0
    assert Path("first.png").read_bytes() == Path("second.png").read_bytes()


def test_absent_cuda_that_is_asked_for_is_one_clear_error(student, capsys) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    status, out, err = run(capsys, "a", "--model", student, "--device", "cuda")
    assert (status, out) == (1, "")
    assert "--device cuda cannot be used" in err
    assert "tiue doctor" in err
    assert run(capsys, "a", "--model", student, "--seed", "1")[0] == 0
    status, out, err = run(capsys, "a", "--model", student, "--seed", "1", "--device", "cuda")
    assert (status, out) == (1, ""), "the picture is there already, and it is an error all the same"


def test_tiny_autoencoder_replaces_the_models_own(student, capsys, tmp_path) -> None:
    from helpers import tiny_vae

    tiny_vae("tiny").save_pretrained(tmp_path / "taesd")
    own = document(capsys, "a", "--model", student, "--seed", "1", "--out", "own.png")
    other = document(capsys, "a", "--model", student, "--seed", "1", "--vae", "taesd", "--out", "other.png")
    assert not np.array_equal(pixels("own.png"), pixels("other.png"))
    assert own["images"][0]["path"] == "own.png"
    assert "--vae taesd" in read_record(Path(other["images"][0]["path"])).command()  # type: ignore[union-attr]
    status, _, err = run(capsys, "a", "--model", student, "--seed", "1", "--out", "other.png")
    assert status == 1
    assert "autoencoder taesd, not of the model" in err


def test_pipeline_refuses_a_seed_out_of_range(student) -> None:
    with Session(GenerateConfig(model=student, seed=MAX_SEED, images=2)) as session, pytest.raises(UsageError):
        session.plan([PromptRow("a", "it")])


@pytest.mark.parametrize(
    ("size", "noted"), [("32", False), ("64", False), ("16", False), ("96", True), ("32x128", True), ("8", True)]
)
def test_a_size_far_from_the_models_is_noted(
    fake: FakeBackend,
    tiny_student_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    size: str,
    noted: bool,
) -> None:
    arguments = ["generate", "a star", "--model", str(tiny_student_folder), "--out", str(tmp_path), "--size", size]
    assert main([*arguments, "--seed", "1"]) == 0
    assert ("far from the 32x32" in capsys.readouterr().err) == noted


def test_bare_words_are_noted_and_drawn(
    fake: FakeBackend, tiny_student_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "a", "red", "star", "--model", str(tiny_student_folder), "--out", str(tmp_path)]
    assert main([*arguments, "--seed", "1"]) == 0
    assert 'tiue generate "a red star"' in " ".join(capsys.readouterr().err.split())
    assert len(list(tmp_path.glob("*.png"))) == 3


@pytest.mark.parametrize("same", [True, False])
def test_a_picture_that_appears_meanwhile_is_never_replaced(
    fake: FakeBackend, tiny_student_folder: Path, tmp_path: Path, same: bool
) -> None:
    """Two runs to one name: the later one keeps the earlier's file, and fails unless it is the very picture."""
    config = GenerateConfig(model=str(tiny_student_folder), out=tmp_path, seed=1)
    rows = [PromptRow("a star", "the prompt")]
    with Session(config) as first, Session(config) as second:
        plans = first.plan(rows), second.plan(rows)
        list(first.run(plans[0]))
        path = plans[0].images[0].path
        assert path is not None
        if not same:
            Image.new("RGB", (3, 3)).save(path)
        before = path.read_bytes()
        if same:
            list(second.run(plans[1]))
        else:
            with pytest.raises(OutputError, match="written by another run"):
                list(second.run(plans[1]))
    assert path.read_bytes() == before


def test_a_run_removes_what_a_killed_one_left_in_its_folder(
    fake: FakeBackend, tiny_student_folder: Path, tmp_path: Path
) -> None:
    left = tmp_path / ".a-star-1.0123abcd.tmp.png"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    with Session(GenerateConfig(model=str(tiny_student_folder), out=tmp_path, seed=1)) as session:
        list(session.run(session.plan([PromptRow("a star", "the prompt")])))
    assert [path.name for path in tmp_path.iterdir()] == ["a-star-1.png"]
