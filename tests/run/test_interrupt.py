"""Ctrl-C and SIGTERM in the middle of the work: exit code 130, and everything is as it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import halfbin as hb
from halfbin.run.events import Event
from run.small_models import TEXT, write_model

SOURCE = Path(__file__).parents[2] / "src"
PATIENCE_SECONDS = 120


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize(
    ("number", "sign"),
    [
        pytest.param(signal.SIGINT, ".", id="ctrl-c while weights are written"),
        pytest.param(signal.SIGTERM, "config.json", id="sigterm after they were"),
    ],
)
def test_an_interrupted_program_leaves_nothing_behind(number: signal.Signals, sign: str, tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    command = [sys.executable, "-m", "halfbin", "quantize", "demo", "-o", str(out)]
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(SOURCE)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (partial / sign).exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(number)
    said_out, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130, said
    assert f"interrupted; nothing was written to {out}" in " ".join(said.split())
    assert "Traceback" not in said and said_out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("earlier", [False, True], ids=["first result", "with --force"])
@pytest.mark.parametrize(
    ("stage", "share"),
    [
        ("quantizing", 0.0),
        ("quantizing", 0.5),
        ("quantizing", 1.0),
        ("checking", 0.0),
        ("checking", 1.0),
        ("evaluating", 0.5),
    ],
)
def test_an_interruption_at_any_stage_leaves_everything_as_it_was(
    stage: str, share: float, earlier: bool, tmp_path: Path
) -> None:
    source = write_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    if earlier:
        hb.quantize(source, tmp_path / "out", recipe="int8", evaluate=False)
    before = contents(tmp_path)
    reached = []

    def stop(event: Event) -> None:
        if event.stage == stage and event.done >= share * event.total:
            reached.append(event)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hb.quantize(source, tmp_path / "out", recipe="int4", text=tmp_path / "text.txt", force=earlier, on_event=stop)
    assert len(reached) == 1 and contents(tmp_path) == before
    hb.quantize(source, tmp_path / "out", recipe="int4", evaluate=False, force=earlier)
    assert (tmp_path / "out" / "report.json").exists() and len(list(tmp_path.iterdir())) == 3
