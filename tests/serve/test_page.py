"""The page in a real browser: it draws while one types, says what it drew, and never complains."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Running, running_server

from tiue_cli.files.png import read_record

playwright_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def papercut() -> Iterator[Running]:
    with running_server("papercut") as running:
        yield running


@pytest.fixture(params=["desktop", "phone"])
def page(request: pytest.FixtureRequest, papercut: Running) -> Iterator[Any]:
    """The page, open; fails the test for anything on its console."""
    said: list[str] = []
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        size = {"width": 1280, "height": 900} if request.param == "desktop" else {"width": 390, "height": 844}
        context = browser.new_context(viewport=size, has_touch=request.param == "phone")
        opened = context.new_page()
        opened.set_default_timeout(60_000)
        opened.on("console", lambda message: said.append(message.text))
        opened.on("pageerror", lambda error: said.append(str(error)))
        opened.on("request", lambda asked: said.append(asked.url) if papercut.url not in asked.url[:60] else None)
        opened.goto(papercut.url)
        opened.wait_for_selector(".tile img")
        yield opened
        browser.close()
    assert [line for line in said if not line.startswith(("blob:", "data:"))] == []


def first_picture(page: Any) -> str:
    """The first picture on the sheet, as a data URL."""
    shown: str = page.evaluate(
        """() => { const image = document.querySelector('.tile img'), canvas = document.createElement('canvas');
        canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
        canvas.getContext('2d').drawImage(image, 0, 0); return canvas.toDataURL(); }"""
    )
    return shown


def test_the_picture_changes_as_one_types(page: Any) -> None:
    before = first_picture(page)
    page.fill("#prompt", "")
    page.type("#prompt", "a red heart under the sea")
    page.wait_for_selector('.tile[aria-label="a red heart under the sea, seed 0"] img')
    after = first_picture(page)
    assert base64.b64decode(after.partition(",")[2])[:4] == b"\x89PNG" and after != before
    status = page.text_content("#status")
    assert "K = 4" in status and "model" in status and " ms" in status and "seeds from 0" in status
    width = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert width <= 0, "nothing sticks out sideways"


def test_a_hostile_prompt_is_text(page: Any) -> None:
    hostile = "<img src=x onerror=console.log('run')><b>a</b>"
    page.fill("#prompt", hostile)
    page.wait_for_function("text => document.querySelector('.tile').ariaLabel.startsWith(text)", arg=hostile)
    page.click(".tile >> nth=0")
    assert hostile in page.text_content("#large-title")
    assert page.query_selector("#large-title b") is None


def test_keys_seeds_steps_and_the_download(page: Any, tmp_path: Path) -> None:
    page.press("#prompt", "Enter")
    page.wait_for_selector('.tile[aria-label$="seed 8"]')
    page.focus("#steps")
    page.keyboard.press("[")
    page.wait_for_selector("text=K = 3")
    page.focus(".tile >> nth=1")
    page.keyboard.press("Enter")
    with page.expect_download() as download:
        page.click("#download")
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    record = read_record(path)
    assert record is not None and record.record == "image"
    assert (record.seed, record.steps, record.prompt, record.model) == (
        9,
        3,
        "a yellow star above a green tree",
        "papercut",
    )
    assert path.name == "a-yellow-star-above-a-green-tree-9.png"
    page.keyboard.press("Escape")
    assert not page.evaluate("document.getElementById('large').open")


def test_the_teacher_beside_the_student(page: Any) -> None:
    page.evaluate("document.getElementById('count').value = 1")
    page.check("#teacher")
    page.wait_for_selector("text=teacher, 25 steps")
    assert page.locator(".tile img").count() == 2
