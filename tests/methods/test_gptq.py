"""GPTQ against its own definition, against rounding, and against a second implementation that inverts in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halfbin.errors import DataError, SchemeError
from halfbin.methods import factorise, gptq, rtn
from halfbin.numerics.ranges import MeanSquaredError
from halfbin.tensor import QTensor, Scheme, dequantize, parse_scheme, spread

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


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "largest first"])
@pytest.mark.parametrize("spelling", SCHEMES)
def test_with_inputs_that_are_not_correlated_it_is_rounding(spelling: str, act_order: bool) -> None:
    w, scheme = weight(), parse_scheme(spelling)
    q, rounded = gptq(w, scheme, factorise(torch.eye(96), act_order=act_order)), rtn(w, scheme)
    assert torch.equal(q.codes, rounded.codes)
    assert torch.equal(q.scale, rounded.scale)


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "largest first"])
@pytest.mark.parametrize("spelling", SCHEMES)
def test_blocks_give_the_codes_of_one_column_after_the_other(spelling: str, act_order: bool) -> None:
    w, scheme, factor = weight(), parse_scheme(spelling), factorise(moment(activations()), act_order=act_order)
    plain = gptq(w, scheme, factor, block=1)
    for block in (7, 32, 128):
        assert torch.equal(gptq(w, scheme, factor, block=block).codes, plain.codes)


def by_inverting(w: Tensor, scheme: Scheme, h: Tensor, damping: float, order: list[int]) -> Tensor:
    """Optimal Brain Surgeon as the paper derives it: the inverse of what is left, anew for every column."""
    w, q = w.double().clone(), rtn(w, scheme)
    h = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    shape = (w.shape[0], w.shape[1])
    scale = spread(q.scale.double(), shape, scheme.granularity).expand(shape)
    zero = None if q.zero_point is None else spread(q.zero_point, shape, scheme.granularity).expand(shape)
    codes = torch.empty(shape, dtype=scheme.format.code_dtype)
    for step, j in enumerate(order):
        left = order[step:]
        inverse = torch.linalg.inv(h[left][:, left])
        zero_j = None if zero is None else zero[:, j]
        codes[:, j] = scheme.grid.encode(w[:, j], scale[:, j], zero_j)
        error = w[:, j] - scheme.grid.decode(codes[:, j], scale[:, j], zero_j, torch.float64)
        w[:, left] -= torch.outer(error, inverse[0] / inverse[0, 0])
    return codes


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "largest first"])
@pytest.mark.parametrize("spelling", ["int4-g32", "int4-g32-asym", "int3-channel", "nf4-g32"])
def test_the_codes_are_those_of_inverting_in_float64(spelling: str, act_order: bool) -> None:
    w, scheme, h = weight(), parse_scheme(spelling), moment(activations())
    factor = factorise(h, damping=0.01, act_order=act_order)
    expected = by_inverting(w, scheme, h, 0.01, factor.order.tolist())
    assert int((gptq(w, scheme, factor).codes != expected).sum()) == 0


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
