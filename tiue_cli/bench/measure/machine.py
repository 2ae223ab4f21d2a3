"""What else the machine did while it was measured: other processes, a hypervisor's theft, a clock that sinks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import psutil
import torch

from tiue_cli.bench.stats import drift, summarize

BUSY_SHARE: Final = 0.05
"""Of the machine's processor time that others may use before it is said."""
STOLEN_SHARE: Final = 0.01
DRIFT: Final = 0.05
"""Change of the control product's time from the first third of the rounds to the last."""
UNSTEADY: Final = 1.3
"""Its 90th percentile as a multiple of its median."""

_LEAST_CONTROLS: Final = 6
_CONTROL_SIDE: Final = {"cpu": 512, "cuda": 4096}


class Control:
    """One fixed matrix product, timed at the begin of each round: what changes in it is the machine.

    The fastest of REPEATS, as the first one finds caches full of a model and its threads asleep.
    """

    REPEATS: Final = 3

    def __init__(self, device: str) -> None:
        side = _CONTROL_SIDE[device]
        generator = torch.Generator(device).manual_seed(0)
        dtype = torch.float16 if device == "cuda" else torch.float32
        self._device = device
        self._left, self._right = (
            torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2)
        )
        self.run_ms()

    def run_ms(self) -> float:
        """Milliseconds of one product."""
        return min(self._once_ms() for _ in range(self.REPEATS))

    def _once_ms(self) -> float:
        if self._device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        torch.mm(self._left, self._right)
        if self._device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) * 1000.0


@dataclass(frozen=True)
class MachineUse:
    """Shares, 0 to 1, of the machine's processor time during the rounds; None where the system does not say."""

    wall_s: float
    others: float | None
    stolen: float | None


@contextlib.contextmanager
def watch_machine() -> Iterator[Callable[[], MachineUse]]:
    """Watch the block; the function that is yielded says afterwards what else ran."""
    process = psutil.Process()
    system, own, started = psutil.cpu_times(), process.cpu_times(), time.perf_counter()
    result: list[MachineUse] = []
    yield lambda: result[0]
    wall_s = time.perf_counter() - started
    system_after, own_after = psutil.cpu_times(), process.cpu_times()
    spent = {name: getattr(system_after, name) - getattr(system, name) for name in system._fields}
    # Guests are counted within user time as well.
    total = sum(value for name, value in spent.items() if not name.startswith("guest"))
    idle = spent.get("idle", 0.0) + spent.get("iowait", 0.0)
    stolen = spent.get("steal")
    ours = (own_after.user + own_after.system) - (own.user + own.system)
    if total <= 0:
        result.append(MachineUse(wall_s, None, None))
        return
    others = total - idle - (stolen or 0.0) - ours
    result.append(
        MachineUse(
            wall_s,
            others=max(0.0, others / total),
            stolen=None if stolen is None else max(0.0, stolen / total),
        )
    )


def machine_warnings(use: MachineUse, control_ms: Sequence[float], *, where: str) -> list[str]:
    """Sentences on what makes the figures of ``where`` less believable; empty on a quiet machine."""
    found = []
    if use.others is not None and use.others > BUSY_SHARE:
        found.append(f"{where}: the machine was busy: other processes used {use.others:.0%} of its processor time")
    if use.stolen is not None and use.stolen > STOLEN_SHARE:
        found.append(f"{where}: the hypervisor took {use.stolen:.0%} of the processor time for other guests")
    if len(control_ms) >= _LEAST_CONTROLS:
        changed = drift(control_ms)
        if abs(changed) > DRIFT:
            how = "slower: it throttled, or others ran" if changed > 0 else "faster"
            found.append(
                f"{where}: a fixed matrix product became {abs(changed):.0%} {how} from the first rounds to the last"
            )
        figures = summarize(control_ms)
        if figures.p90 > UNSTEADY * figures.median:
            found.append(
                f"{where}: the machine was unsteady: a fixed matrix product took {figures.median:.2f} ms in the"
                f" median and {figures.p90:.2f} ms in every tenth round"
            )
    return found
