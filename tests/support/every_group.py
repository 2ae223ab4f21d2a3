"""``pytest --every-group``: all marked groups in one run, and nothing passes for having been left out.

One run of all groups imports, collects and exports once. In it a test that skips itself fails, unless it wants a GPU or
minutes (``TIUE_SLOW``), and so does a group of which nothing ran.
"""

from __future__ import annotations

from collections import Counter

import pytest

GROUPS = ("browser", "install", "load", "openvino", "ray", "rtx", "schemathesis", "slow", "triton")
EXCUSED = ("GPU", "CUDA", "TIUE_SLOW")
"""A reason to skip that holds one of these words is accepted: this machine cannot do better, or should not."""


class EveryGroup:
    """Counts what ran of each group, and says at the end what did not."""

    def __init__(self) -> None:
        self._ran: Counter[str] = Counter()
        self._left_out: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called where the session is summed up: with several processes, in the one that leads them."""
        if report.skipped:
            self._note_skip(report)
        elif report.when == "call":
            self._ran.update(group for group in GROUPS if group in report.keywords)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self._note_skip(report)

    def _note_skip(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(word in reason for word in EXCUSED):
            self._left_out.append(f"{report.nodeid}: {reason}")

    def failures(self) -> list[str]:
        """A line for each thing that should have run."""
        return [*self._left_out, *(f"no test of the group {group} ran" for group in GROUPS if not self._ran[group])]

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.failures() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        counts = ", ".join(f"{group} {self._ran[group]}" for group in GROUPS)
        terminalreporter.write_line(f"every group: {counts}")
        for line in self.failures():
            terminalreporter.write_line(f"LEFT OUT {line}", red=True)
