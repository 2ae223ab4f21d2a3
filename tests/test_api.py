"""The public Python API: its examples run as written, and it draws what the commands draw."""

from __future__ import annotations

import doctest
import importlib
import inspect
import itertools
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import fake_tensorrt
import numpy as np
import pytest
from diffusers import UNet2DConditionModel
from lora_files import draw_factors, write_lora
from PIL import Image
from quick_bench import measure_small_peak
from tiny_export import write_tiny_export

import tiue_cli as tiue
from tiue_cli import api
from tiue_cli.cli.app import main
from tiue_cli.errors import ManifestError, PromptError, UsageError
from tiue_cli.files.png import read_record
from tiue_cli.generate import drawing, pictures
from tiue_cli.model import diffusers_pipeline

PROMPTS = ["a red star", "a blue tree", "a star above a house"]


@pytest.fixture
def student(tiny_student_folder: Path) -> Iterator[tiue.Pipeline]:
    with tiue.load(tiny_student_folder, device="cpu") as pipe:
        yield pipe


def bytes_of(images: list[np.ndarray] | list[Image.Image]) -> list[bytes]:
    return [np.asarray(image).tobytes() for image in images]


# --- the surface ---------------------------------------------------------------------------------------------------


def test_every_public_name_is_there_and_says_what_it_is() -> None:
    for name in tiue.__all__:
        value = getattr(tiue, name)
        assert name in dir(tiue) and value.__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tiue.nothing


@pytest.mark.parametrize("name", ["bench", "distill", "export"])
def test_folders_that_are_functions_can_be_called_and_imported_from(name: str) -> None:
    folder = importlib.import_module(f"tiue_cli.{name}")
    assert getattr(tiue, name) is folder and callable(folder)
    assert inspect.signature(folder) == inspect.signature(getattr(api, name))
    assert importlib.import_module(f"tiue_cli.{name}.config") is folder.config


def test_the_package_is_typed() -> None:
    assert (Path(tiue.__file__).parent / "py.typed").is_file()


# --- the examples --------------------------------------------------------------------------------------------------

EXAMPLES = {
    test.name: test
    for module in (tiue, api, drawing, pictures, diffusers_pipeline)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, extraglobs={"tiue": tiue})
    if test.examples
}


@pytest.fixture
def shop(tmp_path: Path, tiny_student_folder: Path, v_teacher_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the examples expect one, with tiny models under the names of large ones."""
    shutil.copytree(tiny_student_folder, tmp_path / "runs/sd15/student")
    shutil.copytree(v_teacher_folder, tmp_path / "runs/sd15/teacher")
    unet = UNet2DConditionModel.from_pretrained(tiny_student_folder / "unet")
    write_lora(tmp_path / "pixel-art.safetensors", draw_factors(unet))
    (tmp_path / "captions.txt").write_text("a red star\na blue tree\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


# The export traces four graphs, which takes as long for a tiny student as for a large one.
SLOW = {"tiue_cli.api.export"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in EXAMPLES]
)
def test_the_example_runs_as_written(name: str, shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure_small_peak(monkeypatch)
    if name.endswith("build_engine"):
        write_tiny_export(shop / "engines/sd15")
        fake_tensorrt.install(monkeypatch)
    failures = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(EXAMPLES[name])
    assert failures.failed == 0 and failures.attempted > 0


def test_every_public_function_has_an_example() -> None:
    shown = {name.rpartition(".")[2] for name in EXAMPLES}
    methods = {"__call__", "stream", "draw", "check", "save"}
    assert {"load", "export", "build_engine", "distill", "bench", "Pipeline", "Request", *methods} <= shown


# --- what it draws -------------------------------------------------------------------------------------------------


def test_same_seed_same_pixels_as_the_command(
    student: tiue.Pipeline, tiny_student_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(tiny_student_folder), "--seed", "5", "--images", "2", "--device", "cpu"]
    assert main(["generate", *PROMPTS, *words, "--out", str(tmp_path)]) == 0
    found = {record.seed: (path, record) for path in tmp_path.glob("*.png") if (record := read_record(path))}
    pictures = list(student.stream(PROMPTS, seed=5, images=2))
    assert [picture.seed for picture in pictures] == sorted(found) == [5, 6, 7, 8, 9, 10]
    for picture in pictures:
        path, record = found[picture.seed]
        assert picture.image.tobytes() == Image.open(path).tobytes()
        assert picture.record.model_dump(exclude={"model"}) == record.model_dump(exclude={"model"})
        assert picture.save(tmp_path / "again" / "it.png").read_bytes() == path.read_bytes()
    assert bytes_of(student(PROMPTS, seed=5, images=2, output="numpy")) == bytes_of([p.image for p in pictures])


def test_a_picture_is_the_same_whoever_shares_its_batch(student: tiue.Pipeline) -> None:
    requests = [tiue.Request(prompt, seed) for prompt, seed in zip(PROMPTS, (9, 0, 4), strict=True)]
    mixed = student.draw([*requests, tiue.Request("a red star", 1, size=(48, 32), steps=2)], output="numpy")
    assert [picture.seed for picture in mixed] == [9, 0, 4, 1]
    assert mixed[3].image.shape == (48, 32, 3) and mixed[3].record.steps == 2
    for request, picture in zip(requests, mixed, strict=False):
        alone = student(request.prompt, seed=request.seed, output="numpy")[0]
        # Batches of other lengths may take other kernels: up to one level of rounding.
        assert np.abs(alone.astype(int) - picture.image).max() <= 1


def test_latents_decode_to_the_picture(student: tiue.Pipeline, tiny_student_folder: Path) -> None:
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tiny_student_folder / "vae").eval()
    latents = student("a red star", seed=3, output="latents")[0]
    assert latents.shape == (4, 8, 8) and latents.dtype == np.float32
    with torch.no_grad():
        image = vae.decode(torch.from_numpy(latents)[None] / vae.config.scaling_factor).sample[0]
    pixels = ((image / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy().astype(int)
    assert np.abs(pixels - student("a red star", seed=3, output="numpy")[0]).max() <= 1


def test_an_endless_stream_is_read_as_far_as_it_is_drawn(student: tiue.Pipeline) -> None:
    read = itertools.count()
    endless = ("a red star" for _ in read)
    drawn = student.stream(endless, seed=0, batch=4)
    assert [next(drawn).seed for _ in range(6)] == [0, 1, 2, 3, 4, 5]
    assert next(read) <= 9


def test_a_stream_keeps_nothing(student: tiue.Pipeline) -> None:
    # Longer than a text encoder reads, each another text: what is said about one must not pile up.
    prompts = (f"{number} " * 200 for number in itertools.count())
    drawn = student.stream(prompts, seed=0, batch=4, output="numpy")
    tracemalloc.start()
    used_bytes = []
    for _ in range(3):
        for _ in range(20):
            assert next(drawn).cut_text
        used_bytes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    # Twenty pictures are 60 kB, and their prompts 20 kB.
    assert used_bytes[2] - used_bytes[1] < 20_000


def test_without_a_seed_the_seed_is_random_and_told(student: tiue.Pipeline) -> None:
    seeds = {next(student.stream(["a star"])).seed for _ in range(3)}
    assert len(seeds) == 3


def test_a_teacher_counts_its_own_steps(tiny_teacher_folder: Path) -> None:
    with tiue.load(tiny_teacher_folder, device="cpu", guidance=1) as pipe:
        picture = next(pipe.stream(["a star"], seed=0, steps=2))
        assert (pipe.kind, picture.record.steps, picture.record.guidance) == ("teacher", 2, 1)
        assert pipe.draw([tiue.Request("a star", 0, steps=2)])[0].image.tobytes() == picture.image.tobytes()


# --- what it refuses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"images": 0}, "images 0 is out of range"),
        ({"steps": 0}, "steps 0"),
        ({"steps": 9}, "steps"),
        ({"size": 33}, "33x33"),
        ({"size": (0, 32)}, "size"),
        ({"batch": 0}, "batch 0"),
        ({"seed": -1}, "seed -1"),
        ({"output": "jpeg"}, "unknown output 'jpeg'"),
    ],
)
def test_a_call_that_cannot_be_says_why(student: tiue.Pipeline, keywords: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        student("a star", **keywords)


def test_the_unusable_prompt_is_named(student: tiue.Pipeline) -> None:
    with pytest.raises(PromptError, match="prompt 2 is empty"):
        student(["a star", " "], seed=0)
    with pytest.raises(PromptError, match="request 1 contains a NUL"):
        student.draw([tiue.Request("a\0star", 0), tiue.Request("a star", 0)])
    with pytest.raises(UsageError, match="one string"):
        student.stream("a star")


def test_a_closed_pipeline_says_so(tiny_student_folder: Path) -> None:
    pipe = tiue.load(tiny_student_folder, device="cpu")
    pipe.close()
    pipe.close()
    with pytest.raises(UsageError, match="closed"):
        pipe("a star")


def test_an_engine_is_not_built_of_a_folder_that_is_no_export(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"manifest\.json does not exist"):
        tiue.build_engine(tmp_path)
