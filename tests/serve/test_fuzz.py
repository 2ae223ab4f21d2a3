"""schemathesis asks what the OpenAPI document allows and what it does not: no crash, always the documented form."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from serving import Running

pytestmark = pytest.mark.schemathesis
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def test_every_answer_is_documented_and_none_is_a_crash(server: Running) -> None:
    pytest.importorskip("schemathesis")
    words = ["run", f"{server.url}/openapi.json", "--checks", CHECKS, "--max-examples", "60", "--seed", "1"]
    program = Path(sys.executable).with_name("schemathesis")
    done = subprocess.run([str(program), *words], capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "test cases" in done.stdout or "cases" in done.stdout
    assert not [line for line in server.lines if "error" in line], server.lines
