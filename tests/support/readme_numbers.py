"""Figures in the documentation that come from a committed bench report, and whether they still say what it says.

A marker stands right before the figure that it vouches for::

    <!-- bench: papercut_cpu_2026-01-02.json#papercut-student/torch/k4 batch=1 p50 -->47.3 ms
    <!-- bench: a/b.json#papercut-student/onnx/k4 batch=1 speedup baseline=papercut-teacher/torch/25-steps -->**15.0** ×

that is: the report's path below ``benchmarks/``, ``#``, the subject's key, settings, and the name of a figure:

    p50, p90, p99, iqr, first_call       of a batch, in ms (or unit=s)
    p50 stage=unet_decoder               the median of a stage
    images_per_s, runs                   at the median; how many runs there were
    memory                               unit=MiB or unit=GiB
    share                                of the machine's peak, unit=%
    ratio, ratio_low, ratio_high         with baseline=KEY, and scope=unet for the UNet alone
    speedup, speedup_low, speedup_high   the same upside down
    load, build                          in s
    fid, recall, checker_all, …          the mean of a quality metric (no batch; unit=% for a share)

A figure of any other JSON file is named by the keys that lead to it; of a list, the entry that is named so::

    <!-- json: papercut/results/comparison.json#rows/last-k4/mean/recall -->0.998

``batch=N`` is needed where the figure has one, ``size=HxW`` where the report has several sizes. The figure in the text
is the first number after the marker; it must be what the report gives when rounded to as many decimals.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from tiue_cli.bench.report.files import read_report
from tiue_cli.bench.report.schema import LatencyRecord, RatioRecord
from tiue_cli.bench.report.view import ReportView, Setting
from tiue_cli.errors import TiueError

_ANY = re.compile(r"<!--\s*bench\b")
_MARKER = re.compile(r"<!--\s*bench:\s*(?P<file>[^#\s]+\.json)#(?P<subject>\S+)(?P<words>(?:\s+\S+)*?)\s*-->")
_JSON = re.compile(r"<!-- json: (?P<file>[^#\s]+\.json)#(?P<keys>[^>]+?) -->")
_NUMBER = re.compile(r"[ *_≈~+]*(?P<number>-?\d[\d,]*(?:\.\d+)?)")
_UNITS = {"ms": 1.0, "s": 1e-3, "MiB": 2.0**-20, "GiB": 2.0**-30, "%": 100.0}
_PERCENTILES = {"p50": 50, "p90": 90, "p99": 99}
_SETTINGS = {"batch", "size", "stage", "scope", "baseline", "unit"}


class MarkerError(Exception):
    """A marker that cannot be understood, or that names what the report does not have."""


@dataclass(frozen=True)
class Marker:
    """One marker and the figure behind it, as printed."""

    line: int
    file: str
    subject: str
    figure: str
    settings: Mapping[str, str]
    printed: str


def find_markers(text: str) -> list[Marker]:
    """All markers of a document. Raises MarkerError for one that is not written as it must be, or has no figure."""
    found = []
    for line, content in enumerate(text.splitlines(), 1):
        matches = list(_MARKER.finditer(content))
        if len(matches) != len(_ANY.findall(content)):
            raise MarkerError(f"line {line}: a marker is not of the form FILE.json#SUBJECT [batch=N …] FIGURE")
        for match in matches:
            words = match["words"].split()
            settings = dict(word.split("=", 1) for word in words if "=" in word)
            figures = [word for word in words if "=" not in word]
            number = _NUMBER.match(content, match.end())
            if len(figures) != 1 or not settings.keys() <= _SETTINGS:
                raise MarkerError(f"line {line}: one figure, and settings among {', '.join(sorted(_SETTINGS))}")
            if number is None:
                raise MarkerError(f"line {line}: no number follows the marker")
            found.append(Marker(line, match["file"], match["subject"], figures[0], settings, number["number"]))
    return found


def json_faults(text: str, folder: Path) -> list[str]:
    """What is wrong with the figures of a document that are marked as those of a JSON file in ``folder``."""
    found = []
    for line, content in enumerate(text.splitlines(), 1):
        matches = list(_JSON.finditer(content))
        if len(matches) != content.count("<!-- json"):
            found.append(f"line {line}: a marker is not of the form FILE.json#KEY/KEY")
        for match in matches:
            printed = _NUMBER.match(content, match.end())
            value = json_value(folder / match["file"], match["keys"].split("/"))
            if printed is None or value is None:
                found.append(f"line {line}: {'no number' if printed is None else match['keys'] + ' is not there'}")
            elif as_printed(value, printed["number"]) != printed["number"].replace(",", ""):
                found.append(f"line {line}: {printed['number']} is {value} in {match['file']}")
    return found


def json_value(path: Path, keys: list[str]) -> float | None:
    """The number that ``keys`` lead to; an entry of a list is found by its ``name``. None where there is none."""
    if not path.is_file():
        return None
    value = json.loads(path.read_text(encoding="utf-8"))
    for key in keys:
        if isinstance(value, list):
            value = next((entry for entry in value if entry.get("name") == key), None)
        else:
            value = value.get(key) if isinstance(value, dict) else None
    return float(value) if isinstance(value, int | float) else None


def faults(text: str, folder: Path) -> list[str]:
    """What is wrong with the marked figures of a document; reports lie in ``folder``. Empty where all are right."""
    try:
        markers = find_markers(text)
    except MarkerError as error:
        return [str(error)]
    found = []
    for marker in markers:
        try:
            wanted = as_printed(value_of(marker, folder), marker.printed)
        except (MarkerError, TiueError) as error:
            found.append(f"line {marker.line}: {error}")
            continue
        if wanted != marker.printed.replace(",", ""):
            found.append(f"line {marker.line}: {marker.printed} is {wanted} in {marker.file}")
    return found


def as_printed(value: float, printed: str) -> str:
    """The value with as many decimals as ``printed`` has, without thousands separators."""
    return f"{value:.{len(printed.partition('.')[2])}f}"


def value_of(marker: Marker, folder: Path) -> float:
    """The figure in the report, in the unit that the marker asks for. Raises MarkerError, ManifestError."""
    view = _view(folder / marker.file)
    if marker.subject not in view.subjects and marker.subject not in view.quality:
        raise MarkerError(f"{marker.file} has no subject {marker.subject}")
    value = _value(marker, view)
    if value is None:
        raise MarkerError(f"{marker.file} has no {marker.figure} of {marker.subject} there")
    unit = marker.settings.get("unit")
    if unit is not None and unit not in _UNITS:
        raise MarkerError(f"unit {unit}: there are {', '.join(_UNITS)}")
    return value * (1.0 if unit is None else _UNITS[unit])


@cache
def _view(path: Path) -> ReportView:
    return ReportView(read_report(path))


def _value(marker: Marker, view: ReportView) -> float | None:
    figure, key = marker.figure, marker.subject
    if figure in ("load", "build"):
        subject = view.subjects[key]
        return subject.load_s if figure == "load" else subject.build_s
    if "batch" not in marker.settings:
        quality = view.quality.get(key)
        return None if quality is None else quality.metrics.get(figure)
    place = _place(marker, view)
    if figure.startswith(("ratio", "speedup")):
        return _ratio_value(marker, view, place)
    record = view.latency(key, place)
    return None if record is None else _latency_value(marker, view, record)


def _place(marker: Marker, view: ReportView) -> Setting:
    sizes = {place.size for place in view.settings}
    for name, form in (("batch", r"\d+"), ("size", r"\d+x\d+")):
        if name in marker.settings and not re.fullmatch(form, marker.settings[name]):
            raise MarkerError(f"{name}={marker.settings[name]} is not understood")
    if "size" in marker.settings:
        height, _, width = marker.settings["size"].partition("x")
        size = int(height), int(width)
    elif len(sizes) == 1:
        (size,) = sizes
    else:
        raise MarkerError(f"{marker.file} has several sizes: add size=HxW")
    return Setting(int(marker.settings["batch"]), size)


def _ratio_value(marker: Marker, view: ReportView, place: Setting) -> float | None:
    baseline, scope = marker.settings.get("baseline"), marker.settings.get("scope", "image")
    if baseline is None or scope not in ("image", "unet"):
        raise MarkerError("a ratio needs baseline=KEY, and scope is image or unet")
    ratio: RatioRecord | None = view.ratio(marker.subject, baseline, place, "unet" if scope == "unet" else "image")
    if ratio is None:
        return None
    parts = {
        "ratio": ratio.ratio, "ratio_low": ratio.low, "ratio_high": ratio.high,
        "speedup": ratio.ratio, "speedup_low": ratio.high, "speedup_high": ratio.low,
    }  # fmt: skip
    part = parts.get(marker.figure)
    return part if part is None or marker.figure.startswith("ratio") else 1 / part


def _latency_value(marker: Marker, view: ReportView, record: LatencyRecord) -> float | None:
    figure, stage = marker.figure, marker.settings.get("stage")
    stages: Mapping[str, tuple[float, ...]] = {str(name): samples for name, samples in record.stage_samples_ms.items()}
    if stage is not None and stage not in stages:
        return None
    samples = record.samples_ms if stage is None else stages[stage]
    if figure in _PERCENTILES:
        return float(np.percentile(samples, _PERCENTILES[figure]))
    if stage is not None:
        return None
    memory = record.peak_memory_bytes
    figures = {
        "iqr": view.summary(record).iqr,
        "first_call": record.first_call_ms,
        "images_per_s": view.images_per_s(record),
        "runs": float(len(samples)),
        "memory": None if memory is None else float(memory),
        "share": view.share_of_peak(record),
    }
    return figures.get(figure)
