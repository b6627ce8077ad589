"""Fake quantization: the forward pass is quantize and dequantize, the gradients are those of straight-through rounding."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfbin.errors import DataError, SchemeError
from halfbin.numerics import FORMATS, IntegerFormat, Percentile
from halfbin.tensor import (
    Granularity,
    PerTensor,
    Scheme,
    dequantize,
    fake_quantize,
    fit,
    parse_scheme,
    quantize,
    scale_shape,
)
from halfbin.tensor.fake_quantize import tile_sums
from halfbin.tensor.granularity import spread
from tensor.cases import FEW_SCHEMES, GRANULARITIES, SCHEMES, scale_per_element, values_of, weights

law = settings(max_examples=150, deadline=None, derandomize=True, database=None)
EACH_SCHEME = pytest.mark.parametrize("scheme", FEW_SCHEMES.values(), ids=FEW_SCHEMES)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPE = (7, 10)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, -0.0 and 0.0 told apart."""
    return a.dtype == b.dtype and torch.equal(a, b) and torch.equal(torch.signbit(a), torch.signbit(b))


# --- the forward pass


@law
@given(weights(), st.sampled_from(list(SCHEMES.values())), st.sampled_from(DTYPES))
def test_the_forward_pass_is_quantize_and_dequantize_bit_for_bit(
    weight: Tensor, scheme: Scheme, dtype: torch.dtype
) -> None:
    x = weight.clamp(-1e4, 1e4).to(dtype) if dtype == torch.float16 else weight.to(dtype)
    assert same_bits(fake_quantize(x, scheme), dequantize(quantize(x, scheme), dtype))


@EACH_SCHEME
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_forward_pass_with_learned_scales_rounds_them_as_stored(scheme: Scheme, dtype: torch.dtype) -> None:
    x = normal(*SHAPE).to(dtype)
    scale, zero_point = halved(x, scheme)
    x_hat = fake_quantize(x, scheme, scale=scale.requires_grad_(), zero_point=zero_point)
    assert same_bits(x_hat.detach(), dequantize(quantize(x, scheme, scale=scale, zero_point=zero_point), dtype))


def test_the_estimator_chooses_the_range() -> None:
    x, scheme = normal(4, 400), parse_scheme("int4-channel-asym")
    x_hat = fake_quantize(x, scheme, estimator=Percentile(90.0))
    assert torch.equal(x_hat, dequantize(quantize(x, scheme, estimator=Percentile(90.0)), torch.float64))


# --- gradients, against autograd


def halved(x: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Scales about half of those that fit, float32, so that many elements clip, and the zero points that were fitted."""
    scale, zero_point = fit(x, scheme)
    return scale.float() * 0.4321, zero_point


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of `x`."""
    return x + (rounded - x).detach()


def by_hand(x: Tensor, scheme: Scheme, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """x_hat written out with clamp and straight-through rounding: float64, and no line of the library's encoding."""
    values = values_of(scheme)
    stored = straight_through(scale.double(), scheme.scale_format.round(scale.detach().float()).double())
    step = spread(stored, tuple(x.shape), scheme.granularity)
    zero: Tensor | float = 0.0
    if zero_point is not None:
        code = straight_through(zero_point.double(), zero_point.detach().double().round().clamp(values[0], values[-1]))
        zero = spread(code, tuple(x.shape), scheme.granularity)
    u = (x.double() / step + zero).clamp(values[0].item(), values[-1].item())
    # power-of-two scales make ties: the even code lies an even number of values away from zero
    odd = (torch.arange(len(values)) - int((values == 0).nonzero())) % 2
    nearest = values[((u.detach().unsqueeze(-1) - values).abs() + 1e-9 * odd).argmin(-1)]
    return step * (straight_through(u, nearest) - zero)


@EACH_SCHEME
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_those_of_straight_through_rounding_written_by_hand(scheme: Scheme, dtype: torch.dtype) -> None:
    num_clipped = compare_with_hand(scheme, dtype)
    assert 0 < num_clipped < math.prod(SHAPE) or str(scheme.granularity) == "g1"


@pytest.mark.parametrize("fmt", FORMATS)
def test_gradients_of_every_scheme_are_those_written_by_hand(fmt: str) -> None:
    schemes = [scheme for scheme in SCHEMES.values() if scheme.format.name == fmt]
    assert len(schemes) >= 36
    for scheme in schemes:
        try:
            compare_with_hand(scheme, torch.float32)
        except AssertionError as error:
            error.add_note(f"scheme {scheme}")
            raise


def compare_with_hand(scheme: Scheme, dtype: torch.dtype) -> int:
    """Compare x_hat and all gradients with `by_hand`; the number of elements that were clipped."""
    x = normal(*SHAPE).to(dtype).requires_grad_()
    scale, integers = halved(x.detach(), scheme)
    scale.requires_grad_()
    # a float zero point between two codes, some of them beyond the ends of the codes
    zero_point = None if integers is None else (integers * 1.3 - 0.4).requires_grad_()
    inputs = [p for p in (x, scale, zero_point) if p is not None]
    upstream = normal(*SHAPE, seed=1).to(dtype)

    x_hat = fake_quantize(x, scheme, scale=scale, zero_point=zero_point)
    expected = by_hand(x, scheme, scale, zero_point)
    got = torch.autograd.grad(x_hat, inputs, upstream)
    wanted = torch.autograd.grad(expected, inputs, upstream.double())

    # x_hat is off by eps of its own type and by those of u and of the product in float32, none of them above 256 steps
    assert torch.allclose(x_hat.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
    for a, b, leaf in zip(got, wanted, inputs, strict=True):
        assert a.dtype == leaf.dtype
        # slopes are off by eps of float32 for each of at most 57344 steps that cancel; a tile sums up to 70 of them
        largest = max(1.0, values_of(scheme).abs().max().item()) * upstream.abs().max().item()
        slack = 70 * 4 * torch.finfo(torch.float32).eps * largest + torch.finfo(a.dtype).eps * b.abs()
        assert ((a.double() - b.double()).abs() <= slack).all()
    return int((got[0] == 0).sum())


@pytest.mark.parametrize(
    "text", ["int8-tensor-asym", "int4-channel-asym", "uint4-channel-asym", "uint8-tensor-asym", "ternary-channel"]
)
@pytest.mark.parametrize("factor", [0.4321, 1.0], ids=["clipping", "fitted"])
def test_the_gradient_of_x_with_constant_scales_is_torchs(text: str, factor: float) -> None:
    x, scheme = normal(5, 300).float().requires_grad_(), parse_scheme(text)
    fmt = scheme.format
    assert isinstance(fmt, IntegerFormat)
    scale, zero_point = fit(x.detach(), scheme)
    scale = scale * factor
    zero = torch.zeros_like(scale, dtype=torch.int32) if zero_point is None else zero_point
    if isinstance(scheme.granularity, PerTensor):
        theirs = torch.fake_quantize_per_tensor_affine(x, scale[0, 0], zero[0, 0], fmt.qmin, fmt.qmax)
    else:
        theirs = torch.fake_quantize_per_channel_affine(x, scale[:, 0], zero[:, 0], 0, fmt.qmin, fmt.qmax)
    ours = fake_quantize(x, scheme, scale=scale, zero_point=zero_point)
    (wanted,), (got,) = (torch.autograd.grad(y.sum(), x) for y in (theirs, ours))
    assert torch.equal(got, wanted)
    assert bool((got == 0).any()) == (factor < 1)


@EACH_SCHEME
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_constant_scales_x_keeps_its_gradient_exactly_where_it_moved_by_half_a_gap_or_less(
    scheme: Scheme, dtype: torch.dtype
) -> None:
    x = (normal(*SHAPE) * 1.7).to(dtype).requires_grad_()
    scale, zero_point = halved(x.detach(), scheme)
    q = quantize(x.detach(), scheme, scale=scale, zero_point=zero_point)
    values, steps = values_of(scheme), x.detach().double() / scale_per_element(q)
    moved = (dequantize(q, torch.float64) / scale_per_element(q) - steps).abs()
    last_gap = torch.where(steps < 0, values[1] - values[0], values[-1] - values[-2])
    (dx,) = torch.autograd.grad(fake_quantize(x, scheme, scale=scale, zero_point=zero_point).sum(), x)
    assert torch.equal(dx == 1, moved <= last_gap / 2 + 2**-20 * steps.abs())
    assert torch.equal(dx == 0, dx != 1)


def test_the_table_of_equation_3_element_by_element() -> None:
    """Codes -8 to 7 with scale 0.5: LSQ's own numbers, and the ends themselves, which we count as inside."""
    x = torch.tensor([[1.1, -0.9, 3.5, -4.0, 3.6, -4.2, 100.0]], requires_grad=True)
    scheme, scale = parse_scheme("int4-g1"), torch.full((1, 7), 0.5, requires_grad=True)
    got = torch.autograd.grad(fake_quantize(x, scheme, scale=scale).sum(), (x, scale))
    assert got[0].tolist() == [[1, 1, 1, 1, 0, 0, 0]]
    assert torch.allclose(got[1], torch.tensor([[2 - 2.2, -2 + 1.8, 0, 0, 7, -8, 7]]), atol=1e-6)


def test_a_learned_zero_point_moves_only_what_is_clipped() -> None:
    """Codes 0 to 15, scale 0.5, zero point 3.2 read as 3: the range is -1.5 to 6."""
    x = torch.tensor([[0.3, -1.4, 7.0, -2.0]], requires_grad=True)
    scale = torch.full((1, 4), 0.5, requires_grad=True)
    zero_point = torch.full((1, 4), 3.2, requires_grad=True)
    x_hat = fake_quantize(x, parse_scheme("uint4-g1-asym"), scale=scale, zero_point=zero_point)
    got = torch.autograd.grad(x_hat.sum(), (scale, zero_point))
    assert x_hat.tolist() == [[0.5, -1.5, 6.0, -1.5]]
    assert torch.allclose(got[0], torch.tensor([[1 - 0.6, -3 + 2.8, 12, -3]]), atol=1e-6)
    assert got[1].tolist() == [[0, 0, -0.5, -0.5]]


@EACH_SCHEME
def test_x_hat_scales_with_x_and_scale_together(scheme: Scheme) -> None:
    """Euler: x_hat(a x, a scale) = a x_hat(x, scale), hence sum(x dx) + sum(scale dscale) = sum(x_hat)."""
    if scheme.scale_format.value != "f32":
        scheme = dataclasses.replace(scheme, scale_format=type(scheme.scale_format).FLOAT32)
    x = normal(*SHAPE).requires_grad_()
    scale, zero_point = halved(x.detach(), scheme)
    x_hat = fake_quantize(x, scheme, scale=scale.requires_grad_(), zero_point=zero_point)
    dx, dscale = torch.autograd.grad(x_hat.sum(), (x, scale))
    # the gradient of a float32 scale is itself rounded to float32
    slack = 2 * torch.finfo(torch.float32).eps * (scale * dscale).abs().sum().item()
    assert (x * dx).sum().item() + (scale.double() * dscale).sum().item() == pytest.approx(
        x_hat.sum().item(), abs=slack
    )


@pytest.mark.parametrize("text", [t for t, s in FEW_SCHEMES.items() if s.scale_format.value != "e8m0"])
def test_nothing_counts_as_clipped_by_a_scale_that_was_fitted(text: str) -> None:
    """value / (value / 7) may come out above 7, and a zero point is rounded: the largest weight must keep moving."""
    for seed, dtype in enumerate(DTYPES):
        x = normal(64, 65, seed=seed).to(dtype).requires_grad_()
        if text in ("uint2-channel", "uint5-b64x64-f16"):  # hold no negative values
            x = x.detach().abs().requires_grad_()
        (dx,) = torch.autograd.grad(fake_quantize(x, FEW_SCHEMES[text]).sum(), x)
        assert (dx == 1).all()


@pytest.mark.parametrize("text", ["int4-g4", "ternary-channel", "fp8_e4m3-channel", "nf4-g4"])
def test_a_learned_scale_that_starts_where_it_was_fitted_clips_nothing(text: str) -> None:
    """The largest weight's quotient may come out an ulp above the largest code."""
    scheme = parse_scheme(text)
    for seed, dtype in enumerate(DTYPES):
        x = normal(64, 65, seed=seed).to(dtype).requires_grad_()
        scale = fit(x.detach(), scheme)[0].requires_grad_()
        (dx,) = torch.autograd.grad(fake_quantize(x, scheme, scale=scale).sum(), x)
        assert (dx == 1).all()


def test_a_fitted_scale_is_a_constant_to_the_gradient() -> None:
    x, scheme = normal(4, 8).requires_grad_(), parse_scheme("int4")
    scale, _ = fit(x.detach(), scheme)
    weight = normal(4, 8, seed=1)
    fitted, given = ((fake_quantize(x, scheme, scale=s) * weight).sum() for s in (None, scale))
    assert torch.equal(*(torch.autograd.grad(y, x)[0] for y in (fitted, given)))


def test_a_learned_range_clips_the_half_step_beyond_its_ends_and_a_constant_one_does_not() -> None:
    x, scheme = torch.tensor([[3.4, 3.7, 3.8, -4.2, -4.3]], requires_grad=True), parse_scheme("int4-g1")
    constant, learned = torch.full((1, 5), 0.5), torch.full((1, 5), 0.5, requires_grad=True)
    (dx,), (dx_learned,) = (
        torch.autograd.grad(fake_quantize(x, scheme, scale=s).sum(), x) for s in (constant, learned)
    )
    assert dx.tolist() == [[1, 1, 0, 1, 0]]
    assert dx_learned.tolist() == [[1, 0, 0, 0, 0]]


@pytest.mark.parametrize("text", ["int4-g4", "uint4-g4-asym", "int8-tensor", "ternary-b2x3", "fp4_e2m1-channel"])
def test_lsqs_gradient_scale_is_that_of_each_tiles_size(text: str) -> None:
    x, scheme = normal(*SHAPE), parse_scheme(text)
    scale, zero_point = halved(x, scheme)
    scale.requires_grad_()
    plain, scaled = (
        torch.autograd.grad(
            fake_quantize(x, scheme, scale=scale, zero_point=zero_point, lsq_gradient_scale=on).sum(), scale
        )[0]
        for on in (False, True)
    )
    tile = scheme.granularity.tile(SHAPE)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            count = math.prod(min(n, (k + 1) * t) - k * t for n, k, t in zip(SHAPE, (i, j), tile, strict=True))
            g = 1 / math.sqrt(count * scheme.format.maximum)
            assert scaled[i, j].item() == pytest.approx(plain[i, j].item() * g, rel=1e-6)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_tile_sums_is_the_adjoint_of_spread(granularity: Granularity) -> None:
    params = normal(*scale_shape(SHAPE, granularity), seed=2).requires_grad_()
    upstream = normal(*SHAPE)
    (wanted,) = torch.autograd.grad(spread(params, SHAPE, granularity).expand(SHAPE), params, upstream)
    assert torch.allclose(tile_sums(upstream, granularity), wanted, rtol=1e-13, atol=1e-13)


# --- training through it


def test_a_learned_scale_finds_a_lower_error_than_the_whole_range() -> None:
    x, scheme = normal(8, 256).float(), parse_scheme("int3-channel")
    scale = fit(x, scheme)[0].requires_grad_()
    errors = []
    for _ in range(60):
        loss = (fake_quantize(x, scheme, scale=scale) - x).square().sum()
        (gradient,) = torch.autograd.grad(loss, scale)
        scale = (scale - 2e-4 * gradient).detach().requires_grad_()
        errors.append(loss.item())
    assert errors[-1] < 0.8 * errors[0]


def test_a_learned_zero_point_finds_a_range_that_starts_elsewhere() -> None:
    x, scheme = normal(1, 256).float().abs() * 2, parse_scheme("uint4-channel-asym")
    scale, zero_point = torch.full((1, 1), 0.4), torch.full((1, 1), 20.0)  # beyond the codes: read as 15
    errors = []
    for _ in range(100):
        zero_point.requires_grad_()
        loss = (fake_quantize(x, scheme, scale=scale, zero_point=zero_point) - x).square().mean()
        (gradient,) = torch.autograd.grad(loss, zero_point)
        zero_point = (zero_point - gradient.clamp(-0.5, 0.5)).detach()
        errors.append(loss.item())
    assert zero_point.item() < 5  # 15 steps of 0.4 from code 5 on end at 4
    assert errors[-1] < 0.02 * errors[0]


# --- edges


@EACH_SCHEME
@pytest.mark.parametrize("shape", [(1, 1), (9, 1), (1, 9), (3, 0), (0, 3), (0, 0), (2, 5, 9)], ids=str)
def test_gradients_have_the_shapes_of_what_they_belong_to(scheme: Scheme, shape: tuple[int, ...]) -> None:
    x = normal(*shape).requires_grad_()
    scale = torch.ones(scale_shape(shape, scheme.granularity), requires_grad=True)
    zero_point = None if scheme.symmetric else torch.ones(scale.shape, requires_grad=True)
    inputs = [p for p in (x, scale, zero_point) if p is not None]
    got = torch.autograd.grad(fake_quantize(x, scheme, scale=scale, zero_point=zero_point).sum(), inputs)
    assert [g.shape for g in got] == [p.shape for p in inputs]


def test_a_tiny_learned_scale_gives_finite_gradients() -> None:
    """x / scale overflows float32: clipped, with the gradient of the end, not inf or NaN."""
    x, scale = torch.full((1, 4), 1e30, requires_grad=True), torch.full((1, 1), 1e-30, requires_grad=True)
    dx, dscale = torch.autograd.grad(fake_quantize(x, parse_scheme("int8"), scale=scale).sum(), (x, scale))
    assert dx.tolist() == [[0, 0, 0, 0]]
    assert dscale.item() == 4 * 127


def test_what_quantize_refuses_is_refused() -> None:
    x, scheme = normal(2, 3), parse_scheme("int4")
    with pytest.raises(DataError, match="first is nan at"):
        fake_quantize(x * math.nan, scheme)
    with pytest.raises(DataError, match="2 of 2 scales are not positive"):
        fake_quantize(x, scheme, scale=torch.tensor([[-0.1], [0.0]], requires_grad=True))
    with pytest.raises(SchemeError, match="without the scale it belongs to"):
        fake_quantize(x, parse_scheme("int4-asym"), zero_point=torch.zeros(2, 1))
    with pytest.raises(SchemeError, match="no codes of int4"):
        fake_quantize(x, parse_scheme("int4-asym"), scale=torch.ones(2, 1), zero_point=torch.full((2, 1), 9))
    with pytest.raises(SchemeError, match="exactly when the scheme is asymmetric"):
        fake_quantize(x, scheme, scale=torch.ones(2, 1), zero_point=torch.zeros(2, 1))
