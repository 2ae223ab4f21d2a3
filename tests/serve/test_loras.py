"""LoRAs over HTTP: those in the folder, by name; the pictures that the command draws; nothing about where they lie."""

from __future__ import annotations

import base64
from pathlib import Path

import httpx
import numpy as np
import pytest
from lora_files import draw_factors, write_lora, write_tensors
from serving import Running, running_server

import tiue_cli as tiue
from tiue_cli.errors import AdapterError, UsageError
from tiue_cli.files.png import ImageRecord, read_pixels, read_record
from tiue_cli.serve.loras import LoraShelf


@pytest.fixture(scope="module")
def shelf(tiny_teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import UNet2DConditionModel

    unet, folder = UNet2DConditionModel.from_pretrained(tiny_teacher_folder / "unet"), tmp_path_factory.mktemp("shelf")
    write_lora(folder / "ink.safetensors", draw_factors(unet))
    write_lora(folder / "paper" / "pytorch_lora_weights.safetensors", draw_factors(unet, seed=500))
    (folder / "notes.txt").write_text("not a LoRA")
    return folder


@pytest.fixture(scope="module")
def server(tiny_student_folder: Path, shelf: Path) -> Running:
    with running_server(tiny_student_folder, lora_dir=shelf) as running:
        yield running


def ask(server: Running, **body: object) -> httpx.Response:
    url = f"{server.url}/v1/images/generations"
    return httpx.post(url, json={"prompt": "a red star", "seed": 3, **body}, timeout=60)


def test_a_request_names_its_loras(server: Running, shelf: Path, tiny_student_folder: Path, tmp_path: Path) -> None:
    asked = ["ink:0.5", "paper"]
    answer = ask(server, lora=asked).json()
    path = tmp_path / "a.png"
    path.write_bytes(base64.b64decode(answer["data"][0]["b64_json"]))
    record = read_record(path)
    assert isinstance(record, ImageRecord)
    assert [(use.source, use.weight) for use in record.loras] == [("ink", 0.5), ("paper", 1.0)]
    with tiue.load(tiny_student_folder, device="cpu", loras=[f"{shelf / 'ink.safetensors'}:0.5", shelf / "paper"]) as p:
        expected = p("a red star", seed=3, output="numpy")[0]
    assert np.array_equal(read_pixels(path), expected)
    bare = ask(server).json()["data"][0]["b64_json"]
    assert ask(server, lora="ink").json()["data"][0]["b64_json"] not in (bare, answer["data"][0]["b64_json"])
    assert ask(server, lora=[]).json()["data"][0]["b64_json"] == bare


def test_the_model_list_says_which_there_are(server: Running) -> None:
    assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["loras"] == ["ink", "paper"]


@pytest.mark.parametrize("name", ["nothing", "../shelf/ink", "ink.safetensors", "/etc/passwd", "notes", "ink:nan"])
def test_only_names_on_the_shelf_are_served(server: Running, shelf: Path, name: str) -> None:
    response = ask(server, lora=name)
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert "ink, paper" in message or "not a weight" in message
    assert str(shelf.parent) not in message


def test_a_shelf_is_checked_before_it_is_served(tmp_path: Path) -> None:
    import torch

    with pytest.raises(AdapterError, match="not a folder"):
        LoraShelf(tmp_path / "none")
    write_tensors(tmp_path / "a.safetensors", {"x.hada_w1_a": torch.ones(1)})
    with pytest.raises(AdapterError, match="is LoHa"):
        LoraShelf(tmp_path)
    with pytest.raises(UsageError, match="there is: none"):
        LoraShelf(None).resolve(["a"])
