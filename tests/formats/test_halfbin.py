from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from formats.written import projections, tiny_llama, write_model
from halfbin.errors import FormatError, SchemeError
from halfbin.formats import HALFBIN, InputCodec, SafetensorsWriter, open_quantized
from halfbin.formats.layout import PartInfo
from halfbin.numerics import FORMATS, IntegerFormat, ScaleFormat
from halfbin.tensor import (
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QTensor,
    Scheme,
    dequantize,
    parse_inputs,
    parse_scheme,
    quantize,
)

NAME = "model.up_proj.weight"


def same(a: QTensor, b: QTensor) -> bool:
    zero_points = a.zero_point is b.zero_point is None or (
        a.zero_point is not None and b.zero_point is not None and torch.equal(a.zero_point, b.zero_point)
    )
    scales = torch.equal(a.scale.view(torch.uint8), b.scale.view(torch.uint8))
    return a.scheme == b.scheme and torch.equal(a.codes, b.codes) and scales and zero_points


def infos_of(parts: dict[str, Tensor]) -> dict[str, PartInfo]:
    return dict(parts.items())


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    fmt = draw(st.sampled_from(list(FORMATS.values())))
    groups = PerGroup(draw(st.integers(1, 9)))
    tiles: list[Granularity] = [
        PerTensor(),
        PerChannel(),
        PerChannel(1),
        PerToken(),
        PerBlock(2, 3),
        PerGroup(2, 0),
        groups,
    ]
    granularity = draw(st.sampled_from(tiles))
    scale_format = draw(st.sampled_from(list(ScaleFormat)))
    zero_points = isinstance(fmt, IntegerFormat) and scale_format is not ScaleFormat.E8M0
    symmetric = draw(st.booleans()) or not zero_points
    return Scheme(format=fmt, granularity=granularity, symmetric=symmetric, scale_format=scale_format)


@given(scheme=schemes(), shape=st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple), seed=st.integers(0, 9))
@settings(max_examples=300, deadline=None)
def test_every_scheme_and_shape_is_held_without_loss(scheme: Scheme, shape: tuple[int, ...], seed: int) -> None:
    if HALFBIN.refuses("", shape, scheme):
        return  # a granularity that this many dimensions do not have
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    q = quantize(x, scheme)
    parts = HALFBIN.encode(NAME, q)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in parts.items()} == HALFBIN.tensors(NAME, shape, scheme)
    assert all(t.is_contiguous() for t in parts.values())
    config = json.loads(json.dumps(HALFBIN.config({NAME: (scheme, shape)}, [])))
    (stored,) = HALFBIN.schemes(config, infos_of(parts), parts.__getitem__).values()
    assert (stored.scheme, stored.shape) == (scheme, shape)
    assert same(stored.codec.decode(NAME, stored.scheme, stored.shape, parts.__getitem__), q)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=list(FORMATS))
def test_every_finite_code_of_every_format_survives(fmt: IntegerFormat) -> None:
    scheme = Scheme(format=fmt, granularity=PerTensor())
    codes = fmt.codes[torch.isfinite(fmt.decode(fmt.codes))]
    q = QTensor(codes, torch.ones(1), None, scheme)
    parts = HALFBIN.encode(NAME, q)
    assert same(HALFBIN.decode(NAME, scheme, q.shape, parts.__getitem__), q)
    assert parts[NAME + ".codes"].numel() == -(-len(codes) * fmt.bits // 8)


def test_codes_lie_as_the_layout_says() -> None:
    scheme = parse_scheme("int3-tensor")
    q = QTensor(torch.tensor([[-4, -3, 3, 0]], dtype=torch.int8), torch.ones(1, 1), None, scheme)
    # Counted from -4: 0, 1, 7, 4; three bits each, lowest first: 000 100 111 001 -> 0001 0011 1001 read upwards.
    stream = 0 | 1 << 3 | 7 << 6 | 4 << 9
    assert HALFBIN.encode(NAME, q)[NAME + ".codes"].tolist() == [[stream & 255, stream >> 8]]


@pytest.mark.parametrize(
    ("scheme", "shape", "reason"),
    [
        pytest.param("int4-channel", (), "no rows", id="a single number"),
        pytest.param("int4-channel@1", (4,), "does not exist", id="an axis that is not there"),
        pytest.param("int4-b2x2", (4,), "dimensions", id="blocks of a vector"),
    ],
)
def test_what_cannot_be_held_is_refused_with_a_reason(scheme: str, shape: tuple[int, ...], reason: str) -> None:
    refusal = HALFBIN.refuses("Linear", shape, parse_scheme(scheme))
    assert refusal is not None and reason in refusal


def put(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def damage(parts: dict[str, Tensor]) -> None:
        parts[NAME + part] = change(parts[NAME + part].clone())

    return damage


def fill(value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.index_fill(-1, torch.tensor([0]), value)


DAMAGE = [
    pytest.param("int4-g8", put(".codes", lambda t: t.to(torch.int32)), ".codes", "int32", id="codes of a wrong type"),
    pytest.param("int4-g8", put(".codes", lambda t: t[:, :-1]), ".codes", "shape", id="codes of a wrong shape"),
    pytest.param("int4-g8", put(".scale", lambda t: t.half()), ".scale", "float16", id="scale of a wrong type"),
    pytest.param("int4-g8", put(".scale", lambda t: t[:-1]), ".scale", "shape", id="scale of a wrong shape"),
    pytest.param("int4-g8", put(".scale", fill(0.0)), ".scale", "above 0", id="scale of zero"),
    pytest.param("int4-g8", put(".scale", fill(-1.0)), ".scale", "above 0", id="negative scale"),
    pytest.param("int4-g8", put(".scale", fill(float("nan"))), ".scale", "finite", id="scale of NaN"),
    pytest.param("int4-g8-f16", put(".scale", fill(float("inf"))), ".scale", "finite", id="infinite scale"),
    pytest.param("mxfp4", put(".scale", fill(255)), ".scale", "NaN", id="e8m0 scale of NaN"),
    pytest.param("ternary-g8", put(".codes", fill(255)), ".codes", "code 3", id="ternary code 3"),
    pytest.param("fp8_e4m3-g8", put(".codes", fill(0x7F)), ".codes", "NaN", id="fp8 NaN"),
    pytest.param("fp8_e5m2-g8", put(".codes", fill(0xFC)), ".codes", "infinity", id="fp8 infinity"),
    pytest.param("int3-g8", put(".codes", fill(255)), ".codes", "bits after", id="bits after the last code"),
    pytest.param("ternary-g8-asym", put(".zero_point", fill(3)), ".zero_point", "code 3", id="zero point out of range"),
    pytest.param("int4-g8-asym", put(".zero_point", lambda t: t[1:]), ".zero_point", "shape", id="zero point missing"),
]


@pytest.mark.parametrize(("scheme", "damage", "part", "words"), DAMAGE)
def test_a_damaged_part_is_refused_by_name(
    scheme: str, damage: Callable[[dict[str, Tensor]], None], part: str, words: str
) -> None:
    columns = 1 if "bits" in words else 12
    q = quantize(torch.randn(3, columns, generator=torch.Generator().manual_seed(0)), parse_scheme(scheme))
    parts = HALFBIN.encode(NAME, q)
    damage(parts)
    with pytest.raises(FormatError, match=words) as caught:
        HALFBIN.decode(NAME, q.scheme, q.shape, parts.__getitem__)
    assert NAME + part in str(caught.value)


def config_with(**changes: object) -> dict[str, object]:
    return {
        "quant_method": "halfbin",
        "version": 1,
        "tensors": {NAME: {"scheme": "int4-g8", "shape": [3, 12]}},
        **changes,
    }


def entry(**changes: object) -> dict[str, object]:
    return config_with(tensors={NAME: {"scheme": "int4-g8", "shape": [3, 12], **changes}})


@pytest.mark.parametrize(
    ("config", "words"),
    [
        pytest.param(config_with(version=4), "newer halfbin", id="unknown version"),
        pytest.param(config_with(version=True), "version", id="version that is no number"),
        pytest.param({"quant_method": "halfbin"}, "version", id="no version"),
        pytest.param(config_with(tensors=[1]), "must map", id="tensors as a list"),
        pytest.param(config_with(tensors={NAME: 3}), "must hold a scheme", id="entry that is no table"),
        pytest.param(entry(scheme="int9-g8"), "int9", id="unknown format"),
        pytest.param(entry(scheme="nf4-g8-asym"), "not understood", id="impossible scheme"),
        pytest.param(entry(scheme=4), "must hold a scheme", id="scheme that is no text"),
        pytest.param(entry(shape=[3, -12]), "list of sizes", id="negative size"),
        pytest.param(entry(shape=[3, True]), "list of sizes", id="size that is no number"),
        pytest.param(entry(shape=[]), "list of sizes", id="no dimensions"),
        pytest.param(entry(shape=[1] * 40), "list of sizes", id="too many dimensions"),
        pytest.param(entry(shape=[2**40, 2**40]), "elements", id="product beyond every file"),
        pytest.param(entry(shape=[3, 13]), "shape", id="shape that the bytes do not hold"),
        pytest.param(entry(scheme="int4-g8-asym"), "zero_point' is missing", id="zero point not stored"),
        pytest.param(config_with(tensors={}), "does not say what they mean", id="codes that are not listed"),
        pytest.param(
            config_with(tensors={"x": {"scheme": "int4-g8", "shape": [3, 12]}}), "missing", id="listed, not stored"
        ),
        pytest.param(entry(extra=1), "must hold a scheme", id="unknown key"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(config: dict[str, object], words: str) -> None:
    parts = HALFBIN.encode(NAME, quantize(torch.ones(3, 12), parse_scheme("int4-g8")))
    with pytest.raises(FormatError, match=words):
        HALFBIN.schemes(config, infos_of(parts), parts.__getitem__)


def test_zero_points_of_a_symmetric_scheme_are_refused() -> None:
    parts = HALFBIN.encode(NAME, quantize(torch.ones(3, 12), parse_scheme("int4-g8-asym")))
    with pytest.raises(FormatError, match="has no zero point"):
        HALFBIN.schemes(config_with(), infos_of(parts), parts.__getitem__)


def test_an_error_names_tensor_and_directory(tmp_path: Path) -> None:
    q = quantize(torch.ones(3, 12), parse_scheme("int4-g8"))
    parts = HALFBIN.encode(NAME, q)
    parts[NAME + ".scale"] = -parts[NAME + ".scale"]
    specs = {name: (value.dtype, tuple(value.shape)) for name, value in parts.items()}
    with SafetensorsWriter(tmp_path / "model.safetensors", specs, {}) as writer:
        for name, value in parts.items():
            writer.write(name, value)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config_with()}))
    with open_quantized(tmp_path) as checkpoint, pytest.raises(FormatError) as caught:
        checkpoint.read(NAME)
    assert NAME in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_whole_model_of_mixed_schemes_is_read_back(tmp_path: Path) -> None:
    names = [
        "nf4-g64",
        "ternary-channel",
        "int3-g100-asym-f16",
        "mxfp4",
        "fp8_e5m2-tensor",
        "uint4-g32-asym",
        "int8-token",
    ]
    model = tiny_llama()
    weights = [*projections(model), "model.embed_tokens.weight"]
    chosen = {name: parse_scheme(names[i % len(names)]) for i, name in enumerate(weights)}
    written = write_model(tmp_path, model, HALFBIN, chosen.get)
    with open_quantized(tmp_path) as checkpoint:
        assert checkpoint.layout_name == "halfbin"
        assert sorted(checkpoint.names) == sorted(model.state_dict())
        assert sum(map(checkpoint.bytes_of, checkpoint.names)) == checkpoint.num_bytes
        for name, value in written.reference.state_dict().items():
            assert checkpoint.scheme(name) == chosen.get(name)
            assert checkpoint.shape(name) == tuple(value.shape)
            assert torch.equal(checkpoint.read_values(name), value)
            if name in chosen:
                q = checkpoint.read(name)
                assert isinstance(q, QTensor) and same(q, written.quantized[name])
                assert torch.equal(dequantize(q), value)


def test_plain_transformers_stops_instead_of_loading_random_weights(tmp_path: Path) -> None:
    write_model(tmp_path, tiny_llama(), HALFBIN, lambda name: parse_scheme("int8-g128") if "proj" in name else None)
    # transformers only warns of an unknown quant_method; the place holders' shapes are what stops it.
    with pytest.raises(RuntimeError, match="mismatched"):
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)


def test_a_scheme_without_a_spelling_is_refused() -> None:
    odd = Scheme(format=IntegerFormat("mine", -3, 3), granularity=PerChannel())
    assert HALFBIN.refuses("Linear", (4, 4), odd) is not None
    with pytest.raises(SchemeError):
        parse_scheme(str(odd))


INPUTS = [
    "int8-token",
    "int8-tensor",
    "uint8-tensor-asym-f16",
    "fp8_e4m3-tensor-e8m0",
    "int8-token-outliers6",
    "nf4-token",
]


@pytest.mark.parametrize("inputs", INPUTS)
def test_inputs_of_every_scheme_are_held_without_loss(inputs: str) -> None:
    q = quantize(torch.randn(6, 20, generator=torch.Generator().manual_seed(0)), parse_scheme("nf4-g8"))
    how = parse_inputs(inputs).calibrated(-1.0, 3.3)
    assert HALFBIN.refuses("", q.shape, q.scheme, how.inputs) is None
    parts = HALFBIN.encode(NAME, q, how)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in parts.items()} == HALFBIN.tensors(
        NAME, q.shape, q.scheme, how.inputs
    )
    config = json.loads(json.dumps(HALFBIN.config({NAME: (q.scheme, q.shape)}, [], {NAME: how.inputs})))
    (stored,) = HALFBIN.schemes(config, infos_of(parts), parts.__getitem__).values()
    assert stored.inputs is not None
    found = stored.inputs.decode(parts.__getitem__)
    assert found.inputs == how.inputs
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    assert torch.equal(found.fake_quantize(x), how.fake_quantize(x))


def test_the_version_is_raised_only_where_inputs_are_quantized() -> None:
    tensors = {NAME: (parse_scheme("int4-g8"), (3, 12))}
    assert HALFBIN.config(tensors, [])["version"] == 1
    config = HALFBIN.config(tensors, [], {NAME: parse_inputs("int8-token")})
    assert config["version"] == 2
    parts = HALFBIN.encode(NAME, quantize(torch.ones(3, 12), parse_scheme("int4-g8")))
    assert HALFBIN.schemes(config, infos_of(parts), parts.__getitem__)[NAME].inputs is not None
    with pytest.raises(FormatError, match="must hold a scheme and a shape"):
        HALFBIN.schemes({**config, "version": 1}, infos_of(parts), parts.__getitem__)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        pytest.param("int8-tokn", "did you mean 'token'", id="misspelt"),
        pytest.param(8, "must hold a scheme", id="no text"),
        pytest.param("int8-tensor", "input_scale' is missing", id="static, and no scale"),
        pytest.param("int8-channel", "per channel", id="impossible"),
    ],
)
def test_inputs_that_mean_nothing_are_refused(inputs: object, words: str) -> None:
    parts = HALFBIN.encode(NAME, quantize(torch.ones(3, 12), parse_scheme("int4-g8")))
    entry = {"scheme": "int4-g8", "shape": [3, 12], "inputs": inputs}
    config: dict[str, object] = {"quant_method": "halfbin", "version": 2, "tensors": {NAME: entry}}
    with pytest.raises(FormatError, match=words):
        HALFBIN.schemes(config, infos_of(parts), parts.__getitem__)


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        pytest.param("scale", torch.tensor([-1.0]), "holds the scale -1.0", id="scale"),
        pytest.param("zero_point", torch.tensor([300], dtype=torch.int32), "zero point 300 is no code", id="zero"),
        pytest.param("zero_point", torch.tensor([3.0]), "stored as torch.float32", id="type"),
    ],
)
def test_damaged_scales_of_inputs_are_refused(part: str, value: Tensor, words: str) -> None:
    q, how = quantize(torch.ones(3, 12), parse_scheme("int4-g8")), parse_inputs("int8-tensor-asym").calibrated(-1, 1)
    parts = HALFBIN.encode(NAME, q, how)
    config = HALFBIN.config({NAME: (q.scheme, q.shape)}, [], {NAME: how.inputs})
    (stored,) = HALFBIN.schemes(config, infos_of(parts), parts.__getitem__).values()
    assert stored.inputs is not None
    parts[f"{NAME}.input_{part}"] = value
    with pytest.raises(FormatError, match=words):
        stored.inputs.decode(parts.__getitem__)


def test_other_inputs_than_were_announced_are_refused() -> None:
    codec = InputCodec(parse_inputs("int8-token"), "x.", torch.int32)
    with pytest.raises(SchemeError, match="announced as int8-token, and are int4-token"):
        codec.encode(parse_inputs("int4-token").quantizer())
