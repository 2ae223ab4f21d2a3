"""A tiny export, as the server's tests have it."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export that draws 32 x 32 pixels in a millisecond, at K 1 to 4."""
    from tiny_export import write_tiny_export

    folder = tmp_path_factory.mktemp("exports") / "tiny"
    write_tiny_export(folder, precision="fp32")
    return folder
