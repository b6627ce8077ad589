"""Schemes and weights that the tests of this room share, and the error bound that all of them must keep."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from halfbin.numerics import FORMATS, IntegerFormat, ScaleFormat
from halfbin.tensor import (
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QTensor,
    Scheme,
    dequantize,
    spread,
)

GRANULARITIES: tuple[Granularity, ...] = (
    PerTensor(),
    PerChannel(),
    PerChannel(1),
    PerToken(),
    PerGroup(1),
    PerGroup(4),
    PerGroup(3, axis=0),
    PerBlock(2, 3),
    PerBlock(64, 64),
)


def all_schemes() -> dict[str, Scheme]:
    """Every combination of a format, a zero point, a scale's storage and one of `GRANULARITIES` that means something."""
    schemes = {}
    for fmt in FORMATS.values():
        for granularity in GRANULARITIES:
            for stored in ScaleFormat:
                for symmetric in (True, False):
                    if symmetric or (isinstance(fmt, IntegerFormat) and stored is not ScaleFormat.E8M0):
                        scheme = Scheme(format=fmt, granularity=granularity, symmetric=symmetric, scale_format=stored)
                        schemes[str(scheme)] = scheme
    return schemes


SCHEMES = all_schemes()

# A slice through them for tests with one case a scheme: every format, granularity and way to store a scale occurs.
FEW_SCHEMES = {
    text: SCHEMES[text]
    for text in (
        "int2-channel",
        "int3-g4-asym-f16",
        "int4-g4",
        "int4-g4-asym-bf16",
        "int5-b2x3",
        "int6-g3@0-asym",
        "int7-token-e8m0",
        "int8-tensor-asym",
        "int8-channel@1-f16",
        "uint2-channel",
        "uint3-token-asym",
        "uint4-g4-asym",
        "uint5-b64x64-f16",
        "uint6-g1-asym-bf16",
        "uint7-tensor-e8m0",
        "uint8-channel-asym-f16",
        "ternary-channel",
        "ternary-g4-asym",
        "fp8_e4m3-tensor",
        "fp8_e4m3-b2x3",
        "fp8_e5m2-channel-bf16",
        "fp8_e4m3-g4-e8m0",
        "fp4_e2m1-g4-e8m0",
        "fp4_e2m1-g3@0-f16",
        "nf4-g4",
        "nf4-channel@1-f16",
    )
}


# 2**122 leaves room to double, and for a scale that was rounded up; the ends of float32 have tests of their own.
finite_weights = st.floats(-(2.0**122), 2.0**122, width=32)
usual_weights = st.floats(-8, 8, width=32)


@st.composite
def weights(draw: st.DrawFn, elements: st.SearchStrategy[float] | None = None) -> Tensor:
    """Matrices of up to 6 x 9 finite float32 numbers: usual ones, or all of them, subnormals included."""
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 9)))
    if elements is None:
        elements = draw(st.sampled_from([finite_weights, usual_weights]))
    return torch.from_numpy(draw(arrays.arrays(np.float32, shape, elements=elements)))


def values_of(scheme: Scheme) -> Tensor:
    """All finite values of the scheme's format, float64, rising."""
    values = scheme.format.decode(scheme.format.codes, torch.float64)
    return torch.tensor(sorted(set(values[torch.isfinite(values)].tolist())), dtype=torch.float64)


def scale_per_element(q: QTensor) -> Tensor:
    """Each element's scale, float64 [*shape]."""
    return spread(q.scale.double(), q.shape, q.scheme.granularity).expand(q.shape)


def excess(x: Tensor, q: QTensor) -> float:
    """By how much rounding broke its promise, in steps, at the worst element; at most 0 when it was kept.

    Inside the range an element may move by half the gap between the two values around it; beyond the range by its
    distance to the end. x / scale and value * scale are each off by half an ulp, and the former's ulp is one of x's own
    type, so that 2 ulps in all are given; 2**-140 is for quotients that are no normal float32 numbers, and 2**-43 for the
    zero points of up to 256 that are added here, in float64.
    """
    if x.numel() == 0:
        return 0.0
    scale = scale_per_element(q)
    zero_point = 0.0 if q.zero_point is None else spread(q.zero_point.double(), q.shape, q.scheme.granularity)
    steps = x.double() / scale
    moved = (dequantize(q).double() - x.double()).abs() / scale
    values = values_of(q.scheme)
    inside = (steps + zero_point).clamp(values[0], values[-1]).contiguous()
    above = torch.bucketize(inside, values).clamp(1, len(values) - 1)
    half_gap = (values[above] - values[above - 1]) / 2
    beyond = (steps + zero_point - inside).abs()
    slack = 2 * torch.finfo(torch.float32).eps * steps.abs() + (2.0**-140 if q.zero_point is None else 2.0**-43)
    return float((moved - torch.where(beyond > 0, beyond, half_gap) - slack).max())
