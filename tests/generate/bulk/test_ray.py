"""Bulk on a local Ray cluster of two nodes: the shards of one process, whatever dies meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from bulk_jobs import data_files, job, prompts_file, run

pytestmark = pytest.mark.ray
ray = pytest.importorskip("ray")


def is_writer(process: psutil.Process) -> bool:
    """Whether it is one of the actors; Ray names its workers after what they do."""
    try:
        return "ShardWriter" in " ".join(process.cmdline())
    except psutil.Error:
        return False


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    cluster.second = cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_shards_equal_those_of_one_process_though_a_worker_and_a_node_die(
    cluster: Any, tiny_export: Path, tmp_path: Path
) -> None:
    prompts = prompts_file(tmp_path / "p.txt", 2000)
    run(job(tiny_export, prompts, tmp_path / "one", shard=20))
    out = tmp_path / "ray"
    killed: list[str] = []

    def when(shards: int, then: Callable[[], None]) -> None:
        while len(list(out.glob("*_stats.json"))) < shards:
            time.sleep(0.01)
        then()

    def kill_a_worker() -> None:
        workers = [child for child in psutil.Process().children(recursive=True) if is_writer(child)]
        workers[0].kill()
        killed.append("worker")

    def kill_a_node() -> None:
        cluster.remove_node(cluster.second, allow_graceful=False)
        killed.append("node")

    threads = [
        threading.Thread(target=when, args=(10, kill_a_worker), daemon=True),
        threading.Thread(target=when, args=(40, kill_a_node), daemon=True),
    ]
    for thread in threads:
        thread.start()
    totals = run(job(tiny_export, prompts, out, shard=20, launch="ray"))
    for thread in threads:
        thread.join(10)
    assert sorted(killed) == ["node", "worker"] and totals["images"] == 2000
    assert data_files(out) == data_files(tmp_path / "one")


def test_a_driver_that_is_killed_goes_on_where_its_shards_end(cluster: Any, tiny_export: Path, tmp_path: Path) -> None:
    prompts = prompts_file(tmp_path / "p.txt", 3000)
    run(job(tiny_export, prompts, tmp_path / "one", shard=20))
    out = tmp_path / "ray"
    words = ["generate", "--model", str(tiny_export), "--prompts", str(prompts), "--out", str(out), "--seed", "100"]
    command = [sys.executable, "-m", "tiue_cli", *words, "--shards", "20", "--launch", "ray"]
    environment = {**os.environ, "RAY_ADDRESS": cluster.address}
    driver = subprocess.Popen(command, env=environment)
    while len(list(out.glob("*_stats.json"))) < 5:
        assert driver.poll() is None, "the driver ended"
        time.sleep(0.01)
    driver.kill()
    driver.wait()
    there = len(list(out.glob("*_stats.json")))
    assert there < 150, "the job was too quick to be killed"
    subprocess.run(command, env=environment, check=True)
    assert data_files(out) == data_files(tmp_path / "one")
