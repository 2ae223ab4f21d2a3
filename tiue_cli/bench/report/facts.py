"""What stands beside the figures: machine, versions, settings and the protocol of the quality, as (name, value)."""

from __future__ import annotations

import numpy as np

from tiue_cli.bench.report.view import HASH_DIGITS, ReportView
from tiue_cli.text import bytes_text, number


def machine_facts(view: ReportView) -> list[tuple[str, str]]:
    """Where and with what it ran."""
    report = view.report
    machine, peak = report.machine, report.peak
    facts = [
        ("machine", machine.name),
        ("system", machine.system),
        ("CPU", f"{machine.cpu}, {machine.cores} cores, {machine.threads} threads used"),
    ]
    if machine.memory_bytes is not None:
        facts.append(("memory", bytes_text(machine.memory_bytes)))
    facts.append(("GPU", "none" if machine.gpu is None else machine.gpu))
    if machine.driver is not None:
        facts.append(("driver", machine.driver))
    if peak is not None:
        as_what = "" if peak.kernel == "matrix product" else f" (a {peak.kernel.replace('x', '×')})"
        facts.append(
            (
                "peak",
                f"{number(peak.flops_per_s / 1e12)} TFLOP/s in {peak.precision} on {peak.device}: "
                f"a {' × '.join(map(str, peak.shape))} matrix product{as_what}, measured in this run",
            )
        )
    versions = {"tiue": report.tiue_version, "Python": machine.python, **machine.packages}
    facts.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)))
    facts.append(("commit", report.commit or "unknown"))
    facts.append(("date", report.created))
    return facts


def run_facts(view: ReportView) -> list[tuple[str, str]]:
    """What was run: prompts, seed, rounds."""
    report = view.report
    facts = [("prompts", "; ".join(report.prompts)), ("seed", str(report.seed))]
    if view.places:
        facts.append(("measured at", "; ".join(place.words for place in view.places)))
    if report.control_samples_ms:
        samples = report.control_samples_ms
        facts.append(
            (
                "steadiness",
                f"a fixed matrix product at the begin of each of {len(samples)} rounds took "
                f"{number(float(np.median(samples)))} ms in the median, "
                f"{number(float(np.percentile(samples, 90)))} ms at most in 90 % of them",
            )
        )
    return facts


def quality_facts(view: ReportView) -> list[tuple[str, str]]:
    """How quality was measured; empty where it was not."""
    protocol = view.report.quality_protocol
    if protocol is None:
        return []
    facts = [
        ("comparable", "with published figures" if protocol.comparable else "not with published figures"),
        ("images", f"{protocol.images} of each subject, seeds from {', '.join(map(str, protocol.seeds))}"),
        ("prompts", f"{protocol.prompts} ({protocol.prompts_sha256[:HASH_DIGITS]})"),
        ("reference", f"{protocol.reference}, {protocol.reference_images} images{_hash(protocol.reference_sha256)}"),
        ("features", f"{protocol.extractor}, {protocol.features} of them{_hash(protocol.extractor_sha256)}"),
        ("resize", protocol.resize),
        ("neighbours", f"k = {protocol.k}"),
    ]
    if protocol.diversity is not None:
        facts.append(("diversity", protocol.diversity))
    if protocol.clip is not None:
        facts.append(("CLIP model", f"{protocol.clip}{_hash(protocol.clip_sha256)}"))
    return facts + [("note", note) for note in protocol.notes]


def _hash(sha256: str | None) -> str:
    return "" if sha256 is None else f" ({sha256[:HASH_DIGITS]})"
