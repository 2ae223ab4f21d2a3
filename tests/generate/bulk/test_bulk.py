"""Bulk jobs: what the shards hold, that they are the same bytes whoever writes them, and that a kill costs nothing."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from safetensors.numpy import save_file

from tiue_cli.cli.bulk import with_shard_size
from tiue_cli.errors import OutputError, PromptError, UsageError
from tiue_cli.files.hashes import sha256_file
from tiue_cli.files.png import LoraUse
from tiue_cli.generate.bulk import rows
from tiue_cli.generate.bulk import run as run_module
from tiue_cli.generate.bulk.config import BulkConfig, digest
from tiue_cli.generate.bulk.rows import BadRow, estimated_rows, read_rows
from tiue_cli.generate.bulk.run import BulkProgress, run_bulk
from tiue_cli.generate.bulk.shards import ShardStats, ShardTask, _request, shard_identity, shard_tasks
from tiue_cli.generate.config import GenerateConfig
from tiue_cli.generate.prompts import PromptRow

parquet = pytest.importorskip("pyarrow.parquet")
import pyarrow  # noqa: E402
from bulk_jobs import data_files, job, prompts_file, run  # noqa: E402
from permissions import open_folder, unprivileged  # noqa: E402


def members(out: Path) -> dict[str, bytes]:
    """Everything in the tars, read by tarfile."""
    found: dict[str, bytes] = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                data = tar.extractfile(member)
                assert data is not None and member.name not in found
                found[member.name] = data.read()
    return found


def test_the_layout_that_other_tools_read(tiny_export: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    totals = run(job(tiny_export, prompts_file(tmp_path / "p.txt", 25), tmp_path / "out", shard=10))
    out = tmp_path / "out"
    assert sorted(file.name for file in out.glob("0*")) == [
        f"{number:05d}{end}" for number in range(3) for end in (".parquet", ".tar", "_stats.json")
    ]
    rows = [row for file in sorted(out.glob("*.parquet")) for row in parquet.read_table(file).to_pylist()]
    assert [row["id"] for row in rows] == list(range(25)) and [row["seed"] for row in rows] == list(range(100, 125))
    samples = [s for tar in sorted(out.glob("*.tar")) for s in webdataset.WebDataset(str(tar), shardshuffle=False)]
    assert [sample["__key__"] for sample in samples] == [f"{number:09d}" for number in range(25)]
    for row, sample in zip(rows, samples, strict=True):
        assert sample["txt"].decode() == row["prompt"] == json.loads(sample["json"])["prompt"]
        assert hashlib.sha256(sample["png"]).hexdigest() == row["sha256"]
    assert (totals["images"], totals["failed_rows"]) == (25, 0)
    assert totals["tars"]["00002.tar"] == sha256_file(out / "00002.tar")


def test_a_shard_holds_the_images_of_generate(tiny_export: Path, tmp_path: Path) -> None:
    from tiue_cli.generate.prompts import read_prompts
    from tiue_cli.generate.session import Session

    prompts = prompts_file(tmp_path / "p.txt", 6)
    run(job(tiny_export, prompts, tmp_path / "out", shard=6, images=2, steps=2))
    found = members(tmp_path / "out")
    config = GenerateConfig(model=str(tiny_export), seed=100, images=2, steps=2, out=tmp_path / "single")
    with Session(config) as session:
        made = list(session.run(session.plan(read_prompts(prompts))))
    assert len(made) == 12
    for image in made:
        assert image.path is not None
        shard = np.asarray(Image.open(io.BytesIO(found[f"{image.index:09d}.png"]))).astype(int)
        assert np.abs(shard - np.asarray(Image.open(image.path)).astype(int)).max() <= 1


def test_rows_of_every_kind_of_file_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = [
        {"prompt": "a star, red", "seed": 5, "size": "32x48", "steps": 2},
        {"prompt": 'a "tree"', "seed": None, "size": None, "steps": None},
        {"prompt": "ein Häuschen\u2028", "seed": 0, "size": "64", "steps": None},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in fields), encoding="utf-8")
    parquet.write_table(pyarrow.Table.from_pylist([{**row, "more": 1} for row in fields]), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text(
        'more,prompt,seed,size,steps\n1,"a star, red",5,32x48,2\n2,"a ""tree""",,,\n3,ein Häuschen\u2028,0,64,\n',
        encoding="utf-8",
    )

    def of(source: Path | str) -> list[tuple[object, ...]]:
        rows = list(read_rows(str(source)))
        assert all(isinstance(row, PromptRow) for row in rows), rows
        return [(row.prompt, row.seed, row.size, row.steps) for row in rows if isinstance(row, PromptRow)]

    expected = of(tmp_path / "a.jsonl")
    assert expected[0] == ("a star, red", 5, (32, 48), 2) and expected[2][1:3] == (0, (64, 64))
    assert of(tmp_path / "a.parquet") == of(tmp_path / "a.csv") == expected
    (tmp_path / "b.txt").write_text("# a comment\na star\n\n", encoding="utf-8")
    assert of(tmp_path) == expected * 3 + [("a star", None, None, None)]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((tmp_path / "a.jsonl").read_bytes())))
    assert of("-") == expected


def test_cells_and_folders_that_break_readers_are_rows_and_errors_of_ours(tmp_path: Path) -> None:
    (tmp_path / "n.csv").write_text(f"prompt,seed\na star,{'9' * 5000}\na star,7\n")
    bad, good = read_rows(str(tmp_path / "n.csv"))
    assert isinstance(bad, BadRow) and "seed" in bad.reason and len(bad.reason) < 300
    assert isinstance(good, PromptRow) and good.seed == 7
    below = tmp_path / "more" / "below"
    below.mkdir(parents=True)
    os.mkfifo(below / "p.parquet")
    for reader in (lambda source: list(read_rows(source)), estimated_rows):
        with pytest.raises(PromptError, match="a FIFO"):
            reader(str(tmp_path / "more"))


def test_a_folder_of_prompts_that_may_not_be_listed_is_not_left_out() -> None:
    with open_folder() as folder:
        (folder / "p.txt").write_text("a star\n")
        (folder / "private").mkdir(mode=0o700 if os.geteuid() == 0 else 0o000)
        with unprivileged(), pytest.raises(PromptError, match="permission denied"):
            list(read_rows(str(folder)))


def test_bad_rows_are_recorded_and_move_no_other(tiny_export: Path, tmp_path: Path) -> None:
    good = {"prompt": "a star"}
    lines = [
        good,
        {"prompt": ""},
        "not json",
        good,
        {"prompt": "a", "steps": 99},
        {"prompt": "a", "size": "33x33"},
        good,
    ]
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (tmp_path / "p.jsonl").write_text(text, encoding="utf-8")
    config = job(tiny_export, tmp_path / "p.jsonl", tmp_path / "out", shard=4)
    totals = run(config)
    failed = [json.loads(line) for line in (tmp_path / "out" / "failed.jsonl").read_text().splitlines()]
    assert [one["id"] for one in failed] == [1, 2, 4, 5] and totals["failed_rows"] == 4
    assert all(one["reason"] and one["where"].endswith(f"p.jsonl:{one['id'] + 1}") for one in failed)
    assert sorted(int(name[:9]) for name in members(tmp_path / "out") if name.endswith("png")) == [0, 3, 6]
    with pytest.raises(PromptError, match=r"p\.jsonl:2"):
        run(replace(config, out=tmp_path / "strict", strict=True))
    (tmp_path / "p.csv").write_text('prompt,seed\n"a",1,2\n"a",x\n', encoding="utf-8")
    assert all(isinstance(row, BadRow) for row in read_rows(str(tmp_path / "p.csv")))
    (tmp_path / "q.csv").write_text("caption\na\n", encoding="utf-8")
    with pytest.raises(PromptError, match="no column named prompt"):
        list(read_rows(str(tmp_path / "q.csv")))


def test_a_folder_keeps_one_job(tiny_export: Path, tmp_path: Path) -> None:
    prompts = prompts_file(tmp_path / "p.txt", 4)
    config = job(tiny_export, prompts, tmp_path / "out", shard=2)
    run(config)
    before = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in ("00000.tar", "00001.tar")}
    for other in (replace(config, shard=3), replace(config, draw=replace(config.draw, seed=1))):
        with pytest.raises(OutputError, match="a job with other options"):
            run(other)
    prompts_file(prompts, 5)
    run(config)  # a longer file goes on; a shard of the same rows is not drawn again
    after = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in before}
    assert after == before and (tmp_path / "out" / "00002.tar").exists()
    with pytest.raises(UsageError, match="cannot hold"):
        replace(config, draw=replace(config.draw, images=9), shard=8).validate()


def test_a_job_is_told_by_everything_that_decides_its_pictures() -> None:
    """Every field of a request is part of the identity, or is known to move pictures by rounding at most."""
    plain = BulkConfig(draw=GenerateConfig(seed=0), prompts="-", out=Path())
    other: dict[str, object] = {"steps": 2, "size": (32, 32), "encoder_timestep": "first", "long_prompts": "chunk"}
    other |= {"teacher_steps": 9, "guidance": 3.0, "seed": 1, "images": 2, "batch": 3, "metadata": False}
    by_its_files = {"model", "vae", "loras"}
    no_matter = {"backend", "device", "dtype", "provider", "compiled", "out", "grid", "overwrite"}
    assert set(other) | by_its_files | no_matter == {field.name for field in fields(GenerateConfig)}

    def identity(config: BulkConfig, **files: Any) -> str:
        return digest(config.identity(**{"model_id": "m", "vae_id": None, **files}))

    different = [identity(replace(plain, draw=replace(plain.draw, **{name: value}))) for name, value in other.items()]
    lora = LoraUse(source="a.safetensors", weight=0.5, sha256="0" * 64)
    different += [identity(plain, model_id="n"), identity(plain, vae_id="v"), identity(plain, loras=[lora])]
    different += [identity(plain, loras=[lora.model_copy(update={"weight": 1.0})]), identity(plain)]
    assert len(set(different)) == len(different)


def test_rows_keep_their_adapters(tmp_path: Path) -> None:
    row = {"prompt": "a star", "lora": ["a.safetensors:0.5"]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row), encoding="utf-8")
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("prompt,lora\na star,a.safetensors:0.5\n", encoding="utf-8")
    config = BulkConfig(draw=GenerateConfig(seed=0), prompts="-", out=Path())
    for name in ("a.jsonl", "a.parquet", "a.csv"):
        (found,) = read_rows(str(tmp_path / name))
        assert isinstance(found, PromptRow)
        assert _request(found, config, 0, 0).loras == ("a.safetensors:0.5",), name


@pytest.mark.parametrize(
    ("cell", "loras"),
    [
        ("", None),
        ("[]", ()),
        ("7", ("7",)),
        ('"[""a.safetensors:0.5"", ""OWNER/NAME""]"', ("a.safetensors:0.5", "OWNER/NAME")),
        ("[half", ("[half",)),
    ],
)
def test_a_cell_holds_one_adapter_or_a_list_of_them(cell: str, loras: tuple[str, ...] | None, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"prompt,lora\na star,{cell}\n", encoding="utf-8")
    (found,) = read_rows(str(tmp_path / "a.csv"))
    assert isinstance(found, PromptRow) and found.loras == loras


def test_a_shard_is_told_by_what_the_adapters_of_its_rows_hold(tmp_path: Path) -> None:
    """A file that was trained anew under its name draws other pictures: its shards are written again, no others."""
    lora, rows = tmp_path / "a.safetensors", tmp_path / "a.jsonl"
    asked = [{"prompt": "a star", "lora": f"{lora}:0.5"}, {"prompt": "a star"}]
    rows.write_text("\n".join(map(json.dumps, asked)), encoding="utf-8")
    config = BulkConfig(draw=GenerateConfig(seed=0), prompts=str(rows), out=tmp_path, shard=1)

    def identities() -> list[str]:
        return [shard_identity("job", task) for task in shard_tasks(read_rows(str(rows)), config)]

    found = [identities()]
    for value in (1.0, 2.0):
        down, up = np.full((2, 8), value, np.float32), np.ones((8, 2), np.float32)
        names = (
            "unet.mid_block.attentions.0.proj_in.lora_A.weight",
            "unet.mid_block.attentions.0.proj_in.lora_B.weight",
        )
        save_file(dict(zip(names, (down, up), strict=True)), lora)
        os.utime(lora, ns=(0, int(value)))  # two files within a tick of the clock are told by nothing else
        found.append(identities())
    named, plain = zip(*found, strict=True)
    assert len(set(named)) == 3 and len(set(plain)) == 1
    assert identities() == found[-1]


def test_a_row_whose_adapter_cannot_be_used_is_a_failed_row(tiny_export: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,lora\na star,\na star,nowhere.safetensors\n", encoding="utf-8")
    totals = run(job(tiny_export, tmp_path / "a.csv", tmp_path / "out", shard=2))
    assert (totals["images"], totals["failed_rows"]) == (1, 1)
    failed = json.loads((tmp_path / "out" / "failed.jsonl").read_text(encoding="utf-8"))
    assert failed["id"] == 1 and "nowhere.safetensors" in failed["reason"]


def test_a_random_seed_is_kept_for_the_next_run(tiny_export: Path, tmp_path: Path) -> None:
    config = job(tiny_export, prompts_file(tmp_path / "p.txt", 4), tmp_path / "out", shard=2, seed=None)
    first = run(config)
    (tmp_path / "out" / "00001_stats.json").unlink()
    assert run(config) == first


def test_workers_write_the_same_bytes(tiny_export: Path, tmp_path: Path) -> None:
    prompts = prompts_file(tmp_path / "p.txt", 30)
    config = job(tiny_export, prompts, tmp_path / "one", shard=5)
    run(config)
    run(replace(config, out=tmp_path / "two", workers=2))
    assert data_files(tmp_path / "one") == data_files(tmp_path / "two")


def test_without_metadata_no_file_names_the_prompt(tiny_export: Path, tmp_path: Path) -> None:
    run(job(tiny_export, prompts_file(tmp_path / "p.txt", 2), tmp_path / "out", shard=2, metadata=False))
    png = members(tmp_path / "out")["000000000.png"]
    assert b"star" not in png and b"trainedAlgorithmicMedia" in png


def start(prompts: Path, model: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    words = ["generate", "--model", str(model), "--prompts", str(prompts), "--out", str(out), "--shards", "20"]
    return subprocess.Popen(
        [sys.executable, "-m", "tiue_cli", *words, "--seed", "100", "--format", "json", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )


def test_shards_without_a_number_take_the_default(tmp_path: Path) -> None:
    assert with_shard_size(["--shards"]) == ["--shards", "1000"]
    assert with_shard_size(["--shards", "--out", "x"]) == ["--shards", "1000", "--out", "x"]
    for given in (["--shards", "7"], ["--shards=7"], ["--shards", "many"], ["--", "--shards"], ["a", "--shards", "5"]):
        assert with_shard_size(given) == given


def test_the_expected_rows_are_those_that_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts_file(tmp_path / "a.txt", 1000)
    (tmp_path / "b.jsonl").write_text('{"prompt": "a"}\r\n{"prompt": "b"}', encoding="utf-8", newline="")
    parquet.write_table(pyarrow.table({"prompt": ["a", "b", "c"]}), tmp_path / "c.parquet")
    (tmp_path / "d.txt").touch()
    assert estimated_rows(str(tmp_path)) == len(list(read_rows(str(tmp_path)))) == 1005
    assert estimated_rows("-") is None and estimated_rows(str(tmp_path / "missing.parquet")) == 0
    monkeypatch.setattr(rows, "_SAMPLE_BYTES", 2000)  # of a long file the beginning is counted
    assert estimated_rows(str(tmp_path / "a.txt")) == pytest.approx(1000, rel=0.02)


def test_progress_knows_how_much_is_left_and_what_was_there(tiny_export: Path, tmp_path: Path) -> None:
    config = job(tiny_export, prompts_file(tmp_path / "p.txt", 10), tmp_path / "out", shard=3)
    seen: list[BulkProgress] = []
    run_bulk(config, on_progress=seen.append)
    assert [(one.shards, one.expected_shards, one.images) for one in seen] == [
        (0, 4, 0), (1, 4, 3), (2, 4, 6), (3, 4, 9), (4, 4, 10)
    ]  # fmt: skip
    (tmp_path / "out" / "00001_stats.json").unlink()
    seen.clear()
    run_bulk(config, on_progress=seen.append)
    assert [(one.images, one.kept) for one in seen] == [(3, 3), (6, 3), (10, 7)]


def test_memory_does_not_grow_with_the_prompts(
    tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thirty thousand prompts, 7.6 MB as rows, pass through a job that draws nothing."""
    drawn = []

    def draws_nothing(tasks: Iterable[ShardTask], config: BulkConfig, identity: str) -> Iterator[ShardStats]:
        tracemalloc.start()  # the job is open by now: only what the stream keeps counts
        for task in tasks:
            drawn.append(len(task.rows))
            yield ShardStats(task.number, len(task.rows), (), "")

    monkeypatch.setattr(run_module, "writer_of", lambda config: draws_nothing)
    config = job(tiny_export, prompts_file(tmp_path / "p.txt", 30_000), tmp_path / "out", shard=1000)
    try:
        totals = run(config)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert totals["images"] == sum(drawn) == 30_000
    assert peak_bytes < 2 * 2**20


@pytest.mark.slow
def test_workers_end_with_a_job_that_is_killed(tiny_export: Path, tmp_path: Path) -> None:
    process = start(prompts_file(tmp_path / "p.txt", 20_000), tiny_export, tmp_path / "out", "--workers", "2")
    try:
        until_s = time.monotonic() + 120
        while not list((tmp_path / "out").glob("*_stats.json")):
            assert process.poll() is None and time.monotonic() < until_s
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.kill()
        process.communicate()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert len(children) >= 2 and not alive


@pytest.mark.slow
def test_killed_and_started_again_gives_every_id_once_and_the_same_bytes(tiny_export: Path, tmp_path: Path) -> None:
    prompts = prompts_file(tmp_path / "p.txt", 1500)
    out = tmp_path / "killed"
    kills = 0
    for wanted in (1, 15, 35):
        process = start(prompts, tiny_export, out)
        until_s = time.monotonic() + 60
        while process.poll() is None and len(list(out.glob("*_stats.json"))) < wanted and time.monotonic() < until_s:
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills == 3, "the job was too quick to be killed"
    last = start(prompts, tiny_export, out)
    told, _ = last.communicate(timeout=120)
    assert last.returncode == 0 and json.loads(told)["images"] == 1500
    run(job(tiny_export, prompts, tmp_path / "whole", shard=20))
    assert data_files(out) == data_files(tmp_path / "whole")
    assert sorted(int(name[:9]) for name in members(out) if name.endswith("png")) == list(range(1500))


def test_a_long_file_begins_at_once(tiny_export: Path, tmp_path: Path) -> None:
    """The first shard of 300,000 lines is there before the file could have been read as a whole and planned."""
    prompts = prompts_file(tmp_path / "p.txt", 300_000)
    out = tmp_path / "out"
    process = start(prompts, tiny_export, out)
    try:
        until_s = time.monotonic() + 60
        while not (out / "00000_stats.json").exists():
            assert process.poll() is None and time.monotonic() < until_s
            time.sleep(0.05)
        resident_kb = int((Path("/proc") / str(process.pid) / "status").read_text().split("VmRSS:")[1].split()[0])
        assert resident_kb < 600_000
    finally:
        process.kill()
        process.communicate()
