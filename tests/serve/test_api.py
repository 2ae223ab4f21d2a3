"""What clients see: OpenAI's API, A1111's, failures, and the very pixels of ``tiue generate``."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import socket
import threading
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from serving import Running, running_server, wait_for

from tiue_cli.errors import OutOfMemoryError
from tiue_cli.files.png import read_record
from tiue_cli.generate.config import GenerateConfig
from tiue_cli.generate.prompts import rows_from_arguments
from tiue_cli.generate.session import Session
from tiue_cli.serve.engine import Engine

GENERATIONS = "/v1/images/generations"


def pixels(data: str | bytes) -> np.ndarray:
    raw = base64.b64decode(data) if isinstance(data, str) else data
    with Image.open(io.BytesIO(raw)) as image:
        return np.asarray(image.convert("RGB"))


def generated(model: Path, prompt: str, seed: int, out: Path, *, steps: int | None = None) -> np.ndarray:
    """What ``tiue generate PROMPT --seed SEED`` writes."""
    config = GenerateConfig(model=str(model), seed=seed, out=out / f"{seed}-{steps}.png", steps=steps)
    with Session(config) as session:
        (made,) = session.run(session.plan(rows_from_arguments([prompt])))
        assert made.path is not None
        return np.asarray(Image.open(made.path))


def error_of(response: httpx.Response) -> dict[str, str]:
    error: dict[str, str] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


# --- OpenAI --------------------------------------------------------------------------------------------------------


def test_the_official_openai_client(server: Running, tiny_export: Path, tmp_path: Path) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    (model,) = client.models.list().data
    assert model.id == "tiny"
    answer = client.images.generate(prompt="a red star", n=2, model=model.id, size="32x32", extra_body={"seed": 7})
    for offset, image in enumerate(answer.data):
        assert (pixels(image.b64_json) == generated(tiny_export, "a red star", 7 + offset, tmp_path)).all()
    assert (answer.data[1].seed, answer.model, answer.size, answer.steps) == (8, "tiny", "32x32", 4)
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt="a red star", size="33x32")
    assert refused.value.type == "invalid_request_error" and "33" in refused.value.message
    with pytest.raises(openai.NotFoundError) as unknown:
        client.images.generate(prompt="a red star", model="gpt-image-1")
    assert unknown.value.code == "model_not_found" and "tiny" in unknown.value.message


def test_a_png_says_what_it_is_and_not_where_the_model_lies(server: Running, tmp_path: Path) -> None:
    answer = httpx.post(f"{server.url}{GENERATIONS}", json={"prompt": " a tree ", "seed": 3, "steps": 2}).json()
    (tmp_path / "a.png").write_bytes(base64.b64decode(answer["data"][0]["b64_json"]))
    record = read_record(tmp_path / "a.png")
    assert record is not None and record.record == "image"
    assert (record.prompt, record.seed, record.steps, record.model) == ("a tree", 3, 2, "tiny")


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_url_answers_can_be_fetched_without_a_key_and_are_of_the_format(server: Running, output_format: str) -> None:
    body = {"prompt": "a tree", "response_format": "url", "output_format": output_format, "output_compression": 80}
    answer = httpx.post(f"{server.url}{GENERATIONS}", json=body).json()
    fetched = httpx.get(answer["data"][0]["url"])
    assert fetched.headers["content-type"] == f"image/{output_format}"
    with Image.open(io.BytesIO(fetched.content)) as image:
        assert (image.format, image.size) == (output_format.upper(), (32, 32))
    assert error_of(httpx.get(f"{server.url}/images/nothing.png"))["code"] == "image_not_found"


def test_width_comes_first_and_seed_zero_is_a_seed(server: Running) -> None:
    answer = httpx.post(f"{server.url}{GENERATIONS}", json={"prompt": "a", "size": "48x32", "seed": 0}).json()
    assert pixels(answer["data"][0]["b64_json"]).shape == (32, 48, 3)
    assert (answer["seed"], answer["size"]) == (0, "48x32")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "  "}, "prompt"),
        ({"prompt": "a\0b"}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "x" * 4001}, "prompt"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": "a", "n": 11}, "n"),
        ({"prompt": "a", "seed": -1}, "seed"),
        ({"prompt": "a", "seed": 2**63}, "seed"),
        ({"prompt": "a", "seed": 2**63 - 1, "n": 2}, "seed"),
        ({"prompt": "a", "seed": 1.5}, "seed"),
        ({"prompt": "a", "size": "32"}, "size"),
        ({"prompt": "a", "size": "99999x99999"}, "size"),
        ({"prompt": "a", "size": "4096x4096"}, "size"),
        ({"prompt": "a", "steps": 9}, "steps"),
        ({"prompt": "a", "steps": 2, "num_inference_steps": 3}, None),
        ({"prompt": "a", "steps": 9, "size": "4096x4096"}, None),
        ({"prompt": "a", "output_format": "gif"}, "output_format"),
        ([], None),
    ],
)
def test_a_field_that_cannot_be_is_named(server: Running, body: object, param: str | None) -> None:
    response = httpx.post(f"{server.url}{GENERATIONS}", json=body)
    assert response.status_code == 400
    assert error_of(response)["param"] == param


def test_bodies_that_are_none(server: Running) -> None:
    url, header = f"{server.url}{GENERATIONS}", {"content-type": "application/json"}
    assert httpx.post(url, content="{", headers=header).status_code == 400
    assert httpx.post(url, content=b"\xff", headers=header).status_code == 400
    assert httpx.post(url, content="[" * 60_000, headers=header).status_code == 400
    assert httpx.post(url, data={"prompt": "a"}).status_code == 415
    large = json.dumps({"prompt": "a", "user": "x" * 70_000})
    assert error_of(httpx.post(url, content=large, headers=header))["code"] == "body_too_large"
    assert httpx.post(url, content=iter([large.encode()]), headers=header).status_code == 413  # of unknown length
    assert httpx.get(url).status_code == 405
    assert error_of(httpx.get(f"{server.url}/v1/nothing"))["type"] == "not_found_error"


# --- A1111 ---------------------------------------------------------------------------------------------------------


def test_txt2img_as_front_ends_send_it(server: Running, tiny_export: Path, tmp_path: Path) -> None:
    body = {"prompt": "a blue house", "seed": 11, "steps": 20, "width": 32, "height": 32, "batch_size": 1, "n_iter": 2}
    more = {"negative_prompt": "", "cfg_scale": 7, "sampler_name": "Euler a", "override_settings": {}}
    answer = httpx.post(f"{server.url}/sdapi/v1/txt2img", json={**body, **more}).json()
    info = json.loads(answer["info"])
    assert info["all_seeds"] == [11, 12] and info["steps"] == 4
    for image, seed in zip(answer["images"], info["all_seeds"], strict=True):
        assert (pixels(image) == generated(tiny_export, "a blue house", seed, tmp_path)).all()
    random_seeds = [
        json.loads(httpx.post(f"{server.url}/sdapi/v1/txt2img", json={"prompt": "a", "seed": -1}).json()["info"])[
            "seed"
        ]
        for _ in range(2)
    ]
    assert random_seeds[0] != random_seeds[1]
    assert httpx.get(f"{server.url}/sdapi/v1/sd-models").json()[0]["model_name"] == "tiny"


# --- batches -------------------------------------------------------------------------------------------------------


THINGS = [(color, thing) for color in ("red", "blue", "yellow", "green") for thing in ("heart", "star", "fish")]
WORDS = ("a red star", "a blue house", "a tree", "a red tree above a house")


async def ask_all(url: str, asked: list[tuple[str, int, int]]) -> list[httpx.Response]:
    """All (prompt, seed, K) at once, over 64 connections."""
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=64), timeout=120) as client:

        async def ask(prompt: str, seed: int, steps: int) -> httpx.Response:
            return await client.post(url + GENERATIONS, json={"prompt": prompt, "seed": seed, "steps": steps})

        return await asyncio.gather(*(ask(*one) for one in asked))


def differences(answers: list[httpx.Response], asked: list[tuple[str, int, int]], model: Path, out: Path) -> list[int]:
    """The largest difference of each answer to what ``tiue generate`` draws alone, in levels of 255."""
    found = []
    for (prompt, seed, steps), answer in zip(asked, answers, strict=True):
        drawn = pixels(answer.json()["data"][0]["b64_json"]).astype(int)
        found.append(int(np.abs(drawn - generated(model, prompt, seed, out, steps=steps)).max()))
    return found


@pytest.mark.slow
def test_under_load_whoever_shares_a_batch_changes_nothing(tiny_export: Path, tmp_path: Path) -> None:
    """Mixed prompts, seeds and K at once: each image is what ``tiue generate`` draws alone, to a rounding.

    Matrix products round by the shape of the batch, so where a value lies on the edge of two levels it may take
    either; a wrong prompt or seed would differ by dozens.
    """
    asked = [(random.Random(i).choice(WORDS), i, 1 + i % 2) for i in range(200)]
    with running_server(tiny_export) as server:
        answers = asyncio.run(ask_all(server.url, asked))
        text = httpx.get(f"{server.url}/metrics").text
    assert [answer.status_code for answer in answers] == [200] * len(asked)
    largest = max(answer.json()["timings"]["batch"] for answer in answers)
    assert largest >= 4, "the load was meant to share batches"
    assert max(differences(answers[::5], asked[::5], tiny_export, tmp_path)) <= 1
    assert differences(answers[:1], [(WORDS[1], 999, 1)], tiny_export, tmp_path)[0] > 1, "the check can fail"
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(figures['tiue_requests_total{outcome="ok"}']) == 200
    assert float(figures["tiue_batch_size_sum"]) == 201  # with the first image
    assert float(figures["tiue_images_total"]) == 200
    batches = float(figures["tiue_batch_size_count"])
    for stage in ("text_encoder", "unet_encoder", "unet_decoder", "vae_decoder"):
        assert float(figures[f'tiue_stage_seconds_count{{stage="{stage}"}}']) == batches
    assert float(figures['tiue_stage_seconds_count{stage="png"}']) == 200
    parts_s = sum(float(value) for name, value in figures.items() if name.startswith('tiue_stage_seconds_sum{stage="u'))
    assert 0 < parts_s < float(figures["tiue_batch_seconds_sum"])
    assert 'tiue_model_info{backend="onnx",k="4",model="tiny",precision="fp32"}' in figures


@pytest.mark.load  # papercut's export under load
def test_papercut_in_onnx_runtime_has_the_very_pixels_of_generate_under_load(tmp_path: Path) -> None:
    from exports import exported

    from tiue_cli.model.hub import EMBEDDED, resolve_model

    export = exported(resolve_model(EMBEDDED))
    asked = [(f"a {color} {thing}", seed, 4) for seed, (color, thing) in enumerate(THINGS * 4)]
    with running_server(export) as server:
        answers = asyncio.run(ask_all(server.url, asked))
    assert max(answer.json()["timings"]["batch"] for answer in answers) >= 4
    assert set(differences(answers, asked, export, tmp_path)) == {0}


class SlowEngine(Engine):
    """Waits before each batch until it may, and then does what ``outcome`` says."""

    def __init__(self, config: GenerateConfig) -> None:
        super().__init__(config)
        self.may = threading.Event()
        self.may.set()
        self.started = 0
        self.outcome: list[Exception] = []

    def draw(self, jobs):  # type: ignore[no-untyped-def]
        self.started += 1
        assert self.may.wait(30)
        if self.outcome:
            raise self.outcome.pop()
        return super().draw(jobs)


def test_a_client_that_goes_away_frees_its_place(tiny_export: Path) -> None:
    engine = SlowEngine(GenerateConfig(model=str(tiny_export)))
    with running_server(tiny_export, engine=engine, max_queue=2, max_images=2) as server:
        engine.may.clear()
        body = json.dumps({"prompt": "a", "n": 2}).encode()
        host, port = server.url.removeprefix("http://").split(":")
        head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        sent = head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body
        before = engine.started
        with (
            socket.create_connection((host, int(port))) as first,
            socket.create_connection((host, int(port))) as second,
        ):
            first.sendall(sent)
            wait_for(lambda: engine.started == before + 1, "the first batch runs")
            second.sendall(sent)
            wait_for(lambda: server.service.batcher.queued == 2, "two wait")
            refused = httpx.post(f"{server.url}{GENERATIONS}", json={"prompt": "a"})
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            assert error_of(refused)["type"] == "rate_limit_error"
        wait_for(lambda: server.service.batcher.queued == 0, "the places are free")
        engine.may.set()
        assert httpx.post(f"{server.url}{GENERATIONS}", json={"prompt": "a"}).status_code == 200
        assert 'outcome="gone"} 2.0' in httpx.get(f"{server.url}/metrics").text


def test_memory_and_other_failures_are_answers_and_work_goes_on(tiny_export: Path) -> None:
    engine = SlowEngine(GenerateConfig(model=str(tiny_export)))
    with running_server(tiny_export, engine=engine) as server:
        url, body = f"{server.url}{GENERATIONS}", {"prompt": "SECRET heart", "n": 4}
        engine.outcome = [OutOfMemoryError("SECRET of /home/x is full")]
        full = httpx.post(url, json=body)
        assert full.status_code == 507 and error_of(full)["code"] == "out_of_memory"
        engine.outcome = [ValueError("SECRET in /home/x")]
        broken = httpx.post(url, json=body)
        assert broken.status_code == 500 and error_of(broken)["type"] == "server_error"
        again = httpx.post(url, json=body).json()
        assert again["timings"]["batch"] == 2, "half of the batch that did not fit"
        assert "SECRET" not in full.text + broken.text + " ".join(server.lines)
        assert any("ValueError" in line for line in server.lines)


def test_a_request_that_takes_too_long_is_a_504(tiny_export: Path) -> None:
    engine = SlowEngine(GenerateConfig(model=str(tiny_export)))
    with running_server(tiny_export, engine=engine, timeout_s=0.3) as server:
        engine.may.clear()
        late = httpx.post(f"{server.url}{GENERATIONS}", json={"prompt": "a"})
        engine.may.set()
        assert late.status_code == 504 and error_of(late)["code"] == "timeout"


def test_torch_draws_the_pixels_of_generate_to_a_rounding(tiny_student_folder: Path, tmp_path: Path) -> None:
    """torch's convolutions round by the size of the batch, so one level of 255 is what may differ."""
    with running_server(tiny_student_folder) as server:
        answer = httpx.post(f"{server.url}{GENERATIONS}", json={"prompt": "a red star", "seed": 1, "n": 3}).json()
    for image in answer["data"]:
        own = generated(tiny_student_folder, "a red star", image["seed"], tmp_path)
        assert np.abs(pixels(image["b64_json"]).astype(int) - own.astype(int)).max() <= 1
