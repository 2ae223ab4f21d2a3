"""The page at ``/docs``, made from the OpenAPI document on this machine.

FastAPI's own page fetches its JavaScript from elsewhere, which the content security policy forbids.
"""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel


class ErrorBody(BaseModel):
    """What went wrong: in words, by kind, in which field, and in a word for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """OpenAI's form of an error."""

    error: ErrorBody


FAILURES: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": ErrorAnswer, "description": text}
    for status, text in {
        400: "A field that cannot be; param names it",
        401: "No key, or an unknown one",
        403: "A host name that this server does not answer to",
        404: "An unknown model or path",
        405: "Another method is needed",
        408: "The body did not come in time",
        413: "The body is too large",
        415: "Not JSON",
        429: "The queue is full; see Retry-After",
        500: "A fault inside",
        503: "Not ready, or shutting down",
        504: "It took too long",
        507: "The memory of the device did not suffice",
    }.items()
}


def without_422(document: dict[str, Any]) -> dict[str, Any]:
    """FastAPI's document without the answer that it adds to every route: here a wrong field is a 400."""
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)
    return document


def docs_page(document: dict[str, Any]) -> str:
    """The OpenAPI document as one HTML page without a script."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("tiue_cli.serve", "page"), autoescape=True)
    return environment.get_template("docs.html.j2").render(document=document, type_of=_type_text)


def _type_text(schema: dict[str, Any]) -> str:
    """A field's type in words: ``string``, ``integer 0 – 100``, ``"png" | "jpeg"``."""
    if "anyOf" in schema:
        return " | ".join(_type_text(part) for part in schema["anyOf"] if part.get("type") != "null")
    if "enum" in schema:
        return " | ".join(f'"{value}"' for value in schema["enum"])
    text = str(schema.get("type", "value"))
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is None:
        return text
    # JSON Schema's limits come as floats, which do not hold the largest seed.
    return f"{text} from {int(low)}" if high is None or high > 2**53 else f"{text} {int(low)} – {int(high)}"
