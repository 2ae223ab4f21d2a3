"""The ONNX Runtime backend: the same pictures as torch, without torch; and what it refuses, each in one line."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import psutil
import pytest
from exports import build_small_student, exported, torch_images
from tiny_export import write_tiny_export

from tiue_cli.backends import exported as exported_backend
from tiue_cli.backends import onnx_session
from tiue_cli.backends.cuda import device_count
from tiue_cli.backends.onnx_backend import OnnxBackend
from tiue_cli.backends.onnx_session import Provider, choose_provider, open_session, run_session
from tiue_cli.cli.app import main
from tiue_cli.errors import DeviceError, ManifestError, TiueError, UsageError
from tiue_cli.export.tolerance import psnr_db
from tiue_cli.files.exports import EXPORT_MANIFEST
from tiue_cli.model.noise import draw_noise
from tiue_cli.model.student import load_student

PROMPTS = ["a red star above a blue house", "a tree", "a blue house and much more than the model can read " * 3]

no_gpu = pytest.mark.skipif(device_count() > 0, reason="a GPU is there")


@pytest.fixture(scope="module")
def student(tiny_student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_small_student(tiny_student_folder, tmp_path_factory.mktemp("small") / "student")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A hand-made export that a test may damage."""
    write_tiny_export(tmp_path / "tiny", precision="fp32")
    return tmp_path / "tiny"


# --- the same pictures ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("steps", [None, 1, 2, 3, 4])
def test_same_seed_same_image_as_torch(student: Path, steps: int | None) -> None:
    model = load_student(student)
    with OnnxBackend(exported(student), provider="cpu") as backend:
        for size in ((16, 16), (10, 34), (2, 2)):
            noise = draw_noise([0, 5, 2**40], backend.latent_shape(size))
            images = backend.generate(PROMPTS, noise, steps=steps)
            expected = torch_images(model, PROMPTS, noise, steps=steps)
            assert images.shape == (3, *size, 3) and images.dtype == np.uint8
            assert all(psnr_db(image, other) >= 60 for image, other in zip(images, expected, strict=True))


@pytest.mark.slow
def test_an_image_does_not_depend_on_its_batch(student: Path) -> None:
    with OnnxBackend(exported(student), provider="cpu") as backend:
        noise = draw_noise([7, 8, 9], backend.latent_shape((16, 16)))
        together = backend.generate(PROMPTS, noise)
        for index, prompt in enumerate(PROMPTS):
            alone = backend.generate([prompt], noise[index : index + 1])
            assert psnr_db(alone[0], together[index]) >= 60


def test_groups_of_the_last_step_are_the_whole(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with OnnxBackend(tiny, provider="cpu") as backend:
        noise = draw_noise(range(5), backend.latent_shape((32, 32)))
        whole = backend.generate(["a red heart"] * 5, noise)
        monkeypatch.setattr(exported_backend, "PIXELS_AT_ONCE", 2 * 32 * 32)
        np.testing.assert_array_equal(backend.generate(["a red heart"] * 5, noise), whole)


def test_graphs_of_fixed_sizes_are_chosen_by_size(tmp_path: Path) -> None:
    write_tiny_export(tmp_path / "free", precision="fp32")
    write_tiny_export(tmp_path / "fixed", precision="fp32", sizes=[(32, 32), (16, 48)])
    with OnnxBackend(tmp_path / "free", provider="cpu") as free, OnnxBackend(tmp_path / "fixed") as fixed:
        assert free.default_size == fixed.default_size == (32, 32)
        # The hand-made graphs draw their weights in order: only the first size's are those of the free ones.
        noise = draw_noise([1, 2], free.latent_shape((32, 32)))
        np.testing.assert_array_equal(fixed.generate(["a star"] * 2, noise), free.generate(["a star"] * 2, noise))
        assert fixed.generate(["a star"], draw_noise([1], fixed.latent_shape((16, 48)))).shape == (1, 16, 48, 3)
        with pytest.raises(UsageError, match="64x64 pixels is not one of this export's fixed sizes") as caught:
            fixed.latent_shape((64, 64))
        assert "32x32, 16x48" in str(caught.value)


def test_sizes_and_steps_that_do_not_fit(tiny: Path) -> None:
    with OnnxBackend(tiny, provider="cpu") as backend:
        with pytest.raises(UsageError, match="33x32 pixels: both sides must be multiples of 4"):
            backend.latent_shape((33, 32))
        with pytest.raises(UsageError, match="cannot draw with 5 steps") as caught:
            backend.generate(["a star"], draw_noise([0], (4, 8, 8)), steps=5)
        assert "1, 2, 3, 4" in str(caught.value)


@pytest.mark.parametrize("part", ["text encoder", "UNet encoder", "UNet decoder"])
def test_latents_that_are_no_numbers_are_an_error_of_the_first_part_to_blame(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    with OnnxBackend(tiny, provider="cpu") as backend:
        run = backend._run

        def spoiled(name: str, size: Any, inputs: Any) -> dict[str, Any]:
            found = run(name, size, inputs)
            if name != part.lower().replace(" ", "_"):
                return found
            arrays = {key: np.full_like(backend._array(value), np.nan) for key, value in found.items()}
            return {key: onnxruntime.OrtValue.ortvalue_from_numpy(array) for key, array in arrays.items()}

        monkeypatch.setattr(backend, "_run", spoiled)
        with pytest.raises(DeviceError, match=f"the {part} produced NaN or infinity in fp32"):
            backend.generate(["a star"], draw_noise([0], (4, 8, 8)))


def test_what_lies_on_the_device_is_not_copied(tiny: Path) -> None:
    manifest = OnnxBackend(tiny, provider="cpu").manifest
    provider = choose_provider("cpu")
    encoder = open_session(tiny / manifest.graph("unet_encoder").onnx.file, provider)
    text = np.ones((1, manifest.text_tokens, manifest.text_width), np.float32)
    features = run_session(encoder, {"noise": draw_noise([0], (4, 8, 8)), "text_states": text}, provider)
    placed = onnx_session._placed(onnx_session.import_onnxruntime(), features["mid"], provider.device)
    assert placed.data_ptr() == features["mid"].data_ptr()
    assert placed.device_name() == "cpu"


def test_memory_of_a_run_is_given_back(tmp_path: Path) -> None:
    """Two values of 128 MiB each inside a graph are gone after it ran: the most that was ever drawn is not held."""
    count = np.array([2**25], np.int64)
    nodes = [
        onnx.helper.make_node("Expand", ["x", "count"], ["large"]),
        onnx.helper.make_node("Exp", ["large"], ["larger"]),
        onnx.helper.make_node("ReduceMax", ["larger"], ["y"]),
    ]
    value = functools.partial(onnx.helper.make_tensor_value_info, elem_type=onnx.TensorProto.FLOAT, shape=[1])
    graph = onnx.helper.make_graph(
        nodes, "large", [value("x")], [value("y")], [onnx.numpy_helper.from_array(count, "count")]
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10),
              tmp_path / "large.onnx")  # fmt: skip
    provider = Provider("cpu")
    session = open_session(tmp_path / "large.onnx", provider)
    before = psutil.Process().memory_info().rss
    found = run_session(session, {"x": np.ones(1, np.float32)}, provider)
    assert psutil.Process().memory_info().rss - before < 64 * 2**20
    np.testing.assert_allclose(found["y"].numpy(), np.e, rtol=1e-6)


# --- without torch -------------------------------------------------------------------------------------------------


def test_a_whole_run_needs_no_torch(tiny: Path, tmp_path: Path) -> None:
    """In a process where torch, diffusers and transformers cannot even be imported."""
    code = (
        "import sys\n"
        "for name in ('torch', 'diffusers', 'transformers', 'safetensors', 'onnx'): sys.modules[name] = None\n"
        "from tiue_cli.cli.app import main\n"
        f"code = main(['generate', 'a red heart', '--model', {str(tiny)!r}, '--seed', '0', '--out', 'o'])\n"
        "code += main(['inspect', 'o/a-red-heart-0.png'])\n"
        f"code += main(['inspect', {str(tiny)!r}])\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "o" / "a-red-heart-0.png").is_file()
    assert "onnx on cpu in fp32" in done.stdout and "an exported student" in done.stdout


# --- damage --------------------------------------------------------------------------------------------------------


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("unet_decoder.onnx", flip_byte, r"unet_decoder\.onnx is not the file that was written: its SHA-256 is"),
        ("text_encoder.onnx", cut_end, r"text_encoder\.onnx is not the file that was written: it has \d+ bytes"),
        ("vae_decoder.onnx", Path.unlink, r"vae_decoder\.onnx is missing"),
        ("tokenizer.json", flip_byte, r"tokenizer\.json is not the file that was written"),
        (EXPORT_MANIFEST, cut_end, r"manifest\.json is not JSON"),
    ],
)
def test_damage_is_found_before_a_graph_is_opened(
    tiny: Path, name: str, damage: object, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == EXPORT_MANIFEST:
        (tiny / name).write_text((tiny / name).read_text().rstrip()[:-1])
    else:
        damage(tiny / name)  # type: ignore[operator]
    monkeypatch.setattr(OnnxBackend, "_open", lambda *_: pytest.fail("a graph was opened"))
    with pytest.raises(ManifestError, match=message), OnnxBackend(tiny, provider="cpu"):
        pass


@pytest.mark.slow
def test_damage_of_the_external_weights_is_found(student: Path, tmp_path: Path) -> None:
    for number, (damage, message) in enumerate([(flip_byte, "SHA-256"), (cut_end, "bytes")]):
        folder = Path(shutil.copytree(exported(student), tmp_path / str(number)))
        damage(folder / "unet_encoder.onnx.data")
        with pytest.raises(ManifestError, match=rf"unet_encoder\.onnx\.data is not .*{message}"), OnnxBackend(folder):
            pass


def test_a_manifest_of_another_student_is_refused(tiny: Path, tmp_path: Path) -> None:
    write_tiny_export(tmp_path / "other", precision="fp32", seed=1)
    shutil.copy(tmp_path / "other" / EXPORT_MANIFEST, tiny)
    with pytest.raises(ManifestError, match=r"is not the file that was written") as caught, OnnxBackend(tiny):
        pass
    assert "manifest.json belongs to another export" in str(caught.value)


def test_a_file_outside_the_folder_is_refused(tiny: Path) -> None:
    manifest = json.loads((tiny / EXPORT_MANIFEST).read_text())
    manifest["tokenizer"]["file"] = "../tokenizer.json"
    (tiny / EXPORT_MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ManifestError, match=r"field 'tokenizer\.file'"):
        OnnxBackend(tiny)


# --- providers -----------------------------------------------------------------------------------------------------


@no_gpu
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_cannot_run_is_an_error_with_its_reason(tiny: Path, provider: str) -> None:
    with pytest.raises(DeviceError, match=rf"--provider {provider} cannot be used: ") as caught:
        OnnxBackend(tiny, provider=provider)
    assert "--provider cpu" in str(caught.value)


@no_gpu
def test_auto_is_the_cpu_where_there_is_no_gpu(tiny: Path) -> None:
    backend = OnnxBackend(tiny)
    assert (backend.device, backend.provider.note) == ("cpu", None)


@no_gpu
def test_a_silent_fallback_is_not_accepted(tiny: Path) -> None:
    """ONNX Runtime takes the CPU where CUDA does not start, and says so on stderr only."""
    with pytest.raises(DeviceError, match=r"(did not start CUDAExecutionProvider|failed at)"):
        open_session(tiny / "text_encoder.onnx", Provider("cuda"))


def test_auto_says_why_the_gpu_is_idle(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_session, "device_count", lambda: 1)
    monkeypatch.setattr(onnx_session, "provider_problem", lambda name: "libcudnn.so.9 cannot be loaded")
    backend = OnnxBackend(tiny)
    assert backend.device == "cpu"
    assert any("libcudnn.so.9" in note for note in backend.notes)


@pytest.mark.parametrize("name", ["cuda", "tensorrt"])
def test_float32_on_a_gpu_is_float32(name: str, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines are built without TF32 and compared with ONNX Runtime: it must not round to TF32 either."""
    seen: list[Any] = []

    def session(path: Path, options: Any, *, providers: list[Any]) -> None:
        seen.extend(providers)
        raise DeviceError("no session", hint="none is needed")

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tiny.parent / "cache"))
    with pytest.raises(DeviceError, match="no session"):
        open_session(tiny / "text_encoder.onnx", Provider(name))
    cuda = [entry[1] for entry in seen if entry[0] == "CUDAExecutionProvider"]
    assert [options["use_tf32"] for options in cuda] == ["0"]


def test_looking_for_cudas_libraries_prints_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime prints what it could not load to standard output, where the JSON document goes."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnx_session, "device_count", lambda: 1)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("Failed to load libcudnn.so.9"))  # noqa: T201
    onnx_session.provider_problem("cuda")
    assert capsys.readouterr().out == ""


def test_the_tensorrt_that_onnx_runtime_wants_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It wants version 10, and tiue's own extra may have installed 11."""
    (tmp_path / "capi").mkdir()
    for name in ("cuda", "tensorrt"):
        (tmp_path / "capi" / f"libonnxruntime_providers_{name}.so").touch()
    monkeypatch.setattr(onnxruntime, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(onnx_session.PROVIDERS.values()))
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(onnx_session, "device_count", lambda: 1)

    def missing(name: str, **options: Any) -> None:
        raise OSError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr(onnx_session.ctypes, "CDLL", missing)
    problem = onnx_session.provider_problem("tensorrt")
    assert problem is not None and "libnvinfer.so.10" in problem and "pip install tensorrt-cu12-libs==10.*" in problem
    assert "pip install" not in (onnx_session.provider_problem("cuda") or "")


# --- the command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--backend", "torch"], 2, "runs model folders"),
        (["--vae", "somewhere"], 2, "the autoencoder is part of an export"),
        (["--compile"], 2, "--compile is for model folders"),
        (["--dtype", "fp16"], 2, "was exported in fp32"),
        (["--device", "cpu", "--provider", "cuda"], 2, "does not run on --device cpu"),
        (["--guidance", "5"], 2, "is for teachers"),
        (["--size", "34"], 2, "multiples of 4"),
        (["--steps", "9"], 2, "cannot draw with 9 steps"),
        pytest.param(["--provider", "cuda"], 1, "--provider cuda cannot be used", marks=no_gpu),
        pytest.param(["--device", "cuda"], 1, "--provider cuda cannot be used", marks=no_gpu),
    ],
)
def test_options_that_an_export_cannot_follow(
    words: list[str], code: int, message: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["generate", "a star", "--model", str(tiny), "--seed", "1", "--out", str(out), *words]) == code
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_model_folder_does_not_run_in_onnx(tiny_student_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "a star", "--model", str(tiny_student_folder), "--seed", "1"]
    assert main([*words, "--backend", "onnx"]) == 2
    assert "tiue export" in capsys.readouterr().err
    assert main([*words, "--provider", "cpu"]) == 2


def test_damage_exits_1_with_one_line_and_a_hint(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_byte(tiny / "unet_encoder.onnx")
    assert main(["generate", "a star", "--model", str(tiny), "--seed", "1", "--out", str(tmp_path / "o")]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2 and lines[0].startswith("error: ") and lines[1].startswith("hint: ")
    assert not (tmp_path / "o").exists()


def test_damage_is_said_where_every_picture_is_there_already(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", "a star", "--model", str(tiny), "--seed", "1", "--out", str(tmp_path / "o")]
    assert main(words) == 0 and main(words) == 0
    flip_byte(tiny / "unet_encoder.onnx")
    capsys.readouterr()
    assert main(words) == 1
    out, err = capsys.readouterr()
    assert out == "" and "unet_encoder.onnx is not the file that was written" in err


@no_gpu
def test_a_provider_that_cannot_run_is_an_error_where_every_picture_is_there_already(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", "a star", "--model", str(tiny), "--seed", "1", "--out", str(tmp_path / "o")]
    assert main(words) == 0
    capsys.readouterr()
    assert main([*words, "--provider", "cuda"]) == 1
    assert "--provider cuda cannot be used" in capsys.readouterr().err


def test_an_export_in_a_picture_and_back(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command that ``inspect`` gives makes the same picture; a second run finds it there."""
    words = [
        "generate",
        "a star",
        "--model",
        str(tiny),
        "--seed",
        "1",
        "--out",
        str(tmp_path / "o"),
        "--format",
        "json",
    ]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["backend"], report["device"], report["dtype"]) == ("onnx", "cpu", "fp32")
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["images"][0]["skipped"] is True


def test_an_embedded_name_is_not_a_folder_here(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tiue_cli.generate.target import find_export

    monkeypatch.chdir(tiny.parent)
    tiny.rename(tiny.parent / "papercut")
    assert find_export("papercut") is None
    assert find_export("./papercut") is not None


def test_errors_of_the_runtime_are_ours(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"no graph")
    with pytest.raises(TiueError, match=r"ONNX Runtime failed at x\.onnx"):
        open_session(tmp_path / "x.onnx", choose_provider("cpu"))
