"""The README leads nowhere that does not exist, and no place that was meant to be filled is empty."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_is_short_and_has_one_test_command() -> None:
    assert len(README.splitlines()) <= 200
    assert README.count("<!-- test-command -->") == 1
    assert len(re.findall(r"^python -m pip install .+ && python -m pytest$", README, re.MULTILINE)) == 1


def test_nothing_is_left_to_be_filled_in() -> None:
    assert re.findall(r"@@\w+@@|TODO|TBD", README) == []


def test_every_link_to_a_file_leads_somewhere() -> None:
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", README) if "://" not in target]
    assert targets
    assert [target for target in targets if target and not (ROOT / target).exists()] == []
