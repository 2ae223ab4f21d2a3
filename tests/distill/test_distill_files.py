"""The folders of a distillation: one run at a time, modes, what may not be read, and disks without room."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from permissions import open_folder, unprivileged
from small_disk import small_disk

from tiue_cli.base.events import Progress
from tiue_cli.distill import run_folder
from tiue_cli.distill.checkpoint import Checkpoint, TrainingState, read_checkpoint, write_checkpoint
from tiue_cli.distill.loop import Distillation
from tiue_cli.errors import OutputError
from tiue_cli.files import atomic, rows
from tiue_cli.files.caches import user_cache
from tiue_cli.files.rows import RowCache

MakeConfig = Callable[..., Any]


def checkpoint(*, numbers: int = 100) -> Checkpoint:
    import torch

    weights = {"student": {"w": torch.ones(numbers)}, "lora": {"a": torch.ones(3)}}
    return Checkpoint(TrainingState(step=1), weights, {"student_optimizer": {"state": {0: {"m": torch.ones(numbers)}}}})


def test_a_second_run_in_one_folder_is_refused_at_its_start_and_touches_nothing(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    first = Distillation(make_config(max_steps=2), out).events()
    next(event for event in first if isinstance(event, Progress) and event.stage == "warm start")
    half = out / "checkpoints" / ".step_00000001.half.tmp"
    half.mkdir(parents=True)
    before = sorted(out.rglob("*"))
    with pytest.raises(OutputError, match="another tiue distill is running"):
        next(Distillation(make_config(max_steps=2), out, resume=True).events())
    assert sorted(out.rglob("*")) == before
    list(first)
    assert (out / "student" / "tiue.json").is_file() and not (out / run_folder.LOCK).exists()


def test_a_run_that_is_refused_leaves_no_folder(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(teacher=str(tmp_path / "nowhere"))
    with pytest.raises(Exception, match="does not exist"):
        list(Distillation(config, tmp_path / "run").events())
    assert not (tmp_path / "run").exists()


def test_everything_that_a_checkpoint_holds_has_the_umasks_mode(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = write_checkpoint(tmp_path, checkpoint(), keep=1)
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.rglob("*") if file.is_file()}
    assert len(modes) >= 3 and set(modes.values()) == {0o640}


@pytest.mark.parametrize("part", ["student/weights.safetensors", "state.json"])
def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(part: str) -> None:
    with open_folder() as folder:
        path = write_checkpoint(folder, checkpoint(), keep=1)
        (path / part).chmod(0o600 if os.geteuid() == 0 else 0o000)
        with unprivileged(), pytest.raises(OutputError, match="permission denied") as caught:
            read_checkpoint(path)
    assert "remove" not in str(caught.value) and "damaged" not in str(caught.value)


def test_a_damaged_checkpoint_is_still_called_so(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, checkpoint(), keep=1)
    (path / "student" / "weights.safetensors").write_bytes(b"half")
    with pytest.raises(OutputError, match="damaged"):
        read_checkpoint(path)


@pytest.mark.parametrize("size_bytes", [40_000, 450_000])
def test_a_full_disk_is_said_and_the_checkpoint_before_is_kept(tmp_path: Path, size_bytes: int) -> None:
    """In the first file, and in the optimiser's, whose writer has words of its own."""
    with small_disk(tmp_path, size_bytes=size_bytes) as disk:
        kept = write_checkpoint(disk, checkpoint(numbers=10), keep=1)
        later = checkpoint(numbers=100_000)
        later.state.step = 2
        with pytest.raises(OutputError, match=r"step_00000002: the disk is full"):
            write_checkpoint(disk, later, keep=1)
        assert [path.name for path in disk.iterdir()] == [kept.name]
        assert read_checkpoint(kept).state.step == 1


def test_rows_that_do_not_fit_are_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = RowCache(tmp_path / "text", 10_000, (77, 768))
    monkeypatch.setattr(rows, "free_bytes", lambda folder: cache.size_bytes // 2)
    with pytest.raises(OutputError, match=r"the text states need 2\.20 GiB .* 1\.10 GiB are free"):
        cache.check_room("the text states", hint="free some space")
    monkeypatch.setattr(rows, "free_bytes", lambda folder: cache.size_bytes)
    cache.check_room("the text states", hint="free some space")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["cache", "out"])
def test_a_place_that_cannot_be_written_is_found_before_anything_is_read(
    make_config: MakeConfig, tmp_path: Path, key: str
) -> None:
    changes = {"cache": "/proc/nowhere"} if key == "cache" else {}
    out = Path("/proc/nowhere") if key == "out" else tmp_path / "run"
    with pytest.raises(OutputError, match="/proc/nowhere") as caught:
        Distillation(make_config(prompts=str(tmp_path / "none.txt"), **changes), out)
    assert (key == "cache") == ("--set cache" in str(caught.value.hint))


def test_caches_go_where_xdg_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_config: MakeConfig) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache() == tmp_path / "tiue"
    assert make_config(cache="null").cache_folder == tmp_path / "tiue" / "distill"
    for none in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", none)
        assert user_cache() == Path.home() / ".cache" / "tiue"


def test_free_bytes_of_a_folder_that_is_yet_to_be_made(tmp_path: Path) -> None:
    free = atomic.free_bytes(tmp_path / "a" / "b")
    assert free is not None and free > 0
