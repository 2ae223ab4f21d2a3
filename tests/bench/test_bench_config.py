"""What the command line may ask a bench for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tiue_cli.bench.config import BenchConfig, PeerSpec, parse_backends, parse_numbers, parse_peer
from tiue_cli.errors import UsageError


@pytest.mark.parametrize(
    ("text", "peer"),
    [
        ("turbo=stabilityai/sd-turbo:1:0", PeerSpec("turbo", "stabilityai/sd-turbo", 1, 0.0)),
        ("lcm=models/lcm:4", PeerSpec("lcm", "models/lcm", 4)),
        ("a=C:/models/a:4:1.5", PeerSpec("a", "C:/models/a", 4, 1.5)),
        ("a=C:/models/a:4", PeerSpec("a", "C:/models/a", 4)),
    ],
)
def test_peer_is_name_source_steps_guidance(text: str, peer: PeerSpec) -> None:
    assert parse_peer(text) == peer


@pytest.mark.parametrize("text", ["", "turbo", "turbo=x", "=x:4", "turbo=x:0", "turbo=x:4:-1", "a b=x:4", "turbo=:4"])
def test_malformed_peer_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--peer"):
        parse_peer(text)


@pytest.mark.parametrize("text", [f"a=x:{'9' * 5000}", f"a=x:4:{'9' * 400}"])
def test_numbers_of_a_peer_that_python_cannot_read_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--peer"):
        parse_peer(text)


def test_numbers_are_read_in_order() -> None:
    assert parse_numbers("16, 1,4", "--batch") == (16, 1, 4)


@pytest.mark.parametrize("text", ["", "1,", "a", "1.5", "0", "-1", "4,4", "²", "1000000"])
def test_malformed_numbers_are_refused_by_their_option(text: str) -> None:
    with pytest.raises(UsageError, match="--batch"):
        parse_numbers(text, "--batch")


def test_unknown_backend_is_refused_with_the_known_ones() -> None:
    assert parse_backends("onnx,torch") == ("onnx", "torch")
    with pytest.raises(UsageError, match="tflite") as caught:
        parse_backends("torch,tflite")
    assert "torch, compile, onnx, trt" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ()}, "no model"),
        ({"models": ("a", "a")}, "named twice"),
        ({"models": ("sd15",)}, "--random-weights"),
        ({"models": ("sdxl",), "random_weights": True}, "not sdxl"),
        ({"models": ("sd15",), "random_weights": True, "teacher": "x"}, "--teacher"),
        ({"models": ("sd15",), "random_weights": True, "quality": True}, "no quality"),
        ({"batches": (1, 1000)}, "--batch 1000"),
        ({"duration_s": 0.0}, "--duration"),
        ({"duration_s": float("nan")}, "--duration"),
        ({"guidance": -1.0}, "--guidance"),
        ({"threads": 0}, "--threads"),
        ({"reference": Path("x")}, "--reference"),
        ({"images": 1}, "--images"),
        ({"peers": (PeerSpec("a", "x", 1), PeerSpec("a", "y", 1))}, "--peer"),
    ],
)
def test_a_request_that_makes_no_sense_is_one_error_with_a_hint(options: dict[str, Any], message: str) -> None:
    config = BenchConfig(**{"models": ("papercut",), **options})
    with pytest.raises(UsageError) as caught:
        config.validate()
    assert message in str(caught.value)
    assert caught.value.hint


def test_possible_requests_are_taken() -> None:
    BenchConfig(models=("papercut",)).validate()
    BenchConfig(models=("sd15", "papercut"), random_weights=True, teacher="none").validate()


def test_a_folder_called_like_a_shape_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sd15").mkdir()
    BenchConfig(models=("sd15",)).validate()
