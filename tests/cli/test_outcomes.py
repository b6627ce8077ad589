"""How commands end: exit codes, messages, and a quiet stdout."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from cli import fake_api
from cli.conftest import Invoke
from halfbin.cli import interruption
from halfbin.cli.outcome import outcome
from halfbin.errors import FormatError, HalfbinError, OutputError, SchemeError
from halfbin.run.report import Report

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, str(ROOT / "tests/cli/fake_api.py")]


@pytest.mark.parametrize("kind", [SchemeError, FormatError, OutputError], ids=lambda kind: kind.__name__)
def test_what_the_user_can_mend_is_told_without_a_traceback(invoke: Invoke, kind: type[HalfbinError]) -> None:
    error = kind("group_size=48 does not divide [64]")
    error.add_note("while quantizing 'model.layers.3.mlp.up_proj'")
    fake_api.OUTCOMES["m"] = error
    result = invoke("quantize", "m", "-o", "never", "--json")
    assert result.exit_code == 1 and result.stdout == ""
    assert "error: group_size=48 does not divide [64]\n  while quantizing 'model.layers.3.mlp.up_proj'" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_missing_file_is_told_by_name(invoke: Invoke) -> None:
    fake_api.OUTCOMES["m"] = FileNotFoundError(2, "No such file or directory", "m/config.json")
    result = invoke("inspect", "m")
    assert result.exit_code == 1 and "error: No such file or directory: m/config.json" in result.stderr


def test_a_fault_keeps_its_traceback_and_asks_for_a_report(invoke: Invoke) -> None:
    result = invoke("evaluate", "fault")
    assert result.exit_code == 70 and result.stdout == ""
    assert "ZeroDivisionError: a planted fault" in result.stderr and "please report it" in result.stderr


def test_a_limit_fails_with_the_report_printed_all_the_same(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("quantize", "m", "-o", tmp_path / "out", "--max-kl", "0.1", "--json")
    assert result.exit_code == 1 and "above --max-kl" in result.stderr
    assert Report.from_json(json.loads(result.stdout)).kl is not None


def test_a_missing_output_is_a_matter_of_usage(invoke: Invoke) -> None:
    result = invoke("quantize", "m")
    assert result.exit_code == 2 and "--dry-run" in result.stderr
    assert not fake_api.CALLS


def test_an_interruption_that_a_library_turned_into_an_error_is_one_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(interruption, "_arrived", [signal.SIGINT])
    with pytest.raises(typer.Exit) as caught, outcome():
        raise RecursionError("in the middle of an import")
    said = capsys.readouterr().err
    assert caught.value.exit_code == 130 and "interrupted" in said and "Traceback" not in said


def test_before_the_work_an_interruption_ends_the_program_whatever_a_library_would_make_of_it() -> None:
    swallowed = "try: os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException: pass\nprint('it went on')"
    program = f"import os, signal\nfrom halfbin.cli import interruption\ninterruption.listen()\n{swallowed}"
    source = {"PYTHONPATH": str(ROOT / "src")}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=os.environ | source
    )
    assert (result.returncode, result.stdout) == (130, "") and result.stderr == "interrupted; nothing was written\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_an_interruption_says_what_became_of_the_output(tmp_path: Path, number: signal.Signals) -> None:
    with subprocess.Popen(
        [*PROGRAM, "quantize", "hang", "-o", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        while "ready" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130 and stdout == ""
    assert f"interrupted; nothing was written to {tmp_path / 'out'}" in stderr and "Traceback" not in stderr


def test_an_interruption_after_the_result_was_written_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as caught, outcome(tmp_path):
        (tmp_path / "report.json").write_text("{}")
        raise KeyboardInterrupt
    assert caught.value.exit_code == 130
    assert "was written; it is complete" in " ".join(capsys.readouterr().err.split())


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        result = subprocess.run(
            [*PROGRAM, "quantize", "m", "--dry-run"], stdout=write_end, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(write_end)
    assert result.returncode == 141 and result.stderr == ""


def test_stdout_is_one_document_and_stderr_holds_the_rest(tmp_path: Path) -> None:
    result = subprocess.run(
        [*PROGRAM, "quantize", "m", "-o", str(tmp_path / "out"), "--json"], capture_output=True, text=True, check=True
    )
    assert Report.from_json(json.loads(result.stdout)).model == "m"
    assert result.stderr == "a library talks to stdout\nwarning: a library warns\n"
