"""A second moment in a few directions: the diagonal is exact, and full rank is everything."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halfbin.numerics.low_rank import LowRank, low_rank
from halfbin.numerics.output_error import output_error


def moment(n: int = 40, strong: int = 3) -> Tensor:
    """A few strong directions in noise, float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, n, generator=generator) + 10 * torch.randn(500, strong, generator=generator) @ torch.randn(
        strong, n, generator=generator
    )
    return torch.mm(x.double().T, x.double())


def whole(m: LowRank) -> Tensor:
    return torch.diag(m.rest.double()) + m.factor.double() @ m.factor.double().T


@pytest.mark.parametrize("rank", [0, 1, 3, 40, 100])
def test_the_diagonal_is_kept(rank: int) -> None:
    m = moment()
    found = low_rank(m, rank=rank)
    assert torch.allclose(found.diagonal.double(), m.diagonal(), rtol=1e-6)
    assert bool((found.rest >= 0).all())
    assert found.factor.shape == (40, min(rank, 40))


def test_full_rank_is_the_matrix_and_strong_directions_are_found() -> None:
    m = moment()
    assert float((whole(low_rank(m, rank=40)) - m).abs().max()) < 1e-5 * float(m.abs().max())
    off = m - torch.diag(m.diagonal())
    # Beside 3 directions of size 100 x 500, noise of size 500 is left.
    assert float((whole(low_rank(m, rank=3)) - m).norm()) < 0.02 * float(off.norm())


def test_the_output_error_is_that_of_the_matrix_it_stands_for() -> None:
    found, error = low_rank(moment(), rank=3), torch.randn(7, 40, generator=torch.Generator().manual_seed(1))
    expected = float((error.double() @ whole(found) * error.double()).sum())
    assert output_error(error, found) == pytest.approx(expected, rel=1e-5)


def test_dividing_inputs_divides_rows_and_columns() -> None:
    found, scale = low_rank(moment(), rank=3), torch.linspace(0.5, 2, 40)
    expected = whole(found) / scale / scale[:, None]
    assert float((whole(found.divided(scale)) - expected).abs().max()) < 1e-6 * float(expected.abs().max())


def test_the_same_matrix_gives_the_same_bits() -> None:
    assert torch.equal(low_rank(moment(), rank=3).factor, low_rank(moment(), rank=3).factor)


@pytest.mark.parametrize("m", [torch.zeros(4, 4), torch.zeros(0, 0), torch.ones(1, 1)], ids=["zeros", "empty", "one"])
def test_edges(m: Tensor) -> None:
    assert torch.allclose(whole(low_rank(m)), m.double(), atol=1e-6)
