"""A shard: ``00000.tar`` with ``000000000.png``, ``.txt`` and ``.json`` an image, and ``00000.parquet`` beside it.

The layout of img2dataset and WebDataset. A shard is a function of its rows and the job: the same bytes whoever writes
it, once or again. It is there when its ``00000_stats.json`` is, which is written last.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiue_cli.base.machine import usable_cores
from tiue_cli.errors import AdapterError, PromptError, UsageError
from tiue_cli.files.atomic import atomic_file
from tiue_cli.files.hashes import sha256_file
from tiue_cli.files.png import encode_picture
from tiue_cli.files.structured import parse_json
from tiue_cli.generate.bulk.config import BulkConfig, digest
from tiue_cli.generate.bulk.rows import BadRow, Row, import_pyarrow
from tiue_cli.generate.drawing import Pipeline
from tiue_cli.generate.pictures import Request
from tiue_cli.generate.prompts import PromptRow
from tiue_cli.model.lora.files import lora_use
from tiue_cli.model.noise import MAX_SEED

if TYPE_CHECKING:
    import numpy as np

    from tiue_cli.generate.pictures import Picture

WINDOW_BATCHES = 4
"""Batches that are drawn before the images before them are written: what bounds the memory, however large a shard."""
MOST_ENCODERS = 16
"""Threads that encode: a PNG of 512 x 512 takes a core 40 to 50 ms, and a large GPU draws 90 to 150 a second."""
_ENDINGS = {"png": "png", "jpeg": "jpg", "webp": "webp"}


@dataclass(frozen=True)
class ShardTask:
    """The rows of one shard; ``first_row`` is the number of the first of them in the job."""

    number: int
    first_row: int
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Failed:
    """An image that could not be asked for."""

    id: int
    where: str
    reason: str


@dataclass(frozen=True)
class ShardStats:
    """What a shard holds: ``images`` pictures, rows that failed, and a hash of its tar."""

    number: int
    images: int
    failed: tuple[Failed, ...]
    tar_sha256: str


@dataclass(frozen=True)
class _Asked:
    id: int
    request: Request


def shard_tasks(rows: Iterator[Row], config: BulkConfig) -> Iterator[ShardTask]:
    """Cut the stream into shards of whole prompts."""
    at_once = config.rows_per_shard
    for number in itertools.count():
        chunk = tuple(itertools.islice(rows, at_once))
        if not chunk:
            return
        yield ShardTask(number, number * at_once, chunk)


def shard_name(number: int) -> str:
    """``00042``."""
    return f"{number:05d}"


def shard_identity(identity: str, task: ShardTask) -> str:
    """The job, the very rows and what their LoRA files hold: what an edit changed is drawn anew, and no other shard."""
    # Without what a row does not say, so that a field that rows get one day changes nothing of today's.
    said = [{name: value for name, value in vars(row).items() if value is not None} for row in task.rows]
    named = {text for row in task.rows if isinstance(row, PromptRow) for text in row.loras or ()}
    files = [{text: _lora_sha256(text) for text in sorted(named)}] if named else []
    return digest([identity, task.number, said, *files])


def _lora_sha256(text: str) -> str | None:
    """Hash of the file that a row's ``lora`` names; None where none can be used, so that its row fails."""
    try:
        return lora_use(text).sha256
    except (UsageError, AdapterError):
        return None


def write_shard(task: ShardTask, config: BulkConfig, pipeline: Pipeline, *, identity: str) -> ShardStats:
    """Draw and write a shard of the job ``identity``.

    Raises PromptError for a bad row of a ``strict`` job, and what drawing and writing raise.
    """
    asked, failed = _requests(task, config, pipeline)
    if failed and config.strict:
        first = failed[0]
        raise PromptError(first.reason, hint="repair the row, or leave --strict out: it is recorded in failed.jsonl")
    name = config.out / shard_name(task.number)
    rows: list[dict[str, Any]] = []
    with atomic_file(name.with_suffix(".tar")) as temporary:
        with temporary.open("wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for one, picture, data in _drawn(asked, config, pipeline):
                row = _facts(one, picture, data)
                _add(tar, f"{one.id:09d}.{_ENDINGS[config.image_format]}", data)
                _add(tar, f"{one.id:09d}.txt", picture.prompt.encode())
                _add(tar, f"{one.id:09d}.json", json.dumps(row, ensure_ascii=False, sort_keys=True).encode())
                rows.append(row)
        sha256 = sha256_file(temporary)
    _write_parquet(name.with_suffix(".parquet"), rows)
    stats = ShardStats(task.number, len(rows), tuple(failed), sha256)
    write_stats(config.out, stats, identity=shard_identity(identity, task))
    return stats


def _requests(task: ShardTask, config: BulkConfig, pipeline: Pipeline) -> tuple[list[_Asked], list[Failed]]:
    """What to draw, and what cannot be drawn, by id."""
    asked: list[_Asked] = []
    failed: list[Failed] = []
    for offset, row in enumerate(task.rows):
        first_id = (task.first_row + offset) * config.draw.images
        if isinstance(row, BadRow):
            failed.append(Failed(first_id, row.where, row.reason))
            continue
        requests = [_request(row, config, first_id, image) for image in range(config.draw.images)]
        try:
            pipeline.check(requests)
        except (PromptError, UsageError) as error:
            failed.append(Failed(first_id, row.where, f"{row.where}: {error.message}"))
            continue
        asked += [_Asked(first_id + image, request) for image, request in enumerate(requests)]
    return asked, failed


def _request(row: PromptRow, config: BulkConfig, first_id: int, image: int) -> Request:
    assert config.draw.seed is not None, "a job's seed is drawn before it begins"
    seed = config.draw.seed + first_id + image if row.seed is None else row.seed + image
    steps = config.draw.steps if config.draw.teacher_steps is None else config.draw.teacher_steps
    return Request(row.prompt, min(seed, MAX_SEED + 1), row.size or config.draw.size, row.steps or steps, row.loras)


def _drawn(
    asked: Sequence[_Asked], config: BulkConfig, pipeline: Pipeline
) -> Iterator[tuple[_Asked, Picture[np.ndarray], bytes]]:
    """Every image in order; one window is encoded in threads while the next is drawn."""
    window = WINDOW_BATCHES * (config.draw.batch or pipeline.batch_for(config.draw.size))
    before: Iterable[tuple[_Asked, Picture[np.ndarray], bytes]] = ()
    with ThreadPoolExecutor(max_workers=min(MOST_ENCODERS, usable_cores())) as encoders:
        for start in range(0, len(asked), window):
            chunk = asked[start : start + window]
            pictures = pipeline.draw([one.request for one in chunk], output="numpy")
            encoded = encoders.map(lambda picture: _encode(picture, config), pictures)  # begins at once
            yield from before
            before = zip(chunk, pictures, encoded, strict=True)
        yield from before


def _encode(picture: Picture[np.ndarray], config: BulkConfig) -> bytes:
    buffer = io.BytesIO()
    record = picture.record if config.draw.metadata else None
    encode_picture(buffer, picture.image, record, image_format=config.image_format)
    return buffer.getvalue()


def _facts(one: _Asked, picture: Picture[np.ndarray], data: bytes) -> dict[str, Any]:
    record = picture.record
    loras = {"loras": [use.model_dump() for use in record.loras]} if record.loras else {}
    return loras | {
        "id": one.id,
        "key": f"{one.id:09d}",
        "prompt": record.prompt,
        "seed": record.seed,
        "height": record.size[0],
        "width": record.size[1],
        "steps": record.steps,
        "model": record.model,
        "model_id": record.model_id,
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    # No time, no owner: the same image gives the same bytes.
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    arrow, parquet = import_pyarrow("pyarrow", "writing shards"), import_pyarrow("pyarrow.parquet", "writing shards")
    text, number = arrow.string(), arrow.int64()
    names = ("id", "key", "prompt", "seed", "height", "width", "steps", "model", "model_id", "sha256")
    numbers = {"id", "seed", "height", "width", "steps"}
    schema = arrow.schema([(name, number if name in numbers else text) for name in names])
    with atomic_file(path) as temporary:
        parquet.write_table(arrow.Table.from_pylist(rows, schema=schema), temporary, compression="zstd")


# --- what says that a shard is there -------------------------------------------------------------------------------


def stats_path(out: Path, number: int) -> Path:
    """``00042_stats.json``."""
    return out / f"{shard_name(number)}_stats.json"


def write_stats(out: Path, stats: ShardStats, *, identity: str) -> None:
    """Say that the shard is there; ``identity`` is that of the job."""
    data = {
        "format_version": 1,
        "job": identity,
        "shard": stats.number,
        "images": stats.images,
        "failed": [{"id": one.id, "where": one.where, "reason": one.reason} for one in stats.failed],
        "tar_sha256": stats.tar_sha256,
    }
    with atomic_file(stats_path(out, stats.number)) as temporary:
        temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def read_stats(out: Path, number: int, *, identity: str) -> ShardStats | None:
    """The stats of a shard that is there, whole, and this job's; None where it must be written (again)."""
    path = stats_path(out, number)
    name = out / shard_name(number)
    try:
        data = parse_json(path.read_bytes())
        if data["job"] != identity or not all(name.with_suffix(end).is_file() for end in (".tar", ".parquet")):
            return None
        failed = tuple(Failed(one["id"], one["where"], one["reason"]) for one in data["failed"])
        return ShardStats(number, data["images"], failed, data["tar_sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
