"""Bars where somebody watches, silence elsewhere."""

from __future__ import annotations

import io
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


def test_a_pipe_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    with progress() as on_event:
        assert on_event is None
    assert pipe.getvalue() == ""
