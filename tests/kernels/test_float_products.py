"""Every instruction set against one plain sum, to the bit, and that sum against float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from halfbin.errors import DataError
from halfbin.kernels import float_products, products
from halfbin.kernels.float_products import Kind, by_tiles, compiled, dequantize_transposed, linear, pack, unpack
from halfbin.kernels.instruction_sets import usable
from halfbin.numerics.formats import FP8_E4M3, FP8_E5M2, NF4, FloatFormat, TableFormat

sets = pytest.mark.parametrize("name", usable())
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
FORMATS: dict[Kind, FloatFormat | TableFormat] = {Kind.TABLE: NF4, Kind.E4M3: FP8_E4M3, Kind.E5M2: FP8_E5M2}
kinds = pytest.mark.parametrize("kind", Kind, ids=lambda kind: FORMATS[kind].name)
U = 2.0**-24


@dataclass(frozen=True)
class Weight:
    """Codes with their scales, packed, and what they stand for."""

    codes: Tensor
    scale: Tensor
    kind: Kind
    size: int
    packed: Tensor

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def format(self) -> FloatFormat | TableFormat:
        return FORMATS[self.kind]

    @property
    def scales(self) -> Tensor:
        """float32 [n, k]."""
        return self.scale.float().repeat_interleave(self.size, 1)[:, : self.codes.shape[1]]

    @property
    def w_hat(self) -> Tensor:
        """float64 [n, k]."""
        return self.scales.double() * self.format.decode(self.codes, torch.float32).double()


def finite_codes(kind: Kind) -> Tensor:
    codes = FORMATS[kind].codes
    return codes[FORMATS[kind].decode(codes).isfinite()]


def weight(
    n: int, k: int, size: int, kind: Kind, *, dtype: torch.dtype = torch.float32, codes: Tensor | None = None
) -> Weight:
    generator = torch.Generator().manual_seed(n * 1009 + k)
    if codes is None:
        all_codes = finite_codes(kind)
        codes = all_codes[torch.randint(len(all_codes), (n, k), generator=generator)]
    scale = (torch.rand((n, -(-k // size)), generator=generator) * 0.02 + 1e-3).to(dtype)
    return Weight(codes, scale, kind, size, packed(codes, scale, kind, size))


def packed(codes: Tensor, scale: Tensor, kind: Kind, size: int) -> Tensor:
    return pack(codes, scale, kind, group_size=size, table=NF4.table if kind is Kind.TABLE else ())


def inputs(m: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m * 31 + k)) * 3
    return x.to(dtype)


def fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """round(a * b + c) to float32, once.

    In float64 the product is exact and the sum is rounded to 53 bits. That gives a wrong float32 only where it lands halfway
    between two, without being there: then the sign of what was rounded off decides.
    """
    product, other = a.double() * b.double(), c.double()
    total = product + other
    small = torch.where(product.abs() < other.abs(), product, other)
    large = torch.where(product.abs() < other.abs(), other, product)
    lost = small - (total - large)
    tie = (total.view(torch.int64) & ((1 << 29) - 1)) == 1 << 28
    away = torch.where((lost > 0) == (total > 0), torch.inf, 0.0) * total.sign()
    return torch.where(tie & (lost != 0), torch.nextafter(total, away), total).float()


def plain(x: Tensor, w: Weight, bias: Tensor | None) -> Tensor:
    """The sum that csrc/floats/product.h describes, operation by operation; of numbers that are not subnormal."""
    unit = 256.0 if w.kind is Kind.E4M3 else 1.0
    values = w.format.decode(w.codes, torch.float32) / unit
    columns, y = x.float().T, torch.zeros(len(x), len(w))
    for g in range(w.scale.shape[1]):
        total = torch.zeros(len(x), len(w))
        for c in range(g * w.size, min((g + 1) * w.size, x.shape[1])):
            total = fused(columns[c, :, None], values[:, c], total)
        y = fused(unit * total, w.scale[:, g].float(), y)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def check(x: Tensor, w: Weight, bias: Tensor | None, name: str, num_threads: int = 1) -> None:
    y = compiled(x, w.packed, bias, len(w), instruction_set=name, num_threads=num_threads)
    assert y.dtype == x.dtype
    wrong = y != plain(x, w, bias)
    assert not bool(wrong.any()), f"{int(wrong.sum())} of {y.numel()} differ, first at {wrong.nonzero()[0].tolist()}"


SHAPES = [
    pytest.param([(n, 20, 2) for n in range(1, 131)], id="rows"),
    pytest.param([(3, k, m) for k in range(1, 131) for m in (1, 7)], id="columns"),
    pytest.param([(3, 20, m) for m in range(1, 131)], id="tokens"),
    pytest.param([(n, k, m) for n in (1, 2, 3) for k in (1, 2, 3) for m in (1, 2, 3)], id="tiny"),
]


@sets
@kinds
@pytest.mark.parametrize("shapes", SHAPES)
def test_every_tail_of_every_dimension(shapes: list[tuple[int, int, int]], kind: Kind, name: str) -> None:
    for n, k, m in shapes:
        check(inputs(m, k), weight(n, k, k, kind), torch.linspace(-1, 1, n), name)


@sets
@dtypes
@kinds
def test_groups_and_chunks_of_columns(kind: Kind, dtype: torch.dtype, name: str) -> None:
    for size, k in ((8, 40), (32, 70), (64, 65), (64, 192), (128, 300), (136, 300), (300, 300)):
        for m in (1, 4, 9):
            check(inputs(m, k, dtype), weight(67, k, size, kind), torch.linspace(-1, 1, 67).to(dtype), name)


@sets
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_scales_are_read_exactly_as_they_are_stored(dtype: torch.dtype, name: str) -> None:
    w = weight(66, 64, 16, Kind.E4M3, dtype=dtype)
    if dtype == torch.float16:  # the least, the greatest, the least normal one, none
        w.scale[0] = torch.tensor([2.0**-24, 65504.0, 2.0**-14, 0.0])
        w = Weight(w.codes, w.scale, w.kind, w.size, packed(w.codes, w.scale, w.kind, w.size))
    check(inputs(3, 64), w, None, name)


@sets
@kinds
@pytest.mark.parametrize("m", [1, 9], ids=["direct", "converted"])
def test_every_code_has_its_value_to_the_bit(m: int, kind: Kind, name: str) -> None:
    """A column alone, times 1 and scaled by 1, is its code's value: NaN, infinities, subnormals, all but the sign of zero."""
    codes = FORMATS[kind].codes
    for k, place in ((1, 0), (8, 3), (9, 8), (10, 9)):
        w = finite_codes(kind).new_zeros(len(codes), k)
        if kind is Kind.TABLE:
            w += 7  # 0.0
        w[:, place] = codes
        x = torch.zeros(m, k)
        x[:, place] = 1
        memory = packed(w, torch.ones(len(codes), 1), kind, k)
        y = compiled(x, memory, None, len(codes), instruction_set=name)
        expected = FORMATS[kind].decode(codes).expand(m, -1) + 0.0  # -0 becomes 0, as sums begin with 0
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
        assert not bool((y.signbit() & (y == 0)).any())


@sets
@dtypes
@kinds
def test_dequantized_panels_are_the_references_weight_to_the_bit(kind: Kind, dtype: torch.dtype, name: str) -> None:
    every = FORMATS[kind].codes
    for n, k, size in ((1, 1, 1), (70, 300, 64), (70, 300, 300), (130, 9, 8), (64, 136, 136)):
        codes = every[torch.arange(n * k).remainder(len(every))].view(n, k)
        for scale_type in (torch.float32, torch.float16, torch.bfloat16):
            w = weight(n, k, size, kind, codes=codes, dtype=scale_type)
            expected = (FORMATS[kind].decode(codes) * w.scales).to(dtype)
            panels = -(-n // 64)
            found = dequantize_transposed(w.packed, dtype, 0, panels, instruction_set=name).T
            torch.testing.assert_close(found[:n], expected, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(found[:n].signbit() & (expected == 0), expected.signbit() & (expected == 0))
            last = dequantize_transposed(w.packed, dtype, panels - 1, panels, instruction_set=name).T
            torch.testing.assert_close(last, found[(panels - 1) * 64 :], rtol=0, atol=0, equal_nan=True)


@sets
@pytest.mark.parametrize("kind", [Kind.E4M3, Kind.E5M2], ids=str)
def test_a_code_that_is_no_number_spoils_its_row_and_no_other(kind: Kind, name: str) -> None:
    w = weight(70, 300, 64, kind)
    codes = w.codes.clone()
    codes[3, 299], codes[69, 0] = 0x7F, 0xFF
    spoilt = packed(codes, w.scale, kind, 64)
    for m in (1, 9):
        x = inputs(m, 300)
        x[:, 299] = 0  # 0 * NaN is NaN
        for bias in (None, torch.ones(70)):
            before, after = (compiled(x, p, bias, 70, instruction_set=name) for p in (w.packed, spoilt))
            assert bool(after[:, [3, 69]].isnan().all())
            others = [r for r in range(70) if r not in (3, 69)]
            assert torch.equal(after[:, others], before[:, others])
    assert torch.equal(unpack(spoilt)[0], codes)


@sets
def test_infinite_codes_and_inputs_spread_as_in_any_product(name: str) -> None:
    w = weight(70, 40, 40, Kind.E5M2)
    codes = w.codes.clone()
    codes[1, 5], codes[2, 5], codes[2, 6] = 0x7C, 0x7C, 0xFC  # infinity; both infinities
    memory = packed(codes, w.scale, Kind.E5M2, 40)
    for m in (2, 9):
        x = inputs(m, 40).abs()
        x[1, 7] = torch.inf
        y = compiled(x, memory, None, 70, instruction_set=name)
        expected = x.double() @ (w.scales.double() * FP8_E5M2.decode(codes, torch.float64)).T
        odd = ~expected.isfinite()
        assert torch.equal(~y.isfinite(), odd) and bool(odd[0, 1:3].all())
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y[odd].nan_to_num(), expected[odd].float().nan_to_num())


@sets
@dtypes
@kinds
@pytest.mark.parametrize(("n", "k", "size"), [(65, 1000, 1000), (65, 1000, 128), (3, 3000, 64)])
def test_it_lies_within_its_bound_of_the_exact_product(
    n: int, k: int, size: int, kind: Kind, dtype: torch.dtype, name: str
) -> None:
    """s fused products a group, one for each group, one for the bias; then a rounding to the type of y."""
    w, bias = weight(n, k, size, kind), torch.linspace(-1, 1, n).to(dtype)
    for m in (1, 7):
        x = inputs(m, k, dtype)
        y = compiled(x, w.packed, bias, n, instruction_set=name).double()
        exact = x.double() @ w.w_hat.T + bias.double()
        absolute = x.double().abs() @ w.w_hat.abs().T + bias.double().abs()
        roundings = size + -(-k // size) + 1
        bound = roundings * U / (1 - roundings * U) * absolute
        if dtype is torch.bfloat16:
            bound += 2.0**-8 * (exact.abs() + bound)
        assert bool(((y - exact).abs() <= bound).all())


@sets
@dtypes
@kinds
def test_threads_and_tiles_of_tokens_do_not_change_the_bits(kind: Kind, dtype: torch.dtype, name: str) -> None:
    w, x = weight(500, 300, 128, kind), inputs(300, 300, dtype)
    whole = compiled(x, w.packed, None, 500, instruction_set=name, num_threads=1)
    for count in (2, 3):
        assert torch.equal(compiled(x, w.packed, None, 500, instruction_set=name, num_threads=count), whole)
    for m in (*range(1, 14), 49, 257):
        assert torch.equal(compiled(x[:m], w.packed, None, 500, instruction_set=name, num_threads=1 + m % 2), whole[:m])
    assert torch.equal(whole, compiled(x, w.packed, None, 500, instruction_set="portable"))


@kinds
def test_many_tokens_in_bfloat16_are_near_what_the_reference_gives(kind: Kind) -> None:
    """Weights and results rounded to bfloat16, k products summed in float32, in whatever order, and the bias."""
    n, k, m = 700, 300, 64  # more rows than one thread takes at once, and than two
    w, bias, x = weight(n, k, 128, kind), torch.linspace(-1, 1, n).bfloat16(), inputs(m, k, torch.bfloat16)
    w_hat = w.w_hat.float().bfloat16().double()
    for b in (None, bias):
        exact, absolute = x.double() @ w_hat.T, x.double().abs() @ w_hat.abs().T
        if b is not None:
            exact, absolute = exact + b.double(), absolute + b.double().abs()
        bound = (k + 1) * 2 * U * absolute  # tiles may cut digits off where float32 rounds, hence 2
        bound += 2.0**-8 * (exact.abs() + bound)
        found = by_tiles(x.view(2, 32, k), w.packed, b, n)
        assert found.shape == (2, 32, n) and found.dtype == torch.bfloat16
        assert bool(((found.view(m, n).double() - exact).abs() <= bound).all())


def test_how_many_tokens_torch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    w, most = weight(70, 64, 64, Kind.E4M3), float_products.TOKENS_FOR_TILES
    taken: list[int] = []

    def noted(x: Tensor, *_: object) -> Tensor:
        taken.append(x.shape[0])
        return x

    monkeypatch.setattr(float_products, "by_tiles", noted)
    for tiles in (False, True):
        monkeypatch.setattr(float_products, "features", lambda tiles=tiles: {"amx_bf16"} if tiles else {"avx512"})
        for dtype in (torch.float32, torch.bfloat16):
            for m in (most - 1, most):
                linear(inputs(m, 64, dtype), w.packed, None, 70)
    assert taken == [most]


def test_leading_dimensions_stay_and_empty_ones_too() -> None:
    w, x = weight(5, 64, 64, Kind.TABLE), inputs(6, 64)
    flat = linear(x, w.packed, None, 5)
    assert torch.equal(linear(x.view(2, 3, 64), w.packed, None, 5), flat.view(2, 3, 5))
    assert torch.equal(linear(x.T.contiguous().T, w.packed, None, 5), flat)
    assert linear(x[0], w.packed, None, 5).shape == (5,)
    assert linear(x[:0], w.packed, None, 5).shape == (0, 5)


def test_a_packed_weight_has_the_size_that_its_layout_says() -> None:
    # For each of 2 panels 3 groups: 64 rows x 128 columns and 64 scales of 2 bytes; 64 marks; and the header.
    codes, scale = torch.zeros(65, 300, dtype=torch.uint8), torch.ones(65, 3, dtype=torch.float16)
    assert packed(codes, scale, Kind.TABLE, 128).numel() == 128 + 2 * (3 * (64 * 64 + 64 * 2) + 64)
    assert packed(codes, scale, Kind.E4M3, 128).numel() == 128 + 2 * (3 * (64 * 128 + 64 * 2) + 64)


@kinds
def test_unpacked_is_what_was_packed_at_every_size(kind: Kind) -> None:
    every = FORMATS[kind].codes
    shapes = [(n, 20) for n in range(1, 131)] + [(3, k) for k in range(1, 131)] + [(67, 300), (200, 513)]
    for i, (n, k) in enumerate(shapes):
        codes = every[torch.arange(n * k).remainder(len(every))].view(n, k)
        for size in {8, 64, k} - {s for s in (8, 64) if s > k}:
            w = weight(n, k, size, kind, codes=codes, dtype=(torch.float32, torch.float16, torch.bfloat16)[i % 3])
            with products.forced(num_threads=1 + i % 2):
                found, scale = unpack(w.packed)
            assert torch.equal(found, codes) and scale.dtype == w.scale.dtype and torch.equal(scale, w.scale)


def test_a_short_table_is_enough_for_its_codes_and_others_are_refused() -> None:
    codes, scale = torch.tensor([[0, 1, 2]], dtype=torch.uint8), torch.full((1, 1), 0.5)
    memory = pack(codes, scale, Kind.TABLE, group_size=3, table=(-3.0, 0.25, 7.0))
    assert linear(torch.eye(3), memory, None, 1).flatten().tolist() == [-1.5, 0.125, 3.5]
    with pytest.raises(DataError, match="1 of 3 codes are 2 or more, and the table holds 2 values"):
        pack(codes, scale, Kind.TABLE, group_size=3, table=(-3.0, 0.25))


def test_what_cannot_be_packed_is_refused_in_words() -> None:
    codes, one = torch.zeros(4, 80, dtype=torch.uint8), torch.ones(4, 1)
    with pytest.raises(ValueError, match="groups of 12 columns are no multiple of 8"):
        packed(codes, torch.ones(4, 7), Kind.E4M3, 12)
    with pytest.raises(ValueError, match=r"scale is \[4, 2\], expected \[4, 3\]"):
        packed(codes, torch.ones(4, 2), Kind.E4M3, 32)
    with pytest.raises(ValueError, match=r"scales are torch.float64"):
        packed(codes, one.double(), Kind.E4M3, 80)
    with pytest.raises(ValueError, match=r"codes are torch.int8 \[4, 80\] on cpu, expected a uint8 matrix"):
        packed(codes.to(torch.int8), one, Kind.E4M3, 80)
    with pytest.raises(ValueError, match="expected a uint8 matrix with elements"):
        packed(codes[:0], one[:0], Kind.E4M3, 80)
    with pytest.raises(ValueError, match="scales there, too; they are on meta"):
        packed(codes, one.to("meta"), Kind.E4M3, 80)
    with pytest.raises(ValueError, match="group_size=0 must be at least 1"):
        packed(codes, one, Kind.E4M3, 0)
    for kind, table in ((Kind.TABLE, ()), (Kind.TABLE, (1.0,) * 17), (Kind.TABLE, (torch.inf,)), (Kind.E4M3, (1.0,))):
        with pytest.raises(ValueError, match="a table of 1 to 16 finite float32 goes with codes of four bits"):
            pack(codes, one, kind, group_size=80, table=table)


def test_memory_that_is_no_packed_weight_is_not_read() -> None:
    w, x = weight(70, 64, 64, Kind.E4M3), inputs(2, 64)
    integers = products.pack(
        torch.zeros(70, 64, dtype=torch.int8), torch.ones(70, 1), None, bits=8, least=-128, group_size=64
    )
    for wrong in (w.packed[:-64], w.packed[:5], integers, torch.zeros_like(w.packed)):
        with pytest.raises(ValueError, match="do not fit"):
            linear(x, wrong, None, 70)
        with pytest.raises(ValueError, match="do not fit"):
            unpack(wrong)
    broken = copy.deepcopy(w.packed)
    broken[8:16].view(torch.int64).fill_(2**60)  # rows
    for call in (lambda: unpack(broken), lambda: linear(x, broken, None, 2**60)):
        with pytest.raises((ValueError, RuntimeError)):
            call()


def test_arguments_that_do_not_belong_together_are_refused() -> None:
    w, x = weight(70, 64, 64, Kind.E4M3), inputs(2, 64)
    calls: list[Callable[[], Tensor]] = [
        lambda: linear(x, w.packed, None, 71),
        lambda: linear(x[:, :63], w.packed, None, 70),
        lambda: compiled(x, w.packed, None, 70, instruction_set="sse9"),
        lambda: dequantize_transposed(w.packed, torch.float32, 1, 3),
        lambda: dequantize_transposed(w.packed, torch.float32, 1, 1),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="do not fit"):
            call()
    with pytest.raises(ValueError, match="inputs are torch.float16 and the bias None"):
        linear(x.half(), w.packed, None, 70)
    with pytest.raises(ValueError, match=r"bias is \[69\], expected \[70\]"):
        linear(x, w.packed, torch.ones(69), 70)


def test_the_operator_has_a_fake_and_compilers_see_it() -> None:
    w, x = weight(70, 96, 32, Kind.TABLE), inputs(4, 96)
    torch.library.opcheck(torch.ops.halfbin.float_linear.default, (x, w.packed, None, 70))

    def double(x: Tensor) -> Tensor:
        return linear(x + x, w.packed, None, 70) * 0.5

    call = torch.compile(double, fullgraph=True, backend="aot_eager")
    assert torch.equal(call(x), double(x))
