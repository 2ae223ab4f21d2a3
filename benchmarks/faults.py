"""Commands killed at random moments, and disks that run full: what is left must be whole, and nothing may be lost.

    python benchmarks/faults.py [--kills 4] [--commands export,generate,distill,bench] [--seed 0] [--out FILE.json]

export, generate, distill and bench are each run once undisturbed, and then once more with a chain of SIGKILLs at random
fractions of the processor time of the first run. After each kill every file under its final name is read to its end;
the last run of the chain goes to its end, and then nothing temporary may be left and the result must equal the
undisturbed one, byte for byte (but for what is measured or dated). As root on Linux, the first three also write to a
tmpfs that is too small: exit 1, one error that names the disk, no half file, an old result as it was.

Commands are processes of their own, forked from this one, which has the libraries loaded: the start of Python and the
import of torch are not what is tested here.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from tiue_cli.errors import TiueError  # noqa: E402
from tiue_cli.files.exports import check_files, is_export_folder, read_export_manifest  # noqa: E402
from tiue_cli.files.png import read_pixels, read_record  # noqa: E402
from tiue_cli.files.structured import parse_json  # noqa: E402
from tiue_cli.model.folder import check_model_folder  # noqa: E402

POLL_S = 0.005
LIBRARIES = ("torch", "diffusers", "transformers", "safetensors.torch", "rich.progress", "typer.rich_utils", "yaml")


@dataclass
class Count:
    """What came of one command."""

    kills: int = 0
    """Of a command at work; one that had ended by itself is not counted."""
    broken_files: int = 0
    failed_runs: int = 0
    leftovers: int = 0
    lost: int = 0
    """Files of the undisturbed run that are missing or differ after the chain."""
    full_disks: int = 0
    unclear_full_disks: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def bad(self) -> int:
        """What must be 0."""
        return self.broken_files + self.failed_runs + self.leftovers + self.lost + self.unclear_full_disks


@dataclass(frozen=True)
class Ended:
    """A command that ended: its exit status (-9 where it was killed), what it said, its processor time."""

    status: int
    said: str
    cpu_s: float


@dataclass(frozen=True)
class Subject:
    """A command, how it is gone on with after a kill, and which of its files are the same every time."""

    words: list[str]
    again: Callable[[Path], list[str]]
    """Of the folder that the killed run wrote."""
    same: tuple[str, ...]
    """Endings of names."""


# --- processes -----------------------------------------------------------------------------------------------------


def tiue(words: list[str], log: Path, *, kill_after_cpu_s: float | None = None) -> Ended:
    """Run a command in a child; SIGKILL once it has used so much processor time."""
    tasks = Path("/proc/self/task")
    if tasks.exists() and len(list(tasks.iterdir())) > 1:
        raise SystemExit("a library has started threads, and a fork would not have them")
    pid = os.fork()
    if pid == 0:
        _become(words, log)
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            said = log.read_text(encoding="utf-8", errors="replace")
            return Ended(os.waitstatus_to_exitcode(status), said, usage.ru_utime + usage.ru_stime)
        if kill_after_cpu_s is not None and _cpu_s(pid) >= kill_after_cpu_s:
            os.kill(pid, 9)
            kill_after_cpu_s = None
        time.sleep(POLL_S)


def _become(words: list[str], log: Path) -> None:
    """Be ``tiue WORDS`` from here on, with stderr in ``log``; does not return."""
    status = 1
    try:
        null = os.open(os.devnull, os.O_RDWR)
        written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number, opened in enumerate((null, null, written)):
            os.dup2(opened, number)
        sys.argv = ["tiue", *words]
        from tiue_cli.cli.app import main

        status = main()
        sys.stderr.flush()
    except BaseException:  # noqa: BLE001  # the parent's own code must not go on in the child
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _cpu_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- what is there afterwards --------------------------------------------------------------------------------------


def broken(folder: Path) -> list[str]:
    """Files and folders under final names that are not whole."""
    found = []
    for file in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in file.relative_to(folder).parts):
            continue
        try:
            if file.suffix == ".png":
                read_pixels(file)
                read_record(file)
            elif file.name == "model_index.json":
                check_model_folder(file.parent)
            elif file.suffix == ".json":
                parse_json(file.read_bytes())
            elif file.is_dir() and is_export_folder(file):
                manifest = read_export_manifest(file)
                check_files(file, [part for graph in manifest.graphs for part in (graph.onnx, *graph.data)])
        except (TiueError, ValueError, OSError) as error:
            found.append(f"{file.relative_to(folder)}: {error}")
    return found


def temporaries(folder: Path) -> list[str]:
    """What a killed run left, and a later one should have removed."""
    return [str(file.relative_to(folder)) for file in folder.rglob(".*") if ".tmp" in file.name or ".old" in file.name]


def digests(folder: Path, endings: tuple[str, ...]) -> dict[str, str]:
    """SHA-256 by name of the files that are the same every time."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name.endswith(endings)]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


# --- kills ---------------------------------------------------------------------------------------------------------


def kill_often(name: str, subject: Subject, work: Path, *, kills: int, choose: random.Random) -> Count:
    """Once undisturbed, then with ``kills`` kills, one after the other, in one folder."""
    count, log = Count(), work / "log"
    whole = work / "whole" / "out"
    done = tiue([*subject.words, "--out", str(whole)], log)
    if done.status != 0:
        raise SystemExit(f"{name} does not work here: {done.said}")
    expected = digests(whole, subject.same)
    assert expected or not subject.same, f"{name} wrote no {subject.same}"
    out = work / "killed" / "out"
    for _ in range(4 * kills):
        if count.kills == kills:
            break
        moment_s = choose.uniform(0.05, 1.0) * done.cpu_s
        ended = tiue([*subject.again(out), "--out", str(out)], log, kill_after_cpu_s=moment_s)
        if ended.status == -9:
            count.kills += 1
            _count_broken(count, out.parent)
        else:
            _check_end(count, ended, out, expected, subject.same)
            shutil.rmtree(out.parent)
    _check_end(count, tiue([*subject.again(out), "--out", str(out)], log), out, expected, subject.same)
    return count


def _count_broken(count: Count, folder: Path) -> None:
    bad = broken(folder)
    count.broken_files += len(bad)
    count.examples += bad


def _check_end(count: Count, ended: Ended, out: Path, expected: Mapping[str, str], same: tuple[str, ...]) -> None:
    """The run went to its end: all is there, nothing is left over."""
    if ended.status != 0:
        count.failed_runs += 1
        count.examples.append(f"exit {ended.status}: {ended.said[-300:]}")
        return
    _count_broken(count, out.parent)
    left = temporaries(out.parent)
    count.leftovers += len(left)
    found = digests(out, same)
    lost = [name for name in expected if found.get(name) != expected[name]]
    count.lost += len(lost)
    count.examples += [*left, *(f"{name} is missing or differs" for name in lost)]


# --- full disks ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path, size_kb: int) -> Iterator[Path | None]:
    """A tmpfs; None where this process may not mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_kb}k", "tmpfs", str(folder)]
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("mount") is None:
        yield None
        return
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def fill(count: Count, words: list[str], work: Path, size_kb: int, *, old: Path | None = None) -> None:
    """Run ``words --out`` on a disk that is too small, where ``old`` lies already (a result of an earlier run)."""
    with small_disk(work / f"disk{size_kb}{'old' if old else ''}", size_kb) as disk:
        if disk is None:
            return
        if old is not None:
            shutil.copytree(old, disk / "out")
        before = digests(disk, ("",))
        ended = tiue([*words, "--out", str(disk / "out")], work / "log")
        count.full_disks += 1
        problems = [*broken(disk), *temporaries(disk)]
        after = digests(disk, ("",))
        problems += [f"{name} was changed" for name in before if after.get(name) != before[name]]
        said = ended.said
        if ended.status != 1 or "fault of tiue" in said or "disk is full" not in said or problems:
            count.unclear_full_disks += 1
            what = f"{words[0]} on {size_kb} kB{' over an old one' if old else ''}"
            count.examples.append(f"{what}: exit {ended.status}: {said[-300:]} {problems}")


def size_kb(folder: Path) -> int:
    """Of all files, as a tmpfs counts them: in pages."""
    return sum(4 * -(-file.stat().st_size // 4096) for file in folder.rglob("*") if file.is_file())


# --- all -----------------------------------------------------------------------------------------------------------


def subjects(root: Path) -> dict[str, Subject]:
    """The commands, on a model of some hundred kilobytes that is made in ``root``."""
    teacher, student, prompts = root / "teacher", root / "student", root / "p.txt"
    prompts.write_text("a star\na house\n", encoding="utf-8")
    export = ["export", str(root / "small"), "--no-check", "--overwrite"]
    generate = ["generate", "a star", "--model", str(student), "--seed", "1", "--images", "40", "--batch", "2"]
    distill = ["distill", "--teacher", str(teacher), "--prompts", str(prompts), "--max-steps", "12"]
    for setting in (
        *("checkpoint.every=2", "validation.every=4", "validation.teacher_steps=2", "batch_size=1"),
        *(f"cache={root / 'cache'}", "tracking.trackers=[]", "student.steps=2"),
    ):
        distill += ["--set", setting]
    bench = ["bench", str(student), "--teacher", "none", "--backend", "torch", "--steps", "2"]
    bench += ["--batch", "1", "--duration", "0.2"]

    def resumed(out: Path) -> list[str]:
        return ["distill", "--resume"] if (out / "run.json").exists() else distill

    return {
        "export": Subject(export, lambda out: export, (".onnx", ".data", "tokenizer.json")),
        "generate": Subject(generate, lambda out: generate, (".png",)),
        "distill": Subject(distill, resumed, (".safetensors", "step_00000012.png", "config.yaml")),
        "bench": Subject(bench, lambda out: bench, ()),
    }


def _make_models(root: Path) -> None:
    """In a child: what torch starts by itself must not be in the process that forks."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            from exports import build_small_student
            from helpers import build_sd_folder

            from tiue_cli.model.student import save_student, student_from_teacher

            teacher = build_sd_folder(root / "teacher")
            student = save_student(student_from_teacher(teacher, steps=2), root / "student")
            build_small_student(student, root / "small")  # tracing its graphs takes half a minute, not one
            status = 0
        finally:
            os._exit(status)
    if os.waitpid(pid, 0)[1] != 0:
        raise SystemExit("the models could not be made")


def run(commands: Sequence[str], kills: int, seed: int) -> dict[str, Count]:
    """The named commands."""
    choose = random.Random(seed)
    counts = {}
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for library in LIBRARIES:
        importlib.import_module(library)
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        # Of the commands: so that their own temporary folders are looked at as well.
        temporary = root / "tmp"
        temporary.mkdir()
        os.environ["TMPDIR"] = str(temporary)
        tempfile.tempdir = None
        _make_models(root)
        found = subjects(root)
        for name in commands:
            subject = found[name]
            (root / name).mkdir()
            counts[name] = kill_often(name, subject, root / name, kills=kills, choose=choose)
            left = temporaries(temporary)
            counts[name].leftovers += len(left)
            counts[name].examples += left
            if name != "bench":
                whole = root / name / "whole" / "out"
                needed_kb = size_kb(whole)
                for share in (0.5,) if name == "export" else (0.1, 0.5, 0.9):
                    fill(counts[name], subject.words, root / name, max(16, round(share * needed_kb)))
            if name == "export":
                fill(counts[name], subject.words, root / name, round(1.5 * needed_kb), old=whole)
            print(f"{name}: {counts[name]}", flush=True)
    return counts


def main() -> int:
    """Run, print, and exit 1 where something was lost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=4, help="of each command")
    parser.add_argument("--commands", default="export,generate,distill,bench", help="which, by comma")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the counts here, as JSON")
    asked = parser.parse_args()
    counts = run(asked.commands.split(","), asked.kills, asked.seed)
    if asked.out is not None:
        figures = {name: {k: v for k, v in vars(count).items() if k != "examples"} for name, count in counts.items()}
        options = f"--kills {asked.kills} --commands {asked.commands} --seed {asked.seed}"
        command = f"python benchmarks/faults.py {options}"
        document = {"command": command, "commands": figures}
        asked.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 1 if sum(count.bad for count in counts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
