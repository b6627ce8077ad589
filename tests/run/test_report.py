"""The report as a value: what it derives, and its way through JSON and back."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from halfbin.errors import FormatError
from halfbin.run.loading import snippet
from halfbin.run.report import Divergence, ErrorSize, Quality, Report, SiteReport
from run.example_report import example_report

PROMISED = {
    "report_version",
    "halfbin_version",
    "model",
    "recipe",
    "layout",
    "before",
    "after",
    "after_default_load",
    "kl",
    "top1_agreement",
    "bits_per_weight",
    "bits_per_weight_total",
    "bytes_before",
    "bytes_after",
    "sites",
    "evaluation",
    "timings",
    "peak_memory_bytes",
    "warnings",
    "left_at_16_bits",
}
PROMISED_OF_SITES = {
    "name",
    "scheme",
    "dtype",
    "method",
    "shape",
    "num_weights",
    "bytes_before",
    "bytes_after",
    "bits_per_weight",
    "weight_error",
    "output_error",
    "reason",
    "histogram",
}


def through_json(report: Report) -> Report:
    return Report.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False)))


def test_every_promised_key_is_there_also_when_nothing_was_measured() -> None:
    bare = Report(
        halfbin_version="0.1.0",
        model="m",
        output=None,
        recipe="int4",
        layout="halfbin",
        before=Quality(bytes=8),
        after=Quality(bytes=2),
        num_parameters=4,
        sites=(SiteReport(name="w", shape=(4,), bytes_before=8, bytes_after=2, reason="r", scheme="int4-channel"),),
    )
    document = bare.to_json()
    assert document.keys() >= PROMISED
    assert document["sites"][0].keys() >= PROMISED_OF_SITES
    assert document["before"]["perplexity"] is None and document["kl"] is None


def test_a_report_comes_back_from_json_as_it_went() -> None:
    assert through_json(example_report()) == example_report()


def test_a_report_comes_back_from_its_file(tmp_path: Path) -> None:
    example_report().write(tmp_path / "report.json")
    assert Report.read(tmp_path / "report.json") == example_report()


def test_bits_per_weight_count_what_is_stored() -> None:
    report = example_report(1)
    quantized = [site for site in report.sites if site.scheme]
    weights = sum(math.prod(site.shape) for site in quantized)
    document = report.to_json()
    assert document["bits_per_weight"] == 8 * sum(site.bytes_after for site in quantized) / weights
    assert document["bits_per_weight_total"] == 8 * report.after.bytes / report.num_parameters
    assert document["sites"][1]["bits_per_weight"] == 4.5  # 4 bits and a float16 for each 32


def test_sites_without_a_scheme_are_named() -> None:
    assert example_report().to_json()["left_at_16_bits"] == {"count": 1, "names": ["model.embed_tokens"]}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        pytest.param(math.inf, "Infinity", id="infinity"),
        pytest.param(-math.inf, "-Infinity", id="minus-infinity"),
        pytest.param(math.nan, "NaN", id="nan"),
    ],
)
def test_numbers_that_json_has_not_become_strings_and_come_back(value: float, text: str) -> None:
    after = Quality(bytes=1, perplexity=value, nll=value)
    report = dataclasses.replace(
        example_report(), after=after, kl=Divergence(mean=value, median=0.0, p99=value, maximum=value)
    )
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert document["after"]["perplexity"] == text
    found = Report.from_json(document)
    assert found.after.perplexity is not None and found.kl is not None
    assert str(found.after.perplexity) == str(found.kl.mean) == str(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"report_version": 2}, "report_version is 2", id="later-version"),
        pytest.param({"report_version": "1"}, "report_version is '1'", id="version-as-text"),
        pytest.param({"model": 3}, "'model' should be str", id="wrong-type"),
        pytest.param({"before": {"perplexity": 1.0}}, "'before.bytes' is missing", id="missing-key"),
        pytest.param({"top1_agreement": "high"}, "'top1_agreement' should be float", id="text-for-number"),
        pytest.param({"num_parameters": True}, "'num_parameters' should be int", id="bool-for-integer"),
        pytest.param({"sites": [{"name": "a"}]}, "'sites[0].shape' is missing", id="inside-a-list"),
    ],
)
def test_a_report_that_cannot_be_read_is_refused_with_the_place(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError) as caught:
        Report.from_json(example_report().to_json() | change)
    assert message in str(caught.value)


def test_a_site_with_a_scheme_and_a_type_is_refused() -> None:
    document = example_report().to_json()
    document["sites"][0]["scheme"] = "int4-channel"
    with pytest.raises(FormatError, match="either a scheme or a dtype"):
        Report.from_json(document)


@pytest.mark.parametrize(
    "content",
    [pytest.param(b"{", id="cut-off"), pytest.param(b"\xff\xfe", id="not-utf8"), pytest.param(b"[]", id="list")],
)
def test_a_file_that_is_no_report_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(FormatError):
        Report.read(tmp_path / "report.json")


def test_unknown_keys_are_passed_over() -> None:
    assert Report.from_json(example_report().to_json() | {"added_later": 1}) == example_report()


def test_the_worst_site_comes_first_and_nan_is_worse_than_anything() -> None:
    report = example_report()
    errors = [site.weight_error.relative for site in report.worst if site.weight_error]
    assert errors == sorted(errors, reverse=True) and len(errors) == 35
    nowhere = ErrorSize(relative=math.nan, snr_db=math.nan, max_abs=math.nan)
    broken = dataclasses.replace(report.sites[7], weight_error=nowhere)
    sites = (*report.sites[:7], broken, *report.sites[8:])
    assert dataclasses.replace(report, sites=sites).worst[0] is broken


def test_the_headline_names_sizes_and_cost() -> None:
    text = str(example_report())
    assert "stories260K: 1.04 MB -> 194 kB (5.36× smaller)" in text
    assert "perplexity 3.963 -> 4.569 +15.29 %" in text and "KL 0.143" in text


@pytest.mark.parametrize(
    ("model_class", "line"),
    [
        ("LlamaForCausalLM", "from transformers import AutoModelForCausalLM, AutoTokenizer"),
        ("BertModel", "from transformers import AutoTokenizer, BertModel"),
        ("", "from transformers import AutoModel, AutoTokenizer"),
    ],
)
def test_the_lines_that_load_it_name_the_class_that_it_is_of(model_class: str, line: str) -> None:
    assert snippet("compressed-tensors", "out", model_class).startswith(line)
