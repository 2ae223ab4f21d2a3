"""The folder of a run: what it is, so that no other run writes into it, and where its parts lie.

OUT/run.json       what was asked for, and of what
    config.yaml    the same config, to read and to copy
    log.jsonl      a line of figures every few steps
    grids/         teacher beside student
    trackers/      TensorBoard's files, where it is used
    checkpoints/   see checkpoint.py
    student/       the result
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from tiue_cli import __version__
from tiue_cli.distill.config import DistillConfig, forbidden_on_resume, to_yaml
from tiue_cli.distill.data.prompts import TrainingPrompts
from tiue_cli.errors import ManifestError, OutputError, UsageError
from tiue_cli.files.access import has_file, is_file, kind_of, list_folder, read_bytes
from tiue_cli.files.atomic import atomic_file, check_writable, output_error
from tiue_cli.files.lock import NoLocksError, held_lock
from tiue_cli.files.manifests import read_manifest, write_json
from tiue_cli.files.structured import parse_json
from tiue_cli.files.students import RUN_MANIFEST

LEFTOVERS = ".*.tmp*"
"""What a kill leaves of a file or folder that was being written (artifacts.py)."""


LOCK = ".lock"


class RunRecord(BaseModel):
    """What a run was started with, stored as ``run.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = 1
    kind: Literal["distillation"] = "distillation"
    config: DistillConfig
    prompts_sha256: str
    teacher_sha256: str
    processes: int
    tiue_version: str = __version__


class RunFolder:
    """Paths and log of a run in ``out``."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.checkpoints, self.grids, self.student = out / "checkpoints", out / "grids", out / "student"
        self._log = out / "log.jsonl"

    @property
    def trackers(self) -> Path:
        """Where trackers that write files do so."""
        return self.out / "trackers"

    def log(self, line: Mapping[str, Any]) -> None:
        """Append a line of figures. Raises OutputError."""
        try:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(dict(line)) + "\n")
        except OSError as error:
            raise output_error(self._log, error) from error

    def remove_leftovers(self) -> None:
        """Delete what a killed run left half-written beside the checkpoints."""
        for folder in (self.out, self.grids):
            for path in folder.glob(LEFTOVERS):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def cut_log(self, step: int) -> None:
        """Forget the lines after ``step``: steps that a killed run did and a resumed one does again."""
        if not is_file(self._log):
            return
        lines = read_bytes(self._log).decode("utf-8", errors="replace").splitlines()
        with atomic_file(self._log) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines if _step_of(line) <= step), encoding="utf-8")


def _step_of(line: str) -> float:
    """The step of a log line; infinite for the half line that a kill left."""
    try:
        return float(parse_json(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def stored_config(out: Path) -> DistillConfig:
    """The config that the run in ``out`` was started with. UsageError where there is none."""
    if not has_file(out / RUN_MANIFEST, error=ManifestError):
        raise UsageError(f"there is no run to resume in {out}", hint="leave --resume out to start one")
    return read_manifest(out / RUN_MANIFEST, RunRecord).config


def check_out_folder(out: Path, *, resume: bool) -> None:
    """Refuse a folder that is in use, before anything is loaded. Raises OutputError or UsageError."""
    if resume:
        stored_config(out)
        return
    if has_file(out / RUN_MANIFEST, error=OutputError):
        raise OutputError(
            f"{out} holds a distillation already; nothing was changed",
            hint=f"continue it: tiue distill --out {out} --resume; or choose another folder",
        )
    kind = kind_of(out, error=OutputError)
    if kind != "nothing" and (
        kind != "folder"
        or any(not path.match(LEFTOVERS) and path.name != LOCK for path in list_folder(out, error=OutputError))
    ):
        raise OutputError(f"{out} exists and is not an empty folder", hint="choose another folder for --out")


def check_places(out: Path, config: DistillConfig, *, resume: bool) -> None:
    """``check_out_folder``, and whether it and the cache can be written: before seconds of imports and hours of work.

    Raises OutputError or UsageError.
    """
    check_out_folder(out, resume=resume)
    check_writable(out)
    # A cache that holds something may be whole, and then it is only read.
    empty = not any(config.cache_folder.glob("*-*"))
    if empty and (config.text_cache or config.warm_start.needs_pairs):
        try:
            check_writable(config.cache_folder)
        except OutputError as error:
            raise OutputError(
                error.message, hint="give the caches another folder: --set cache=FOLDER, or set XDG_CACHE_HOME"
            ) from error


@contextlib.contextmanager
def run_lock(out: Path, *, resume: bool) -> Iterator[None]:
    """Hold the folder of a run; a second distillation in it is refused, and touches nothing. Raises OutputError.

    A folder that was made for the lock and got nothing else is removed again.
    """
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(out, error) from error
    try:
        with contextlib.ExitStack() as stack:
            held = True  # where the file system has no locks, nothing can be known
            with contextlib.suppress(NoLocksError):
                held = stack.enter_context(held_lock(out / LOCK))
            if not held:
                raise OutputError(
                    f"another tiue distill is running in {out}; nothing was changed",
                    hint="wait until it ends, or choose another folder",
                )
            check_out_folder(out, resume=resume)  # the folder's last owner may have ended since it was looked at
            yield
    finally:
        if made:
            with contextlib.suppress(OSError):  # it holds a run
                out.rmdir()


def check_resumable(out: Path, record: RunRecord) -> None:
    """Refuse to resume as another run; the message lists every difference. Raises UsageError."""
    before = read_manifest(out / RUN_MANIFEST, RunRecord)
    found = [str(difference) for difference in forbidden_on_resume(before.config, record.config)]
    for name, label in (("prompts_sha256", "prompts"), ("teacher_sha256", "the teacher's weights")):
        if getattr(before, name) != getattr(record, name):
            found.append(f"{label} have changed since")
    if before.processes != record.processes:
        found.append(f"processes: {before.processes} → {record.processes}")
    if found:
        raise UsageError(
            f"the run in {out} was started with other settings: " + "; ".join(found),
            hint="resume it without these changes, or start another run in another folder",
        )


def write_record(out: Path, record: RunRecord) -> None:
    """Store what the run is. Raises OutputError."""
    write_json(out / RUN_MANIFEST, record)  # first: with it alone the run can be resumed
    with atomic_file(out / "config.yaml") as temporary:
        temporary.write_text(to_yaml(record.config), encoding="utf-8")


def card_section(config: DistillConfig, prompts: TrainingPrompts) -> str:
    """How the student was made, for the end of its model card."""
    return (
        "\n## Training\n\n"
        f"`tiue distill` on {len(prompts.prompts):,} prompts and no images, with these settings:\n\n"
        f"```yaml\n{to_yaml(config)}```\n"
    )
