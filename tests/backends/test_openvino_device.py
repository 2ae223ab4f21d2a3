"""Which device and arithmetic OpenVINO is given, and what is refused; OpenVINO itself is not needed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from tiny_export import write_tiny_export

from tiue_cli.backends import openvino_device
from tiue_cli.backends.openvino_device import (
    choose_arithmetic,
    find_device,
    import_openvino,
    model_cache,
    native_precisions,
    openvino_errors,
)
from tiue_cli.cli.app import main
from tiue_cli.errors import DeviceError, MissingDependencyError, OutOfMemoryError
from tiue_cli.files.exports import ExportManifest, ExportParity, OutputParity, RuntimeParity


class FakeCore:
    """Answers as OpenVINO's Core does on a machine with ``capabilities`` and ``devices``."""

    def __init__(self, *capabilities: str, devices: tuple[str, ...] = ("CPU",)) -> None:
        self.capabilities = list(capabilities)
        self.available_devices = list(devices)

    def get_property(self, device: str, name: str) -> list[str]:
        assert name == "OPTIMIZATION_CAPABILITIES"
        return self.capabilities


PLAIN = cast(Any, FakeCore("FP32", "INT8", "BIN", "EXPORT_IMPORT"))
"""What OpenVINO 2026.4 says of a CPU with AVX2 alone."""
MODERN = cast(Any, FakeCore("FP32", "BF16", "INT8", "BIN", "EXPORT_IMPORT"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> ExportManifest:
    return write_tiny_export(tmp_path_factory.mktemp("export") / "tiny", precision="fp32")


def checked(manifest: ExportManifest, *, bf16_db: float | None) -> ExportManifest:
    """The manifest as an export leaves it whose check drew in OpenVINO, in bf16 with this PSNR (None: not at all)."""
    found = () if bf16_db is None else (bf16_db,)
    parity = ExportParity(
        provider="cpu",
        outputs=(OutputParity(graph="vae_decoder", output="images", cases=(), max_error=0, relative_error=0),),
        prompts=("a star",),
        image_psnr_db=90,
        required_psnr_db=60,
        runtimes=tuple(
            RuntimeParity(runtime="openvino", version="1", precision="bf16", image_psnr_db=db, required_psnr_db=35)
            for db in found
        ),
    )
    return manifest.model_copy(update={"parity": parity})


@pytest.mark.parametrize(
    ("core", "bf16_db", "floats", "note"),
    [
        (PLAIN, 44.0, "fp32", None),
        (MODERN, 44.0, "bf16", "images 44 dB from fp32's"),
        (MODERN, 34.9, "fp32", None),
        (MODERN, None, "fp32", "was not checked in it"),
    ],
)
def test_bf16_is_chosen_only_where_it_is_native_and_holds(
    manifest: ExportManifest, core: Any, bf16_db: float | None, floats: str, note: str | None
) -> None:
    found = choose_arithmetic(core, "CPU", checked(manifest, bf16_db=bf16_db), "auto")
    assert found.floats == floats
    assert (found.note is None) if note is None else (note in (found.note or ""))


def test_what_was_asked_for_is_not_replaced(manifest: ExportManifest) -> None:
    """OpenVINO would compute in fp32 without a word."""
    with pytest.raises(DeviceError, match="this CPU has no bf16 arithmetic"):
        choose_arithmetic(PLAIN, "CPU", manifest, "bf16")
    with pytest.raises(DeviceError, match="no fp16 arithmetic"):
        choose_arithmetic(MODERN, "CPU", manifest, "fp16")
    assert choose_arithmetic(MODERN, "CPU", manifest, "bf16").hint == "bf16"
    assert choose_arithmetic(MODERN, "CPU", checked(manifest, bf16_db=50), "fp32").hint == "f32"


def test_precisions_are_the_librarys_own_word() -> None:
    assert native_precisions(PLAIN, "CPU") == ("fp32", "int8")
    assert native_precisions(MODERN, "CPU") == ("fp32", "bf16", "int8")


def test_a_device_that_is_not_there_is_an_error_that_names_what_is() -> None:
    two = cast(Any, FakeCore(devices=("CPU", "GPU.0", "GPU.1")))
    assert [find_device(two, asked) for asked in ("auto", "cpu", "gpu")] == ["CPU", "CPU", "GPU"]
    with pytest.raises(DeviceError, match="--device npu cannot be used: OpenVINO finds CPU, GPU here"):
        find_device(two, "npu")


def test_the_oldest_compiled_models_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(openvino_device, "CACHE_BYTES", 250)
    folder = tmp_path / "tiue" / "openvino"
    folder.mkdir(parents=True)
    for age, name in enumerate(("newest", "middle", "oldest")):
        path = folder / f"{name}.blob"
        path.write_bytes(bytes(100))
        os.utime(path, (1e9 - age, 1e9 - age))
    assert model_cache() == folder
    assert {path.stem for path in folder.iterdir()} == {"newest", "middle"}


def test_no_cache_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiue").write_text("a file where the folder would be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert model_cache() is None


def test_its_absence_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependencyError) as caught:
        import_openvino()
    assert caught.value.hint == "install it: python -m pip install 'tiue[openvino]'"


def test_what_it_raises_is_ours() -> None:
    with pytest.raises(DeviceError, match=r"OpenVINO failed at x\.onnx: .*the reason"), openvino_errors("x.onnx"):
        raise RuntimeError("Exception from src/core.cpp:132:\nthe reason")
    with pytest.raises(OutOfMemoryError), openvino_errors("x.onnx"):
        raise RuntimeError("std::bad_alloc")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backend", "openvino", "--provider", "cpu"], "--provider is for ONNX Runtime"),
        (["--backend", "openvino", "--device", "cuda"], "does not run on --device cuda"),
        (["--backend", "openvino", "--precision", "int8"], "was exported in fp32, and --precision says int8"),
        (["--backend", "onnx", "--device", "gpu"], "--device gpu is for OpenVINO"),
        (["--device", "npu"], "--device npu is for OpenVINO"),
    ],
)
def test_options_that_do_not_fit_exit_2(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_export(tmp_path / "tiny", precision="fp32")
    assert main(["generate", "a star", "--model", str(tmp_path / "tiny"), "--seed", "1", *words]) == 2
    assert message in capsys.readouterr().err


def test_devices_of_openvino_are_not_for_model_folders(
    tiny_student_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "a star", "--model", str(tiny_student_folder), "--device", "gpu"]) == 2
    assert "--device gpu is for OpenVINO" in capsys.readouterr().err
