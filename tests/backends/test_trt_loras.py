"""LoRAs on an engine, on the fakes: refitted, it draws what an export of the student with them draws, and back."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import fake_tensorrt
import numpy as np
import pytest
from exports import build_small_student, export_copy
from lora_files import draw_factors, write_lora

import tiue_cli as tiue
from tiue_cli.backends.onnx_backend import OnnxBackend
from tiue_cli.backends.trt_backend import TrtBackend
from tiue_cli.cli.app import main
from tiue_cli.errors import AdapterError, DeviceError, ParityError, UsageError
from tiue_cli.export.config import EngineRequest, ExportConfig
from tiue_cli.export.trt.engine import EngineConfig, build_engine
from tiue_cli.files.engines import read_engine_manifest
from tiue_cli.files.png import LoraUse, read_record
from tiue_cli.generate.config import GenerateConfig
from tiue_cli.generate.fused import fused_export
from tiue_cli.generate.pictures import Request
from tiue_cli.generate.target import find_export
from tiue_cli.model.components import load_components
from tiue_cli.model.lora.files import lora_use
from tiue_cli.model.noise import draw_noise
from tiue_cli.serve.engine import Engine, batch_key

pytestmark = pytest.mark.slow  # exports of a small student, 20 s each

PROMPTS = ["a red heart", "a blue house at night"]
SIZE = (16, 12)
ENDS = ("to_q", "to_v", "proj_in", "conv1", "conv_shortcut", "time_emb_proj", "linear_1", "ff.net.2", "conv_out")


@pytest.fixture(scope="module")
def small(tiny_student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_small_student(tiny_student_folder, tmp_path_factory.mktemp("small") / "student")


@pytest.fixture(scope="module")
def adapters(small: Path) -> tuple[Path, Path]:
    """Two that share some layers: one of everything, one of a few."""
    parts = load_components(small)
    wide = draw_factors(parts.unet, parts.text_encoder, ends=ENDS)
    few = draw_factors(parts.unet, ends=("to_q", "to_out.0"), std=0.3, seed=900)
    folder = small.parent / "loras"
    return write_lora(folder / "wide.safetensors", wide), write_lora(folder / "few.safetensors", few)


@pytest.fixture(scope="module")
def built(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with an engine that can be refitted, to be copied."""
    folder = tmp_path_factory.mktemp("built") / "small"
    export_copy(small, folder, precision="fp32", sizes=(SIZE,), check=False)
    with pytest.MonkeyPatch.context() as patch:
        fake_tensorrt.install(patch)
        patch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
        build_engine(EngineConfig(folder, refit=True))
    return folder


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> fake_tensorrt.State:
    # One cache for the module: an export with an adapter is made once.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "fused"))
    return fake_tensorrt.install(monkeypatch)


@pytest.fixture
def export(built: Path, cuda: fake_tensorrt.State, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "small"))


@pytest.fixture
def backend(export: Path) -> Iterator[TrtBackend]:
    with TrtBackend(export) as opened:
        yield opened


def drawn(backend: TrtBackend | OnnxBackend) -> np.ndarray:
    """Latents of both prompts."""
    return backend.latents(PROMPTS, draw_noise(range(2), backend.latent_shape(SIZE)))


def fused_latents(export: Path, *uses: LoraUse) -> np.ndarray:
    """What ONNX Runtime makes of the student exported anew with the adapters in its weights, without a map of names."""
    info = find_export(str(export))
    assert info is not None
    with OnnxBackend(fused_export(export, info.manifest, info.model_id, uses), provider="cpu") as reference:
        return drawn(reference)


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_a_refitted_engine_draws_what_the_fused_export_draws_and_its_own_again(
    export: Path, backend: TrtBackend, adapters: tuple[Path, Path], cuda: fake_tensorrt.State
) -> None:
    wide, few = lora_use(f"{adapters[0]}:0.7"), lora_use(str(adapters[1]))
    bare = drawn(backend)
    expectations = {use: fused_latents(export, use) for use in (wide, few)}
    for use in (wide, few, wide):  # what the one before has changed must be restored
        backend.use_loras([use])
        expected = expectations[use]
        assert distance(expected, bare) > 1e-2
        for _ in range(3):  # plain, captured, launched
            assert distance(drawn(backend), expected) <= 1e-4
        assert backend.refit_s is not None
    backend.use_loras(())
    np.testing.assert_array_equal(drawn(backend), bare)
    assert backend.graph_problem is None
    before = len(cuda.refits)
    backend.use_loras(())
    assert len(cuda.refits) == before, "nothing changed, nothing is refitted"


def test_only_what_changes_is_given_and_what_tensorrt_joined_with_it(
    export: Path, backend: TrtBackend, adapters: tuple[Path, Path], cuda: fake_tensorrt.State
) -> None:
    backend.use_loras([lora_use(str(adapters[1]))])
    engine = {plan.graph: {weight.name: weight for weight in plan.refit} for plan in backend.engine.plans}
    assert {name for name, _ in cuda.refits} == {"unet_encoder", "unet_decoder"}
    for graph, names in cuda.refits:
        ends = {engine[graph][name].layer.split(".attn")[-1] for name in names}  # type: ignore[index]
        # Queries of self-attention are joined with keys and values; those of cross-attention stand alone.
        assert ends == {"1.to_q", "1.to_k", "1.to_v", "1.to_out.0", "2.to_q", "2.to_out.0"}


def test_a_plan_that_is_opened_later_has_the_adapters_as_well(
    export: Path, backend: TrtBackend, adapters: tuple[Path, Path]
) -> None:
    use = lora_use(str(adapters[0]))
    backend._plans.pop(("unet_decoder", SIZE))
    backend.use_loras([use])
    assert distance(drawn(backend), fused_latents(export, use)) <= 1e-4


def test_after_a_failed_refit_the_next_one_gives_everything_anew(
    backend: TrtBackend, adapters: tuple[Path, Path], cuda: fake_tensorrt.State
) -> None:
    bare = drawn(backend)
    cuda.fail_refit = 1
    with pytest.raises(DeviceError, match=r"cannot be refitted: it refuses the new weights: .*Internal Error"):
        backend.use_loras([lora_use(str(adapters[0]))])
    backend.use_loras(())
    np.testing.assert_array_equal(drawn(backend), bare)
    assert {name: len(names) for name, names in cuda.refits[-3:]} == {
        plan.graph: len(plan.refit) for plan in backend.engine.plans if plan.refit
    }


def test_an_adapter_of_another_model_changes_nothing(
    backend: TrtBackend, tiny_student_folder: Path, tmp_path: Path, cuda: fake_tensorrt.State
) -> None:
    other = load_components(tiny_student_folder)
    path = write_lora(tmp_path / "other.safetensors", draw_factors(other.unet, ends=("to_q",)))
    bare = drawn(backend)
    with pytest.raises(AdapterError, match=r"other\.safetensors"):
        backend.use_loras([lora_use(str(path))])
    np.testing.assert_array_equal(drawn(backend), bare)
    assert not cuda.refits


def test_layers_that_are_set_for_good_are_refused_by_name(
    built: Path, cuda: fake_tensorrt.State, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "small"))
    manifest = next(folder.glob("*/engine.json"))
    engine = read_engine_manifest(manifest.parent)
    plans = tuple(
        plan.model_copy(update={"refit": tuple(w for w in plan.refit if not w.layer.endswith("to_out.0"))})
        for plan in engine.plans
    )
    manifest.write_text(engine.model_copy(update={"plans": plans}).model_dump_json(), encoding="utf-8")
    with TrtBackend(folder) as backend:
        bare = drawn(backend)
        with pytest.raises(AdapterError, match=r"set for good in unet_encoder.plan of this engine: .*to_out\.0"):
            backend.use_loras([lora_use(str(adapters[1]))])
        np.testing.assert_array_equal(drawn(backend), bare)


def test_an_engine_that_does_not_take_its_new_weights_is_not_written(
    small: Path, cuda: fake_tensorrt.State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export_copy(small, tmp_path / "small", precision="fp32", sizes=(SIZE,), check=False)
    monkeypatch.setattr(fake_tensorrt.Refitter, "refit_cuda_engine", lambda self: True)
    with pytest.raises(ParityError, match="refitted with other weights"):
        build_engine(EngineConfig(folder, refit=True))
    assert not list(folder.glob("*/engine.json"))


def test_engines_with_and_without_refit_are_not_taken_for_each_other(
    export: Path, adapters: tuple[Path, Path], cuda: fake_tensorrt.State
) -> None:
    assert build_engine(EngineConfig(export, refit=True)).reused
    fixed = build_engine(EngineConfig(export, check=False))
    assert not fixed.reused and not fixed.manifest.takes_loras
    assert "refit-individual" not in fixed.manifest.build_flags
    with pytest.raises(UsageError, match="this engine takes no LoRA"):
        tiue.load(export, backend="trt", loras=[adapters[1]])
    with TrtBackend(export) as backend, pytest.raises(UsageError, match="takes no LoRA"):
        backend.use_loras([lora_use(str(adapters[1]))])


def test_refit_is_refused_with_an_adapter_for_good_and_in_8_bits() -> None:
    config = ExportConfig("student", loras=("ink.safetensors",))
    with pytest.raises(UsageError, match="adds one for good"):
        EngineRequest(refit=True).fit(config, precision=None)
    with pytest.raises(UsageError, match="for fp16 and fp32"):
        EngineRequest(refit=True).fit(ExportConfig("student"), precision="int8")


def test_adapters_are_switched_from_python_and_restored(
    export: Path, adapters: tuple[Path, Path], cuda: fake_tensorrt.State
) -> None:
    with tiue.load(export, backend="trt") as pipe:
        bare = pipe("a red heart", seed=3, output="latents")[0]
        wide, few = pipe.load_lora(adapters[0]), pipe.load_lora(adapters[1], weight=0.5)
        both = pipe("a red heart", seed=3, output="latents")[0]
        pipe.set_adapters([few])
        one = pipe("a red heart", seed=3, output="latents")[0]
        pipe.set_adapters([wide, few])
        np.testing.assert_array_equal(pipe("a red heart", seed=3, output="latents")[0], both)
        pipe.unload_lora()
        np.testing.assert_array_equal(pipe("a red heart", seed=3, output="latents")[0], bare)
    assert distance(one, bare) > 1e-3 and distance(both, one) > 1e-3


def test_a_server_switches_adapters_by_batch(
    export: Path, adapters: tuple[Path, Path], cuda: fake_tensorrt.State
) -> None:
    with tiue.load(export, backend="trt", loras=[f"{adapters[1]}:0.5"]) as pipe:
        expected = pipe("a star", seed=4, output="numpy")[0]
    engine = Engine(GenerateConfig(model=str(export), backend="trt"), lora_dir=adapters[0].parent)
    engine.load()
    asked = [Request("a star", seed=4, loras=engine.loras.resolve(names)) for names in (["few:0.5"], [], ["few:0.5"])]
    jobs = engine.check(asked, model=engine.name)
    assert len({batch_key(job) for job in jobs}) == 2
    pixels = [engine.draw([job])[0].pixels for job in jobs]
    engine.close()
    np.testing.assert_array_equal(pixels[0], expected)
    np.testing.assert_array_equal(pixels[2], expected)
    assert not np.array_equal(pixels[1], expected)


def test_rows_with_adapters_of_their_own_are_drawn_in_one_run(
    export: Path, adapters: tuple[Path, Path], cuda: fake_tensorrt.State, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = ['{"prompt": "a star", "seed": 1}', f'{{"prompt": "a star", "seed": 1, "lora": "{adapters[1]}:0.5"}}']
    prompts.write_text("\n".join(rows), encoding="utf-8")
    out = tmp_path / "out"
    engine = ["--model", str(export), "--backend", "trt"]
    assert main(["generate", "--prompts", str(prompts), *engine, "--out", str(out)]) == 0
    records = [read_record(out / name) for name in ("a-star-1.png", "a-star-1-2.png")]
    assert [[use.weight for use in record.loras] for record in records] == [[], [0.5]]  # type: ignore[union-attr]
    single = tmp_path / "one.png"
    options = ["--seed", "1", "--lora", f"{adapters[1]}:0.5", "--out", str(single)]
    assert main(["generate", "a star", *engine, *options]) == 0
    assert single.read_bytes() == (out / "a-star-1-2.png").read_bytes()
