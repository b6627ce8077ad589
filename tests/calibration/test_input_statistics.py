"""The observer of a run: its parts agree with the data, and dividing it is observing divided data."""

from __future__ import annotations

import pytest
import torch

from halfbin.calibration import InputStatistics
from halfbin.errors import DataError


def observed(x: torch.Tensor) -> InputStatistics:
    statistics = InputStatistics(x.shape[-1])
    for part in torch.split(x, 20):
        statistics.add(part[None])
    return statistics


def test_dividing_is_observing_divided_inputs() -> None:
    x = torch.randn(60, 12, generator=torch.Generator().manual_seed(0))
    scale = torch.linspace(0.1, 9, 12)
    divided, other = observed(x), observed(x / scale)
    divided.divide(scale)
    # Both round each number a few times to float32.
    assert torch.allclose(divided.matrix(), other.matrix(), rtol=1e-5, atol=1e-6 * float(other.matrix().abs().max()))
    assert torch.allclose(divided.channels.absmax, other.channels.absmax, rtol=1e-6)
    assert torch.allclose(divided.channels.mean_magnitude, other.channels.mean_magnitude, rtol=1e-5)
    assert torch.allclose(divided.rows, other.rows, rtol=1e-6)


def test_rows_are_rows_that_were_seen() -> None:
    x = torch.arange(100.0 * 3).reshape(100, 3)
    statistics = observed(x)
    assert statistics.num_tokens == 100
    assert {tuple(row.tolist()) for row in statistics.rows} <= {tuple(row.tolist()) for row in x}


def test_how_far_inputs_moved_is_summed_from_where_the_streams_part() -> None:
    generator = torch.Generator().manual_seed(1)
    unrounded = torch.randn(60, 12, generator=generator)
    x = unrounded + 0.1 * torch.randn(60, 12, generator=generator) * (torch.arange(60) >= 20)[:, None]
    statistics = InputStatistics(12)
    for part, before in zip(torch.split(x, 20), torch.split(unrounded, 20), strict=True):
        statistics.add(part, before)
    moved = statistics.moved()
    assert moved is not None
    expected = (unrounded - x).double().T @ x.double()
    assert torch.allclose(moved, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    scale = torch.linspace(0.1, 9, 12)
    statistics.divide(scale)
    divided = statistics.moved()
    assert divided is not None
    expected = ((unrounded - x) / scale).double().T @ (x / scale).double()
    assert torch.allclose(divided, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_streams_that_never_part_have_not_moved() -> None:
    x = torch.randn(20, 12, generator=torch.Generator().manual_seed(1))
    statistics = InputStatistics(12)
    statistics.add(x, x.clone())
    assert statistics.moved() is None


@pytest.mark.parametrize("scale", [torch.ones(3), torch.tensor([1.0, 0.0])], ids=["too many", "zero"])
def test_a_scale_that_cannot_be_is_refused(scale: torch.Tensor) -> None:
    with pytest.raises(DataError, match="2 channels, all above 0"):
        observed(torch.ones(4, 2)).divide(scale)
