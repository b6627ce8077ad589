"""Ctrl-C and SIGTERM in the middle of the work: exit code 130, and everything is as it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
PATIENCE_SECONDS = 120


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_an_interrupted_run_leaves_nothing_behind(number: signal.Signals, tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    command = [sys.executable, "-m", "halfbin", "quantize", "demo", "-o", str(out)]
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(SOURCE)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (partial / "config.json").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    said_out, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130, said
    assert f"interrupted; nothing was written to {out}" in " ".join(said.split())
    assert "Traceback" not in said and said_out == ""
    assert list(tmp_path.iterdir()) == []
