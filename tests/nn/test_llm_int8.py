"""LLM.int8() in one compiled call: the bits that its order of operations says, on every instruction set."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from halfbin.errors import DataError
from halfbin.kernels import products
from halfbin.nn import CpuFeatures, LLMInt8Linear
from halfbin.nn.llm_int8 import INT8_TOKEN
from halfbin.tensor import FloatColumns, dequantize, int_matmul, parse_scheme, quantize

pytestmark = pytest.mark.skipif("avx2" not in CpuFeatures.detect().instructions, reason="plain loops are not chosen")
sets = pytest.mark.parametrize("name", products.instruction_sets())
U = 2.0**-24
ROUNDOFF = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
dtypes = pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    """Biases want some, and where gradients are on they get them step by step."""
    with torch.no_grad():
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(
    rows: int = 70,
    columns: int = 300,
    kept: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float16,
    scheme: str = "int8-channel",
) -> LLMInt8Linear:
    ids = torch.tensor(kept, dtype=torch.int32)
    floats = FloatColumns(ids, normal(rows, len(kept), seed=3).to(dtype)) if kept else None
    q = quantize(normal(rows, columns, seed=1), parse_scheme(scheme))
    return LLMInt8Linear(q, nn.Parameter(normal(rows, seed=2)), columns=floats)


def inputs(
    tokens: int, columns: int = 300, outliers: tuple[int, ...] = (), dtype: torch.dtype = torch.float32
) -> Tensor:
    x = normal(tokens, columns, seed=tokens).clamp(-5.5, 5.5)
    for i, column in enumerate(outliers):
        x[i % tokens, column] = (-1) ** i * (6.0 + 20 * i)
    return x.to(dtype)


def step_by_step(of: LLMInt8Linear, x: Tensor) -> Tensor:
    """What csrc/matmul/mixed.h says, operation by operation."""
    columns = of.columns
    known = [] if columns is None else columns.ids.tolist()
    found = [c for c in range(x.shape[1]) if c not in known and bool((x[:, c].abs() >= of.threshold).any())]
    rest = x.clone()
    rest[:, known + found] = 0
    y = int_matmul(quantize(rest, INT8_TOKEN.scheme), of.qtensor)
    values = [] if columns is None else list(columns.values.float().T)
    for c, w in zip(known + found, values + [dequantize(of.qtensor)[:, c] for c in found], strict=True):
        y = y + x[:, c, None].float() * w
    return (y if of.bias is None else y + of.bias.float()).to(x.dtype)


@sets
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", ["int8-channel", "int4-channel"])
@pytest.mark.parametrize("kept", [(), (3,), (0, 17, 299)], ids=["none", "one", "ends"])
def test_the_bits_are_those_of_the_order_of_operations(
    kept: tuple[int, ...], scheme: str, dtype: torch.dtype, name: str
) -> None:
    for outliers in ((), (17,), (5, 17, 18, 298, 0)):
        for tokens in (1, 4, 33):
            of, x = layer(kept=kept, scheme=scheme), inputs(tokens, outliers=outliers, dtype=dtype)
            with products.forced(name):
                assert torch.equal(of(x), step_by_step(of, x))


@sets
def test_every_tail_of_rows_and_columns(name: str) -> None:
    for rows, columns in [(n, 40) for n in range(1, 131)] + [(3, k) for k in range(2, 131)]:
        of, x = layer(rows, columns, kept=(0,)), inputs(2, columns, outliers=(columns - 1,))
        with products.forced(name):
            assert torch.equal(of(x), step_by_step(of, x)), (rows, columns)


@pytest.mark.parametrize("values", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_kept_columns_are_read_as_they_are_stored(values: torch.dtype) -> None:
    of, x = layer(kept=(2, 9), dtype=values), inputs(3)
    assert torch.equal(of(x), step_by_step(of, x))


def test_threads_do_not_change_bits() -> None:
    of, x = layer(500, kept=(2, 9)), inputs(20, outliers=(1, 200))
    found = []
    for count in (1, 2, 3):
        with products.forced(num_threads=count):
            found.append(of(x))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@dtypes
def test_both_ways_agree_within_their_roundings(dtype: torch.dtype) -> None:
    of, x = layer(kept=(3, 17)), inputs(9, outliers=(5, 100, 200), dtype=dtype)
    outside = [3, 17, 5, 100, 200]
    rest = x.clone()
    rest[:, outside] = 0
    first = int_matmul(quantize(rest, INT8_TOKEN.scheme), of.qtensor).double().abs()
    weight = of.weight[:, outside].double().abs()
    assert of.bias is not None
    absolute = first + x[:, outside].double().abs() @ weight.T + of.bias.double().abs()
    bound = (2 * len(outside) + 3) * U * absolute + 2 * ROUNDOFF[dtype] * absolute
    assert bool(((of(x).double() - of._plainly(x).double()).abs() <= bound).all())


def test_all_columns_and_none_can_be_outliers() -> None:
    of, x = layer(), inputs(3)
    of.threshold = 0.0
    assert torch.equal(of(x), step_by_step(of, x))
    of.threshold = torch.inf
    assert torch.equal(of(x), step_by_step(of, x)) and torch.equal(of(x), of._plainly(x))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_inputs_that_are_not_finite_are_refused(bad: float) -> None:
    for kept in ((), (7,)):
        x = inputs(4)
        x[1, 7] = bad
        with pytest.raises(DataError, match="1 of 1200 elements are NaN or infinite"):
            layer(kept=kept)(x)


def test_shapes_stay_and_empty_ones_too() -> None:
    of, x = layer(kept=(3,)), inputs(6, outliers=(9,))
    flat = of(x)
    assert torch.equal(of(x.view(2, 3, 300)), flat.view(2, 3, 70))
    assert of(x[0]).shape == (70,) and of(x[:0]).shape == (0, 70)


def test_columns_are_followed_and_codes_may_be_held_packed_alone() -> None:
    of, x = layer(kept=(3, 17)), inputs(5, outliers=(9,))
    before = of(x)
    packed = copy.deepcopy(of)
    packed.hold_packed()
    assert packed._buffers.get("codes") is None
    assert torch.equal(packed(x), before) and torch.equal(packed.weight, of.weight)
    assert packed.column_values is not None
    packed.column_values.mul_(2)
    assert not torch.equal(packed(x), before)
    packed.load_state_dict(of.state_dict())
    assert torch.equal(packed(x), before)


def test_it_says_what_multiplies() -> None:
    assert layer().multiplied == ("LLM.int8()", {})
