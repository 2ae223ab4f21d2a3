"""schemathesis asks what the OpenAPI document allows, and what it does not: never a 5xx, always the documented form."""

from __future__ import annotations

import pytest
from serving import Running

schemathesis = pytest.importorskip("schemathesis")
pytestmark = pytest.mark.schemathesis


@pytest.fixture(scope="module")
def api_schema(server: Running) -> object:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


schema = schemathesis.pytest.from_fixture("api_schema")


@schema.parametrize()
def test_every_answer_is_documented_and_none_is_a_crash(case) -> None:  # type: ignore[no-untyped-def]
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    case.call_and_validate(checks=checks, timeout=60)
