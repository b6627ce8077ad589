"""Layers whose codes stand for floats: when the compiled product is used, what it gives, what is left to the reference."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from halfbin.errors import DataError
from halfbin.kernels.float_products import TOKENS_FOR_TILES
from halfbin.nn import EXACT, KERNELS, CpuFeatures, QuantInputLinear, QuantLinear, Reference
from halfbin.nn.floats import FloatCodes
from halfbin.tensor import QTensor, dequantize, parse_inputs, parse_scheme, quantize

needs_avx2 = pytest.mark.skipif("avx2" not in CpuFeatures.detect().instructions, reason="plain loops are not chosen")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
U = 2.0**-24
ROUNDOFF = {torch.float32: U, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
CPU = CpuFeatures("x86_64", "AVX2", frozenset({"avx2"}))
SCHEMES = [
    "nf4-g64",
    "nf4-g64-bf16",
    "nf4-channel",
    "fp8_e4m3-channel",
    "fp8_e4m3-tensor",
    "fp8_e4m3-b128x128",
    "fp8_e4m3-b16x64-f16",
    "fp8_e5m2-channel",
    "fp8_e5m2-g128-bf16",
    "mxfp8",
    "fp4_e2m1-g16",
    "fp4_e2m1-g8-e8m0",
]
schemes = pytest.mark.parametrize("text", SCHEMES)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight(text: str, rows: int = 150, columns: int = 300) -> QTensor:
    return quantize(normal(rows, columns, seed=1), parse_scheme(text))


@pytest.mark.parametrize(
    ("text", "cpu", "words"),
    [
        *((text, CPU, None) for text in SCHEMES),
        ("mxfp4", CPU, None),
        ("int4-g128", CPU, "its codes are int4, and it reads FP8 and floats of 4 bits"),
        ("nf4-g20", CPU, "groups of 20 columns are no multiple of 8"),
        ("fp8_e4m3-channel@1", CPU, "groups of 1 columns are no multiple of 8"),
        ("nf4-g64", CpuFeatures("arm64", "DEFAULT"), "this arm64 has no AVX2"),
    ],
)
def test_why_a_weight_is_left_to_the_reference(text: str, cpu: CpuFeatures, words: str | None) -> None:
    reason = FloatCodes().refuses(weight(text), cpu)
    assert reason is None if words is None else reason is not None and words in reason


def test_weights_elsewhere_and_without_elements_are_refused() -> None:
    q = weight("nf4-g64")
    assert "its codes are on meta" in (FloatCodes().refuses(q.to("meta"), CPU) or "")
    empty = quantize(torch.zeros(0, 8), parse_scheme("fp8_e4m3-channel"))
    assert "no elements: [0, 8]" in (FloatCodes().refuses(empty, CPU) or "")


@needs_avx2
@schemes
def test_a_layer_says_that_its_inputs_stay_floats(text: str) -> None:
    for kernels in (KERNELS, EXACT):
        layer = QuantLinear(weight(text), kernels=kernels)
        assert layer.multiplied[0] == "float-inputs"
        assert set(layer.refusals) == {kernel.name for kernel in kernels} - {"float-inputs", "reference"}
    layer.choose([Reference()])
    assert layer.multiplied == ("reference", {})


@needs_avx2
def test_integers_are_multiplied_as_before_and_fp4_is_one_of_them() -> None:
    assert QuantLinear(weight("int4-g128")).kernel.name == "int8-inputs"
    assert QuantLinear(weight("mxfp4")).kernel.name == "int8-inputs"
    assert QuantLinear(weight("mxfp4"), kernels=EXACT).kernel.name == "float-inputs"
    assert QuantLinear(weight("int4-g128"), kernels=EXACT).kernel.name == "reference"


@needs_avx2
@dtypes
@schemes
def test_a_layer_lies_within_its_bound_of_the_exact_product(text: str, dtype: torch.dtype) -> None:
    """K fused products and one for each group in float32, the bias, the type of y. From many tokens on weights are bfloat16."""
    q = weight(text)
    layer = QuantLinear(q, nn.Parameter(normal(150).to(dtype), requires_grad=False))
    assert layer.bias is not None
    # In float32: a scale times a code is rounded there by the reference, and by the product not at all.
    w_hat, bias = dequantize(q, torch.float64), layer.bias.double()
    groups = -(-300 // (q.scheme.granularity.tile(q.shape)[1]))
    for tokens in (1, 6, 2 * TOKENS_FOR_TILES):
        x = normal(2, tokens, 300).to(dtype)
        y = layer(x)
        assert y.dtype == dtype and y.shape == (2, tokens, 150)
        exact = x.double() @ w_hat.T + bias
        absolute = x.double().abs() @ w_hat.abs().T + bias.abs()
        many = tokens > 6 and dtype is torch.bfloat16
        # torch's tiles may cut digits off where float32 rounds, hence 2.
        bound = ((300 + groups + 1) * U * (2 if many else 1) + (ROUNDOFF[dtype] if many else 0)) * absolute
        bound += 0 if dtype is torch.float32 else ROUNDOFF[dtype] * (exact.abs() + bound)
        assert bool(((y.double() - exact).abs() <= bound * (1 + 1e-3)).all())


@needs_avx2
def test_the_plain_product_can_be_asked_for_to_the_bit() -> None:
    layer, x = QuantLinear(weight("nf4-g64")), normal(3, 300)
    fast = layer(x)
    layer.hold_packed()
    layer.choose([Reference()])
    assert torch.equal(layer(x), nn.functional.linear(x, dequantize(layer.qtensor)))
    layer.choose(KERNELS)
    assert torch.equal(layer(x), fast)


@needs_avx2
@schemes
def test_a_layer_may_hold_the_packed_weight_alone(text: str) -> None:
    plain, alone = (QuantLinear(weight(text)) for _ in range(2))
    alone.hold_packed()
    assert "codes" not in alone._buffers
    x = normal(3, 300)
    assert torch.equal(alone(x), plain(x))
    assert torch.equal(alone.codes, plain.codes)
    assert (
        torch.equal(alone.scale.view(torch.uint8), plain.scale.view(torch.uint8))
        and alone.scale.dtype == plain.scale.dtype
    )
    file = io.BytesIO()
    torch.save(alone.state_dict(), file)
    other = QuantLinear(quantize(normal(150, 300, seed=7), parse_scheme(text)))
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
    assert torch.equal(other(x), plain(x))


@needs_avx2
def test_one_copy_of_the_weight_is_all_that_there_is() -> None:
    layer = QuantLinear(weight("nf4-g64-f16"))
    layer.hold_packed()
    # 3 panels of 64 rows, 5 groups: codes of half a byte and float16 scales; a mark for each row.
    assert layer.memory.numel() == 128 + 3 * (5 * (64 * 32 + 64 * 2) + 64)


@needs_avx2
def test_inputs_that_the_kernel_does_not_read_go_to_the_reference() -> None:
    layer = QuantLinear(weight("nf4-g64"), nn.Parameter(normal(150)))
    half, double = copy.deepcopy(layer).half(), copy.deepcopy(layer).double()
    with torch.no_grad():
        for other, x in ((half, normal(3, 300).half()), (double, normal(3, 300).double())):
            expected = nn.functional.linear(x, dequantize(other.qtensor, x.dtype), other.bias)
            assert torch.equal(other(x), expected)
    x = normal(3, 300).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None and layer.bias is not None and layer.bias.grad is not None


@needs_avx2
def test_a_token_that_is_not_finite_spoils_no_other() -> None:
    layer, x = QuantLinear(weight("fp8_e4m3-channel")), normal(5, 300)
    before = layer(x)
    x[2, 7] = torch.nan
    after = layer(x)
    assert bool(after[2].isnan().all())
    assert torch.equal(after[[0, 1, 3, 4]], before[[0, 1, 3, 4]])


@needs_avx2
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inputs", ["fp8_e4m3-token", "fp8_e4m3-tensor", "fp8_e4m3-tensor-dynamic", "int8-token"])
@pytest.mark.parametrize("text", ["fp8_e4m3-channel", "fp8_e4m3-b128x128", "nf4-g64"])
def test_rounded_inputs_are_multiplied_as_the_floats_they_stand_for(text: str, inputs: str, dtype: torch.dtype) -> None:
    q, quantizer = weight(text), parse_inputs(inputs).calibrated(-2.5, 3.0)
    layer = QuantInputLinear(q, quantizer, nn.Parameter(normal(150).to(dtype), requires_grad=False))
    name, refusals = layer.multiplied
    assert name == "rounded-floats" and "codes are no integers" in refusals["exact-integers"]
    assert layer.bias is not None
    x = normal(7, 300).to(dtype)
    x_hat, w_hat = quantizer.fake_quantize(x).double(), dequantize(q, torch.float64)
    exact = x_hat @ w_hat.T + layer.bias.double()
    absolute = x_hat.abs() @ w_hat.abs().T + layer.bias.double().abs()
    bound = (300 + -(-300 // q.scheme.granularity.tile(q.shape)[1]) + 1) * U * absolute
    bound += 0 if dtype is torch.float32 else ROUNDOFF[dtype] * (exact.abs() + bound)
    assert bool(((layer(x).double() - exact).abs() <= bound * (1 + 1e-3)).all())
    x[1, 7] = torch.inf
    with pytest.raises(DataError, match="NaN or infinit"):
        layer(x)


@needs_avx2
def test_inputs_and_integers_that_no_compiled_product_takes_are_told() -> None:
    layer = QuantInputLinear(weight("int8-channel"), parse_inputs("fp8_e4m3-token").quantizer())
    assert layer.slow is not None
    assert "fp8_e4m3 codes are no integers; its codes are int8, and it reads FP8" in layer.slow
    assert layer.multiplied[0] == "reference"


@needs_avx2
def test_a_layer_compiles_and_exports_to_the_operator() -> None:
    layer, x = QuantLinear(weight("nf4-g64")), normal(4, 300)
    layer.hold_packed()
    with torch.no_grad():
        expected = layer(x)
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
        program = torch.export.export(layer, (x,))
        assert torch.ops.halfbin.float_linear.default in {node.target for node in program.graph.nodes}
        assert torch.equal(program.module()(x), expected)
