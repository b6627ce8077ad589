"""What a run says that it cost: held against the same numbers computed here, by a plain loop."""

from __future__ import annotations

import functools
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from typer.testing import CliRunner

import halfbin as hb
from halfbin.cli.app import app
from halfbin.errors import SchemeError
from halfbin.evaluation import Comparison
from models import zoo
from run.small_models import LETTERS, TEXT, write_model, write_tokenizer

CONTEXT = 32  # of the small model
ROOM = CONTEXT - 1  # the first place is BOS
PROMISED = {"before", "after", "kl", "top1_agreement", "bits_per_weight", "bits_per_weight_total", "sites", "warnings"}
# Log-probabilities of at most 10 nats from float32 logits of size 100 or less, off by some ten roundings: 1e-4 nats a token
# at the very most, and without a common direction. Means of over 600 tokens are held to a tenth of that.
TOLERANCE = 1e-5


@functools.cache
def _root() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="measured-")


@functools.cache
def finished(recipe: str, layout: str) -> tuple[Path, Path, dict[str, Any]]:
    """Source, output and report.json of one measured run of the command line."""
    folder = Path(_root().name) / f"{recipe}-{layout}"
    source = write_model(folder / "model", dtype=torch.bfloat16)
    (folder / "text.txt").write_text(TEXT)
    arguments = ["quantize", source, "-o", folder / "out", "--text", folder / "text.txt", "--recipe", recipe]
    result = CliRunner().invoke(app, [str(a) for a in [*arguments, "--format", layout, "--json"]])
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads((folder / "out" / "report.json").read_text())
    assert json.loads(result.stdout) == report
    return source, folder / "out", report


@torch.no_grad()
def log_probabilities(model: Any) -> tuple[Tensor, Tensor]:
    """For every letter of the text, float64 [letters, vocabulary], and the letters' own tokens."""
    ids = torch.tensor([4 + LETTERS.index(letter) for letter in TEXT])
    rows = [model(torch.cat([torch.tensor([1]), part])[None]).logits[0, :-1] for part in torch.split(ids, ROOM)]
    return torch.cat(rows).double().log_softmax(-1), ids


RUNS = pytest.mark.parametrize(
    ("recipe", "layout"),
    [("int4", "compressed-tensors"), ("int8", "compressed-tensors"), ("nf4", "halfbin"), ("fp8", "safetensors")],
)


@RUNS
def test_the_numbers_are_those_of_a_plain_loop(recipe: str, layout: str) -> None:
    source, out, report = finished(recipe, layout)
    load = transformers.AutoModelForCausalLM.from_pretrained
    before, ids = log_probabilities(load(source, dtype=torch.float32))
    model = hb.load(out, torch.float32, dequantize=True) if layout == "halfbin" else load(out, dtype=torch.float32)
    after, _ = log_probabilities(model)
    for found, expected in ((report["before"], before), (report["after"], after)):
        nll = float(-expected.gather(1, ids[:, None]).mean())
        assert found["nll"] == pytest.approx(nll, abs=TOLERANCE)
        assert found["perplexity"] == pytest.approx(torch.tensor(nll).exp().item(), rel=TOLERANCE)
    kl = (before.exp() * (before - after)).sum(-1)
    assert report["kl"]["mean"] == pytest.approx(float(kl.mean()), abs=TOLERANCE)
    assert report["kl"]["maximum"] == pytest.approx(float(kl.max()), abs=10 * TOLERANCE)
    agreement = float((before.argmax(-1) == after.argmax(-1)).double().mean())
    assert abs(report["top1_agreement"] - agreement) <= 1 / len(ids)  # one near tie may fall either way
    assert float(kl.mean()) > 10 * TOLERANCE, "the model is too flat for this test to tell anything"


@RUNS
def test_the_report_has_its_keys_and_the_plans_sites(recipe: str, layout: str) -> None:
    source, _, report = finished(recipe, layout)
    plan = hb.plan(source, recipe=recipe, format=layout)
    assert report.keys() >= PROMISED
    assert [site["name"] for site in report["sites"]] == [s.site.name for s in plan.sites]
    assert report["before"]["bytes"] == plan.bytes_before and report["after"]["bytes"] == plan.bytes_after
    quantized = [site for site in report["sites"] if site["scheme"]]
    bits = 8 * sum(site["bytes_after"] for site in quantized) / sum(site["num_weights"] for site in quantized)
    assert report["bits_per_weight"] == pytest.approx(bits)
    assert report["left_at_16_bits"] == {"count": 2, "names": ["lm_head", "model.embed_tokens"]}
    assert report["evaluation"]["num_tokens"] == len(TEXT) and report["evaluation"]["text"] == "text.txt"
    # A plain file does not say what its weights were rounded to, so only there no layer's outputs can be compared.
    assert all(site["weight_error"]["relative"] > 0 for site in quantized)
    assert layout == "safetensors" or all(site["output_error"]["relative"] > 0 for site in quantized)


@RUNS
def test_the_page_loads_nothing(recipe: str, layout: str) -> None:
    _, out, report = finished(recipe, layout)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "://" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", page)
    assert not re.search(r'(src|href|srcset|data|action)="(?!#)', page)
    assert all(site["name"] in page for site in report["sites"])


@RUNS
def test_inspection_finds_what_was_planned(recipe: str, layout: str) -> None:
    source, out, report = finished(recipe, layout)
    inspection = hb.inspect(out)
    found = {tensor.name: tensor for tensor in inspection.tensors}
    for planned in hb.plan(source, recipe=recipe, format=layout).sites:
        tensor = found.pop(planned.site.tensor)
        assert tensor.shape == planned.site.shape and tensor.bytes == planned.bytes_after
        assert tensor.weights == ("bfloat16" if layout == "safetensors" else planned.spelled)
    assert {name.split(".")[-2].removesuffix("norm") for name in found} <= {"", "input_layer", "post_attention_layer"}
    assert inspection.bytes == report["after"]["bytes"]


def test_evaluating_the_directories_afterwards_finds_the_same(tmp_path: Path) -> None:
    source, out, report = finished("int4", "compressed-tensors")
    (tmp_path / "text.txt").write_text(TEXT)
    found = hb.evaluate(source, out, text=tmp_path / "text.txt")
    assert isinstance(found, Comparison) and found.definition is not None
    assert found.definition.words == report["evaluation"]["definition"]
    assert found.after.nll == pytest.approx(report["after"]["nll"], abs=TOLERANCE)
    assert found.kl.mean == pytest.approx(report["kl"]["mean"], abs=TOLERANCE)


def test_the_default_load_is_measured_in_the_models_own_type() -> None:
    _, out, report = finished("int8", "compressed-tensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16 and report["after_default_load"]["dtype"] == "bfloat16"
    predicted, ids = log_probabilities(model)
    nll = float(-predicted.gather(1, ids[:, None]).mean())
    assert report["after_default_load"]["nll"] == pytest.approx(nll, rel=2.0**-8)  # sums of bfloat16 in another order


def test_tokenizer_and_generation_settings_come_along_byte_for_byte() -> None:
    source, out, _ = finished("int4", "compressed-tensors")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer("add(one)", add_special_tokens=False)["input_ids"] == [4 + LETTERS.index(x) for x in "add(one)"]


def test_a_limit_that_is_exceeded_leaves_the_result_and_fails(tmp_path: Path) -> None:
    source, _, _ = finished("int4", "compressed-tensors")
    (tmp_path / "text.txt").write_text(TEXT)
    options = ["--text", str(tmp_path / "text.txt"), "--json", "--max-kl"]
    for limit, code in (("1e-9", 1), ("1e9", 0)):
        out = tmp_path / limit
        result = CliRunner().invoke(app, ["quantize", str(source), "-o", str(out), *options, limit])
        assert result.exit_code == code, result.output
        assert ("above --max-kl 1e-09" in result.stderr) == bool(code)
        assert json.loads(result.stdout) == json.loads((out / "report.json").read_text())


def test_an_encoder_is_measured_by_its_embeddings(tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    for path in zoo.directory_of("bert").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    write_tokenizer(source)
    report = hb.quantize(source, tmp_path / "out", recipe="int4", max_tokens=500)
    assert report.kl is None and report.before.perplexity is None
    assert report.embeddings is not None and 0.9 < report.embeddings.mean_cosine < 1


def test_on_a_trained_model_more_bits_cost_less(tmp_path: Path) -> None:
    kl = {}
    for recipe in ("int4", "int8"):
        report = hb.quantize("demo", tmp_path / recipe, recipe=recipe, max_tokens=600)
        assert report.kl is not None and report.evaluation is not None and report.evaluation.num_tokens == 600
        kl[recipe] = report.kl.mean
    assert 0 < kl["int8"] < kl["int4"] / 10  # 16 times finer steps, so errors some 256 times smaller in KL


def test_a_rounded_cache_costs_something_and_fewer_bits_cost_more() -> None:
    coarse, fine = (
        hb.evaluate("demo", max_tokens=600, context=128, kv_cache=scheme) for scheme in ("int4-token", "int8-token")
    )
    assert isinstance(coarse, Comparison) and isinstance(fine, Comparison)
    assert 0 < fine.kl.mean < 0.1 * coarse.kl.mean
    assert fine.before.value == coarse.before.value


def test_keys_and_values_cannot_share_a_scale_over_tokens() -> None:
    with pytest.raises(SchemeError, match="token by token"):
        hb.evaluate("demo", max_tokens=600, context=128, kv_cache="int8-tensor")
