"""Malformed input for every reader of tiue, for as long as you like: how many ended in anything but an error of ours.

    python benchmarks/fuzz.py --minutes 10 [--inputs 10000] [--seed 0] [--out FILE.json]

Each input is a good file with one to four changes: bytes flipped, cut, doubled; in JSON a value replaced by one that
breaks readers (2^63, NaN, 5,000 digits, half an emoji, 10,000 brackets), a key dropped or added. A *fault* is an
exception outside ``TiueError``; a *hang* is longer than ten seconds of processor time, or than a minute (a wait); a
*long* message has more than 2,500 characters. ``--inputs`` ends a campaign at a count, whatever the machine's load.
tests/test_fuzz.py runs some hundred of the same inputs in the suite.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from tiue_cli.errors import TiueError

LIMIT_S = 10
"""Of processor time: a machine that does other work as well is no hang."""
WAIT_S = 60
FIGURES = ("inputs", "accepted", "refused", "faults", "hangs", "long_messages")
LONGEST_MESSAGE = 2500
NASTY: tuple[str, ...] = (
    *("NaN", "-Infinity", "1e999", "-1", "0", "0.5", "true", "null", "[]", "{}", '""', '"x"', "[[]]", "[null]"),
    *(str(2**31), str(2**63), str(2**64 + 1), str(10**30), "9" * 5000, "[" * 10_000, '{"a":' * 200 + "1" + "}" * 200),
    *('"a cat \\ud83d"', '"\\u0000"', '"' + "x" * 5000 + '"', '"\\u001b[31m"', '"../../etc/passwd"', '"/dev/zero"'),
    *("[1e308, 1e308]", "[-1, -1]", "[0]", "[65536]", '{"x": [1]}', "1e-320", '"1"', "[9223372036854775808]"),
)
TOKENS = (
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\r",
    b"\x1b[",
    b"\x9b",
    b"\xed\xa0\x80",
    b"\n---\n",
    b": ",
    b"&a [*a]",
)
TOKENS += (
    b"!!timestamp x",
    b"!!python/object:os.system",
    b"0x" + b"f" * 5000,
    b'"',
    b"{",
    b"[",
    b",",
    b"#",
    b"%",
    b"- ",
)


@dataclass(frozen=True)
class Target:
    """A reader, and a good file that it reads. ``files`` are the paths below ``folder`` that are changed."""

    name: str
    folder: Path
    files: tuple[str, ...]
    read: Callable[[Path], object]
    every: int = 1
    """Only in every so manieth round: for what takes a second."""


@dataclass
class Count:
    """What came of the inputs of one target."""

    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    faults: int = 0
    hangs: int = 0
    long_messages: int = 0
    slowest_s: float = 0.0
    examples: list[str] = field(default_factory=list)


class Hang(BaseException):
    """The time for one input is over."""


def change(data: bytes, choose: random.Random) -> bytes:
    """One to four changes of a good file."""
    for _ in range(choose.randint(1, 4)):
        structured = choose.random() < 0.6
        changed = _change_json(data, choose) if structured else None
        data = _change_bytes(data, choose) if changed is None else changed
    return data


def _change_bytes(data: bytes, choose: random.Random) -> bytes:
    at = choose.randrange(len(data) + 1)
    end = min(len(data), at + choose.choice((1, 1, 4, 64, 4096)))
    kind = choose.randrange(6)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + data[end:]
    if kind == 2:
        return data[:at] + bytes(choose.randrange(256) for _ in range(end - at)) + data[end:]
    if kind == 3:
        return data[:end] + data[at:end] * choose.choice((1, 2, 50)) + data[end:]
    if kind == 4:
        return data[:at] + choose.choice(NASTY).encode() + data[end:]
    return data[:at] + choose.choice(TOKENS) + data[at:]


def _change_json(data: bytes, choose: random.Random) -> bytes | None:
    """Replace, drop or add one value of a JSON document, or of the header of a safetensors file; None for others."""
    if len(data) > 8 and int.from_bytes(data[:8], "little") < len(data) and data[8:9] == b"{":
        length = int.from_bytes(data[:8], "little")
        header = _change_json(data[8 : 8 + length], choose)
        return None if header is None else len(header).to_bytes(8, "little") + header + data[8 + length :]
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return None
    places = list(_places(tree))
    if not places:
        return None
    holder, key = choose.choice(places)
    kind = choose.randrange(8)
    mark = f"@{choose.randrange(10**9)}@"
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[choose.choice(("", "x", "\x1b", "prompt", "a" * 300))] = mark
    else:
        holder[key] = mark
    return (
        json.dumps(tree, ensure_ascii=choose.random() < 0.5)
        .replace(f'"{mark}"', choose.choice(NASTY))
        .encode(errors="surrogatepass")
    )


def _places(tree: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    left = [tree]
    while left and len(found) < 20_000:
        holder = left.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        found += [(holder, key) for key in keys]
        left += [holder[key] for key in keys if isinstance(holder[key], dict | list)]
    return found


def try_one(target: Target, choose: random.Random, work: Path, count: Count) -> None:
    """Change one file of a copy of the target's folder, read, and put it back."""
    folder = work / target.name
    if not folder.exists():
        shutil.copytree(target.folder, folder)
    file = folder / choose.choice(target.files)
    good = file.read_bytes()
    file.write_bytes(change(good, choose))
    count.inputs += 1
    started = time.perf_counter()
    before = [signal.signal(number, _hang) for number in _TIMERS]
    signal.alarm(WAIT_S)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    try:
        target.read(folder)
        count.accepted += 1
    except TiueError as error:
        count.refused += 1
        if len(str(error)) > LONGEST_MESSAGE or not str(error).strip():
            count.long_messages += 1
            _example(count, f"{file.name}: a message of {len(str(error))} characters: {str(error)[:200]}")
    except Hang:
        count.hangs += 1
        _example(count, f"{file.name}: no end after {LIMIT_S} s of processor time or {WAIT_S} s")
    except Exception as error:  # noqa: BLE001  # what is looked for
        count.faults += 1
        place = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in place if "tiue_cli" in frame.filename]
        _example(count, f"{file.name}: {type(error).__name__}: {str(error)[:150]} at {' '.join(ours[-3:])}")
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for number, handler in zip(_TIMERS, before, strict=True):
            signal.signal(number, handler)
        file.write_bytes(good)
    count.slowest_s = max(count.slowest_s, time.perf_counter() - started)


_TIMERS = (signal.SIGALRM, signal.SIGPROF)


def _hang(number: int, frame: FrameType | None) -> None:
    raise Hang


def _example(count: Count, text: str) -> None:
    if text not in count.examples and len(count.examples) < 20:
        count.examples.append(text)


def targets(root: Path) -> list[Target]:
    """Good files of every kind, made in ``root``, and what reads them."""
    import numpy as np
    import torch
    from bench_reports import make_report
    from helpers import build_sd_folder
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo
    from tiny_export import write_tiny_export

    from tiue_cli.backends.tokenizer import PromptTokenizer
    from tiue_cli.backends.torch_backend import TeacherTorchBackend
    from tiue_cli.bench.quality.references import _load_npz
    from tiue_cli.bench.report.files import read_report
    from tiue_cli.cli.inspection import inspect_source
    from tiue_cli.distill.checkpoint import Checkpoint, TrainingState, read_checkpoint, write_checkpoint
    from tiue_cli.distill.data.prompts import read_training_prompts
    from tiue_cli.distill.resolve import Layer, parse_overrides, read_config, resolve_config
    from tiue_cli.export.trt.profiles import load_profiles, shipped_profiles
    from tiue_cli.files.exports import read_export_manifest
    from tiue_cli.files.png import ImageRecord, save_png
    from tiue_cli.files.rows import RowCache
    from tiue_cli.generate.prompts import read_prompts
    from tiue_cli.model.folder import check_model_folder
    from tiue_cli.model.noise import draw_noise
    from tiue_cli.model.student import save_student, student_from_teacher

    teacher = build_sd_folder(root / "teacher")
    student = save_student(student_from_teacher(teacher, steps=4), root / "student")
    write_tiny_export(root / "export")
    texts = root / "texts"
    texts.mkdir()
    (texts / "p.txt").write_text("a red star\n# a comment\nein Haus, 夜\n" * 5, encoding="utf-8")
    rows = [
        {"prompt": "a star", "seed": 5, "size": 64, "steps": 2},
        {"prompt": "夜 🌙", "size": "32x48"},
        {"prompt": "c"},
    ]
    (texts / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (texts / "one.jsonl").write_text(json.dumps(rows[0]), encoding="utf-8")
    (texts / "p.csv").write_text('prompt,n\n"a, ""b""\nc",1\nd,2\n', encoding="utf-8")
    (texts / "c.yaml").write_text("teacher: t\nprompts: p\nkl: {weight: 0.05}\nvsd:\n  guidance: 3\nsize: [64, 64]\n")
    shutil.copy(next(iter(shipped_profiles().values())), texts / "p.toml")
    pictures = root / "pictures"
    pictures.mkdir()
    record = ImageRecord(
        prompt="a star",
        seed=1,
        size=(8, 8),
        kind="teacher",
        steps=2,
        guidance=3.0,
        model="m",
        model_id="0" * 32,
        backend="torch",
        device="cpu",
        dtype="fp32",
        tiue_version="0.1.0",
    )
    save_png(pictures / "ours.png", np.zeros((8, 8, 3), np.uint8), record)
    (pictures / "record.json").write_text(record.model_dump_json())
    info = PngInfo()
    info.add_text("parameters", "a castle\nNegative prompt: fog\nSteps: 20, Sampler: Euler a")
    info.add_itxt("workflow", "{}", zip=True)
    Image.new("RGB", (8, 8)).save(pictures / "theirs.png", pnginfo=info)
    (root / "report").mkdir()
    (root / "report" / "r.json").write_text(make_report().model_dump_json())
    rng = np.random.default_rng(0)
    np.savez(root / "report" / "s.npz", mu=rng.normal(size=4), sigma=np.eye(4))
    cache = RowCache(root / "rows", 4, (2, 3))
    cache.write(0, rng.normal(size=(4, 2, 3)).astype(np.float32))
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    made = Checkpoint(
        TrainingState(step=3), {"student": {"w": torch.ones(3)}}, {"student_optimizer": optimizer.state_dict()}
    )
    write_checkpoint(root / "checkpoints", made, keep=1)

    def configs(folder: Path, suffixes: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.suffix in suffixes)

    def read_yaml(folder: Path) -> None:
        resolve_config([Layer("c.yaml", read_config(folder / "c.yaml"))])

    def read_set(folder: Path) -> None:
        word = (folder / "c.yaml").read_bytes().decode("utf-8", "surrogateescape")
        resolve_config(
            [Layer("base", {"teacher": "t", "prompts": "p"}), Layer("--set", parse_overrides([f"kl={word}"]))]
        )

    def read_record_json(folder: Path) -> None:
        text = (folder / "record.json").read_bytes().decode("utf-8", "replace")
        info = PngInfo()
        info.add_itxt("tiue", text)
        Image.new("RGB", (8, 8)).save(folder / "made.png", pnginfo=info)
        json.dumps(inspect_source(str(folder / "made.png")).as_dict(), allow_nan=False)

    def tokenized(folder: Path) -> None:
        PromptTokenizer(folder / "tokenizer.json")(["a star", ""])

    def read_rows(folder: Path) -> None:
        RowCache(folder, 4, (2, 3)).rows([0, 3])

    def inspected(folder: Path, name: str = "") -> None:
        json.dumps(inspect_source(str(folder / name)).as_dict(), allow_nan=False)

    def drawn(folder: Path) -> None:
        with TeacherTorchBackend(check_model_folder(folder), guidance=2.0, device="cpu") as backend:
            backend.generate(["a star"], draw_noise([1], backend.latent_shape((32, 32))), steps=2)

    (tree,) = (root / "checkpoints").glob("step_*")
    (chunk,) = (root / "rows").glob("*.npy")
    return [
        Target("prompts-txt", texts, ("p.txt",), lambda folder: read_prompts(folder / "p.txt")),
        Target("prompts-jsonl", texts, ("p.jsonl",), lambda folder: read_prompts(folder / "p.jsonl")),
        Target("prompts-json-row", texts, ("one.jsonl",), lambda folder: read_prompts(folder / "one.jsonl")),
        Target("training-txt", texts, ("p.txt",), lambda folder: read_training_prompts(str(folder / "p.txt"))),
        Target("training-jsonl", texts, ("p.jsonl",), lambda folder: read_training_prompts(str(folder / "p.jsonl"))),
        Target("training-csv", texts, ("p.csv",), lambda folder: read_training_prompts(str(folder / "p.csv"))),
        Target("yaml", texts, ("c.yaml",), read_yaml),
        Target("set", texts, ("c.yaml",), read_set),
        Target("toml", texts, ("p.toml",), lambda folder: load_profiles(str(folder / "p.toml"))),
        Target("model-configs", teacher, configs(teacher, (".json", ".txt")), check_model_folder),
        Target("drawing", teacher, configs(teacher, (".json",)), drawn, every=10),
        Target("headers", teacher, configs(teacher, (".safetensors",)), check_model_folder),
        Target("student", student, ("tiue.json", "README.md", "model_index.json"), inspected),
        Target("export", root / "export", ("manifest.json",), inspected),
        Target("export-manifest", root / "export", ("manifest.json",), read_export_manifest),
        Target(
            "tokenizer", root / "export", ("tokenizer.json",), lambda f: PromptTokenizer(f / "tokenizer.json")(["a"])
        ),
        Target("png", pictures, ("ours.png",), lambda folder: inspected(folder, "ours.png")),
        Target("foreign-png", pictures, ("theirs.png",), lambda folder: inspected(folder, "theirs.png")),
        Target("png-record", pictures, ("record.json",), read_record_json),
        Target("report", root / "report", ("r.json",), lambda folder: read_report(folder / "r.json")),
        Target("statistics", root / "report", ("s.npz",), lambda folder: _load_npz(folder / "s.npz")),
        Target("rows", root / "rows", (chunk.name,), read_rows),
        Target("checkpoint", tree, configs(tree, (".json", ".safetensors")), read_checkpoint),
    ]


def campaign(minutes: float, seed: int, *, inputs: int | None = None) -> dict[str, Count]:
    """Try all targets in turn until the time is over, or there were so many inputs."""
    counts: dict[str, Count] = {}
    choose = random.Random(seed)
    with tempfile.TemporaryDirectory() as made, tempfile.TemporaryDirectory() as work:
        all_targets = targets(Path(made))
        end_s = time.monotonic() + 60 * minutes
        for number in itertools.count():
            tried = sum(count.inputs for count in counts.values())
            if time.monotonic() > end_s or (inputs is not None and tried >= inputs):
                break
            for target in all_targets:
                if number % target.every == 0:
                    try_one(target, choose, Path(work), counts.setdefault(target.name, Count()))
    return counts


def main() -> int:
    """Run, show a table, and exit 1 where there was a fault or a hang."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--inputs", type=int, help="end after so many; without it, the time alone counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the counts here, as JSON")
    asked = parser.parse_args()
    counts = campaign(asked.minutes, asked.seed, inputs=asked.inputs)
    total: Counter[str] = Counter()
    print(
        f"{'reader':<18}{'inputs':>8}{'accepted':>10}{'refused':>9}{'faults':>8}{'hangs':>7}{'long':>6}{'slowest':>10}"
    )
    for name, count in counts.items():
        figures = (count.inputs, count.accepted, count.refused, count.faults, count.hangs, count.long_messages)
        total.update(
            dict(zip(("inputs", "accepted", "refused", "faults", "hangs", "long_messages"), figures, strict=True))
        )
        print("{:<18}{:>8}{:>10}{:>9}{:>8}{:>7}{:>6}{:>8.2f} s".format(name, *figures, count.slowest_s))
        for example in count.examples:
            print(f"    {example!r}")
    print(", ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in total.items()))
    if asked.out is not None:
        document = {
            "seed": asked.seed,
            "minutes": asked.minutes,
            "total": dict(total),
            "readers": {
                name: {key: value for key, value in vars(count).items() if key not in ("slowest_s", "examples")}
                for name, count in counts.items()
            },
        }
        asked.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 1 if total["faults"] or total["hangs"] or total["long_messages"] else 0


if __name__ == "__main__":
    sys.exit(main())
