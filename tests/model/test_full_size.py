"""Stable Diffusion 1.5's real configuration, end to end, with random weights. Two minutes and 2.1 GB of disk:

TIUE_SLOW=1 python -m pytest -m slow tests/model/test_full_size.py
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from helpers import build_full_size_folder, seeded_noise

from tiue_cli.model.folder import check_model_folder
from tiue_cli.model.teacher import load_teacher

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("TIUE_SLOW" not in os.environ, reason="takes minutes and 2.1 GB; set TIUE_SLOW=1"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_full_size_folder(tmp_path_factory.mktemp("full") / "sd15")


def test_the_folder_has_the_published_sizes(folder: Path) -> None:
    info = check_model_folder(folder)
    counts = {component.name: component.parameters for component in info.components}
    assert counts == {"text_encoder": 123_060_480, "unet": 859_520_964, "vae": 83_653_863}
    assert (info.image_size, info.factor, info.text_tokens) == ((512, 512), 8, 77)
    assert {dtype for component in info.components for dtype in component.dtypes} == {"F16"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory as Linux counts it")
def test_an_image_of_512_pixels_fits_into_24_gib(folder: Path) -> None:
    import resource

    teacher = load_teacher(folder, dtype=torch.float32)
    images = teacher.sample(["a red star"], seeded_noise((1, 4, 64, 64)), steps=1)
    assert images.shape == (1, 512, 512, 3)
    assert images.std() > 1
    peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert peak_bytes < 24 * 2**30
    print(f"peak {peak_bytes / 2**30:.1f} GiB")  # noqa: T201 - shown with -s
