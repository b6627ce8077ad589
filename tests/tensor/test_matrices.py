"""Stored weights and the matrices in them: quantized one by one or as a whole, the codes are the same."""

from __future__ import annotations

import pytest
import torch

from halfbin.errors import SchemeError
from halfbin.models import Site
from halfbin.planning.plan import _as_stored  # how a plan spells a matrix's granularity for what is stored
from halfbin.tensor import parse_scheme, quantize
from halfbin.tensor.matrices import as_stored, matrices, scheme_of_matrix

SCHEMES = ("int4-g8", "int4-g5", "int8-channel", "int4-b4x8", "int4-g8-asym")
SHAPES = {
    "linear": ((12, 24), False),
    "conv1d": ((24, 12), True),
    "stack": ((3, 12, 24), False),
    "turned stack": ((3, 24, 12), True),
}


@pytest.mark.parametrize("spelling", SCHEMES)
@pytest.mark.parametrize("kind", list(SHAPES))
def test_matrices_one_by_one_are_the_whole(kind: str, spelling: str) -> None:
    shape, transposed = SHAPES[kind]
    site = Site("s", "s.weight", shape, torch.float32, "expert" if len(shape) == 3 else "linear", "", transposed)
    asked = parse_scheme(spelling)
    stored = type(asked)(
        format=asked.format,
        granularity=_as_stored(asked.granularity, site),
        symmetric=asked.symmetric,
        scale_format=asked.scale_format,
    )
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    of_matrix = scheme_of_matrix(stored, len(shape), transposed=transposed)
    parts = matrices(weight, transposed=transposed)
    assert all(part.shape == (12, 24) for part in parts)
    joined = as_stored([quantize(p, of_matrix) for p in parts], stored, shape, transposed=transposed)
    whole = quantize(weight, stored)
    assert torch.equal(joined.codes, whole.codes)
    assert torch.equal(joined.scale, whole.scale)
    assert (joined.zero_point is None) == asked.symmetric
    assert joined.zero_point is None or whole.zero_point is None or torch.equal(joined.zero_point, whole.zero_point)


@pytest.mark.parametrize("spelling", ["int8-tensor", "int4-g8@0"])
def test_a_scale_over_several_matrices_is_refused(spelling: str) -> None:
    with pytest.raises(SchemeError, match="matrices of a stack"):
        scheme_of_matrix(parse_scheme(spelling), 3, transposed=False)
