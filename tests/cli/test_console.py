"""What reaches the terminal while something long runs."""

from __future__ import annotations

import io
import re
import sys

import pytest

from tiue_cli.cli import console as console_module
from tiue_cli.cli.console import Console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("live", [True, False])
def test_stages_show_counts_time_left_and_all_figures_in_80_columns(
    monkeypatch: pytest.MonkeyPatch, live: bool
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    figures = "vsd 0.009946  kl 0.2825  grad_norm 0.5512  lora 0.4864  6.38 images/s  0.5 GiB"
    with Console().stages(live=live) as show:
        show("warm start", 10, 10, "")
        show("distillation", 11, 3000, figures)
        show("distillation", 12, 3000, figures)
    assert isinstance(sys.stderr, Terminal)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sys.stderr.getvalue())
    last = shown.rstrip().splitlines()[-3:]
    assert "warm start" in last[0] and "10/10" in last[0]
    assert "distillation" in last[1] and "12/3000" in last[1] and re.search(r"\d:\d\d:\d\d|-:--:--", last[1])
    assert last[2].strip() == figures


def test_stages_in_a_log_say_how_long_it_will_take(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([100.0, 130.0, 131.0, 159.0])
    monkeypatch.setattr(console_module.time, "monotonic", lambda: next(clock))
    with Console().stages() as show:
        show("distillation", 501, 2000, "a")  # resumed: the 500 steps before took no time now
        show("distillation", 511, 2000, "b")
        show("distillation", 512, 2000, "c")  # a second later: no line
        show("distillation", 521, 2000, "d")  # and 29 s later
    assert capsys.readouterr().err.splitlines() == [
        "distillation 501/2000  a",
        "distillation 511/2000  b  1:14:27 left",  # 1,489 steps of 3 s
    ]
