"""Code in the documentation runs as it is written."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from exports import build_small_student, exported
from PIL import Image
from tiny_export import write_tiny_export

from tiue_cli.cli.app import main

ROOT = Path(__file__).resolve().parents[2]


def code_block(page: str, name: str) -> str:
    """The code that stands under ``<!-- test: NAME -->`` on a page of ``docs/``."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.findall(rf"^<!-- test: {name} -->\n```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(found) == 1, f"{page} has {len(found)} blocks named {name}"
    return found[0]


@pytest.fixture(params=["by hand", pytest.param("traced", marks=pytest.mark.slow)])
def workplace(request: pytest.FixtureRequest, tiny_student_folder: Path, tmp_path: Path) -> Path:
    """A folder with ``engines/papercut``: not papercut itself, but as good an export."""
    engine = tmp_path / "engines" / "papercut"
    if request.param == "by hand":
        write_tiny_export(engine, precision="fp32")
    else:
        shutil.copytree(exported(build_small_student(tiny_student_folder, tmp_path / "student")), engine)
    return tmp_path


def test_the_four_graphs_by_hand_draw_what_tiue_draws(workplace: Path) -> None:
    code = code_block("deploy.md", "deploy")
    assert not {"tiue_cli", "torch"} & set(re.findall(r"\w+", code)), "the block must stand without tiue and torch"
    assert len([line for line in code.splitlines() if line and not line.startswith("#")]) < 40
    subprocess.run([sys.executable, "-c", code], cwd=workplace, check=True)
    for number, prompt in enumerate(("a red heart at night", "a blue fish under the sea")):
        wanted = workplace / f"wanted-{number}.png"
        words = [prompt, "--seed", str(number), "--model", str(workplace / "engines" / "papercut")]
        assert main(["generate", *words, "--out", str(wanted), "--format", "quiet"]) == 0
        drawn, expected = (np.asarray(Image.open(path), dtype=int) for path in (workplace / f"{number}.png", wanted))
        # The batch is another one here, and convolutions of another batch may round differently.
        assert np.abs(drawn - expected).max() <= 1 and drawn.std() > 1
