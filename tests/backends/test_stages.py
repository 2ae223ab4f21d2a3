"""Stages tell their time to who listens in this thread, and to nobody else."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from tiny_export import write_tiny_export

from tiue_cli.backends.onnx_backend import OnnxBackend
from tiue_cli.backends.stages import listening, timed_stage
from tiue_cli.files.exports import GRAPHS
from tiue_cli.model.noise import draw_noise


def test_a_pass_of_an_export_tells_its_four_stages_in_order(tmp_path: Path) -> None:
    write_tiny_export(tmp_path, precision="fp32")
    told: list[tuple[str, float]] = []
    with OnnxBackend(tmp_path) as backend:
        noise = draw_noise([1, 2], backend.latent_shape(backend.default_size))
        with listening(lambda stage, seconds: told.append((stage, seconds))):
            heard = backend.generate(["a star", "a tree"], noise)
        unheard = backend.generate(["a star", "a tree"], noise)
    assert [stage for stage, _ in told] == list(GRAPHS) and all(seconds > 0 for _, seconds in told)
    assert np.array_equal(heard, unheard)


def test_another_thread_is_not_listened_to_and_a_failed_stage_is_not_told() -> None:
    told: list[str] = []

    def elsewhere() -> None:
        with timed_stage("vae_decoder"):
            pass

    with listening(lambda stage, seconds: told.append(stage)):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        with pytest.raises(ZeroDivisionError), timed_stage("unet_decoder"):
            raise ZeroDivisionError
        assert told == []
        with timed_stage("text_encoder"):
            pass
    assert told == ["text_encoder"]
