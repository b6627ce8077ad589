"""Each command: what it calls, what it prints, and that `--json` prints one document and nothing else."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cli import fake_api
from cli.conftest import Invoke
from halfbin.cli.plan_table import plan_table
from halfbin.run.report import Report


def test_quantize_passes_every_option_on(invoke: Invoke, tmp_path: Path) -> None:
    invoke(
        "quantize", "m", "-o", tmp_path / "out", "--recipe", "nf4", "--format", "halfbin", "--text", "t.txt",
        "--max-tokens", "9", "--no-evaluate", "--force", "--device", "cuda", "--trust-remote-code",
        "--calibration", "c.jsonl", "--num-samples", "7", "--sample-length", "64", "--seed", "3",
        "--activations", "disk", "--untie", "--all-experts",
    )  # fmt: skip
    (call,) = fake_api.CALLS
    assert call == {
        "verb": "quantize",
        "model": "m",
        "output": tmp_path / "out",
        "recipe": "nf4",
        "format": "halfbin",
        "text": Path("t.txt"),
        "max_tokens": 9,
        "evaluate": False,
        "force": True,
        "trust_remote_code": True,
        "device": "cuda",
        "max_kl": None,
        "calibration": Path("c.jsonl"),
        "num_samples": 7,
        "sample_length": 64,
        "seed": 3,
        "activations": "disk",
        "untie": True,
        "all_experts": True,
        "on_event": None,  # nobody is watching: not a terminal
    }


def test_quantize_prints_what_people_ask_first(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("quantize", "m", "-o", tmp_path / "out")
    assert result.exit_code == 0
    shown = " ".join(result.stdout.split())
    for expected in ("1.04 MB", "194 kB", "5.36×", "3.963", "4.569", "+15.29 %", "bfloat16 (default load)", "0.143",
                     "p99 0.902", "84.21 %", "model.layers.4.mlp.down_proj", "412 MB", "report.html", "from_pretrained",
                     "warning: 5 sites", "every token scored once"):  # fmt: skip
        assert expected in shown, expected


def test_what_libraries_say_stays_off_stdout_and_bars_stay_off_pipes(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("quantize", "m", "-o", tmp_path / "out", "--json")
    assert "a library talks" in result.stderr and "a library talks" not in result.stdout
    assert "quantizing" not in result.stderr


def test_json_of_quantize_is_the_report(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("quantize", "m", "-o", tmp_path / "out", "--json")
    assert Report.from_json(json.loads(result.stdout)).model == "m"


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        pytest.param(["quantize", "m", "--dry-run"], {"output_bytes", "peak_memory_bytes", "sites"}, id="plan"),
        pytest.param(["inspect", "c"], {"inspection_version", "tensors", "bytes", "bits_per_weight"}, id="inspect"),
        pytest.param(["bench", "m"], {"streaming_bytes_per_second", "codes", "floats", "layers"}, id="bench"),
        pytest.param(["evaluate", "a"], {"perplexity", "nll", "num_tokens", "evaluation"}, id="evaluate"),
        pytest.param(["evaluate", "a", "b"], {"before", "after", "kl", "top1_agreement", "evaluation"}, id="compare"),
    ],
)
def test_json_is_one_document(invoke: Invoke, arguments: list[str], keys: set[str]) -> None:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    assert document.keys() >= keys


def test_a_plan_collapses_layers_and_writes_nothing(invoke: Invoke) -> None:
    result = invoke("quantize", "m", "--dry-run")
    assert [call["verb"] for call in fake_api.CALLS] == ["plan"]
    rows = [line for line in result.stdout.splitlines() if "model.layers" in line]
    assert len(rows) == 2
    assert "model.layers.*.mlp.up_proj" in rows[1] and "×32" in rows[1] and "262 kB" in rows[1]
    assert "64 sites of 65 would be quantized" in result.stdout
    assert "nothing was written" in result.stdout


@pytest.mark.parametrize(("more", "told"), [(0, False), (250_000, True)], ids=["none", "some"])
def test_a_plan_tells_what_columns_in_16_bits_may_add(more: int, told: bool) -> None:
    plan = {
        "model": "m",
        "recipe": "llm-int8",
        "layout": "halfbin",
        "input_bytes": 2_000_000,
        "output_bytes": 1_000_000,
        "output_bytes_at_most": 1_000_000 + more,
        "peak_memory_bytes": 1,
        "sites": [],
    }
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(plan_table(plan))
    assert ("2.50 kB for each percent of the columns that data keep" in console.export_text()) is told


def test_inspect_shows_codes_and_totals(invoke: Invoke) -> None:
    result = invoke("inspect", "c")
    assert "int4-g32" in result.stdout and "5.00 where quantized" in result.stdout
    assert "of 16" in result.stdout and "█" in result.stdout and "norm.weight" in result.stdout


def test_evaluate_shows_both_models(invoke: Invoke) -> None:
    result = invoke("evaluate", "a", "b", "--context", "64", "--stride", "32")
    for expected in ("4.000", "5.000", "+25.00 %", "0.100", "84.00 %", "the first and the last 4", "float32"):
        assert expected in result.stdout, expected
    assert fake_api.CALLS[0]["context"] == 64 and fake_api.CALLS[0]["stride"] == 32


@pytest.mark.parametrize("second", [pytest.param([], id="one model"), pytest.param(["b"], id="two models")])
def test_json_of_evaluate_says_how_the_text_was_cut(invoke: Invoke, second: list[str]) -> None:
    result = invoke("evaluate", "a", *second, "--text", "folder/mine.txt", "--json")
    found = json.loads(result.stdout)["evaluation"]
    assert found.pop("definition").startswith("context 9, windows of 8 tokens that begin every 4, BOS (token 0) before")
    assert found == {
        "text": "mine.txt", "num_tokens": 100, "dtype": "float32", "context": 9, "stride": 4, "bos": 0
    }  # fmt: skip


def test_a_plan_names_the_model_as_the_user_did(invoke: Invoke) -> None:
    assert "some/where" in invoke("quantize", "some/where", "--dry-run").stdout
    assert json.loads(invoke("quantize", "some/where", "--dry-run", "--json").stdout)["model"] == "some/where"


def test_the_demo_explains_runs_and_points_on(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("demo", "-o", tmp_path / "demo-out")
    assert result.exit_code == 0
    assert "4.569" in result.stdout and "halfbin inspect" in result.stdout
    assert "4-bit integers" in result.stderr
    assert fake_api.CALLS[0]["model"] == "demo" and not fake_api.CALLS[0]["force"]


def test_the_demo_replaces_an_earlier_demo_and_nothing_else(invoke: Invoke, tmp_path: Path) -> None:
    invoke("demo", "-o", tmp_path / "out")
    invoke("demo", "-o", tmp_path / "out")
    assert fake_api.CALLS[1]["force"]
    invoke("quantize", "mine", "-o", tmp_path / "other")
    invoke("demo", "-o", tmp_path / "other")
    assert not fake_api.CALLS[3]["force"]


def test_bench_shows_speeds_gains_and_on_request_kernels(invoke: Invoke) -> None:
    plain, told = invoke("bench", "m").stdout, invoke("bench", "m", "--explain").stdout
    for expected in ("100", "33.3", "3.00×", "4.00×", "25.00 %", "40.0 GB/s", "reference in 3 layers", "1 tensor"):
        assert expected in plain, expected
    assert "no integers" not in plain
    assert "model.layers.*.up_proj ×3" in told
    assert told.count("int8-inputs: nf4 codes are no integers") == 1  # what holds of every layer is told once
    assert told.index("all of them") < told.index("nf4 codes are no integers")
    assert "it is merged with others" in told


def test_bench_passes_every_option_on(invoke: Invoke) -> None:
    invoke(
        "bench", "m", "--prompt", 7, "--new-tokens", 8, "--rounds", 9, "--threads", 1, "--dtype", "fp32", "--alone",
        "--trust-remote-code",
    )  # fmt: skip
    (call,) = fake_api.CALLS
    assert call == {
        "verb": "bench",
        "model": "m",
        "prompt_tokens": 7,
        "new_tokens": 8,
        "rounds": 9,
        "threads": 1,
        "dtype": "fp32",
        "alone": True,
        "trust_remote_code": True,
        "on_event": None,
    }


def test_markup_and_escapes_in_names_are_not_obeyed(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("quantize", "[red]m[/red]\x1b[31m", "-o", tmp_path / "out")
    assert "[red]m[/red]\ufffd[31m" in result.stdout and "\x1b" not in result.stdout
