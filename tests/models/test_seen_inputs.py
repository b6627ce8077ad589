"""Inputs are gathered by the memory that they lie in, and nothing of that memory is held."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from halfbin.models.inputs import Inputs
from halfbin.models.products import Place, Product


class Kept:
    """An observer that counts what it was given."""

    def __init__(self, num_features: int) -> None:
        self.sums: list[float] = []

    def add(self, x: Tensor) -> None:
        self.sums.append(float(x.sum()))


def product(name: str, x: Tensor) -> Product:
    return Product(Place(name, (4, 8), (8, 1), 0), x, x)


def test_products_of_one_tensor_are_observed_once_through_whatever_views() -> None:
    seen: Inputs[Kept] = Inputs(Kept)
    x = torch.ones(2, 3, 8)
    for name in ("q", "k", "v"):
        seen.see(product(name, x.view(-1, 8)))
    (group,) = seen.groups()
    assert [place.parameter for place in group.places] == ["q", "k", "v"]
    assert group.observer.sums == [48.0]


def test_memory_that_was_given_back_may_hold_another_input() -> None:
    seen: Inputs[Kept] = Inputs(Kept)
    memory = bytearray(torch.ones(6, 8).numpy().tobytes())
    for name in ("q", "o"):
        x = torch.frombuffer(memory, dtype=torch.float32).view(6, 8)
        seen.see(product(name, x))
        del x  # the call holds it no longer
    assert [group.observer.sums for group in seen.groups()] == [[48.0], [48.0]]


def test_no_input_is_held_until_the_call_is_over() -> None:
    seen: Inputs[Kept] = Inputs(Kept)
    x = torch.ones(6, 8)
    seen.see(product("q", x))
    gone = weakref.ref(x)
    del x
    assert gone() is None
