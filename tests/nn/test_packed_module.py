"""Layers that hold nothing but their kernel's layout behave as those that hold codes."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from halfbin.nn import EXACT, KERNELS, CpuFeatures, QuantInputLinear, QuantLinear
from halfbin.nn.packed_module import PackedModule
from halfbin.tensor import QTensor, dequantize, parse_inputs, parse_scheme, quantize

pytestmark = pytest.mark.skipif("avx2" not in CpuFeatures.detect().instructions, reason="plain loops are not chosen")
SCHEMES = [
    "int4-g128",
    "uint4-g32-asym-f16",
    "int8-channel",
    "int8-tensor-asym",
    "ternary-tensor",
    "int3-g64-bf16",
    "uint8-b16x64-asym",
    "int8-g32-e8m0",
    "int4-b32x300",
    "int2-g64-asym",
    "mxfp4",
    "fp4_e2m1-g64-f16",
    "nf4-g64-f16",
    "fp8_e4m3-channel",
    "fp8_e4m3-b128x128",
    "fp8_e5m2-tensor-bf16",
    "mxfp8",
    "fp4_e2m1-g8",
]
schemes = pytest.mark.parametrize("text", SCHEMES)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    """Biases want some, and where gradients are on they get them from the reference."""
    with torch.no_grad():
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layers(text: str) -> tuple[QuantLinear, QuantLinear]:
    """The same layer with codes, and without."""
    q = quantize(normal(70, 300, seed=1), parse_scheme(text))
    both = tuple(QuantLinear(q, nn.Parameter(normal(70, seed=2))) for _ in range(2))
    both[1].hold_packed()
    assert not holds_codes(both[1])
    return both[0], both[1]


def holds_codes(layer: PackedModule) -> bool:
    return any(layer._buffers.get(name) is not None for name in ("codes", "scale", "zero_point"))


def same(a: QTensor, b: QTensor) -> bool:
    def alike(x: Tensor | None, y: Tensor | None) -> bool:
        if x is None or y is None:
            return x is y
        return x.dtype == y.dtype and torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))

    parts = ((a.codes, b.codes), (a.scale, b.scale), (a.zero_point, b.zero_point))
    return a.scheme == b.scheme and all(alike(x, y) for x, y in parts)


@schemes
def test_what_is_packed_alone_reads_and_computes_as_before(text: str) -> None:
    plain, packed = layers(text)
    x = normal(3, 300)
    assert torch.equal(packed(x), plain(x))
    assert same(packed.qtensor, plain.qtensor)
    assert torch.equal(packed.weight, plain.weight)
    assert torch.equal(packed.codes, plain.codes) and packed.codes_shape == (70, 300)
    assert (packed.zero_point is None) == (plain.zero_point is None)
    assert repr(packed) == repr(plain)


def test_one_copy_of_the_weight_is_all_that_there_is() -> None:
    plain, packed = layers("int4-g128")
    assert plain.memory is plain.codes
    # 2 panels of 64 rows, 3 groups: codes of half a byte and float32 scales.
    assert packed.memory.numel() == 64 + 2 * 3 * (64 * 64 + 64 * 4)
    assert packed.prepare().memory is packed.memory
    assert packed._packed.value is None


@schemes
def test_a_state_is_that_of_codes_and_loads_into_both_kinds(text: str) -> None:
    plain, packed = layers(text)
    state = packed.state_dict()
    assert state.keys() == plain.state_dict().keys()
    other = quantize(normal(70, 300, seed=9), parse_scheme(text))
    for layer in (plain, packed):
        layer.load_state_dict({**QuantLinear(other).state_dict(), "bias": torch.zeros(70)})
        assert same(layer.qtensor, other)
        assert torch.equal(layer(normal(3, 300)), QuantLinear(other)(normal(3, 300)))
        layer.load_state_dict(state)
    assert same(packed.qtensor, plain.qtensor)
    assert holds_codes(plain) and not holds_codes(packed)


def pickled(layer: QuantLinear) -> QuantLinear:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded: QuantLinear = torch.load(file, weights_only=False)
    return loaded


@schemes
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_is_packed_alone_too_and_shares_nothing(text: str, copied: object) -> None:
    _, packed = layers(text)
    other = copied(packed)  # type: ignore[operator]  # a parameter of the test
    assert not holds_codes(other) and same(other.qtensor, packed.qtensor)
    assert other.memory.data_ptr() != packed.memory.data_ptr()
    assert torch.equal(other(normal(3, 300)), packed(normal(3, 300)))


def test_what_is_pickled_is_codes_and_no_layout() -> None:
    _, packed = layers("int4-g128")
    state = packed.__getstate__()
    assert torch.equal(state["_buffers"]["codes"], packed.codes)
    assert state["_alone"] is True


@schemes
def test_casts_keep_the_weight_and_moves_bring_codes_back(text: str) -> None:
    plain, packed = layers(text)
    packed.to(torch.bfloat16)
    assert not holds_codes(packed) and packed.weight.dtype == torch.bfloat16
    assert same(packed.qtensor, plain.qtensor)
    packed.half()  # float16 inputs go through the reference, which reads codes
    assert holds_codes(packed) and same(packed.qtensor, plain.qtensor)
    _, packed = layers(text)
    assert packed.to("meta").codes.is_meta and holds_codes(packed)


def test_assigned_codes_are_followed() -> None:
    plain, packed = layers("int4-g128")
    other = quantize(normal(70, 300, seed=9), parse_scheme("int4-g128"))
    for layer in (plain, packed):
        layer.codes, layer.scale = other.codes, other.scale
    assert torch.equal(packed(normal(3, 300)), plain(normal(3, 300)))
    assert same(packed.qtensor, other)


def test_exact_inputs_bring_codes_back() -> None:
    plain, packed = layers("int4-g128")
    x = normal(3, 300)
    packed.choose(EXACT)
    assert holds_codes(packed)
    assert torch.equal(packed(x), nn.functional.linear(x, dequantize(plain.qtensor), plain.bias))
    packed.hold_packed()  # the reference has no layout of its own
    assert holds_codes(packed)
    _, packed = layers("int4-g128")
    packed.choose(KERNELS)
    assert not holds_codes(packed) and torch.equal(packed(x), plain(x))


def test_what_the_kernel_does_not_read_still_goes_through_the_reference() -> None:
    plain, packed = layers("int4-g128")
    with torch.enable_grad():
        assert torch.equal(packed(normal(3, 300)), plain(normal(3, 300)))
    x = normal(3, 300).double()
    assert torch.equal(packed.double()(x), plain.double()(x))


@pytest.mark.parametrize(
    ("text", "inputs"),
    [
        ("int8-channel", "int8-token"),
        ("int8-channel", "uint8-tensor-asym"),
        ("int8-channel", "int8-token-f16"),
        ("fp8_e4m3-channel", "fp8_e4m3-token"),
        ("nf4-g64", "fp8_e4m3-tensor"),
    ],
)
def test_layers_with_quantized_inputs_do_the_same(text: str, inputs: str) -> None:
    q, quantizer = quantize(normal(70, 300, seed=1), parse_scheme(text)), parse_inputs(inputs)
    plain, packed = (QuantInputLinear(q, quantizer.calibrated(-2.5, 3.0)) for _ in range(2))
    packed.hold_packed()
    assert holds_codes(packed) == (plain.slow is not None)
    assert torch.equal(packed(normal(3, 300)), plain(normal(3, 300)))
    assert same(packed.qtensor, q) and same(copy.deepcopy(packed).qtensor, q)


def test_it_compiles_and_exports() -> None:
    _, packed = layers("int4-g128")
    x = normal(4, 300)
    with torch.no_grad():
        expected = packed(x)
        assert torch.equal(torch.compile(packed, fullgraph=True, backend="aot_eager")(x), expected)
        program = torch.export.export(packed, (x,))
        assert torch.ops.halfbin.linear.default in {node.target for node in program.graph.nodes}
        assert torch.equal(program.module()(x), expected)
