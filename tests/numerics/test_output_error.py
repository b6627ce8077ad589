"""The output error from a second moment is that of the outputs themselves."""

from __future__ import annotations

import pytest
import torch

from halfbin.numerics import output_error as module
from halfbin.numerics.output_error import output_error


@pytest.mark.parametrize("features", [1, 2, 7, 8, 9, 100])
@pytest.mark.parametrize("chunk", [1 << 22, 250], ids=["at once", "in chunks"])
def test_it_is_the_sum_of_squared_output_errors(features: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, features, generator=generator) + 0.5
    error = torch.randn(13, features, generator=generator)
    expected = float((x.double() @ error.double().T).square().sum())
    moment = (x.double().T @ x.double()).float()
    # Float32 sums of `features` products, twice, each bounded by the products of magnitudes.
    magnitude = float((error.abs().double() @ moment.abs().double() * error.abs().double()).sum())
    assert abs(output_error(error, moment) - expected) <= 2 * (features + 2) * 2.0**-24 * magnitude


def test_nothing_costs_nothing() -> None:
    assert output_error(torch.zeros(3, 5), torch.ones(5, 5)) == 0
    assert output_error(torch.zeros(0, 5), torch.ones(5, 5)) == 0
    assert output_error(torch.zeros(3, 0), torch.ones(0, 0)) == 0
