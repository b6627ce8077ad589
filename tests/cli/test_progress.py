"""Bars where somebody watches, silence elsewhere."""

from __future__ import annotations

import io
import re
import sys

import pytest

from halfbin.cli.progress import progress
from halfbin.run.events import Event


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_bar_per_stage_on_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, out = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    with progress() as on_event:
        assert on_event is not None
        for done in (0, 500, 1000):
            on_event(Event("quantizing", done, 1000, "bytes", "model\x1b[2Jevil"))
        on_event(Event("evaluating", 1, 3, "windows"))
    shown = screen.getvalue()
    assert "quantizing" in shown and "1.00 kB of 1.00 kB" in shown
    assert "evaluating" in shown and "1 of 3 windows" in shown
    assert "\x1b[2J" not in shown and out.getvalue() == ""


def test_the_estimate_comes_from_the_whole_stage_and_fits_into_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, clock = Terminal(), [0.0]
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("rich.console.monotonic", lambda: clock[0])
    with progress() as on_event:
        assert on_event is not None
        on_event(Event("evaluating", 0, 0, "windows"))
        for done in range(1, 4):  # one step takes longer than the 30 s that Rich remembers
            clock[0] = 100.0 * done
            on_event(Event("evaluating", 100 * done, 1000, "windows", "model.layers.31.mlp.down_proj " * 3))
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue()).replace("\r", "\n").splitlines()
    last = [line for line in lines if "evaluating" in line][-1]
    assert "300 of 1,000 windows" in last and "~11 min 40 s left" in last and len(last) <= 80


def test_a_stage_without_a_count_ends_when_the_next_one_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, clock = Terminal(), [0.0]
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("rich.console.monotonic", lambda: clock[0])
    with progress() as on_event:
        assert on_event is not None
        on_event(Event("checking", 0, 0, "models"))
        clock[0] = 5.0
        on_event(Event("evaluating", 0, 0, "windows"))
        clock[0] = 3605.0
        on_event(Event("evaluating", 2, 2, "windows"))
    shown = screen.getvalue()
    assert "starting" not in shown.rpartition("checking")[2], "what was shown before the first stage is gone"
    assert "0:00:05" in shown.rpartition("checking")[2] and "models" not in shown


def test_a_pipe_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    with progress() as on_event:
        assert on_event is None
    assert pipe.getvalue() == ""
