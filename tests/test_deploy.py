"""Files for containers: they parse, and name only metrics that the server has."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from tiue_cli.serve.metrics import Metrics

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"


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


def test_the_compose_file_publishes_on_loopback_only() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert set(services) == {"tiue", "prometheus", "grafana"}
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service["ports"])
    for name in (
        "prometheus.yml",
        *(f"grafana/provisioning/{kind}.yaml" for kind in ("datasources/prometheus", "dashboards/tiue")),
    ):
        assert yaml.safe_load((DEPLOY / name).read_text())
