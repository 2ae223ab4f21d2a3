"""One server with a tiny export in ONNX Runtime for all tests that only ask it things."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export that draws 32 x 32 pixels in a millisecond, at K 1 to 4."""
    from tiny_export import write_tiny_export

    folder = tmp_path_factory.mktemp("exports") / "tiny"
    write_tiny_export(folder, precision="fp32")
    return folder


@pytest.fixture(scope="session")
def server(tiny_export: Path) -> Iterator[object]:
    """A running server; shared, so leave it as it is."""
    from serving import running_server

    with running_server(tiny_export) as running:
        yield running
