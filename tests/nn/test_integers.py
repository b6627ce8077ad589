"""Layers on the compiled integer products: when they are used, what they give, and that they follow their weight."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from halfbin.errors import DataError
from halfbin.kernels import products
from halfbin.nn import EXACT, CpuFeatures, QuantInputLinear, QuantLinear
from halfbin.nn.integers import IntegerInputs
from halfbin.nn.quant_inputs import finished
from halfbin.tensor import QTensor, dequantize, int_matmul, parse_inputs, parse_scheme, quantize

needs_avx2 = pytest.mark.skipif("avx2" not in CpuFeatures.detect().instructions, reason="plain loops are not chosen")
U = 2.0**-24


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight(text: str, rows: int = 70, columns: int = 300) -> QTensor:
    return quantize(normal(rows, columns, seed=1), parse_scheme(text))


CPU = CpuFeatures("x86_64", "AVX2", frozenset({"avx2"}))


@pytest.mark.parametrize(
    ("text", "cpu", "words"),
    [
        ("int4-g128", CPU, None),
        ("uint4-g32-asym-f16", CPU, None),
        ("int8-channel", CPU, None),
        ("ternary-tensor", CPU, None),
        ("int3-g64-bf16", CPU, None),
        ("int4-g40", CPU, "groups of 40 columns are no multiple of 32"),
        ("int4-channel@1", CPU, "groups of 1 columns are no multiple of 32"),
        ("mxfp4", CPU, None),
        ("nf4-g64", CPU, "its codes are nf4, no integers"),
        ("fp8_e4m3-channel", CPU, "its codes are fp8_e4m3, no integers"),
        ("int4-g128", CpuFeatures("arm64", "DEFAULT"), "this arm64 has no AVX2"),
    ],
)
def test_why_a_weight_is_left_to_the_reference(text: str, cpu: CpuFeatures, words: str | None) -> None:
    reason = IntegerInputs().refuses(weight(text), cpu)
    assert reason is None if words is None else reason is not None and words in reason


@needs_avx2
def test_a_layer_says_which_kernel_it_has_and_why_not_a_faster_one() -> None:
    assert QuantLinear(weight("int4-g128")).kernel.name == "int8-inputs"
    assert QuantLinear(weight("int4-g128"), kernels=EXACT).kernel.name == "reference"
    slow = QuantLinear(weight("int4-g40"))
    assert slow.kernel.name == "reference"
    assert slow.refusals["int8-inputs"] == "groups of 40 columns are no multiple of 32"


@needs_avx2
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "text",
    ["int4-g128", "int4-g32-asym-f16", "uint4-g64-asym", "int8-channel", "int2-tensor-bf16", "mxfp4", "ternary-g64"],
)
def test_a_layer_is_as_near_to_the_float_product_as_rounded_inputs_allow(text: str, dtype: torch.dtype) -> None:
    q, x = weight(text), normal(2, 3, 300).to(dtype)
    layer = QuantLinear(q, nn.Parameter(normal(70).to(dtype)))
    assert layer.bias is not None
    with torch.no_grad():
        y = layer(x)
    assert y.dtype == dtype and y.shape == (2, 3, 70)
    size = q.scheme.group_size or 128
    rows, w_hat = x.reshape(6, 300).double(), dequantize(q, torch.float64)
    # Half a step for each input; then a rounding of the division, three a group, and those of the bias and of the type of y.
    step = torch.cat([p.abs().amax(1, keepdim=True).expand_as(p) for p in torch.split(rows, size, 1)], 1) / 127
    moved = step * (0.5 + 127 * 4 * U)
    roundings = (3 * -(-300 // size) + 2) * U + (0 if dtype == torch.float32 else 2.0**-8)
    absolute = (rows.abs() + moved) @ w_hat.abs().T + layer.bias.detach().double().abs()
    error = (y.reshape(6, 70).double() - rows @ w_hat.T - layer.bias.detach().double()).abs()
    assert bool((error <= moved @ w_hat.abs().T + roundings * absolute).all())


@needs_avx2
def test_scales_of_fp4_are_halved_exactly() -> None:
    """e8m0 scales from 2**-127, which has no half among float32's normal numbers, and float16's subnormal ones."""
    q = weight("mxfp4")
    q.scale.view(torch.uint8).copy_(torch.arange(q.scale.numel()).remainder(255).to(torch.uint8).view(q.scale.shape))
    assert torch.equal(IntegerInputs().pack(q).unpack(q.scheme).scale.view(torch.uint8), q.scale.view(torch.uint8))
    q = weight("fp4_e2m1-g64-f16")
    q.scale.view(torch.int16).copy_(torch.arange(1, 1 + q.scale.numel()).to(torch.int16).view(q.scale.shape))
    assert torch.equal(IntegerInputs().pack(q).unpack(q.scheme).scale, q.scale)


@needs_avx2
def test_exact_inputs_can_be_asked_for_and_taken_back() -> None:
    layer, x = QuantLinear(weight("int4-g128")), normal(3, 300)
    fast = layer(x)
    layer.choose(EXACT)
    assert torch.equal(layer(x), nn.functional.linear(x, dequantize(layer.qtensor)))
    assert not torch.equal(layer(x), fast)
    layer.choose([IntegerInputs(), *EXACT])
    assert torch.equal(layer(x), fast)


@needs_avx2
def test_inputs_that_the_kernel_does_not_read_go_to_the_reference() -> None:
    layer = QuantLinear(weight("int4-g128"), nn.Parameter(normal(70)))
    half, double = copy.deepcopy(layer).half(), copy.deepcopy(layer).double()
    for other, x in ((half, normal(3, 300).half()), (double, normal(3, 300).double())):
        assert torch.equal(other(x), nn.functional.linear(x, dequantize(other.qtensor, x.dtype), other.bias))


@needs_avx2
def test_gradients_flow_through_the_reference() -> None:
    layer, x = QuantLinear(weight("int4-g128"), nn.Parameter(normal(70))), normal(3, 300).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None and layer.bias is not None and layer.bias.grad is not None
    assert torch.equal(layer.bias.grad, torch.full((70,), 3.0))


def changed_in_place(layer: QuantLinear, q: QTensor) -> None:
    layer.codes.copy_(q.codes)
    layer.scale.copy_(q.scale)


def changed_by_a_state(layer: QuantLinear, q: QTensor) -> None:
    layer.load_state_dict(QuantLinear(q).state_dict())


def replaced(layer: QuantLinear, q: QTensor) -> None:
    layer.codes, layer.scale = q.codes, q.scale


@needs_avx2
@pytest.mark.parametrize("change", [changed_in_place, changed_by_a_state, replaced])
@pytest.mark.parametrize("inputs", [None, "int8-token"])
def test_a_layer_follows_its_weight(change: object, inputs: str | None) -> None:
    other = quantize(normal(70, 300, seed=9), parse_scheme("int4-g128"))

    def layer(q: QTensor) -> QuantLinear:
        return QuantLinear(q) if inputs is None else QuantInputLinear(q, parse_inputs(inputs).quantizer())

    mine, x = layer(weight("int4-g128")), normal(3, 300)
    before = mine(x)
    change(mine, other)  # type: ignore[operator]  # a parameter of the test
    assert not torch.equal(mine(x), before)
    assert torch.equal(mine(x), layer(other)(x))


@needs_avx2
def test_a_weight_is_packed_once_and_let_go_with_a_cast_or_a_copy() -> None:
    layer, x = QuantLinear(weight("int4-g128")), normal(3, 300)
    y = layer(x)
    packed = layer.prepare()
    layer(x)
    assert layer.prepare() is packed
    # 2 panels of 64 rows, 3 groups: codes of half a byte and float32 scales.
    assert packed.memory.numel() == 64 + 2 * 3 * (64 * 64 + 64 * 4)
    assert copy.deepcopy(layer)._packed.value is None
    layer.to(torch.bfloat16)
    assert layer._packed.value is None
    assert torch.equal(layer(x), y)


INPUTS = [
    "int8-token",
    "int8-tensor",
    "int8-tensor-dynamic",
    "int8-token-asym",
    "uint8-tensor-asym",
    "uint8-token-asym",
]
INPUTS += ["int4-token", "int8-tensor-f16", "uint4-token-asym", "uint8-tensor"]


@needs_avx2
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "text", ["int8-channel", "int8-tensor-asym", "int4-g128", "int4-g32-asym-f16", "uint8-b16x64-asym"]
)
@pytest.mark.parametrize("inputs", INPUTS)
def test_rounded_inputs_give_the_bits_of_the_plain_integer_product(inputs: str, text: str, dtype: torch.dtype) -> None:
    q, quantizer = weight(text), parse_inputs(inputs).calibrated(-2.5, 3.0)
    layer = QuantInputLinear(q, quantizer, nn.Parameter(normal(70).to(dtype)))
    assert layer.slow is None
    for x in (normal(300).to(dtype), normal(2, 20, 300).to(dtype), torch.zeros(1, 300, dtype=dtype)):
        with torch.no_grad():
            assert torch.equal(layer(x), finished(int_matmul(quantizer.quantize(x), q), layer.bias, x))


@needs_avx2
@pytest.mark.parametrize("inputs", ["int8-token", "int8-tensor", "int8-tensor-dynamic"])
def test_inputs_that_are_not_finite_are_refused(inputs: str) -> None:
    layer, x = QuantInputLinear(weight("int8-channel"), parse_inputs(inputs).calibrated(-2.5, 3.0)), normal(4, 300)
    x[1, 7] = torch.inf
    with pytest.raises(DataError, match=r"1 of (4|1200) .*infinit"):
        layer(x)


def test_dynamic_scales_that_are_stored_narrowly_go_the_plain_way() -> None:
    layer = QuantInputLinear(weight("int8-channel"), parse_inputs("int8-token-f16").quantizer())
    assert layer.slow is not None
    assert "stored as f16" in layer.slow


@needs_avx2
def test_a_layer_compiles_and_exports_to_the_operator() -> None:
    layer, x = QuantLinear(weight("int4-g128")), normal(4, 300)
    layer.prepare()
    with torch.no_grad():
        expected = layer(x)
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
        program = torch.export.export(layer, (x,))
        assert torch.ops.halfbin.linear.default in {node.target for node in program.graph.nodes}
        assert torch.equal(program.module()(x), expected)


@needs_avx2
def test_a_number_of_threads_of_its_own() -> None:
    layer, x = QuantLinear(weight("int4-g128", rows=500)), normal(20, 300)
    y = layer(x)
    try:
        products.set_num_threads(2)
        assert torch.equal(layer(x), y)
    finally:
        products.set_num_threads(None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_bias_may_lie_in_steps(dtype: torch.dtype) -> None:
    q = quantize(torch.randn(6, 64, generator=torch.Generator().manual_seed(0)), parse_scheme("int8-channel"))
    steps = nn.Parameter(torch.arange(12.0, dtype=dtype)[::2], requires_grad=False)
    together = nn.Parameter(steps.detach().clone(memory_format=torch.contiguous_format), requires_grad=False)
    assert not steps.is_contiguous() and together.is_contiguous()
    x = torch.ones(2, 64)
    assert torch.equal(QuantLinear(q, steps)(x), QuantLinear(q, together)(x))
