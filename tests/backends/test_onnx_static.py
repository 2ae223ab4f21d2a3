"""Runs at fixed shapes in memory that stays: equal to plain runs, on the CPU provider for real; recording by a stand-in
that has the rules of ONNX Runtime's CUDA graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from tiny_export import CHANNELS, TOKENS, write_tiny_export

from tiue_cli.backends import onnx_backend, onnx_session
from tiue_cli.backends.onnx_backend import OnnxBackend
from tiue_cli.backends.onnx_session import CudaOptions, Provider, open_session, read_cuda_options, run_session
from tiue_cli.backends.onnx_static import StaticRuns
from tiue_cli.errors import DeviceError, UsageError
from tiue_cli.model.noise import draw_noise

CPU = Provider("cpu")
PROMPTS = ["a red heart", "a yellow star", "a blue house"]


class Recording:
    """A session with CUDA graphs' rules: an id belongs to one binding, and what was recorded is what is repeated."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.graphs: dict[str, Any] = {}
        self.released: list[int] = []
        self.plain_runs = 0
        self.refusal: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any, options: Any = None) -> None:
        number = options.get_run_config_entry("gpu_graph_id")
        if number == "-1":
            self.plain_runs += 1
        elif self.refusal is not None:
            raise RuntimeError(self.refusal)
        else:
            assert self.graphs.setdefault(number, binding) is binding, "a graph's binding was exchanged"
        self._session.run_with_iobinding(self.graphs.get(number, binding), options)

    def release_captured_graph(self, number: int) -> None:
        del self.graphs[str(number)]
        self.released.append(number)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    write_tiny_export(tmp_path / "tiny")
    return tmp_path / "tiny"


def session(folder: Path, name: str) -> ort.InferenceSession:
    return open_session(folder / f"{name}.onnx", CPU)


def ids(batch: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 8, (batch, TOKENS))


def noise(batch: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, CHANNELS, 8, 8), dtype=np.float32)


def test_static_runs_equal_plain_ones_in_every_order_of_shapes(tiny: Path) -> None:
    text, encoder = session(tiny, "text_encoder"), session(tiny, "unet_encoder")
    static_text = StaticRuns(text, CPU, name="text_encoder.onnx", held=2)
    static_encoder = StaticRuns(encoder, CPU, name="unet_encoder.onnx", held=2)
    for seed, batch in enumerate((1, 1, 2, 1, 2, 3, 3, 1, 2)):
        tokens, drawn = {"input_ids": ids(batch, seed)}, noise(batch, seed)
        states = run_session(text, tokens, CPU)
        expected = run_session(encoder, {"noise": drawn, **states}, CPU)
        # What one graph's binding holds is bound as it is in the next one's.
        found = static_encoder({"noise": drawn, **static_text(tokens)})
        assert found.keys() == expected.keys()
        for name, value in found.items():
            np.testing.assert_array_equal(value.numpy(), expected[name].numpy(), err_msg=f"{name}, {batch}")
    assert static_text.problem is None and static_encoder.problem is None


def test_outputs_of_a_shape_stay_where_they_are(tiny: Path) -> None:
    runs = StaticRuns(session(tiny, "text_encoder"), CPU, name="text_encoder.onnx")
    places = {runs({"input_ids": ids(2, seed)})["text_states"].data_ptr() for seed in range(4)}
    assert len(places) == 1


def test_the_first_run_of_a_shape_is_plain_and_later_ones_are_recorded_once(tiny: Path) -> None:
    recording = Recording(session(tiny, "text_encoder"))
    runs = StaticRuns(recording, CPU, name="text_encoder.onnx")  # type: ignore[arg-type]
    for seed, batch in enumerate((1, 1, 2, 1, 2)):
        tokens = {"input_ids": ids(batch, seed)}
        expected = run_session(recording._session, tokens, CPU)["text_states"].numpy()
        np.testing.assert_array_equal(runs(tokens)["text_states"].numpy(), expected)
    assert recording.plain_runs == 2 and set(recording.graphs) == {"1", "2"}


def test_a_shape_that_makes_way_gives_its_graph_back(tiny: Path) -> None:
    recording = Recording(session(tiny, "text_encoder"))
    runs = StaticRuns(recording, Provider("cpu"), name="text_encoder.onnx", held=2)  # type: ignore[arg-type]
    runs._provider = Provider("cuda")
    runs._make = lambda inputs, make=runs._make: _on_cpu(runs, make, inputs)  # type: ignore[method-assign]
    for batch in (1, 1, 2, 2, 3, 3, 1):
        runs({"input_ids": ids(batch, batch)})
    assert recording.released == [1, 2]
    runs({"input_ids": ids(1, 1)})
    runs.close()
    assert recording.released == [1, 2, 3, 4] and not recording.graphs


def _on_cpu(runs: StaticRuns, make: Any, inputs: Any) -> Any:
    runs._provider = CPU
    try:
        return make(inputs)
    finally:
        runs._provider = Provider("cuda")


def test_a_run_that_cannot_be_recorded_stays_plain_and_says_why(tiny: Path) -> None:
    recording = Recording(session(tiny, "text_encoder"))
    recording.refusal = "operation not permitted when stream is capturing"
    runs = StaticRuns(recording, CPU, name="text_encoder.onnx")  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        patch.setattr(state, "RuntimeException", RuntimeError)
        for seed in range(3):
            tokens = {"input_ids": ids(2, seed)}
            expected = run_session(recording._session, tokens, CPU)["text_states"].numpy()
            np.testing.assert_array_equal(runs(tokens)["text_states"].numpy(), expected)
    assert runs.problem is not None and "stream is capturing" in runs.problem
    assert recording.plain_runs == 3


def test_the_backend_draws_the_same_with_static_runs(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with OnnxBackend(tiny, provider="cpu") as backend:
        shape = backend.latent_shape(backend.default_size)
        wanted = {
            (batch, steps): backend.generate(PROMPTS[:batch], draw_noise(range(batch), shape), steps=steps)
            for batch in (1, 3)
            for steps in (1, 4)
        }
    monkeypatch.setattr(
        onnx_backend, "choose_provider", lambda asked, cuda: Provider("cpu", cuda=CudaOptions(graphs=True))
    )
    with OnnxBackend(tiny) as backend:
        for _ in range(3):
            for (batch, steps), images in wanted.items():
                found = backend.generate(PROMPTS[:batch], draw_noise(range(batch), shape), steps=steps)
                assert np.array_equal(found, images), (batch, steps)
        assert len(backend._static) == 4 and all(runs.recorded > 0 for runs in backend._static)
        assert not any("CUDA graph" in note for note in backend.notes)


def test_a_graph_that_cannot_be_captured_at_all_is_opened_plainly(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        onnx_backend, "choose_provider", lambda asked, cuda: Provider("cpu", cuda=CudaOptions(graphs=True))
    )

    def refusing(path: Path, provider: Provider, *, graphs: bool = False, **options: Any) -> Any:
        if graphs and path.name == "unet_decoder.onnx":
            raise DeviceError("not all nodes are on the CUDA execution provider")
        return open_session(path, provider, graphs=graphs, **options)

    monkeypatch.setattr(onnx_backend, "open_session", refusing)
    with OnnxBackend(tiny) as backend:
        drawn = draw_noise([0], backend.latent_shape(backend.default_size))
        first = backend.generate(PROMPTS[:1], drawn)
        assert np.array_equal(first, backend.generate(PROMPTS[:1], drawn))
        assert any("unet_decoder.onnx runs without a CUDA graph" in note for note in backend.notes)


# --- options -------------------------------------------------------------------------------------------------------


def test_options_are_read_from_words() -> None:
    assert read_cuda_options("") == CudaOptions()
    wanted = CudaOptions(nhwc=True, search=True, graphs=True, memory_bytes=3 * 2**29)
    assert read_cuda_options(" graphs, memory=1.5,nhwc,search") == wanted
    with pytest.raises(UsageError, match="TIUE_ORT_CUDA: fast is not known") as caught:
        read_cuda_options("nhwc,fast")
    assert "memory=GIB" in str(caught.value)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", {"cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"}),
        ("search,nhwc", {"cudnn_conv_algo_search": "EXHAUSTIVE", "prefer_nhwc": "1", "use_tf32": "0"}),
        ("memory=2", {"gpu_mem_limit": str(2**31), "arena_extend_strategy": "kSameAsRequested"}),
        ("graphs", {"enable_cuda_graph": "1"}),
    ],
)
def test_what_onnx_runtime_is_told(
    words: str, told: dict[str, str], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def spy(path: Path, options: Any, *, providers: list[Any]) -> None:
        seen.append(dict(providers[0][1]))
        raise DeviceError("no session", hint="none is needed")

    monkeypatch.setattr(ort, "InferenceSession", spy)
    monkeypatch.setenv("TIUE_ORT_CUDA", words)
    monkeypatch.setattr(onnx_session, "provider_problem", lambda name: None)
    backend = OnnxBackend(tiny, provider="cuda")
    with pytest.raises(DeviceError, match="no session"), backend:
        pass
    assert told.items() <= seen[0].items()
    for name in {"prefer_nhwc", "enable_cuda_graph", "gpu_mem_limit"} - told.keys():
        assert name not in seen[0], "the careful default"


def test_what_others_open_is_never_recorded() -> None:
    """Checks of an export run each shape once, by ``run_session``, which must not record."""
    provider = Provider("cuda", cuda=CudaOptions(graphs=True))
    assert "enable_cuda_graph" not in onnx_session._options(provider)
