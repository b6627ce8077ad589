"""A whole run on the embedded model, with little text: what it says while it works, and what it says of its measure."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from halfbin import api, demo
from halfbin.cli.demo import BEFORE
from halfbin.run.events import Event
from halfbin.run.job import model_directory


def test_the_demo_announces_exactly_the_stages_that_a_run_goes_through(tmp_path: Path) -> None:
    events: list[Event] = []
    report = api.quantize("demo", tmp_path / "out", max_tokens=600, on_event=events.append)
    stages = list(dict.fromkeys(event.stage for event in events))
    assert stages == re.findall(r"^([a-z]+ing)  ", BEFORE, flags=re.MULTILINE)
    assert stages == list(report.timings)
    steps = [(event.done, event.total) for event in events if event.stage == "evaluating" and event.total]
    # 600 tokens are two windows, and each is read by the original, the result, and the result in its default type.
    assert steps == sorted(steps) and steps[-1] == (6, 6)
    found = report.evaluation
    assert found is not None and (found.context, found.stride, found.bos, found.num_tokens) == (512, 511, 0, 600)
    assert found.definition.startswith("context 512, windows of 511 tokens without overlap")


def test_an_evaluation_says_how_its_text_was_cut(tmp_path: Path) -> None:
    found = api.evaluate("demo", max_tokens=100, context=32, stride=8).definition
    assert found is not None and (found.context, found.stride, found.bos) == (32, 8, 0)


def test_demo_is_the_embedded_model_also_beside_a_directory_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert model_directory("demo") == demo.model_path()
    assert model_directory("./demo").resolve() == model_directory(Path("demo")).resolve() == tmp_path / "demo"
