"""A disk of a few bytes, to be full."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(place: Path, *, size_bytes: int) -> Iterator[Path]:
    """A mounted tmpfs of ``size_bytes``; skips the test where this process may not mount."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small disk needs root")
    disk = place / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("this system lets nobody mount")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)
