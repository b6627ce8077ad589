"""GPTQ against its own definition, against rounding, and against a second implementation that inverts in float64."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from halfbin.calibration import SecondMoment
from halfbin.errors import DataError, SchemeError
from halfbin.methods import column_rounding, factorise, gptq, rtn
from halfbin.methods.factor import Factor, rounding_order
from halfbin.numerics.ranges import MeanSquaredError
from halfbin.tensor import QTensor, Scheme, dequantize, parse_scheme, spread
from tensor.cases import FEW_SCHEMES

EVERY_SCHEME = [*FEW_SCHEMES, "int4-b8x16", "int4-b8x16-asym", "int2-g40-asym-f16"]
SCHEMES = ["int4-g32", "int4-g32-asym", "int3-channel", "int8-tensor", "nf4-g32", "fp4_e2m1-g32", "int4-g24"]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight(rows: int = 24, columns: int = 96) -> Tensor:
    return torch.randn(rows, columns, generator=generator(0)) * 0.05


def activations(tokens: int = 400, columns: int = 96) -> Tensor:
    """Correlated, and of very different sizes."""
    mixing = torch.randn(columns, columns, generator=generator(1)) / columns**0.5
    x = torch.randn(tokens, columns, generator=generator(2)) @ (torch.eye(columns) + 2 * mixing)
    sizes: Tensor = torch.logspace(-1, 1, columns)
    return torch.mul(x, sizes[torch.randperm(columns, generator=generator(3))])


def moment(x: Tensor) -> Tensor:
    wide = x.double()
    return torch.mm(wide.T, wide)


def output_error(w: Tensor, q: QTensor, x: Tensor) -> float:
    return float((x.double() @ (dequantize(q, torch.float64) - w.double()).T).square().sum())


def weight_error(w: Tensor, q: QTensor) -> float:
    return float((dequantize(q, torch.float64) - w.double()).square().sum())


@pytest.mark.parametrize("recompute", [False, True], ids=["scales fixed", "scales again"])
@pytest.mark.parametrize("spelling", EVERY_SCHEME)
def test_with_inputs_that_are_not_correlated_it_is_rounding(spelling: str, recompute: bool) -> None:
    w, scheme = weight(), parse_scheme(spelling)
    factor = factorise(torch.eye(96), act_order=not recompute)
    q, rounded = gptq(w, scheme, factor, recompute_scales=recompute), rtn(w, scheme)
    assert torch.equal(q.codes, rounded.codes)
    assert torch.equal(q.scale.double(), rounded.scale.double())
    if q.zero_point is not None and rounded.zero_point is not None:
        assert torch.equal(q.zero_point, rounded.zero_point)


def width_of(scheme: Scheme) -> int:
    """Columns that share a scale."""
    return scheme.granularity.tile((24, 96))[1]


def assert_scales_equal(q: QTensor, other: QTensor, *, exactly: bool) -> None:
    if exactly:
        assert torch.equal(q.scale.double(), other.scale.double())
        return
    # Products of another size add up to 96 terms in another order, and terms may be some times larger than their sum: the
    # columns a scale is chosen from again are off by 2**-18 of the largest ones, and a narrow scale may become its neighbour.
    found, expected = q.scale.double(), other.scale.double()
    slack = 2.0**-18 * expected.max() + torch.finfo(q.scale.dtype).eps * expected
    assert bool(((found - expected).abs() <= slack).all())


@pytest.mark.parametrize("recompute", [False, True], ids=["scales fixed", "scales again"])
@pytest.mark.parametrize("spelling", EVERY_SCHEME)
def test_spans_give_the_codes_of_passing_each_error_on_at_once(spelling: str, recompute: bool) -> None:
    w, scheme = weight(), parse_scheme(spelling)
    factor = factorise(moment(activations()), group_size=width_of(scheme) if recompute else None)
    plain = gptq(w, scheme, factor, leaf=96, recompute_scales=recompute)
    for leaf in (1, 7, 32):
        q = gptq(w, scheme, factor, leaf=leaf, recompute_scales=recompute)
        assert_scales_equal(q, plain, exactly=not recompute)
        assert torch.equal(q.codes, plain.codes)


@pytest.mark.parametrize("recompute", [False, True], ids=["scales fixed", "scales again"])
@pytest.mark.parametrize("spelling", EVERY_SCHEME)
def test_shares_of_rows_give_the_codes_of_all_rows_together(
    spelling: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, scheme, factor = weight(), parse_scheme(spelling), factorise(moment(activations()), act_order=not recompute)
    whole = gptq(w, scheme, factor, recompute_scales=recompute)
    monkeypatch.setattr(
        importlib.import_module("halfbin.methods.gptq"), "SHARE", 5
    )  # the room gives the function this name
    q = gptq(w, scheme, factor, recompute_scales=recompute)
    assert torch.equal(q.codes, whole.codes)
    assert_scales_equal(q, whole, exactly=not recompute)


@pytest.mark.parametrize("spelling", [s for s in EVERY_SCHEME if s.startswith(("int", "uint", "ternary"))])
def test_the_fast_rounding_of_a_column_gives_the_bits_of_the_plain_one(spelling: str) -> None:
    grid = parse_scheme(spelling).grid
    fast, plain = column_rounding.rounding(grid), column_rounding.plain(grid)
    column = torch.cat([torch.randn(500, generator=generator(5)) * 3, torch.arange(-300, 300) / 2, torch.zeros(1)])
    scale = torch.rand(len(column), generator=generator(6)) + 0.01
    scale[500:] = 1.0  # ties
    zero = None if grid.symmetric else torch.randint(0, 3, (len(column),), generator=generator(7)).float()
    codes = torch.empty(2, len(column), dtype=grid.format.code_dtype)
    assert torch.equal(fast(column, scale, zero, codes[0]), plain(column, scale, zero, codes[1]))
    assert torch.equal(codes[0], codes[1])


def by_inverting(w: Tensor, scheme: Scheme, h: Tensor, damping: float, order: list[int], *, recompute: bool) -> Tensor:
    """Optimal Brain Surgeon as the paper derives it: the inverse of what is left, anew for every column."""
    w = w.double().clone()
    h = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    shape = (w.shape[0], w.shape[1])
    width = width_of(scheme)
    fitted = rtn(w.float(), scheme)
    codes, reached = torch.empty(shape, dtype=scheme.format.code_dtype), set()
    for step, j in enumerate(order):
        if recompute and j // width not in reached:
            reached.add(j // width)
            fitted = rtn(w.float(), scheme)  # all groups, though only this one's columns will be rounded with it
        scale = spread(fitted.scale.double(), shape, scheme.granularity).expand(shape)[:, j]
        zero = None
        if fitted.zero_point is not None:
            zero = spread(fitted.zero_point, shape, scheme.granularity).expand(shape)[:, j]
        left = order[step:]
        inverse = torch.linalg.inv(h[left][:, left])
        codes[:, j] = scheme.grid.encode(w[:, j], scale, zero)
        error = w[:, j] - scheme.grid.decode(codes[:, j], scale, zero, torch.float64)
        w[:, left] -= torch.outer(error, inverse[0] / inverse[0, 0])
    return codes


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "largest first"])
@pytest.mark.parametrize(
    "spelling", ["int4-g32", "int4-g32-asym", "int3-channel", "nf4-g32", "fp4_e2m1-b8x16", "int4-tensor"]
)
def test_the_codes_are_those_of_inverting_in_float64(spelling: str, act_order: bool) -> None:
    w, scheme, h = weight(), parse_scheme(spelling), moment(activations())
    factor = factorise(h, damping=0.01, act_order=act_order)
    expected = by_inverting(w, scheme, h, 0.01, factor.order.tolist(), recompute=False)
    assert int((gptq(w, scheme, factor).codes != expected).sum()) == 0


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "largest group first"])
@pytest.mark.parametrize(
    "spelling", ["int4-g32", "int4-g32-asym", "int3-g40", "nf4-g32", "fp4_e2m1-b8x16", "int4-tensor"]
)
def test_scales_that_are_chosen_again_are_those_of_the_columns_as_they_have_become(
    spelling: str, act_order: bool
) -> None:
    w, scheme, h = weight(), parse_scheme(spelling), moment(activations())
    factor = factorise(h, act_order=act_order, group_size=width_of(scheme))
    expected = by_inverting(w, scheme, h, 0.01, factor.order.tolist(), recompute=True)
    q = gptq(w, scheme, factor, recompute_scales=True, leaf=8)
    assert int((q.codes != expected).sum()) == 0
    assert torch.equal(q.scale, gptq(w, scheme, factor).scale) == (spelling == "int4-tensor")


def test_an_order_that_tears_groups_apart_is_refused() -> None:
    w, factor = weight(), factorise(moment(activations()))
    with pytest.raises(SchemeError, match="act_order=False or with group_size=32"):
        gptq(w, parse_scheme("int4-g32"), factor, recompute_scales=True)
    q = gptq(w, parse_scheme("int4-channel"), factor, recompute_scales=True)  # one group for all columns
    assert torch.equal(q.codes, gptq(w, parse_scheme("int4-channel"), factor).codes)


def test_groups_are_kept_together_the_largest_first() -> None:
    diagonal = torch.tensor([1.0, 5.0, 2.0, 9.0, 0.0, 3.0, 3.0, 4.0])  # means 8/3, 4 and 7/2
    assert rounding_order(diagonal, 3).tolist() == [3, 5, 4, 7, 6, 1, 2, 0]
    assert rounding_order(diagonal).tolist() == [3, 1, 7, 5, 6, 2, 0, 4]
    with pytest.raises(SchemeError, match="group_size=0"):
        rounding_order(diagonal, 0)


@pytest.mark.parametrize("spelling", SCHEMES)
def test_on_correlated_inputs_the_outputs_gain_and_the_weights_pay(spelling: str) -> None:
    w, scheme, x = weight(), parse_scheme(spelling), activations()
    q, rounded = gptq(w, scheme, factorise(moment(x))), rtn(w, scheme)
    assert output_error(w, q, x) < 0.7 * output_error(w, rounded, x)
    assert weight_error(w, q) > weight_error(w, rounded)


def test_ranges_that_are_searched_are_used() -> None:
    w, scheme, x = weight(), parse_scheme("int3-channel"), activations()
    q = gptq(w, scheme, factorise(moment(x)), estimator=MeanSquaredError())
    assert torch.equal(q.scale, rtn(w, scheme, estimator=MeanSquaredError()).scale)
    assert output_error(w, q, x) < output_error(w, rtn(w, scheme, estimator=MeanSquaredError()), x)


def test_columns_that_were_never_active_are_rounded_and_disturb_nobody() -> None:
    w, scheme, x = weight(), parse_scheme("int4-channel"), activations()
    alive = torch.ones(96, dtype=torch.bool)
    alive[[0, 40, 95]] = False
    q = gptq(w, scheme, factorise(moment(x * alive)))
    rounded = rtn(w, scheme)
    assert factorise(moment(x * alive), damping=0.0).damping == 0.0  # they need no repair
    assert torch.equal(q.codes[:, ~alive], rounded.codes[:, ~alive])
    assert output_error(w, q, x * alive) < output_error(w, rounded, x * alive)


def test_too_few_samples_are_repaired_by_damping_and_it_is_told() -> None:
    h = moment(activations(tokens=10))  # rank 10 of 96
    factor = factorise(h, damping=0.0)
    assert factor.damping > 0
    assert factorise(moment(activations())).damping == 0.01
    w, scheme = weight(), parse_scheme("int4-g32")
    assert output_error(w, gptq(w, scheme, factor), activations(10)) < output_error(w, rtn(w, scheme), activations(10))


def test_float64_is_tried_before_more_damping() -> None:
    basis = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64, generator=generator(4))).Q
    h = basis @ torch.diag(torch.logspace(0, -10, 64, dtype=torch.float64)) @ basis.T
    factor = factorise((h + h.T) / 2, damping=0.0)
    assert factor.dtype == torch.float64
    assert factor.damping == 0.0


def test_a_row_depends_on_no_other_row() -> None:
    w, scheme, factor = weight(), parse_scheme("int4-g32"), factorise(moment(activations()))
    whole = gptq(w, scheme, factor).codes
    assert torch.equal(gptq(w[5:9], scheme, factor).codes, whole[5:9])


@pytest.mark.parametrize("h", [torch.ones(3, 4), torch.full((3, 3), float("nan"))], ids=["not square", "NaN"])
def test_what_is_no_second_moment_is_refused(h: Tensor) -> None:
    with pytest.raises(DataError, match="square and finite"):
        factorise(h)


def test_a_factor_of_another_width_is_refused() -> None:
    with pytest.raises(SchemeError, match=r"weight \[24, 96\] and second moment of 95 features"):
        gptq(weight(), parse_scheme("int4-g32"), factorise(torch.eye(95)))


def test_threads_do_not_change_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("halfbin.methods.gptq"), "SHARE", 8)
    w, scheme, factor = weight(), parse_scheme("int4-g32"), factorise(moment(activations()), act_order=False)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(gptq(w, scheme, factor, recompute_scales=True))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0].codes, found[1].codes) and torch.equal(found[0].scale, found[1].scale)


def test_a_weight_that_is_stored_transposed_is_a_view() -> None:
    w, factor = weight(), factorise(moment(activations()))
    stored = w.T.contiguous()
    assert torch.equal(
        gptq(stored.T, parse_scheme("int4-g32"), factor).codes, gptq(w, parse_scheme("int4-g32"), factor).codes
    )


def test_narrow_types_are_rounded_as_their_float32_values() -> None:
    w, factor, scheme = weight().bfloat16(), factorise(moment(activations())), parse_scheme("int4-g32")
    assert torch.equal(gptq(w, scheme, factor).codes, gptq(w.float(), scheme, factor).codes)


def test_the_weight_is_left_as_it_was() -> None:
    w = weight()
    gptq(w, parse_scheme("int4-g32"), factorise(torch.eye(96), act_order=False))
    assert torch.equal(w, weight())


@pytest.mark.parametrize("spelling", ["int4-channel", "fp8_e4m3-channel"])
def test_errors_that_overflow_are_refused(spelling: str) -> None:
    upper = torch.eye(96) + torch.full((96, 96), 1e30).triu(1)
    with pytest.raises(DataError):
        gptq(weight(), parse_scheme(spelling), Factor(upper, torch.arange(96), 0.01, torch.float32))


@pytest.mark.parametrize("strip", [16, 512], ids=["six strips", "one strip"])
@pytest.mark.parametrize("threads", [1, 2])
def test_an_observer_is_factorised_as_its_matrix_is(strip: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("halfbin.methods.factor"), "STRIP", strip)
    observer, before = SecondMoment(96), torch.get_num_threads()
    observer.add(activations())
    try:
        torch.set_num_threads(threads)
        found, expected = factorise(observer), factorise(observer.matrix())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found.upper, expected.upper) and torch.equal(found.order, expected.order)
    h = observer.matrix()[found.order][:, found.order]
    h.diagonal().add_(0.01 * float(h.diagonal().mean()))
    product = found.upper.double() @ h @ found.upper.double().T  # U H U^T = 1
    assert float((product - torch.eye(96)).abs().max()) < 1e-3
    assert torch.equal(found.upper, found.upper.triu()) and found.upper.is_contiguous()


def test_a_matrix_that_is_factorised_stays_as_it_was() -> None:
    h = moment(activations()).float()
    before = h.clone()
    factorise(h)
    assert torch.equal(h, before)
