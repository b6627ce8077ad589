"""Against the library itself: its packers byte for byte, its decompressors bit for bit, its own files, and its client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from formats.written import Written, projections, tiny_llama, tokens, write_model
from halfbin.errors import FormatError
from halfbin.formats import COMPRESSED_TENSORS, open_quantized
from halfbin.tensor import QTensor, dequantize, parse_scheme, quantize

pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)

SPELLINGS = [
    *(f"int{bits}-g32" for bits in range(2, 9)),
    *(f"int{bits}-channel" for bits in range(2, 9)),
    *(f"int{bits}-g32-asym" for bits in range(2, 9)),
    *(f"int{bits}-channel-asym" for bits in range(2, 9)),
    *("fp8_e4m3-channel", "fp8_e4m3-tensor", "fp8_e4m3-b128x32", "mxfp4", "mxfp8"),
]


def peer_scheme(q: QTensor) -> tuple[Any, Any]:
    """The library's compressor and scheme for the group that we would write."""
    (group,) = COMPRESSED_TENSORS.config({"m.weight": (q.scheme, q.shape)}, [])["config_groups"].values()  # type: ignore[attr-defined]  # a JSON object
    return BaseCompressor.get_value_from_registry(group["format"]), QuantizationScheme.model_validate(group)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("shape", [(40, 96), (37, 160)], ids=str)
def test_bytes_equal_the_librarys_and_decompress_to_our_values(spelling: str, shape: tuple[int, int]) -> None:
    q = quantize(torch.randn(shape, generator=torch.Generator().manual_seed(0)), parse_scheme(spelling))
    compressor, scheme = peer_scheme(q)
    ours = {name.removeprefix("m."): part for name, part in COMPRESSED_TENSORS.encode("m.weight", q).items()}
    w_hat = dequantize(q)
    opened = compressor.decompress({name: part.clone() for name, part in ours.items()}, scheme)["weight"]
    assert torch.equal(opened.float(), w_hat)
    # What lies on the grid rounds to itself, so the library's own rounding gives our codes again.
    state = {"weight": w_hat, "weight_scale": q.scale.float()}
    if len(ours["weight_scale"].shape) == 1:
        state["weight_scale"] = state["weight_scale"].reshape(1)
    if q.zero_point is not None:
        state["weight_zero_point"] = q.zero_point.to(torch.int8)
    theirs = compressor.compress(state, scheme)
    assert set(theirs) == set(ours)
    for name, part in theirs.items():
        assert part.dtype == ours[name].dtype, name
        fp4 = name == "weight_packed" and part.dtype == torch.uint8
        seen = _positive_zeros if fp4 else _bits  # the library rounds to +0 what we round to -0
        assert torch.equal(seen(part), seen(ours[name])), name


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def _positive_zeros(packed: torch.Tensor) -> torch.Tensor:
    low, high = packed & 15, packed >> 4
    return torch.where(low == 8, 0, low) | torch.where(high == 8, 0, high) << 4


@pytest.mark.parametrize("spelling", ["int3-channel", "int5-channel-asym", "int6-channel", "int7-channel-asym"])
def test_rows_that_fill_no_whole_word_are_packed_alike(spelling: str) -> None:
    for columns in range(1, 34):
        q = quantize(
            torch.randn(columns + 2, columns, generator=torch.Generator().manual_seed(0)), parse_scheme(spelling)
        )
        compressor, scheme = peer_scheme(q)
        parts = {name.removeprefix("m."): part for name, part in COMPRESSED_TENSORS.encode("m.weight", q).items()}
        assert torch.equal(compressor.decompress(parts, scheme)["weight"], dequantize(q))


def difference(written: Written, **options: object) -> float:
    """Load as a client does; largest difference of logits from the model with dequantized weights."""
    loaded, info = AutoModelForCausalLM.from_pretrained(
        written.directory, dtype=torch.float32, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    with torch.no_grad():
        return float((loaded(tokens()).logits - written.reference(tokens()).logits).abs().max())


@pytest.mark.parametrize("tied", [False, True], ids=["head of its own", "tied head"])
@pytest.mark.parametrize(
    "spelling",
    ["int4-g128", "int3-g32-f16", "int8-channel", "int4-g128-asym", "fp8_e4m3-channel", "fp8_e4m3-b128x128", "mxfp4"],
)
def test_a_client_computes_what_the_dequantized_model_computes(tmp_path: Path, spelling: str, tied: bool) -> None:
    scheme = parse_scheme(spelling)
    model = tiny_llama(tied=tied)
    written = write_model(tmp_path, model, COMPRESSED_TENSORS, dict.fromkeys(projections(model), scheme).get)
    # The same float32 products on the same float32 weights: nothing may differ. (float16 scales are widened on load.)
    assert difference(written) == 0.0
    with open_quantized(tmp_path) as checkpoint:
        assert sorted(checkpoint.names) == sorted(
            name for name in model.state_dict() if not (tied and "lm_head" in name)
        )
        assert sum(map(checkpoint.bytes_of, checkpoint.names)) == checkpoint.num_bytes
        for name in checkpoint.names:
            assert torch.equal(checkpoint.read_values(name), written.reference.state_dict()[name])


def test_a_client_reads_several_schemes_and_an_ignored_layer(tmp_path: Path) -> None:
    model = tiny_llama()
    chosen = dict.fromkeys(projections(model), parse_scheme("int4-g64"))
    chosen |= {name: parse_scheme("fp8_e4m3-channel") for name in chosen if "down_proj" in name}
    chosen |= {name: parse_scheme("int8-channel") for name in chosen if "o_proj" in name}
    ignored = "model.layers.1.self_attn.q_proj"
    del chosen[f"{ignored}.weight"]
    written = write_model(tmp_path, model, COMPRESSED_TENSORS, chosen.get, ignored=("lm_head", ignored))
    assert difference(written) == 0.0
    with open_quantized(tmp_path) as checkpoint:
        assert {name: scheme for name in checkpoint.names if (scheme := checkpoint.scheme(name))} == chosen


def test_a_head_of_its_own_may_be_quantized(tmp_path: Path) -> None:
    model = tiny_llama()
    chosen = dict.fromkeys([*projections(model), "lm_head.weight"], parse_scheme("int8-channel"))
    assert difference(write_model(tmp_path, model, COMPRESSED_TENSORS, chosen.get, ignored=())) == 0.0


def test_zero_points_fail_loudly_without_the_key_and_load_with_it(tmp_path: Path) -> None:
    """When the first half fails, the client has learned to read packed zero points: drop the key then."""
    model = tiny_llama()
    chosen = dict.fromkeys(projections(model), parse_scheme("int4-g128-asym"))
    written = write_model(tmp_path, model, COMPRESSED_TENSORS, chosen.get)
    assert difference(written) == 0.0
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]["dequantize"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="mismatched"):
        difference(written)
    from transformers import CompressedTensorsConfig

    assert difference(written, quantization_config=CompressedTensorsConfig(dequantize=True)) == 0.0


@pytest.mark.parametrize(
    ("layout", "arguments"),
    [
        pytest.param("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 128}, id="W4A16"),
        pytest.param(
            "pack-quantized",
            {"num_bits": 3, "strategy": "group", "group_size": 32, "symmetric": False},
            id="W3A16 asym",
        ),
        pytest.param("int-quantized", {"num_bits": 8, "strategy": "channel"}, id="int8"),
        pytest.param(
            "naive-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}, id="naive int8 asym"
        ),
        pytest.param("naive-quantized", {"num_bits": 4, "strategy": "group", "group_size": 64}, id="naive int4"),
        pytest.param("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, id="fp8"),
        pytest.param("naive-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, id="naive fp8"),
    ],
)
def test_a_checkpoint_of_the_librarys_own_is_read(tmp_path: Path, layout: str, arguments: dict[str, Any]) -> None:
    model = tiny_llama()
    scheme = QuantizationScheme(targets=["re:.*proj"], weights=QuantizationArgs(**arguments), format=layout)
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=["lm_head"], quantization_status=QuantizationStatus.INITIALIZED
    )
    apply_quantization_config(model, config, show_progress=False)
    _calibrate(model, symmetric=arguments.get("symmetric", True))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    compressor.decompress_model(model)
    with open_quantized(tmp_path) as checkpoint:
        assert sorted(checkpoint.names) == sorted(tiny_llama().state_dict())
        for name in checkpoint.names:
            assert (checkpoint.scheme(name) is not None) == name.endswith("proj.weight")
            assert torch.equal(checkpoint.read_values(name), model.get_parameter(name).float())


def _calibrate(model: Any, symmetric: bool) -> None:
    """Any positive scales and, when asymmetric, zero points will do: only the files matter here."""
    generator = torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        if name.endswith("proj"):
            module.weight_scale.data = torch.rand(module.weight_scale.shape, generator=generator) * 0.01 + 0.001
            if not symmetric:
                shape = module.weight_zero_point.shape
                module.weight_zero_point.data = torch.randint(-4, 4, shape, generator=generator, dtype=torch.int8)


def test_a_format_that_is_not_read_is_named(tmp_path: Path) -> None:
    model = tiny_llama()
    chosen = dict.fromkeys(projections(model), parse_scheme("mxfp4"))
    write_model(tmp_path, model, COMPRESSED_TENSORS, chosen.get)
    text = (tmp_path / "config.json").read_text().replace("mxfp4-pack-quantized", "nvfp4-pack-quantized")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(FormatError, match="nvfp4-pack-quantized"):
        open_quantized(tmp_path)
