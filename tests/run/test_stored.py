"""Tensors as they lie on disk, read off the parameters that they became in memory."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor

from halfbin.models.products import Place
from halfbin.models.skeleton import Target
from halfbin.run.blockwise.stored import Stored


def read(
    parameter: Tensor, shape: tuple[int, ...], places: list[Place], *, unchanged: bool, transposed: bool
) -> Tensor:
    partial: Any = types.SimpleNamespace(get=lambda name: parameter, targets={"w": Target("p", unchanged=unchanged)})
    stored = Stored(partial, {"w": tuple(places)}, {"w": shape}, {"w"} if transposed else set())
    return stored.read("w")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("experts", [1, 3])
def test_a_stack_that_was_converted_is_read_matrix_by_matrix(experts: int, transposed: bool) -> None:
    parameter = torch.arange(experts * 16.0).reshape(experts, 4, 4)  # [experts, out, in], square on purpose
    places = [Place("p", (4, 4), (4, 1), 16 * i) for i in range(experts)]
    found = read(parameter, (experts, 4, 4), places, unchanged=False, transposed=transposed)
    assert torch.equal(found, parameter.mT if transposed else parameter)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_part_of_a_parameter_is_read_as_it_is_stored(transposed: bool) -> None:
    parameter = torch.arange(32.0).reshape(8, 4)
    second = Place("p", (4, 4), (4, 1), 16)
    found = read(parameter, (4, 4), [second], unchanged=False, transposed=transposed)
    assert torch.equal(found, parameter[4:].T if transposed else parameter[4:])


def test_what_was_not_converted_is_the_parameter() -> None:
    parameter = torch.arange(16.0).reshape(4, 4)
    assert torch.equal(read(parameter, (4, 4), [], unchanged=True, transposed=True), parameter)
