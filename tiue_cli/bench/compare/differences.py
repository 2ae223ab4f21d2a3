"""What else differs between two bench reports: to be read before any figure is compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tiue_cli.base.text import plain
from tiue_cli.bench.report.schema import BenchReport
from tiue_cli.bench.report.tables import HASH_DIGITS
from tiue_cli.bench.report.view import Setting

# What is left out follows from the rest, or is a figure or a text.
_SUBJECT_REST = {"key", "label", "model", "weights_bytes", "load_s", "build_s", "parity", "notes"}
_PROTOCOL_REST = {"prompts", "seeds", "reference", "clip", "comparable", "notes"}
_WORDS = {
    "memory_bytes": "memory in bytes", "gpu": "GPU", "cpu": "CPU", "model_sha256": "model hash",
    "prompts_sha256": "hash of the prompts", "reference_sha256": "hash of the references",
    "extractor_sha256": "hash of the extractor", "clip_sha256": "hash of the CLIP model",
}  # fmt: skip


def report_differences(old: BenchReport, new: BenchReport) -> tuple[str, ...]:
    """One sentence a difference: machine and versions first, then settings, then the subjects."""
    found = (*_of_machine(old, new), *_of_settings(old, new), *_of_subjects(old, new), *_of_latency(old, new))
    return tuple(plain(sentence) for sentence in found)


def quality_obstacle(old: BenchReport, new: BenchReport) -> str | None:
    """Why the quality of two reports cannot be compared; None where it can, or where neither has any."""
    before, after = old.quality_protocol, new.quality_protocol
    if before is None and after is None:
        return None
    if before is None or after is None:
        return f"only the {'new' if before is None else 'old'} report has it"
    rest = _PROTOCOL_REST
    found = list(_changes("", before.model_dump(exclude=rest), after.model_dump(exclude=rest)))
    return None if not found else "another protocol: " + "; ".join(found)


def _of_machine(old: BenchReport, new: BenchReport) -> Iterator[str]:
    machines = [report.machine.model_dump(exclude={"packages"}) for report in (old, new)]
    versions = [{"tiue": report.tiue_version, "commit": report.commit} for report in (old, new)]
    yield from _changes("machine: ", *machines)
    yield from _changes("package ", old.machine.packages, new.machine.packages)
    yield from _changes("", *versions)


def _of_settings(old: BenchReport, new: BenchReport) -> Iterator[str]:
    if old.seed != new.seed:
        yield f"seed {old.seed} → {new.seed}"
    if old.prompts != new.prompts:
        yield "other prompts for the latency"


def _of_subjects(old: BenchReport, new: BenchReport) -> Iterator[str]:
    before, after = ({subject.key: subject for subject in report.subjects} for report in (old, new))
    for key, subject in after.items():
        if key in before:
            fields = [one.model_dump(exclude=_SUBJECT_REST) for one in (before[key], subject)]
            yield from _changes(f"{key}: ", *fields)
    for which, keys in (("old", before.keys() - after.keys()), ("new", after.keys() - before.keys())):
        if keys:
            yield f"only in the {which} report: {', '.join(sorted(keys))}"


def _of_latency(old: BenchReport, new: BenchReport) -> Iterator[str]:
    common = {subject.key for subject in old.subjects} & {subject.key for subject in new.subjects}
    before, after = ({(one.subject, Setting.of(one)): one for one in report.latency} for report in (old, new))
    for which, only in (("old", before.keys() - after.keys()), ("new", after.keys() - before.keys())):
        shapes = sorted({(setting.batch, setting.size) for subject, setting in only if subject in common})
        if shapes:
            listed = ", ".join(f"batch {batch} at {size[0]}x{size[1]}" for batch, size in shapes)
            yield f"measured in the {which} report only, for some subjects: {listed}"
    clocks = {
        f"clock of the stages: {before[key].clock} → {record.clock}"
        for key, record in after.items()
        if key in before and before[key].clock != record.clock
    }
    yield from sorted(clocks)


def _changes(prefix: str, old: Mapping[str, object], new: Mapping[str, object]) -> Iterator[str]:
    for name in [*old, *(name for name in new if name not in old)]:
        before, after = old.get(name), new.get(name)
        if before != after:
            yield f"{prefix}{_WORDS.get(name, name.replace('_', ' '))} {_shown(name, before)} → {_shown(name, after)}"


def _shown(name: str, value: object) -> str:
    if value is None:
        return "none"
    text = str(value)
    return text[:HASH_DIGITS] if name.endswith("sha256") or name == "commit" else text
