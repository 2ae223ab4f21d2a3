"""Files for containers: they parse, and name only metrics that the server has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tiue_cli.serve.metrics import Metrics

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    board = json.loads((DEPLOY / "grafana" / "tiue.json").read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked = set(re.findall(r"tiue_\w+", " ".join(expressions)))
    metrics = Metrics()
    metrics.observe_batch(1, 0.1)
    metrics.observe_stage("png", 0.1)
    metrics.requests.labels("ok").inc()
    there = set(re.findall(r"^(tiue_\w+)", metrics.text().decode(), re.MULTILINE))
    assert asked and asked <= there


def test_the_dockerfile_has_no_finding_of_hadolint() -> None:
    found = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip("hadolint is not installed: its wheel is for Linux x86-64")
    done = subprocess.run([found, "--no-color", DEPLOY / "Dockerfile"], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout
    bad = subprocess.run([found, "-"], input="FROM python\nRUN cd /src\n", capture_output=True, encoding="utf-8")
    assert bad.returncode != 0, "the linter finds nothing in a bad file"


def test_the_dockerfile_names_files_and_variants_that_exist() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert set(re.findall(r"^FROM \S+ AS (\w+)", text, re.MULTILINE)) == {"export", "cpu", "cuda"}
    asked = re.findall(r"-r /(requirements/\S+)", text)
    assert len(asked) == 4 and all((ROOT / name).is_file() for name in asked)
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not {"requirements", "tiue_cli", "README.md", "engines"} & set(ignored) and "!engines/profiles" in ignored


def test_the_compose_file_publishes_on_loopback_only() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert set(services) == {"tiue", "prometheus", "grafana"}
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service["ports"])
    for name in (
        "prometheus.yml",
        *(f"grafana/provisioning/{kind}.yaml" for kind in ("datasources/prometheus", "dashboards/tiue")),
    ):
        assert yaml.safe_load((DEPLOY / name).read_text())
