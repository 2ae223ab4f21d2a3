"""The routes.

| route | what |
|---|---|
| ``POST /v1/images/generations``, ``GET /v1/models`` | OpenAI's |
| ``POST /sdapi/v1/txt2img`` and what front ends ask before it | A1111's |
| ``GET /images/NAME`` | what ``response_format: url`` points to |
| ``/healthz`` ``/readyz`` ``/metrics`` ``/docs`` ``/openapi.json`` | for operators |
| ``/`` | the page |
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pydantic
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from tiue_cli import __version__
from tiue_cli.errors import TiueError
from tiue_cli.serve.config import ServeConfig
from tiue_cli.serve.docs import FAILURES, docs_page, without_422
from tiue_cli.serve.engine import Engine
from tiue_cli.serve.failures import RequestFailure, failure_response, json_response
from tiue_cli.serve.page_files import page_response
from tiue_cli.serve.schemas import (
    ImagesAnswer,
    ImagesRequest,
    ModelsAnswer,
    Txt2ImgAnswer,
    Txt2ImgRequest,
    infotext,
    validation_failure,
    wxh,
)
from tiue_cli.serve.security import Guard
from tiue_cli.serve.service import ClientGone, Order, Picture, Service

_CLOSED = Response(status_code=499)
"""nginx's "client closed request": nobody reads it."""


def create_app(
    engine: Engine, config: ServeConfig, *, keys: tuple[bytes, ...] = (), log: Callable[[str], None]
) -> tuple[ASGIApp, Service]:
    """The ASGI application, with all its layers, and the service behind it, which starts and stops with it."""
    service = Service(engine, config, log=log)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.create_task(_start(service, log))
        yield
        await starting
        await service.drain()

    app = FastAPI(title="tiue", version=__version__, docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    _add_openai(app, service)
    _add_a1111(app, service)
    _add_operations(app, service)
    app.add_exception_handler(HTTPException, _http_failure)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(RequestFailure, _failure)
    app.add_exception_handler(Exception, _fault)
    guarded: ASGIApp = Guard(app, config=config, keys=keys, log=log)
    if config.cors:
        guarded = CORSMiddleware(
            guarded,
            allow_origins=config.cors,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
    return guarded, service


async def _start(service: Service, log: Callable[[str], None]) -> None:
    started_s = time.perf_counter()
    try:
        await service.start()
    except TiueError as error:
        service.failed = error.message
        log(f"the model cannot be served: {error.message}")
        return
    log(f"ready after {time.perf_counter() - started_s:.1f} s: {', '.join(service.engine.models)}")


# --- OpenAI --------------------------------------------------------------------------------------------------------


def _add_openai(app: FastAPI, service: Service) -> None:
    @app.post("/v1/images/generations", summary="Draw images, as OpenAI's API does", **_answers(ImagesAnswer))
    async def generations(asked: ImagesRequest, request: Request) -> Response:
        output_format = asked.output_format or "png"
        order = Order(
            prompt=asked.prompt,
            model=asked.model,
            count=1 if asked.n is None else asked.n,
            size=asked.pixels,
            steps=asked.wanted_steps,
            seed=asked.seed,
            output_format=output_format,
            quality=asked.output_compression,
            loras=asked.loras,
        )
        pictures = await _draw(request, service, order)
        if pictures is None:
            return _CLOSED
        first = pictures[0]
        data = []
        for picture in pictures:
            if asked.response_format == "url":
                name = service.store.put(picture.data, output_format=output_format)
                place = {"url": f"{str(request.base_url).rstrip('/')}/images/{name}"}
            else:
                place = {"b64_json": base64.b64encode(picture.data).decode("ascii")}
            data.append({**place, "seed": picture.record.seed})
        return json_response(
            {
                "created": int(time.time()),
                "data": data,
                "model": first.record.model,
                "size": wxh(first.record.size),
                "steps": first.record.steps,
                "seed": first.record.seed,
                "output_format": output_format,
                "timings": {
                    "queue_ms": round(max(picture.queue_ms for picture in pictures), 2),
                    "model_ms": round(max(picture.model_ms for picture in pictures), 2),
                    "batch": max(picture.batch for picture in pictures),
                },
            }
        )

    @app.get("/v1/models", summary="The models that are served", **_answers(ModelsAnswer))
    async def models() -> Response:
        data = [
            {"id": name, "object": "model", "created": 0, "owned_by": "tiue", **_model_facts(service, name)}
            for name in service.engine.models
        ]
        return json_response({"object": "list", "data": data})

    @app.get("/images/{name}", summary="An image that response_format url named", **_answers(None))
    async def image(name: str) -> Response:
        found = service.store.get(name)
        if found is None:
            raise RequestFailure(404, "this image is not kept, or not any more", code="image_not_found")
        data, media_type = found
        return Response(data, media_type=media_type, headers={"Cache-Control": "private, max-age=600"})


def _model_facts(service: Service, name: str) -> dict[str, Any]:
    """What the page and careful clients want to know about a model."""
    engine = service.engine
    if name != engine.name:
        return {"kind": "teacher"}
    return {
        "loras": list(engine.loras.names),
        "kind": engine.kind,
        "size": wxh(engine.default_size),
        "steps": engine.default_steps,
        "step_choices": list(engine.step_choices),
        "max_images": service.config.max_images,
    }


# --- A1111 ---------------------------------------------------------------------------------------------------------


def _add_a1111(app: FastAPI, service: Service) -> None:
    @app.post("/sdapi/v1/txt2img", summary="Draw images, as A1111's API does", **_answers(Txt2ImgAnswer))
    async def txt2img(asked: Txt2ImgRequest, request: Request) -> Response:
        choices = service.engine.step_choices
        height, width = service.engine.default_size
        order = Order(
            prompt=asked.prompt,
            model=None,
            count=asked.count,
            size=(asked.height or height, asked.width or width),
            # Front ends always send a sampler's steps; a student has few, and others mean its own.
            steps=asked.steps if not choices or asked.steps in choices else None,
            seed=None if asked.seed == -1 else asked.seed,
        )
        pictures = await _draw(request, service, order)
        if pictures is None:
            return _CLOSED
        return json_response(
            {
                "images": [base64.b64encode(picture.data).decode("ascii") for picture in pictures],
                "parameters": asked.model_dump(),
                "info": json.dumps(infotext([picture.record for picture in pictures])),
            }
        )

    @app.get("/sdapi/v1/options", summary="What A1111's front ends ask first", **_answers(None))
    async def options() -> Response:
        return json_response({"sd_model_checkpoint": service.engine.name, "samples_format": "png"})

    @app.get("/sdapi/v1/sd-models", summary="What A1111's front ends ask first", **_answers(None))
    async def sd_models() -> Response:
        name, model_id = service.engine.name, service.engine.target.model_id
        entry = {"title": name, "model_name": name, "hash": model_id[:10], "sha256": None, "filename": name}
        return json_response([{**entry, "config": None}])

    @app.get("/sdapi/v1/samplers", summary="What A1111's front ends ask first", **_answers(None))
    async def samplers() -> Response:
        return json_response([{"name": "TiUE one pass", "aliases": [], "options": {}}])


# --- for operators -------------------------------------------------------------------------------------------------


def _add_operations(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", summary="Whether the process lives", **_answers(None))
    async def healthz() -> Response:
        return json_response({"status": "ok"})

    @app.get("/readyz", summary="Whether the first image has been drawn (503 until then)", **_answers(None))
    async def readyz() -> Response:
        if service.ready:
            return json_response({"status": "ready"})
        status = "draining" if service.draining else "loading" if service.failed is None else "failed"
        return json_response({"status": status}, status=503)

    @app.get("/metrics", summary="Figures for Prometheus", **_answers(None))
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @functools.cache
    def document() -> dict[str, Any]:
        return without_422(app.openapi())

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return json_response(document())

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return Response(docs_page(document()), media_type="text/html; charset=utf-8")

    async def page(request: Request) -> Response:
        return page_response(request.url.path)

    for path in ("/", "/page.css", "/page.js", "/icon.svg"):
        app.add_api_route(path, page, methods=["GET"], include_in_schema=False)


# --- what routes share ---------------------------------------------------------------------------------------------


def _answers(model: type[pydantic.BaseModel] | None) -> dict[str, Any]:
    """What a route's documentation says of its answers; routes build their responses themselves, which is faster."""
    return {
        "response_model": model,
        "responses": FAILURES,
        "response_class": Response if model is None else JSONResponse,
    }


async def _draw(request: Request, service: Service, order: Order) -> list[Picture] | None:
    """The pictures, None where the client went away meanwhile. Raises RequestFailure."""
    gone = asyncio.get_running_loop().create_task(_until_gone(request))
    try:
        return await service.draw(order, gone=gone)
    except ClientGone:
        return None
    finally:
        gone.cancel()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _failure(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestFailure)
    return failure_response(error)


async def _fault(request: Request, error: Exception) -> Response:
    # Starlette raises the error again afterwards; the guard around the application logs its kind and place.
    return failure_response(RequestFailure(500, "something went wrong inside the server", code="internal_error"))


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return failure_response(validation_failure(error.errors()))


async def _http_failure(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {404: "there is nothing at this path", 405: "this path takes another method"}.get(
        error.status_code, "the request cannot be answered"
    )
    headers = dict(error.headers or {})
    return failure_response(RequestFailure(error.status_code, message, code="not_found", headers=headers))
