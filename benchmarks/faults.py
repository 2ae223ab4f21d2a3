"""Commands killed at random moments, and disks that run full: what is left must be whole, and the next run must work.

    python benchmarks/faults.py [--kills 5] [--seed 0] [--out FILE.json]

For each of export, generate, distill and bench: SIGKILL at random moments; after each, every file under its final name
is read to its end, the same command is run again to its end, and nothing temporary may be left. As root on Linux the
first three also write to a tmpfs of some hundred kilobytes: exit 1, one error that names the disk, no half file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from tiue_cli.errors import TiueError  # noqa: E402
from tiue_cli.files.exports import check_files, is_export_folder, read_export_manifest  # noqa: E402
from tiue_cli.files.png import read_pixels, read_record  # noqa: E402
from tiue_cli.files.structured import parse_json  # noqa: E402
from tiue_cli.model.folder import check_model_folder  # noqa: E402


@dataclass
class Count:
    """What came of one command."""

    kills: int = 0
    killed_at_work: int = 0
    """The others had ended already."""
    broken_files: int = 0
    failed_reruns: int = 0
    leftovers: int = 0
    full_disks: int = 0
    unclear_full_disks: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def bad(self) -> int:
        """What must be 0."""
        return self.broken_files + self.failed_reruns + self.leftovers + self.unclear_full_disks


def tiue(words: list[str], *, kill_after_s: float | None = None) -> tuple[int, str]:
    """Run a command; its exit status (-9 where it was killed) and what it said on stderr."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tiue_cli", *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment) as process:
        try:
            _, said = process.communicate(timeout=kill_after_s)
        except subprocess.TimeoutExpired:
            process.kill()
            _, said = process.communicate()
    return process.returncode, said.decode(errors="replace")


def broken(folder: Path) -> list[str]:
    """Files under final names that are not whole."""
    found = []
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        try:
            if hidden:
                continue
            if file.suffix == ".png":
                read_pixels(file)
                read_record(file)
            elif file.suffix == ".json":
                parse_json(file.read_bytes())
            elif file.name == "model_index.json":
                check_model_folder(file.parent)
            elif file.is_dir() and is_export_folder(file):
                manifest = read_export_manifest(file)
                check_files(file, [part for graph in manifest.graphs for part in (graph.onnx, *graph.data)])
        except (TiueError, ValueError, OSError) as error:
            found.append(f"{file.relative_to(folder)}: {error}")
    return found


def temporaries(folder: Path) -> list[str]:
    """What a killed run left, and the next one should have removed."""
    return [str(file.relative_to(folder)) for file in folder.rglob(".*") if ".tmp" in file.name or ".old" in file.name]


def kill_often(name: str, words: list[str], again: list[str], out: Path, *, kills: int, choose: random.Random) -> Count:
    """Kill ``words`` ``kills`` times, each followed by a run of ``again`` to its end."""
    count = Count()
    started = time.monotonic()
    status, said = tiue(words)
    whole_s = time.monotonic() - started
    if status != 0:
        raise SystemExit(f"{name} does not work here: {said}")
    for _ in range(kills):
        shutil.rmtree(out, ignore_errors=True)
        status, _ = tiue(words, kill_after_s=choose.uniform(0.3, 1.0) * whole_s)
        count.kills += 1
        count.killed_at_work += status == -9
        bad = broken(out.parent)
        count.broken_files += len(bad)
        resume = again if name != "distill" or (out / "run.json").exists() else words
        status, said = tiue(resume)
        if status != 0:
            count.failed_reruns += 1
            bad.append(f"run again: exit {status}: {said[-300:]}")
        left = temporaries(out.parent)
        count.leftovers += len(left)
        count.examples += bad + left
    return count


@contextlib.contextmanager
def small_disk(folder: Path, size_kb: int) -> Iterator[Path | None]:
    """A tmpfs; None where this process may not mount one."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_kb}k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=False)


def fill(count: Count, words: list[str], work: Path, size_kb: int) -> None:
    """Run ``words --out`` on a disk that is too small."""
    with small_disk(work / f"disk{size_kb}", size_kb) as disk:
        if disk is None:
            return
        status, said = tiue([*words, "--out", str(disk / "out")])
        count.full_disks += 1
        bad = broken(disk)
        clear = status == 1 and "fault of tiue" not in said and ("full" in said or "space" in said)
        if not clear or bad:
            count.unclear_full_disks += 1
            count.examples.append(f"{words[0]} on {size_kb} kB: exit {status}: {said[-300:]} {bad}")


def run(kills: int, seed: int) -> dict[str, Count]:
    """All commands."""
    from helpers import build_sd_folder

    from tiue_cli.model.student import save_student, student_from_teacher

    choose = random.Random(seed)
    counts = {}
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        teacher = build_sd_folder(root / "teacher")
        student = save_student(student_from_teacher(teacher, steps=2), root / "student")
        (root / "p.txt").write_text("a star\na house\n")
        export = ["export", str(student), "--no-check"]
        generate = ["generate", "a star", "--model", str(student), "--seed", "1", "--images", "40", "--grid"]
        distill = ["distill", "--teacher", str(teacher), "--prompts", str(root / "p.txt"), "--max-steps", "12"]
        for setting in ("checkpoint.every=2", "validation.every=4", "validation.teacher_steps=2", "batch_size=1"):
            distill += ["--set", setting]
        distill += ["--set", f"cache={root / 'cache'}", "--set", "tracking.trackers=[]", "--set", "student.steps=2"]
        bench = ["bench", str(student), "--batch", "1", "--duration", "0.5"]
        plans = {
            "export": (export, [*export, "--overwrite"]),
            "generate": (generate, generate),
            "distill": (distill, ["distill", "--resume"]),
            "bench": (bench, bench),
        }
        for name, (words, again) in plans.items():
            out = root / f"of-{name}" / "out"
            place = ["--out", str(out)]
            counts[name] = kill_often(name, words + place, again + place, out, kills=kills, choose=choose)
            print(name, counts[name], flush=True)
        for name, sizes in (("export", (100, 300)), ("generate", (20, 60)), ("distill", (100, 1500))):
            for size_kb in sizes:
                fill(counts[name], plans[name][0], root / f"of-{name}", size_kb)
            print(name, counts[name], flush=True)
    return counts


def main() -> int:
    """Run, print, and exit 1 where something was lost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=5, help="of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the counts here, as JSON")
    asked = parser.parse_args()
    counts = run(asked.kills, asked.seed)
    if asked.out is not None:
        figures = {name: {k: v for k, v in vars(count).items() if k != "examples"} for name, count in counts.items()}
        asked.out.write_text(json.dumps({"seed": asked.seed, "commands": figures}, indent=2) + "\n", encoding="utf-8")
    return 1 if sum(count.bad for count in counts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
