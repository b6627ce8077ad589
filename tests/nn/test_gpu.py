"""Layers on Triton's kernels, on a GPU or in the interpreter: when they are used and what they give."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from halfbin.errors import DataError
from halfbin.nn import EXACT, CpuFeatures, QuantInputLinear, QuantLinear, Reference
from halfbin.nn.gpu import FloatInputs, RoundedInputs
from halfbin.nn.quant_inputs import finished
from halfbin.tensor import QTensor, dequantize, int_matmul, parse_inputs, parse_scheme, quantize
from kernels.triton.where import DEVICE, ON_GPU, UNIT, only_where_kernels_run

only_where_kernels_run()
NO_CPU = CpuFeatures("none", "DEFAULT")
SCHEMES = [
    "int4-g128",
    "int4-g32-asym-f16",
    "uint4-g64-asym-bf16",
    "int8-channel",
    "int2-tensor-bf16",
    "uint8-b16x64-asym",
]
SCHEMES += ["fp8_e4m3-channel", "fp8_e4m3-g64", "mxfp8", "fp8_e4m3-tensor"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight(text: str, rows: int = 70, columns: int = 300, seed: int = 1) -> QTensor:
    return quantize(normal(rows, columns, seed=seed), parse_scheme(text)).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("text", SCHEMES)
def test_a_layer_multiplies_floats_as_they_are(text: str, dtype: torch.dtype) -> None:
    q, x = weight(text), normal(2, 3, 300).to(dtype).to(DEVICE)
    layer = QuantLinear(q, nn.Parameter(normal(70).to(dtype).to(DEVICE)))
    assert layer.kernel.name == "triton" and layer.bias is not None
    with torch.no_grad():
        y = layer(x)
    assert y.dtype == dtype and y.shape == (2, 3, 70)
    rows, w_hat, bias = x.double().view(6, 300), dequantize(q, torch.float64), layer.bias.detach().double()
    expected = rows @ w_hat.T + bias
    # 300 sums, two roundings for each of at most 10 groups, three more; half an ulp of y's type; see test_weight_only.py.
    slack = (300 + 20 + 10 + 3) * UNIT * (rows.abs() @ w_hat.abs().T + bias.abs())
    rounding = (2.0**-11 if dtype == torch.float16 else 2.0**-8) * (expected.abs() + slack) + 2.0**-25
    assert bool(((y.double().view(6, 70) - expected).abs() <= slack + rounding).all())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int4-g40", "groups of 40 columns are no multiple of 32"),
        ("int4-channel@1", "groups of 1 columns are no multiple of 32"),
        ("nf4-g64", "its codes are nf4, and Triton's kernels read integers and fp8_e4m3"),
        ("fp8_e5m2-channel", "its codes are fp8_e5m2"),
        ("mxfp4", "its codes are fp4_e2m1"),
    ],
)
def test_why_a_weight_is_left_to_others(text: str, words: str) -> None:
    reason = FloatInputs().refuses(weight(text), NO_CPU)
    assert reason is not None and words in reason
    assert words in QuantLinear(weight(text)).refusals["triton"]


def test_float32_inputs_and_gradients_go_to_the_reference() -> None:
    layer, x = QuantLinear(weight("int4-g128"), nn.Parameter(normal(70).to(DEVICE))), normal(3, 300).to(DEVICE)
    with torch.no_grad():
        assert torch.equal(layer(x), nn.functional.linear(x, dequantize(layer.qtensor), layer.bias))
    half = copy.deepcopy(layer).half()
    half(x.half().requires_grad_()).sum().backward()
    assert half.bias is not None and half.bias.grad is not None


def test_exact_products_are_these_too() -> None:
    layer, x = QuantLinear(weight("int4-g128")), normal(3, 300).half().to(DEVICE)
    y = layer(x)
    layer.choose(EXACT)
    assert layer.kernel.name == "triton" and torch.equal(layer(x), y)
    layer.choose([Reference()])
    assert not torch.equal(layer(x), y)


def test_a_layer_follows_its_weight() -> None:
    layer, other, x = (
        QuantLinear(weight("int8-channel")),
        weight("int8-channel", seed=9),
        normal(3, 300).half().to(DEVICE),
    )
    before = layer(x)
    layer.codes.copy_(other.codes)
    layer.scale.copy_(other.scale)
    assert not torch.equal(layer(x), before)
    assert torch.equal(layer(x), QuantLinear(other)(x))


INPUTS = ["int8-token", "int8-tensor", "int8-tensor-dynamic", "int4-token", "int8-tensor-f16"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("text", ["int8-channel", "int8-tensor", "int4-channel-f16", "int8-b16x512"])
@pytest.mark.parametrize("inputs", INPUTS)
def test_rounded_inputs_give_the_bits_of_the_plain_integer_product(inputs: str, text: str, dtype: torch.dtype) -> None:
    q, quantizer = weight(text), parse_inputs(inputs).calibrated(-2.5, 3.0)
    layer = QuantInputLinear(q, quantizer, nn.Parameter(normal(70).to(dtype))).to(DEVICE)
    assert layer.slow is None and isinstance(layer.product, RoundedInputs)
    for floats in (normal(300), normal(2, 20, 300), torch.zeros(1, 300)):
        x = floats.to(dtype).to(DEVICE)
        with torch.no_grad():
            assert torch.equal(layer(x), finished(int_matmul(layer.quantizer.quantize(x), q), layer.bias, x))


@pytest.mark.parametrize("inputs", ["fp8_e4m3-token", "fp8_e4m3-tensor", "fp8_e4m3-tensor-dynamic"])
@pytest.mark.parametrize("text", ["fp8_e4m3-channel", "fp8_e4m3-tensor"])
def test_fp8_on_both_sides_is_near_the_plain_product(text: str, inputs: str) -> None:
    q, quantizer = weight(text), parse_inputs(inputs).calibrated(-2.5, 3.0)
    layer, x = QuantInputLinear(q, quantizer).to(DEVICE), normal(4, 300).to(DEVICE)
    assert layer.slow is None and isinstance(layer.product, RoundedInputs)
    x_hat, w_hat = dequantize(layer.quantizer.quantize(x), torch.float64), dequantize(q, torch.float64)
    bound = ((300 + 3) * UNIT + (2.0**-13 if ON_GPU else 0)) * (
        x_hat.abs() @ w_hat.abs().T
    )  # see test_quantized_inputs.py
    with torch.no_grad():
        assert bool(((layer(x).double() - x_hat @ w_hat.T).abs() <= bound).all())


@pytest.mark.parametrize(
    ("text", "inputs", "words"),
    [
        ("int8-channel", "int8-token-asym", "inputs have zero points"),
        ("int8-channel-asym", "int8-token", "weights have zero points"),
        ("int8-channel", "uint8-tensor", "inputs are uint8"),
        ("uint8-channel", "int8-token", "weights are uint8"),
        ("int8-channel", "fp8_e4m3-token", "inputs are fp8_e4m3 and weights int8"),
        ("int8-g128", "int8-token", "a scale for each 128 columns"),
        ("int8-channel", "int8-token-outliers6", "outlier columns"),
        ("int8-channel", "int8-token-f16", "stored as f16"),
    ],
)
def test_why_rounded_inputs_are_left_to_others(text: str, inputs: str, words: str) -> None:
    reason = RoundedInputs(parse_inputs(inputs)).refuses(weight(text), NO_CPU)
    assert reason is not None and words in reason


def test_sums_that_int32_does_not_hold_are_refused() -> None:
    inputs = RoundedInputs(parse_inputs("int8-token"))
    most = (2**31 - 1) // 2**14
    assert inputs.refuses(weight("int8-channel", 1, most), NO_CPU) is None
    assert (
        inputs.refuses(weight("int8-channel", 1, most + 1), NO_CPU)
        == f"sums over {most + 1} columns could exceed INT32"
    )


def test_inputs_that_are_not_finite_are_refused() -> None:
    layer = QuantInputLinear(weight("int8-channel"), parse_inputs("int8-token").quantizer())
    x = normal(4, 300).to(DEVICE)
    x[1, 7] = torch.inf
    with pytest.raises(DataError, match="1 of 4 tokens"):
        layer(x)


def test_layers_compile_and_export_to_the_operators() -> None:
    x = normal(4, 300).half().to(DEVICE)
    plain = QuantLinear(weight("int4-g128"))
    rounded = QuantInputLinear(weight("int8-channel"), parse_inputs("int8-token").quantizer())
    for layer, name in ((plain, "triton_weight_only"), (rounded, "triton_quantized_inputs")):
        layer.prepare()
        with torch.no_grad():
            expected = layer(x)
            assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
            program = torch.export.export(layer, (x,))
            targets = {node.target for node in program.graph.nodes}
            assert getattr(torch.ops.halfbin, name).default in targets
            assert torch.equal(program.module()(x), expected)
