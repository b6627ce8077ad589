"""Every instruction set against one plain sum, to the bit, and that sum against float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from halfbin.errors import DataError
from halfbin.kernels import products
from halfbin.kernels.products import InputGrid, instruction_sets, linear, pack, unpack

SETS = instruction_sets()
sets = pytest.mark.parametrize("name", SETS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
U = 2.0**-24
TOKEN = InputGrid(by_group=False)


def test_the_plain_loops_are_always_there_and_the_last_choice() -> None:
    assert SETS[-1] == "portable"


@dataclass(frozen=True)
class Weight:
    """Integer codes with their scales, packed, and what they stand for."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    size: int
    packed: Tensor

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def w_hat(self) -> Tensor:
        """float64 [n, k]."""
        columns = self.codes.shape[1]
        zero = torch.zeros(self.scale.shape) if self.zero_point is None else self.zero_point
        scale, zeros = (p.double().repeat_interleave(self.size, 1)[:, :columns] for p in (self.scale, zero))
        return scale * (self.codes.double() - zeros)


def weight(
    n: int,
    k: int,
    size: int,
    *,
    bits: int = 4,
    signed: bool = True,
    symmetric: bool = True,
    dtype: torch.dtype = torch.float32,
    codes: Tensor | None = None,
) -> Weight:
    generator = torch.Generator().manual_seed(n * 1009 + k)
    least = -(2 ** (bits - 1)) if signed else 0
    shape = (n, -(-k // size))
    if codes is None:
        codes = torch.randint(least, least + 2**bits, (n, k), generator=generator)
    codes = codes.to(torch.int8 if signed else torch.uint8)
    scale = (torch.rand(shape, generator=generator) * 0.02 + 1e-3).to(dtype)
    zero = torch.randint(least, least + 2**bits, shape, generator=generator).int()
    zero_point = None if symmetric else zero
    packed = pack(codes, scale, zero_point, bits=bits, least=least, group_size=size, sums=True)
    return Weight(codes, scale, zero_point, size, packed)


def inputs(m: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m * 31 + k)) * 3
    return x.to(dtype)


def rounded(x: Tensor, w: Weight, grid: InputGrid) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int64 [m, k], float32 scales [m, groups] and zero points [m, groups], by group or by token."""
    size = w.size if grid.by_group else x.shape[1]
    codes, scales, zeros = [], [], []
    for part in torch.split(x.float(), size, 1):
        low, high = part.amin(1, keepdim=True).clamp(max=0), part.amax(1, keepdim=True).clamp(min=0)
        zero = torch.zeros_like(low)
        if grid.symmetric:
            scale = (high if grid.qmin == 0 else torch.maximum(-low, high)) / grid.qmax
        else:
            scale = high / (grid.qmax - grid.qmin) - low / (grid.qmax - grid.qmin)
        scale = torch.where(scale > 0, scale, 1.0).clamp(min=torch.finfo(torch.float32).smallest_normal)
        if not grid.symmetric:
            zero = (grid.qmin - low / scale).round().clamp(grid.qmin, grid.qmax)
        codes.append(((part / scale).round() + zero).clamp(grid.qmin, grid.qmax))
        scales.append(scale)
        zeros.append(zero)
    groups = w.scale.shape[1]
    spread = [torch.cat(p, 1).expand(-1, groups) for p in (scales, zeros)]
    return torch.cat(codes, 1).long(), spread[0], spread[1].long()


def plain(x: Tensor, w: Weight, bias: Tensor | None, grid: InputGrid) -> Tensor:
    """The sum that csrc/matmul/product.h describes, operation by operation."""
    s, scales, zeros = rounded(x, w, grid)
    y = torch.zeros(len(x), len(w))
    for g in range(w.scale.shape[1]):
        part = slice(g * w.size, (g + 1) * w.size)
        codes = w.codes[:, part].long()
        if w.zero_point is not None:
            codes = codes - w.zero_point[:, g : g + 1]
        total = (s[:, part] - zeros[:, g : g + 1]) @ codes.T
        assert total.numel() == 0 or int(total.abs().max()) < 2**31
        scaled = total.float() * w.scale[:, g].float()
        # A product of two float32 is exact in float64, where the sum is rounded to 53 bits before it is to 24: as good as once.
        y = (scaled.double() * (scales[:, g : g + 1].double() if grid.by_group else 1) + y).float()
    if not grid.by_group:
        y = y * scales[:, :1]
    y = y if bias is None else y + bias.float()
    return y.to(x.dtype)


def check(x: Tensor, w: Weight, bias: Tensor | None, grid: InputGrid, name: str) -> None:
    with products.forced(name):
        y = linear(x, w.packed, bias, len(w), grid)
    assert y.dtype == x.dtype
    expected = plain(x, w, bias, grid)
    wrong = y != expected
    assert not bool(wrong.any()), f"{int(wrong.sum())} of {y.numel()} differ, first at {wrong.nonzero()[0].tolist()}"


COMMON = (1, 2, 3)
SHAPES = [
    pytest.param([(n, 40, m) for n in range(1, 131) for m in (2,)], id="rows"),
    pytest.param([(3, k, m) for k in range(1, 131) for m in (1, 7)], id="columns"),
    pytest.param([(3, 40, m) for m in range(1, 131)], id="tokens"),
    pytest.param([(n, k, m) for n in COMMON for k in COMMON for m in COMMON], id="tiny"),
]


@sets
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shapes", SHAPES)
def test_every_tail_of_every_dimension(shapes: list[tuple[int, int, int]], bits: int, name: str) -> None:
    for n, k, m in shapes:
        w = weight(n, k, k, bits=bits)
        for grid in (InputGrid(), TOKEN):
            check(inputs(m, k), w, torch.linspace(-1, 1, n), grid, name)


@sets
@dtypes
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("kind", [(4, True), (4, False), (8, True), (8, False), (3, True), (2, False)], ids=str)
def test_groups_zero_points_and_formats(kind: tuple[int, bool], symmetric: bool, dtype: torch.dtype, name: str) -> None:
    for size, k in ((32, 96), (32, 70), (64, 192), (64, 65), (96, 200), (128, 384), (128, 300), (300, 300)):
        for m in (1, 4, 5, 33):
            w = weight(67, k, size, bits=kind[0], signed=kind[1], symmetric=symmetric)
            check(inputs(m, k, dtype), w, torch.linspace(-1, 1, 67).to(dtype), InputGrid(), name)


FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
TABLES = {"fp4": FP4, "ends": (-128, *range(14), 127), "positive": tuple(range(100, 116))}


@sets
@dtypes
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_codes_with_a_table_stand_for_its_integers(table: tuple[int, ...], dtype: torch.dtype, name: str) -> None:
    for n, k, size in (
        [(n, 40, 32) for n in (1, 63, 64, 65, 130)] + [(3, k, 32) for k in range(1, 131)] + [(67, 600, 600)]
    ):
        w = weight(n, k, size, signed=False)
        packed = pack(w.codes, w.scale, None, bits=4, least=0, group_size=size, sums=True, table=table)
        values = Weight(torch.tensor(table, dtype=torch.int8)[w.codes.long()], w.scale, None, size, packed)
        assert torch.equal(unpack(packed, least=0)[0], w.codes)
        for m in (1, 3, 7, 33):
            check(inputs(m, k, dtype), values, None, InputGrid(), name)
        check(inputs(2, k, dtype), values, None, InputGrid(by_group=False, symmetric=False), name)


@sets
@pytest.mark.parametrize(
    "grid",
    [
        InputGrid(by_group=False),
        InputGrid(by_group=False, symmetric=False),
        InputGrid(by_group=False, symmetric=False, qmin=0, qmax=255),
        InputGrid(by_group=False, qmin=0, qmax=255),
        InputGrid(by_group=False, qmin=-8, qmax=7),
    ],
    ids=str,
)
def test_grids_of_inputs(grid: InputGrid, name: str) -> None:
    for bits, symmetric, size in ((8, True, 200), (8, False, 200), (4, False, 64)):
        for m in (1, 3, 40):
            check(inputs(m, 200) + 1, weight(70, 200, size, bits=bits, symmetric=symmetric), None, grid, name)


@sets
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_scales_are_read_exactly_as_they_are_stored(dtype: torch.dtype, name: str) -> None:
    w = weight(128, 256, 64, dtype=dtype)
    if dtype == torch.float16:
        w.scale[0] = torch.tensor(
            [2.0**-24, 65504.0, 2.0**-14, 0.0]
        )  # the least, the greatest, the least normal one, none
        w = Weight(w.codes, w.scale, None, 64, pack(w.codes, w.scale, None, bits=4, least=-8, group_size=64))
    check(inputs(3, 256), w, None, InputGrid(), name)


@sets
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("code", ["least", "greatest", "both"])
def test_extreme_codes_on_both_sides_saturate_nothing(code: str, bits: int, name: str) -> None:
    n, k = 64, 1024
    least, greatest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    alternating = torch.tensor([least, greatest]).repeat(n, k // 2)
    codes = {"least": alternating.clamp(max=least), "greatest": alternating.clamp(min=greatest), "both": alternating}
    w = weight(n, k, k, bits=bits, codes=codes[code])
    one = torch.ones(1)
    grid = InputGrid(by_group=False)
    for m in (1, 4, 20):
        for low, high in ((-128.0, -128.0), (127.0, 127.0), (-128.0, 127.0)):
            x = torch.tensor([low, high]).repeat(m, k // 2)
            with products.forced(name):
                y = linear(x, w.packed, None, n, grid, one)  # static, with scale 1: the codes are the numbers
            total = x.double() @ w.codes.double().T
            assert torch.equal(y, (total.float() * w.scale[:, 0]))


@sets
def test_zeros_outliers_and_subnormals(name: str) -> None:
    x = inputs(5, 256)
    x[0] = 0
    x[1, 17] = 1e30
    x[2] = 1e-42
    x[3] *= 1e-38
    x[4, 100] = 3e38
    for size in (64, 256):
        check(x, weight(66, 256, size), None, InputGrid(), name)
        check(x[:4], weight(66, 256, size, bits=8), None, TOKEN, name)


@sets
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_a_token_that_is_not_finite_gives_nan_and_spoils_no_other(bad: float, name: str) -> None:
    w, x = weight(70, 256, 64), inputs(5, 256)
    with products.forced(name):
        before = linear(x, w.packed, None, 70, InputGrid())
        x[2, 200] = bad
        after = linear(x, w.packed, None, 70, InputGrid())
        with pytest.raises(DataError, match="1 of 5 tokens hold NaN or infinity"):
            linear(x, w.packed, None, 70, TOKEN)
    others = [0, 1, 3, 4]
    assert torch.equal(after[others], before[others])
    assert bool(after[2].isnan().all())


@sets
@dtypes
def test_two_threads_give_the_bits_of_one(dtype: torch.dtype, name: str) -> None:
    w = weight(1000, 512, 128)
    for m in (1, 6, 70):
        found = []
        for count in (1, 2, 3):
            with products.forced(name, count):
                found.append(linear(inputs(m, 512, dtype), w.packed, None, 1000, InputGrid()))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


@sets
@pytest.mark.parametrize("bits", [4, 8])
def test_tokens_in_blocks_and_spans_are_what_each_is_alone(bits: int, name: str) -> None:
    # Inputs of so many columns that no second cache holds those of more than a block of 64 tokens.
    w = weight(70, 65_536, 128, bits=bits)
    x = inputs(150, 65_536, torch.bfloat16)
    with products.forced(name, 1):
        together = linear(x, w.packed, None, len(w), InputGrid())
    for token in (0, 1, 63, 64, 74, 75, 127, 149):
        with products.forced("portable", 1):
            assert torch.equal(
                linear(x[token : token + 1], w.packed, None, len(w), InputGrid()), together[token : token + 1]
            )


def test_what_would_be_chosen_gives_the_same_bits() -> None:
    w = weight(130, 512, 128)
    for m in (1, 7, 8, 9, 100):
        y = linear(inputs(m, 512), w.packed, None, 130, InputGrid())
        assert torch.equal(y, plain(inputs(m, 512), w, None, InputGrid()))


@sets
@pytest.mark.parametrize(("bits", "size"), [(4, 128), (8, 128), (8, 1000)])
def test_the_float_product_is_near(bits: int, size: int, name: str) -> None:
    """|x_hat - x| <= step / 2 for each input, and 3 G + 2 float32 roundings of sums that |x_hat| |w_hat| bounds."""
    k = 1000
    w, x = weight(65, k, size, bits=bits), inputs(9, k)
    with products.forced(name):
        y = linear(x, w.packed, None, 65, InputGrid())
    step = torch.cat([p.abs().amax(1, keepdim=True).expand_as(p) for p in torch.split(x.double(), size, 1)], 1) / 127
    slack = 127 * 4 * U  # the division moves a tie by an ulp of the code
    moved = step * (0.5 + slack)
    absolute = (x.double().abs() + moved) @ w.w_hat.abs().T
    bound = moved @ w.w_hat.abs().T + (3 * w.scale.shape[1] + 2) * U * absolute
    error = (y.double() - x.double() @ w.w_hat.T).abs()
    assert bool((error <= bound).all())


def test_leading_dimensions_stay_and_empty_ones_too() -> None:
    w = weight(5, 64, 64)
    x = inputs(6, 64)
    flat = linear(x, w.packed, None, 5, InputGrid())
    assert torch.equal(linear(x.view(2, 3, 64), w.packed, None, 5, InputGrid()), flat.view(2, 3, 5))
    assert torch.equal(linear(x.T.contiguous().T, w.packed, None, 5, InputGrid()), flat)
    assert linear(x[0], w.packed, None, 5, InputGrid()).shape == (5,)
    assert linear(x[:0], w.packed, None, 5, InputGrid()).shape == (0, 5)


@pytest.mark.parametrize("shape", [(2, 63), (2, 65), (1, 2, 63), (128,)], ids=str)
def test_inputs_of_another_width_are_refused(shape: tuple[int, ...]) -> None:
    w = weight(5, 64, 32)
    with pytest.raises(DataError, match=rf"have {shape[-1]} columns, and the weight has 64"):
        linear(torch.zeros(shape), w.packed, None, 5, InputGrid())


def test_a_packed_weight_has_the_size_that_its_layout_says() -> None:
    # 64 rows x 128 columns at half a byte, and 64 scales of 2 bytes, for each of 2 panels and 3 groups; and the header.
    codes, scale = torch.zeros(65, 300, dtype=torch.int8), torch.ones(65, 3, dtype=torch.float16)
    assert pack(codes, scale, None, bits=4, least=-8, group_size=128).numel() == 64 + 2 * 3 * (64 * 64 + 64 * 2)
    assert pack(codes, scale, None, bits=2, least=-2, group_size=128).numel() == 64 + 2 * 3 * (64 * 32 + 64 * 2)
    zeros = torch.zeros(65, 3, dtype=torch.int32)
    assert pack(codes, scale, zeros, bits=4, least=-8, group_size=128).numel() == 64 + 2 * 3 * (64 * 64 + 64 * 3)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_unpacked_is_what_was_packed_at_every_size(signed: bool, bits: int) -> None:
    shapes = [(n, 40) for n in range(1, 131)] + [(3, k) for k in range(1, 131)] + [(67, 300), (200, 513)]
    for i, (n, k) in enumerate(shapes):
        for size in {32, 64, 128, k} - {s for s in (32, 64, 128) if s > k}:
            dtype = (torch.float32, torch.float16, torch.bfloat16)[i % 3]
            w = weight(n, k, size, bits=bits, signed=signed, symmetric=bool(i % 2), dtype=dtype)
            with products.forced(num_threads=1 + i % 2):
                codes, scale, zero_point = unpack(w.packed, least=-(2 ** (bits - 1)) if signed else 0)
            assert codes.dtype == w.codes.dtype and torch.equal(codes, w.codes)
            assert scale.dtype == dtype and torch.equal(scale, w.scale)
            if w.zero_point is None:
                assert zero_point is None
            else:
                assert zero_point is not None and torch.equal(zero_point, w.zero_point)


def test_what_cannot_be_packed_is_refused_in_words() -> None:
    codes = torch.zeros(4, 80, dtype=torch.int8)
    with pytest.raises(ValueError, match="groups of 40 columns are no multiple of 32"):
        pack(codes, torch.ones(4, 2), None, bits=4, least=-8, group_size=40)
    with pytest.raises(ValueError, match=r"scale is \[4, 2\], expected \[4, 3\]"):
        pack(codes, torch.ones(4, 2), None, bits=4, least=-8, group_size=32)
    with pytest.raises(ValueError, match=r"scales are torch.float64"):
        pack(codes, torch.ones(4, 1).double(), None, bits=4, least=-8, group_size=80)
    with pytest.raises(ValueError, match="'sse9' does not run here; these do: .*portable"), products.forced("sse9"):
        pass
    with pytest.raises(ValueError, match="a zero point is a token's"):
        InputGrid(symmetric=False)
    with pytest.raises(ValueError, match="codes -128 to 200 must"):
        InputGrid(by_group=False, qmax=200)
    with pytest.raises(ValueError, match="num_threads=0 must be at least 1"):
        products.set_num_threads(0)


def test_the_operator_has_a_fake_and_compilers_see_it() -> None:
    w, x = weight(70, 96, 32), inputs(4, 96)
    operator = torch.ops.halfbin.linear.default
    torch.library.opcheck(operator, (x, w.packed, None, 70, True, True, -128, 127, None, None))

    def double(x: Tensor) -> Tensor:
        return linear(x + x, w.packed, None, 70, InputGrid()) * 0.5

    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), double(x))
