"""A checkpoint is timed with its codes, beside the same weights as floats."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import halfbin as hb
from halfbin.errors import HalfbinError, ModelError
from halfbin.kernels import streaming
from halfbin.models import open_skeleton
from halfbin.models.running import load_running
from halfbin.nn import CpuFeatures, QuantLinear
from halfbin.run import benchmark as room
from halfbin.run.benchmark import bytes_per_token
from models.zoo import directory_of


@pytest.fixture(autouse=True)
def short_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "read_rate", lambda: streaming.read_rate(num_bytes=2**16, rounds=1))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = tmp_path_factory.mktemp("recipe") / "mine.toml"
    recipe.write_text('layout = "halfbin"\n[[rule]]\nmatch = "*"\nweights = "int4-g32"\n')
    output = tmp_path_factory.mktemp("out") / "out"
    hb.quantize(directory_of("llama"), output, recipe=recipe, evaluate=False)
    return output


@pytest.mark.skipif("avx2" not in CpuFeatures.detect().instructions, reason="plain loops are not chosen")
@pytest.mark.parametrize("weights", ["nf4-g32", "fp8_e4m3-channel", "fp8_e5m2-g32"])
def test_codes_that_stand_for_floats_are_loaded_packed_and_tell_their_kernel(weights: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(f'layout = "halfbin"\n[[rule]]\nmatch = "*"\nweights = "{weights}"\n')
    output = tmp_path / "out"
    hb.quantize(directory_of("llama"), output, recipe=tmp_path / "mine.toml", evaluate=False)
    found = hb.bench(output, prompt_tokens=4, new_tokens=1, rounds=1, threads=1, alone=True)
    assert len(found.layers) == 14 and {layer.kernel for layer in found.layers} == {"float-inputs"}
    assert "no integers" in found.layers[0].refusals["int8-inputs"] and "triton" in found.layers[0].refusals
    model, floats = hb.load(output), hb.load(output, dequantize=True)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(layers) == 14 and not any("codes" in layer._buffers for layer in layers)
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, floats(ids).logits, rtol=1e-4, atol=1e-5)


def test_codes_are_timed_beside_floats_and_every_layer_tells_its_kernel(quantized: Path) -> None:
    threads = torch.get_num_threads()
    found = hb.bench(quantized, prompt_tokens=8, new_tokens=2, rounds=1, threads=1)
    assert torch.get_num_threads() == threads
    assert found.threads == 1 and found.dtype == "fp32"
    assert found.floats is not None
    assert len(found.layers) == 14 and found.dequantized == {}
    assert {layer.weights for layer in found.layers} == {"int4-g32"}
    document = found.to_json()
    for name in ("codes", "floats"):
        assert document[name]["decode_tokens_per_second"] == pytest.approx(
            1 / document[name]["seconds_per_token"]["median"]
        )
        assert document[name]["share_of_streaming_read"] > 0
    # 14 matrices in 4 bits and a scale of 32 bits for 32 weights, instead of 32 bits.
    weights = sum(rows * columns for rows, columns in (layer.shape for layer in found.layers))
    assert found.floats.bytes_per_token - found.codes.bytes_per_token == weights * (4 - 5 / 8)


def test_a_float_model_is_timed_alone() -> None:
    found = hb.bench(directory_of("llama"), prompt_tokens=4, new_tokens=1, rounds=1)
    assert found.floats is None and found.layers == ()


def test_a_token_reads_a_table_that_serves_as_head_and_no_other() -> None:
    untied, tied = (load_running(open_skeleton(directory_of(name))).model for name in ("llama", "llama-tied"))
    table = untied.get_parameter("model.embed_tokens.weight")
    everything = sum(p.numel() * p.element_size() for p in untied.parameters())
    assert bytes_per_token(untied) == everything - table.numel() * table.element_size()
    assert bytes_per_token(tied) == bytes_per_token(untied)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        pytest.param("bert", {}, "BertModel does not predict tokens", id="encoder"),
        pytest.param("llama", {"prompt_tokens": 10**6}, "made for", id="too long"),
        pytest.param(
            "llama",
            {"dtype": "int8", "prompt_tokens": 4, "new_tokens": 1},
            "--dtype 'int8' is not understood",
            id="type",
        ),
    ],
)
def test_what_cannot_be_timed_is_refused(name: str, options: dict[str, object], words: str) -> None:
    with pytest.raises((ModelError, HalfbinError), match=words):
        hb.bench(directory_of(name), **options)  # type: ignore[arg-type]
