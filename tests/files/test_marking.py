"""Every generated file says that a machine made it, and other tools read who, what and how from it."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tiue_cli.files.png import ImageRecord, encode_picture, read_record, save_png

SOURCE_TYPE = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
PIXELS = np.random.Generator(np.random.Philox(key=1)).integers(0, 256, (16, 24, 3), dtype=np.uint8)
RECORD = ImageRecord(
    prompt="a red heart, left of\na blue house: über ☾",
    seed=2**40,
    size=(16, 24),
    kind="student",
    steps=4,
    model="papercut",
    model_id="0123456789abcdef" * 2,
    backend="torch",
    device="cpu",
    dtype="fp32",
    tiue_version="0.2.0",
)


def marked(xmp: str | bytes) -> str | None:
    """The source type that an XMP packet states, read by an XML parser."""
    text = xmp.decode() if isinstance(xmp, bytes) else xmp
    root = ET.fromstring(text[text.index("<x:xmpmeta") : text.index("</x:xmpmeta>") + len("</x:xmpmeta>")])
    return next((found for node in root.iter() if (found := node.get(SOURCE_TYPE))), None)


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("record", [RECORD, None])
def test_every_file_says_that_it_is_machine_made(image_format: str, record: ImageRecord | None) -> None:
    buffer = io.BytesIO()
    encode_picture(buffer, PIXELS, record, image_format=image_format)  # type: ignore[arg-type]
    with Image.open(buffer) as image:
        xmp = image.info["XML:com.adobe.xmp"] if image_format == "png" else image.info["xmp"]
        assert marked(xmp) == "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    assert (b"heart" in buffer.getvalue().replace(b"\0", b"")) is (record is not None)


def test_the_mark_changes_no_pixel(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", PIXELS, RECORD)
    with Image.open(tmp_path / "a.png") as image:
        assert (np.asarray(image) == PIXELS).all()
    assert read_record(tmp_path / "a.png") == RECORD


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_sd_parsers_reads_prompt_and_settings(image_format: str, tmp_path: Path) -> None:
    sd_parsers = pytest.importorskip("sd_parsers")
    path = tmp_path / f"a.{image_format}"
    with path.open("wb") as file:
        encode_picture(file, PIXELS, RECORD, image_format=image_format)  # type: ignore[arg-type]
    info = sd_parsers.ParserManager().parse(path)
    assert info is not None
    assert [prompt.value for prompt in info.prompts] == [RECORD.prompt]
    sampler = info.samplers[0]
    assert (sampler.parameters["seed"], sampler.parameters["steps"]) in {(2**40, 4), (str(2**40), "4")}
    assert [model.name for model in info.models] == ["papercut"]
