"""Float inputs times integer and FP8 weights, against float64 and a bound."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from halfbin.kernels.triton.layout import Weight, pack_float8, pack_integers
from halfbin.kernels.triton.tiles import cut
from halfbin.kernels.triton.weight_only import linear
from kernels.triton.where import DEVICE, UNIT, only_where_kernels_run

only_where_kernels_run()
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
# Half an ulp of a normal result, and half the least subnormal of float16: results near 0 have no relative error.
ROUNDING = {torch.float16: (2.0**-11, 2.0**-25), torch.bfloat16: (2.0**-8, 0.0)}


@dataclass(frozen=True)
class Case:
    """A packed weight with what it stands for."""

    packed: Weight
    w_hat: Tensor  # float64 [n, k]

    def __len__(self) -> int:
        return len(self.w_hat)


def spread(params: Tensor, size: int, k: int) -> Tensor:
    return params.double().repeat_interleave(min(size, k), 1)[:, :k]


def integers(
    n: int,
    k: int,
    size: int,
    *,
    bits: int = 4,
    signed: bool = True,
    symmetric: bool = True,
    scale_type: torch.dtype = torch.float32,
    codes: Tensor | None = None,
) -> Case:
    generator = torch.Generator().manual_seed(n * 1009 + k)
    least = -(2 ** (bits - 1)) if signed else 0
    if codes is None:
        codes = torch.randint(least, least + 2**bits, (n, k), generator=generator)
    codes = codes.to(torch.int8 if signed else torch.uint8)
    shape = (n, -(-k // min(size, k)))
    scale = (torch.rand(shape, generator=generator) * 0.02 + 1e-3).to(scale_type)
    zero = torch.randint(least, least + 2**bits, shape, generator=generator).int()
    zeros = None if symmetric else zero.to(DEVICE)
    packed = pack_integers(codes.to(DEVICE), scale.to(DEVICE), zeros, bits=bits, least=least, group_size=size)
    shift = 0 if symmetric else spread(zero, size, k)
    return Case(packed, spread(scale, size, k) * (codes.double() - shift))


def float8(n: int, k: int, size: int) -> Case:
    generator = torch.Generator().manual_seed(n * 1009 + k)
    codes = torch.randint(0, 256, (n, k), generator=generator).to(torch.uint8)
    codes = torch.where(codes & 0x7F == 0x7F, 0, codes)  # NaN
    scale = torch.rand(n, -(-k // min(size, k)), generator=generator) * 0.02 + 1e-3
    packed = pack_float8(codes.to(DEVICE), scale.to(DEVICE), group_size=size)
    return Case(packed, spread(scale, size, k) * codes.view(torch.float8_e4m3fn).double())


def inputs(m: int, k: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(m, k, generator=torch.Generator().manual_seed(m * 31 + k)) * 3).to(dtype)


def check(x: Tensor, w: Case, bias: Tensor | None = None) -> Tensor:
    """As many roundings as there are sums and scales, of a sum of magnitudes; then that of y's type."""
    y = linear(x.to(DEVICE), w.packed, None if bias is None else bias.to(DEVICE)).cpu()
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], len(w))
    m, k = x.shape
    added = torch.zeros(len(w)).double() if bias is None else bias.double()
    expected = x.double() @ w.w_hat.T + added
    groups, splits = w.packed.scale.shape[0], cut(m, len(w), k, w.packed.group_size).splits
    slack = (k + 2 * groups + splits + 3) * UNIT * (x.double().abs() @ w.w_hat.abs().T + added.abs())
    relative, absolute = ROUNDING[x.dtype]
    bound = slack + relative * (expected.abs() + slack) + absolute
    error = (y.double() - expected).abs()
    worst = int((error / bound.clamp(min=1e-300)).argmax())
    assert bool((error <= bound).all()), (
        f"off by {error.flatten()[worst]}, at most {bound.flatten()[worst]}, at {worst}"
    )
    return y


TAILS = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 130)
SHAPES = [
    pytest.param([(n, 40, 2) for n in TAILS], id="rows"),
    pytest.param([(3, k, m) for k in range(1, 131) for m in (2,)], id="columns"),
    pytest.param([(3, k, 17) for k in TAILS], id="columns-of-many-tokens"),
    pytest.param([(3, 40, m) for m in TAILS], id="tokens"),
    pytest.param([(n, k, m) for n in (1, 2, 3) for k in (1, 2, 3) for m in (1, 2, 3)], id="tiny"),
]


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("shapes", SHAPES)
def test_every_tail_of_every_dimension(shapes: list[tuple[int, int, int]], kind: str) -> None:
    for i, (n, k, m) in enumerate(shapes):
        w = float8(n, k, k) if kind == "fp8" else integers(n, k, k, bits=int(kind[-1]), symmetric=i % 2 == 0)
        check(inputs(m, k, (torch.float16, torch.bfloat16)[i % 2]), w, torch.linspace(-1, 1, n))


@dtypes
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("kind", [(4, True), (4, False), (8, True), (8, False), (3, True), (2, False)], ids=str)
def test_groups_zero_points_and_formats(kind: tuple[int, bool], symmetric: bool, dtype: torch.dtype) -> None:
    for size, k in ((32, 96), (32, 70), (64, 65), (96, 200), (128, 300), (300, 300)):
        for m in (1, 17):
            w = integers(67, k, size, bits=kind[0], signed=kind[1], symmetric=symmetric)
            check(inputs(m, k, dtype), w, torch.linspace(-1, 1, 67).to(dtype))


@dtypes
def test_groups_of_fp8(dtype: torch.dtype) -> None:
    for size, k in ((32, 70), (64, 192), (128, 300), (300, 300)):
        for m in (1, 17, 65):
            check(inputs(m, k, dtype), float8(67, k, size))


@dtypes
def test_every_fp8_pattern_is_read_exactly(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8)[:, None]
    packed = pack_float8(codes.to(DEVICE), torch.ones(256, 1, device=DEVICE), group_size=1)
    y = linear(torch.ones(1, 1, dtype=dtype, device=DEVICE), packed, None)[0].cpu()
    assert torch.equal(y.float().nan_to_num(1e9), codes[:, 0].view(torch.float8_e4m3fn).float().nan_to_num(1e9))


@dtypes
@pytest.mark.parametrize("m", [1, 40, 129])
def test_tiles_of_all_kinds_meet_without_gaps(m: int, dtype: torch.dtype) -> None:
    check(inputs(m, 520, dtype), integers(300, 520, 128, symmetric=False), torch.linspace(-1, 1, 300))


def test_columns_are_split_and_their_parts_added_up_with_the_bias() -> None:
    assert cut(2, 70, 3000, 128).splits > 8
    assert cut(17, 70, 3000, 128).splits == 1
    x, w = inputs(2, 3000, torch.float16), integers(70, 3000, 128)
    for bias in (None, torch.linspace(-50, 50, 70)):
        assert torch.equal(check(x, w, bias), check(x, w, bias))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("code", ["least", "greatest", "both"])
def test_extreme_codes_lie_where_they_should(code: str, bits: int) -> None:
    n, k = 3, 256
    least, greatest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    alternating = torch.tensor([least, greatest]).repeat(n, k // 2)
    codes = {"least": alternating.clamp(max=least), "greatest": alternating.clamp(min=greatest), "both": alternating}
    w = integers(n, k, 64, bits=bits, codes=codes[code])
    one = torch.zeros(k, k, dtype=torch.float16).fill_diagonal_(1)
    check(one[::5].contiguous(), w)  # a row of ones at one place reads one column
    check(torch.ones(1, k, dtype=torch.float16), w)


def test_the_farthest_offsets_are_exact_in_bfloat16() -> None:
    codes, zero = torch.tensor([[0, 255]]), torch.tensor([[255], [0]], dtype=torch.int32)
    both = codes.expand(2, 2).to(torch.uint8).to(DEVICE)
    packed = pack_integers(both, torch.ones(2, 1, device=DEVICE), zero.to(DEVICE), bits=8, least=0, group_size=2)
    y = linear(torch.eye(2, dtype=torch.bfloat16, device=DEVICE), packed, None).cpu()
    assert torch.equal(y.float(), torch.tensor([[-255.0, 0.0], [0.0, 255.0]]).bfloat16().float())


@pytest.mark.parametrize("scale_type", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_scales_are_read_as_they_are_stored(scale_type: torch.dtype) -> None:
    check(inputs(3, 256, torch.float16), integers(70, 256, 64, scale_type=scale_type))


@dtypes
def test_zeros_and_outliers(dtype: torch.dtype) -> None:
    x = inputs(4, 256, dtype)
    x[0] = 0
    x[1, 17] = 60000
    x[2] *= 2.0**-12
    x[3, ::2] = -30000
    w = integers(66, 256, 64, symmetric=False)
    w.packed.scale.mul_(2.0**-8)  # results fit float16
    y = check(x, Case(w.packed, w.w_hat * 2.0**-8))
    assert bool((y[0] == 0).all())


@dtypes
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
def test_a_token_that_is_not_finite_gives_nan_and_spoils_no_other(kind: str, bad: float, dtype: torch.dtype) -> None:
    w = float8(70, 256, 64) if kind == "fp8" else integers(70, 256, 64, bits=int(kind[-1]), symmetric=False)
    for m in (5, 20):
        x = inputs(m, 256, dtype).to(DEVICE)
        before = linear(x, w.packed, None)
        x[2, 200] = bad
        after = linear(x, w.packed, None)
        others = [i for i in range(m) if i != 2]
        assert torch.equal(after[others], before[others])
        assert bool(after[2].isnan().all())


def test_leading_dimensions_stay_and_empty_ones_too() -> None:
    w, x = integers(5, 64, 64), inputs(6, 64, torch.float16).to(DEVICE)
    flat = linear(x, w.packed, None)
    assert torch.equal(linear(x.view(2, 3, 64), w.packed, None), flat.view(2, 3, 5))
    assert torch.equal(linear(x.T.contiguous().T, w.packed, None), flat)
    assert torch.equal(linear(x[0], w.packed, None), flat[0])
    assert linear(x[:0], w.packed, None).shape == (0, 5)


def test_a_bias_may_be_a_view_with_strides() -> None:
    for m in (1, 20):
        check(inputs(m, 300, torch.float16), integers(70, 300, 128), torch.linspace(-1, 1, 140)[::2])


def test_the_operator_has_a_fake_and_compilers_see_it() -> None:
    w, x = integers(70, 96, 32).packed, inputs(4, 96, torch.bfloat16).to(DEVICE)
    arguments = (w.codes, w.scale, w.offset, None, w.group_size, w.bits, w.float8, w.constant)
    torch.library.opcheck(torch.ops.halfbin.triton_weight_only.default, (x, *arguments))

    def double(x: Tensor) -> Tensor:
        return linear(x + x, w, None) * 0.5

    assert torch.equal(torch.compile(double, fullgraph=True, backend="aot_eager")(x), double(x))
