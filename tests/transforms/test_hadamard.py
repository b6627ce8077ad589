"""Every order that is promised is orthogonal, and what is not promised is said."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halfbin.errors import SchemeError
from halfbin.transforms.hadamard import hadamard, kronecker_factors, largest_order
from halfbin.transforms.paley import is_paley_order, paley, prime_power

PALEY = [4, 8, 12, 20, 24, 28, 36, 44, 52, 60, 76, 84, 100, 108, 124, 140, 148, 180, 244, 344]
SIZES = [1, 2, 4, 12, 20, 24, 28, 36, 40, 44, 52, 60, 64, 72, 92, 108, 112, 140, 144, 172, 184, 200, 384]


def is_hadamard(h: Tensor) -> bool:
    """Integers in float64 are exact."""
    n = len(h)
    return bool((h.abs() == 1).all()) and torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("order", PALEY)
def test_fields_of_primes_and_prime_powers_give_hadamard_matrices(order: int) -> None:
    # With prime powers: 28 = 3^3 + 1, 244 = 3^5 + 1 and 344 = 7^3 + 1 of the first kind, 52 = 2 (5^2 + 1) of the second.
    assert is_paley_order(order)
    h = paley(order)
    assert h.shape == (order, order)
    assert is_hadamard(h)


@pytest.mark.parametrize("order", [2, 6, 16 + 2, 40 - 1, 92, 116, 172, 188])
def test_orders_without_a_field_are_known(order: int) -> None:
    assert not is_paley_order(order)


def test_prime_powers() -> None:
    assert [prime_power(q) for q in (0, 1, 2, 9, 12, 49, 91, 343, 1021)] == [
        None,
        None,
        (2, 1),
        (3, 2),
        None,
        (7, 2),
        None,
        (7, 3),
        (1021, 1),
    ]


@pytest.mark.parametrize("n", SIZES)
def test_rows_are_orthogonal(n: int) -> None:
    assert is_hadamard(hadamard(n))


@pytest.mark.parametrize("n", [768, 2304, 4096, 5120, 11008, 13824, 14336, 18944, 29568])
def test_factors_of_a_layers_width_are_hadamard_matrices_of_that_order(n: int) -> None:
    # A Kronecker product of Hadamard matrices is one, so n squared numbers need not be made.
    factors = kronecker_factors(n)
    assert torch.tensor([len(f) for f in factors]).prod() == n
    assert all(is_hadamard(f) for f in factors)
    assert all(len(f) <= 64 or len(f) % 8 for f in factors)  # powers of two are cut
    assert largest_order(n) == n


@pytest.mark.parametrize(("n", "order"), [(7, 1), (6, 2), (50, 2), (116, 4), (188, 4), (376, 8), (1500, 500), (232, 8)])
def test_where_no_order_is_known_the_largest_that_divides_it_is_told(n: int, order: int) -> None:
    assert largest_order(n) == order
    with pytest.raises(SchemeError, match=rf"of order {n} is known here.*has {order}"):
        hadamard(n)


def test_factors_belong_to_the_caller() -> None:
    kronecker_factors(12)[0].zero_()
    assert is_hadamard(hadamard(12))
