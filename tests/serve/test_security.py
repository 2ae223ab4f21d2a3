"""Keys, hosts, headers, and that nothing of a prompt reaches where it does not belong."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from serving import Running, running_server

from tiue_cli.errors import UsageError
from tiue_cli.serve.config import ServeConfig
from tiue_cli.serve.security import read_keys

KEY, OTHER = "0123456789abcdef-one", "0123456789abcdef-two"
GENERATIONS = "/v1/images/generations"


def test_another_host_needs_keys_or_a_word() -> None:
    for host in ("0.0.0.0", "192.168.1.5", "example.org", "::"):
        with pytest.raises(UsageError, match="other machines"):
            ServeConfig(host=host).validate()
        ServeConfig(host=host, no_auth=True).validate()
        ServeConfig(host=host, api_key_file=Path("keys")).validate()
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        ServeConfig(host=host).validate()
    for origin in ("*", "app.example.org", "https://app.example.org/path"):
        with pytest.raises(UsageError, match="origin"):
            ServeConfig(cors=(origin,)).validate()


@pytest.mark.parametrize(("text", "wrong"), [("", "no key"), ("# none\n\n", "no key"), ("short\n", "shorter")])
def test_files_without_usable_keys_are_refused(tmp_path: Path, text: str, wrong: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(UsageError, match=wrong) as refused:
        read_keys(tmp_path / "keys")
    assert "short" not in refused.value.message.replace("shorter", "")


def test_a_key_opens_and_nothing_else_does(tiny_export: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"# two\n{KEY}\n{OTHER}\n")
    with running_server(tiny_export, keys=read_keys(tmp_path / "keys")) as server:
        url = f"{server.url}{GENERATIONS}"

        def status(authorization: str | None, path: str = url) -> int:
            headers = {} if authorization is None else {"authorization": authorization}
            if path == url:
                return httpx.post(url, json={"prompt": "a"}, headers=headers).status_code
            return httpx.get(path, headers=headers).status_code

        for wrong in (None, "", "Bearer", "Bearer x", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Basic !", KEY):
            assert status(wrong) == 401, wrong
        basic = base64.b64encode(f"user:{OTHER}".encode()).decode()
        for right in (f"Bearer {KEY}", f"bearer {OTHER}", f"Basic {basic}"):
            assert status(right) == 200, right
        for path in ("/v1/models", "/metrics", "/sdapi/v1/sd-models"):
            assert status(None, server.url + path) == 401, path
        for path in ("/", "/healthz", "/readyz", "/docs", "/openapi.json", "/page.js"):
            assert status(None, server.url + path) == 200, path
        assert KEY not in " ".join(server.lines)
        answer = httpx.post(url, json={"prompt": "a"})
        assert answer.json()["error"]["type"] == "authentication_error" and "www-authenticate" in answer.headers


def test_an_open_server_does_not_answer_to_names_that_point_here(server: Running) -> None:
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""):
        assert httpx.get(f"{server.url}/v1/models", headers={"host": host}).status_code == 403, host
    for host in ("localhost:80", "127.0.0.1", "[::1]:8000"):
        assert httpx.get(f"{server.url}/v1/models", headers={"host": host}).status_code == 200, host


def test_other_origins_only_where_they_were_named(server: Running, tiny_export: Path) -> None:
    ask = {"origin": "https://app.example.org", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in httpx.options(f"{server.url}{GENERATIONS}", headers=ask).headers
    with running_server(tiny_export, cors=("https://app.example.org",)) as open_server:
        url = f"{open_server.url}{GENERATIONS}"
        assert httpx.options(url, headers=ask).headers["access-control-allow-origin"] == ask["origin"]
        evil = httpx.options(url, headers={**ask, "origin": "https://evil.example"})
        assert "access-control-allow-origin" not in evil.headers


def test_the_page_may_load_from_here_only_and_loads_from_here_only(server: Running) -> None:
    page = httpx.get(f"{server.url}/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    for path in ("/", "/docs"):
        html = httpx.get(server.url + path).text
        assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=|(src|href)=\"(https?:)?//", html), path
    assert "http" not in httpx.get(f"{server.url}/page.css").text
    assert page.headers["x-content-type-options"] == "nosniff"


def test_a_prompt_stays_out_of_logs_headers_and_failures(server: Running) -> None:
    marker = "<script>alert('tiue-marker')</script>\r\nX-Injected: 1"
    before = len(server.lines)
    for body in ({"prompt": marker}, {"prompt": marker, "size": "7x7"}, {"prompt": [marker]}, {marker: marker}):
        answer = httpx.post(f"{server.url}{GENERATIONS}", json=body)
        assert "tiue-marker" not in str(answer.headers) and "x-injected" not in answer.headers
        if answer.status_code != 200:
            assert "tiue-marker" not in answer.text
    assert "tiue-marker" not in httpx.get(f"{server.url}/{marker.split()[0]}?q=tiue-marker").text
    assert "tiue-marker" not in httpx.get(f"{server.url}/metrics").text
    assert "tiue-marker" not in " ".join(server.lines[before:])


def test_importing_the_command_line_loads_no_web_framework() -> None:
    code = "import sys, tiue_cli.cli.app; print(sorted({'fastapi', 'uvicorn', 'starlette'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.strip() == "[]"
