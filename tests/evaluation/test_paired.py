"""Paired differences: certain where windows agree, however much the windows differ; uncertain where they do not."""

from __future__ import annotations

import pytest
import torch

from halfbin.errors import DataError
from halfbin.evaluation import paired_difference


def test_a_small_difference_on_every_window_is_certain() -> None:
    generator = torch.Generator().manual_seed(0)
    windows = torch.randn(50, generator=generator) * 10
    found = paired_difference(windows + 0.1 + 0.01 * torch.randn(50, generator=generator), windows)
    assert found.low < found.mean < found.high
    assert found.excludes_zero
    assert found.mean == pytest.approx(0.1, abs=0.01)


def test_noise_is_not() -> None:
    a, b = torch.randn(2, 50, generator=torch.Generator().manual_seed(1))
    assert not paired_difference(a, b).excludes_zero


def test_the_interval_narrows_with_the_root_of_the_windows() -> None:
    a = torch.randn(6400, generator=torch.Generator().manual_seed(2))
    few, many = (paired_difference(a[:n], torch.zeros(n)) for n in (100, 6400))
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(8, rel=0.3)


def test_other_windows_are_refused() -> None:
    with pytest.raises(DataError, match="same windows"):
        paired_difference(torch.ones(3), torch.ones(4))
