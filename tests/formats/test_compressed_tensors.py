from __future__ import annotations

import pytest
import torch

from halfbin.errors import FormatError, SchemeError
from halfbin.formats import COMPRESSED_TENSORS
from halfbin.formats.layout import PartInfo
from halfbin.tensor import QTensor, Scheme, parse_scheme, quantize

NAME = "model.layers.0.mlp.up_proj.weight"

HELD = [
    *(f"int{bits}-g32" for bits in range(2, 9)),
    *(f"int{bits}-g32-asym-f16" for bits in range(2, 9)),
    *("int3-channel", "int8-channel", "int4-channel-asym-bf16"),
    *("fp8_e4m3-channel", "fp8_e4m3-tensor-bf16", "fp8_e4m3-b32x32", "mxfp4", "mxfp8"),
]


def quantized(spelling: str, shape: tuple[int, int] = (40, 96)) -> QTensor:
    return quantize(torch.randn(shape, generator=torch.Generator().manual_seed(0)), parse_scheme(spelling))


@pytest.mark.parametrize("spelling", HELD)
def test_every_held_scheme_is_held_without_loss(spelling: str) -> None:
    q = quantized(spelling)
    assert COMPRESSED_TENSORS.refuses("Linear", q.shape, q.scheme) is None
    parts = COMPRESSED_TENSORS.encode(NAME, q)
    announced = COMPRESSED_TENSORS.tensors(NAME, q.shape, q.scheme)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in parts.items()} == announced
    assert all(t.is_contiguous() for t in parts.values())
    infos: dict[str, PartInfo] = dict(parts.items())
    config = COMPRESSED_TENSORS.config({NAME: (q.scheme, q.shape)}, ["lm_head"])
    stored = COMPRESSED_TENSORS.schemes(config, infos, parts.__getitem__)[NAME]
    assert (stored.scheme, stored.shape) == (q.scheme, q.shape)
    for codec in (COMPRESSED_TENSORS, stored.codec):
        back = codec.decode(NAME, stored.scheme, stored.shape, parts.__getitem__)
        assert torch.equal(back.codes, q.codes)
        assert torch.equal(back.scale.view(torch.uint8), q.scale.view(torch.uint8))
        if q.zero_point is not None:
            assert back.zero_point is not None and torch.equal(back.zero_point, q.zero_point)


REFUSED = [
    pytest.param("Linear", (8, 64), "nf4-g64", "table", id="nf4"),
    pytest.param("Linear", (8, 64), "ternary-channel", "int2", id="ternary"),
    pytest.param("Linear", (8, 64), "fp8_e5m2-channel", "e4m3", id="e5m2"),
    pytest.param("Linear", (8, 64), "uint4-g32-asym", "int4-...-asym", id="unsigned"),
    pytest.param("Linear", (8, 100), "int4-g32", "shorter", id="a short last group"),
    pytest.param("Linear", (8, 100), "fp8_e4m3-b8x32", "shorter", id="a narrow last block"),
    pytest.param("Linear", (8, 64), "int8-token", "token", id="token"),
    pytest.param("Linear", (8, 64), "int8-tensor", "use channel", id="one scale for integers"),
    pytest.param("Linear", (8, 64), "int8-b8x8", "b8x8", id="blocks of integers"),
    pytest.param("Linear", (8, 64), "int4-g8@0", "g8@0", id="groups along rows"),
    pytest.param("Linear", (8, 64), "int4-channel@1", "channel@1", id="a scale a column"),
    pytest.param("Linear", (8, 64), "fp8_e4m3-g32", "groups", id="fp8 in groups"),
    pytest.param("Linear", (8, 64), "fp4_e2m1-g32", "mxfp4", id="fp4 with float scales"),
    pytest.param("Linear", (8, 64), "fp8_e4m3-g16-e8m0", "mxfp8", id="other mx groups"),
    pytest.param("Linear", (8, 64), "int4-g32-e8m0", "power-of-two", id="integers with e8m0 scales"),
    pytest.param("Conv1D", (8, 64), "int4-g32", "transposed", id="Conv1D"),
    pytest.param("Embedding", (8, 64), "int8-channel", "embeddings", id="embedding"),
    pytest.param("Conv2d", (8, 4, 3, 3), "int8-channel", "Conv2d", id="convolution"),
    pytest.param("", (4, 8, 64), "int4-g32", "stack", id="fused experts"),
    pytest.param("", (8, 64), "int4-g32", "module", id="a tensor without a module"),
    pytest.param("Linear", (64,), "int8-tensor", "16 bits", id="a vector"),
]


@pytest.mark.parametrize(("module_class", "shape", "spelling", "words"), REFUSED)
def test_what_clients_cannot_hold_is_refused(
    module_class: str, shape: tuple[int, ...], spelling: str, words: str
) -> None:
    reason = COMPRESSED_TENSORS.refuses(module_class, shape, parse_scheme(spelling))
    assert reason is not None and words in reason
    assert any(advice in reason for advice in ("use ", "keep it in 16 bits")), reason


def config_of(spellings: dict[str, str], ignored: tuple[str, ...] = ()) -> dict[str, object]:
    tensors: dict[str, tuple[Scheme, tuple[int, ...]]] = {
        f"{module}.weight": (parse_scheme(spelling), (64, 64)) for module, spelling in spellings.items()
    }
    return COMPRESSED_TENSORS.config(tensors, ignored)


def test_one_scheme_targets_every_linear_and_ignores_by_name() -> None:
    config = config_of({"a.q": "int4-g32-f16", "a.k": "int4-g32-bf16"}, ("lm_head", "router"))
    (group,) = config["config_groups"].values()  # type: ignore[attr-defined]  # the value of a JSON object
    assert group["targets"] == ["Linear"] and group["format"] == config["format"] == "pack-quantized"
    assert config["ignore"] == ["lm_head", "router"] and "dequantize" not in config
    assert config["quantization_status"] == "compressed"


def test_several_schemes_target_modules_by_name() -> None:
    config = config_of({"a.q": "int4-g32", "a.k": "fp8_e4m3-channel", "b.q": "int4-g32"})
    groups = list(config["config_groups"].values())  # type: ignore[attr-defined]  # the value of a JSON object
    assert [group["targets"] for group in groups] == [["a.q", "b.q"], ["a.k"]]
    assert [group["format"] for group in groups] == ["pack-quantized", "float-quantized"]
    assert config["format"] == "mixed-precision" and "dequantize" not in config


def test_modules_are_targets_by_both_names_where_disk_and_framework_differ() -> None:
    wide, narrow = parse_scheme("int4-g32"), parse_scheme("int8-channel")
    tensors = {"a.q.weight": (wide, (64, 64)), "a.k.weight": (narrow, (64, 64))}
    config = COMPRESSED_TENSORS.config(tensors, (), modules={"a.q.weight": "model.a.q", "a.k.weight": "a.k"})
    groups = config["config_groups"].values()  # type: ignore[attr-defined]  # the value of a JSON object
    assert [group["targets"] for group in groups] == [["a.q", "model.a.q"], ["a.k"]]


def test_zero_points_ask_the_client_to_dequantize() -> None:
    assert config_of({"a.q": "int4-g32-asym"})["dequantize"] is True


def test_zero_points_in_a_mix_are_refused() -> None:
    with pytest.raises(SchemeError, match="int4-g32-asym beside 1 other"):
        config_of({"a.q": "int4-g32-asym", "a.k": "int8-channel"})


def test_nothing_quantized_needs_no_config() -> None:
    assert config_of({}) == {}


def test_a_tensor_that_is_no_modules_weight_has_no_parts() -> None:
    with pytest.raises(SchemeError, match="--format halfbin"):
        COMPRESSED_TENSORS.tensors("experts.gate_up_proj", (8, 64), parse_scheme("int4-g32"))


MODULE = NAME.removesuffix(".weight")
DAMAGE = [
    pytest.param("int4-g32", "weight_packed", lambda t: t.long(), "int64", id="codes of a wrong type"),
    pytest.param("int4-g32", "weight_scale", lambda t: -t, "above 0", id="negative scale"),
    pytest.param("int4-g32", "weight_scale", lambda t: t / 0, "finite", id="infinite scale"),
    pytest.param("int4-g32", "weight_scale", lambda t: t[:, :2], "shape", id="too few scales"),
    pytest.param("int4-g32", "weight_shape", lambda t: t - 1, "says", id="another shape"),
    pytest.param("int4-g32-asym", "weight_zero_point", lambda t: t.t(), "shape", id="zero points packed along in"),
    pytest.param("mxfp4", "weight_scale", lambda t: t | 255, "NaN", id="e8m0 NaN"),
]


@pytest.mark.parametrize(("spelling", "part", "change", "words"), DAMAGE)
def test_a_damaged_part_is_refused_by_name(spelling: str, part: str, change: object, words: str) -> None:
    q = quantized(spelling)
    parts = COMPRESSED_TENSORS.encode(NAME, q)
    assert callable(change)
    parts[f"{MODULE}.{part}"] = change(parts[f"{MODULE}.{part}"])
    with pytest.raises(FormatError, match=words) as caught:
        COMPRESSED_TENSORS.decode(NAME, q.scheme, q.shape, parts.__getitem__)
    assert f"{MODULE}.{part}" in str(caught.value)


def test_an_fp8_code_of_nan_is_refused() -> None:
    q = quantized("fp8_e4m3-channel")
    parts = COMPRESSED_TENSORS.encode(NAME, q)
    parts[NAME] = torch.full(q.shape, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    with pytest.raises(FormatError, match="NaN"):
        COMPRESSED_TENSORS.decode(NAME, q.scheme, q.shape, parts.__getitem__)
