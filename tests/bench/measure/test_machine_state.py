"""What disturbs a measurement is noticed, and a quiet machine is not accused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tiue_cli.bench.measure import machine as machine_state
from tiue_cli.bench.measure.machine import MachineUse, machine_warnings, watch_machine
from tiue_cli.bench.measure.memory import watch_memory

QUIET = MachineUse(10.0, others=0.01, stolen=0.0)
STEADY = [5.0, 5.1, 4.9, 5.0, 5.1, 5.0, 4.9, 5.0, 5.1]


def test_a_quiet_machine_gives_no_warning() -> None:
    assert machine_warnings(QUIET, STEADY, where="batch 1") == []
    assert machine_warnings(MachineUse(10.0, None, None), STEADY, where="batch 1") == []


@pytest.mark.parametrize(
    ("use", "control_ms", "words"),
    [
        (MachineUse(10.0, others=0.3, stolen=0.0), STEADY, "other processes used 30%"),
        (MachineUse(10.0, others=0.0, stolen=0.08), STEADY, "hypervisor took 8%"),
        (QUIET, [5.0] * 3 + [6.0] * 3 + [7.0] * 3, "40% slower"),
        (QUIET, [7.0] * 3 + [6.0] * 3 + [5.0] * 3, "29% faster"),
        (QUIET, [5.0, 9.0, 5.0, 5.0, 9.0, 5.0, 5.0, 9.0, 5.0], "unsteady"),
    ],
)
def test_each_disturbance_is_said_with_its_place(use: MachineUse, control_ms: list[float], words: str) -> None:
    (warning,) = machine_warnings(use, control_ms, where="batch 4")
    assert warning.startswith("batch 4: ")
    assert words in warning


def test_shares_are_of_all_processor_time(monkeypatch: pytest.MonkeyPatch) -> None:
    # 2 cores for 10 s: 20 s in all, 6 ours, 4 stolen, 8 idle, so 2 of others.
    fields = ("user", "system", "idle", "iowait", "steal", "guest")

    class Times(SimpleNamespace):
        _fields = fields

    system = iter([Times(user=0, system=0, idle=0, iowait=0, steal=0, guest=0),
                   Times(user=7, system=1, idle=5, iowait=3, steal=4, guest=3)])  # fmt: skip
    own = iter([SimpleNamespace(user=1.0, system=0.0), SimpleNamespace(user=6.0, system=1.0)])
    process: Any = SimpleNamespace(cpu_times=lambda: next(own))
    monkeypatch.setattr(machine_state.psutil, "cpu_times", lambda: next(system))
    monkeypatch.setattr(machine_state.psutil, "Process", lambda: process)
    with watch_machine() as watch:
        pass
    assert watch().others == pytest.approx(2 / 20)
    assert watch().stolen == pytest.approx(4 / 20)


def test_memory_is_what_the_call_had_at_its_peak_and_not_what_it_kept() -> None:
    def spend() -> int:
        block = np.ones(64 * 2**20, dtype=np.uint8)
        return int(block[0])

    result, rise = watch_memory("cpu", spend)
    assert result == 1
    if rise.kind is None:
        pytest.skip("this system does not keep the peak of a process")
    assert (rise.peak_bytes or 0) + 2**20 >= 64 * 2**20
    assert (rise.peak_bytes or 0) < 96 * 2**20
    _, nothing = watch_memory("cpu", lambda: None)
    assert (nothing.peak_bytes or 0) < 4 * 2**20
