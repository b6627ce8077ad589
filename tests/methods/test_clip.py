"""The clip search lowers each tile's own output error or leaves it, and rounding and GPTQ both gain by it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halfbin.errors import DataError, SchemeError
from halfbin.methods import after_correction, clipped, factorise, gptq
from halfbin.numerics.low_rank import low_rank
from halfbin.numerics.ranges import MeanSquaredError
from halfbin.tensor import QTensor, Scheme, dequantize, fit, parse_scheme, quantize
from halfbin.tensor.granularity import regions

SCHEMES = [
    "int4-g32",
    "int4-g32-asym",
    "int3-channel",
    "uint4-b16x48-asym",
    "int4-g40-asym-f16",
    "nf4-g32",
    "int4-tensor",
    "mxfp4",
    "int4-channel@1",
]
ROWS, COLUMNS = 20, 96


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight(rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    """Heavy tails, where clipping pays."""
    normal = torch.randn(4, rows, columns, generator=generator(0))
    return 0.02 * normal[0] / normal[1:].square().mean(0).sqrt()


def moment(columns: int = COLUMNS) -> Tensor:
    """Of correlated inputs of very different sizes, float64."""
    mixing = torch.randn(columns, columns, generator=generator(1)) / columns**0.5
    x = torch.randn(400, columns, generator=generator(2)) @ (torch.eye(columns) + 2 * mixing)
    x = (x * torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=generator(3))]).double()
    return torch.mm(x.T, x)


def rounded(w: Tensor, scheme: Scheme, params: tuple[Tensor, Tensor | None]) -> QTensor:
    return quantize(w, scheme, scale=params[0], zero_point=params[1])


def tile_errors(w: Tensor, q: QTensor, m: Tensor) -> Tensor:
    """e M e^T of each tile with its own columns' block of M, added up over its rows; float64, one tile after the other."""
    error, found = dequantize(q, torch.float64) - w.double(), []
    for region in regions(q.shape, q.scheme.granularity):
        (rows, columns), (height, width) = region.elements, region.tile
        for i in range(rows.start, rows.stop, height):
            for j in range(columns.start, columns.stop, width):
                e, block = error[i : i + height, j : j + width], m[j : j + width, j : j + width]
                found.append(float((e @ block * e).sum()))
    return torch.tensor(found)


def output_error(w: Tensor, q: QTensor, m: Tensor) -> float:
    error = dequantize(q, torch.float64) - w.double()
    return float((error @ m * error).sum())


@pytest.mark.parametrize("spelling", SCHEMES)
def test_no_tile_is_worse_than_with_its_whole_range(spelling: str) -> None:
    w, scheme, m = weight(), parse_scheme(spelling), moment()
    found = tile_errors(w, rounded(w, scheme, clipped(w, scheme, m, damping=0.0)), m)
    whole = tile_errors(w, quantize(w, scheme), m)
    # Candidates are compared in float32: two that differ by less than its rounding may change places.
    assert bool((found <= whole * (1 + COLUMNS * 2.0**-22)).all())


@pytest.mark.parametrize("spelling", ["int4-g32", "int4-g32-asym", "int3-channel", "uint4-b16x48-asym", "int4-tensor"])
def test_the_outputs_gain_more_than_by_a_search_that_knows_only_weights(spelling: str) -> None:
    w, scheme, m = weight(64), parse_scheme(spelling), moment()
    found = output_error(w, rounded(w, scheme, clipped(w, scheme, m)), m)
    assert found < 0.95 * output_error(w, quantize(w, scheme, estimator=MeanSquaredError()), m)
    assert found < 0.8 * output_error(w, quantize(w, scheme), m)


@pytest.mark.parametrize("spelling", SCHEMES)
def test_with_inputs_that_are_all_alike_it_is_the_search_for_the_least_squared_error(spelling: str) -> None:
    w, scheme = weight(), parse_scheme(spelling)
    scale, zero_point = clipped(w, scheme, torch.eye(COLUMNS), num_candidates=36, smallest=0.3, damping=0.0)
    same_scale, same_zero = fit(w, scheme, MeanSquaredError(36, 0.3))
    assert torch.equal(scale, same_scale)
    assert zero_point is same_zero is None or (
        zero_point is not None and same_zero is not None and torch.equal(zero_point, same_zero)
    )


@pytest.mark.parametrize("spelling", ["int4-g32", "int4-g32-asym", "int3-channel"])
def test_gptq_starts_from_these_scales_and_gains(spelling: str) -> None:
    w, scheme, m = weight(64), parse_scheme(spelling), moment()
    params, factor = clipped(w, scheme, m), factorise(m)
    q = gptq(w, scheme, factor, params=params)
    assert torch.equal(q.scale, params[0])
    assert output_error(w, q, m) < output_error(w, gptq(w, scheme, factor), m)
    assert output_error(w, q, m) < output_error(w, rounded(w, scheme, params), m)


@pytest.mark.parametrize("spelling", SCHEMES)
def test_a_second_moment_of_full_rank_in_pieces_is_the_second_moment(spelling: str) -> None:
    w, scheme, m = weight(), parse_scheme(spelling), moment()
    exact, pieces = clipped(w, scheme, m), clipped(w, scheme, low_rank(m, rank=COLUMNS))
    # Float32 on both ways: ties may turn.
    assert float((exact[0].float() != pieces[0].float()).double().mean()) < 0.02


def test_a_few_directions_do_nearly_as_well_as_all() -> None:
    w, scheme, m = weight(64), parse_scheme("int3-channel"), moment() + 50 * torch.ones(COLUMNS, COLUMNS).double()
    errors = [
        output_error(w, rounded(w, scheme, clipped(w, scheme, m_)), m)
        for m_ in (m, low_rank(m, rank=16), low_rank(m, rank=0))
    ]
    assert errors[1] < 1.05 * errors[0]
    assert errors[1] < errors[2]


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "largest first"])
@pytest.mark.parametrize("spelling", ["int4-g32", "int4-g32-asym", "int3-channel"])
def test_what_corrections_leave_over_is_better_for_gptq(spelling: str, act_order: bool) -> None:
    w, scheme, m = weight(64), parse_scheme(spelling), moment()
    factor = factorise(m, act_order=act_order)
    left = clipped(w, scheme, after_correction(factor.upper, factor.order))
    errors = [
        output_error(w, gptq(w, scheme, factor, params=params), m)
        for params in (left, clipped(w, scheme, m), fit(w, scheme, MeanSquaredError()))
    ]
    assert errors[0] < 0.97 * errors[2]
    assert errors[0] < 1.01 * errors[1]  # with one scale a row both are as good here


def test_what_corrections_leave_over_is_the_conditional_variance_of_each_column() -> None:
    m = moment(8) / 400
    factor = factorise(m, damping=0.0)
    left = after_correction(factor.upper, factor.order).rest
    for step, column in enumerate(factor.order.tolist()):
        still = factor.order[step:]
        assert float(left[column]) == pytest.approx(1 / float(torch.linalg.inv(m[still][:, still])[0, 0]), rel=1e-3)


def test_given_scales_are_not_to_be_chosen_again() -> None:
    w, scheme, m = weight(), parse_scheme("int4-g32"), moment()
    with pytest.raises(SchemeError, match="pass one of them"):
        gptq(w, scheme, factorise(m, act_order=False), params=clipped(w, scheme, m), recompute_scales=True)


def test_a_large_weight_is_kept_where_its_input_is_large_and_given_up_where_it_is_small() -> None:
    w, scheme = weight(8, 32).clamp(-0.05, 0.05), parse_scheme("int4-channel")
    w[:, 5] = 0.1
    small, large = torch.eye(32), torch.eye(32)
    small[5, 5], large[5, 5] = 1e-3, 1e3
    given_up, kept = clipped(w, scheme, small)[0], clipped(w, scheme, large)[0]
    assert bool((given_up < 0.8 * fit(w, scheme)[0]).all())
    assert float((kept / fit(w, scheme)[0]).min()) > 0.9


def test_columns_that_were_never_active_count_a_little_and_without_damping_not_at_all() -> None:
    w, scheme = weight(), parse_scheme("int4-g32")
    dead = moment()
    dead[32:64], dead[:, 32:64] = 0, 0
    scale, whole = clipped(w, scheme, dead, damping=0.0)[0], fit(w, scheme)[0]
    assert torch.equal(scale[:, 1], whole[:, 1])
    assert not torch.equal(scale[:, 0], whole[:, 0])
    assert torch.equal(clipped(w, scheme, dead)[0][:, 1], clipped(w, scheme, torch.eye(COLUMNS))[0][:, 1])


@pytest.mark.parametrize("factor", [1e-20, 4.0, 1e20])
def test_the_size_of_the_moment_does_not_matter(factor: float) -> None:
    w, scheme, m = weight(), parse_scheme("int4-g32"), moment()
    assert (
        float((clipped(w, scheme, m)[0] != clipped(w, scheme, m * factor)[0]).double().mean()) < 0.02
    )  # ties in float32


@pytest.mark.parametrize("spelling", ["int4-g32-asym", "int4-channel"])
def test_a_row_depends_on_no_other_row(spelling: str) -> None:
    w, scheme, m = weight(), parse_scheme(spelling), moment()
    whole, part = clipped(w, scheme, m), clipped(w[5:9], scheme, m)
    assert torch.equal(whole[0][5:9], part[0])


@pytest.mark.parametrize("spelling", SCHEMES)
def test_chunks_change_nothing(spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w, scheme, m = weight(), parse_scheme(spelling), moment()
    whole = clipped(w, scheme, m)
    monkeypatch.setattr("halfbin.methods.clip._CHUNK", 100)
    pieces = clipped(w, scheme, m)
    # BLAS may sum fewer rows in another order, and turn ties.
    assert float((whole[0].float() != pieces[0].float()).double().mean()) < 0.02


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 70), (0, 32), (4, 0)], ids=str)
@pytest.mark.parametrize("spelling", ["int4-g32", "int4-g32-asym", "int4-tensor"])
def test_any_shape_has_the_scales_that_rounding_needs(spelling: str, shape: tuple[int, int]) -> None:
    w, scheme = weight(*shape), parse_scheme(spelling)
    assert rounded(w, scheme, clipped(w, scheme, torch.eye(shape[1]))).shape == shape


@pytest.mark.parametrize("spelling", ["int4-g32", "int4-g32-asym"])
def test_zeros_and_constants_are_exact(spelling: str) -> None:
    scheme, m = parse_scheme(spelling), moment()
    for w in (torch.zeros(2, COLUMNS), torch.full((2, COLUMNS), 0.7)):
        q = rounded(w, scheme, clipped(w, scheme, m))
        assert torch.allclose(dequantize(q), w, rtol=2.0**-22, atol=0)


def test_what_does_not_fit_is_refused() -> None:
    w, scheme = weight(), parse_scheme("int4-g32")
    with pytest.raises(SchemeError, match=r"weight \[20, 96\] and second moment \[95, 95\]"):
        clipped(w, scheme, torch.eye(95))
    with pytest.raises(SchemeError, match=r"smallest=0"):
        clipped(w, scheme, torch.eye(96), smallest=0)
    with pytest.raises(DataError, match="second moment holds NaN"):
        clipped(w, scheme, torch.full((96, 96), float("nan")))
    w[3, 4] = torch.inf
    with pytest.raises(DataError, match=r"\[3, 4\]"):
        clipped(w, scheme, torch.eye(96))
