"""Hadamard matrices from the squares of a finite field.

In a field of q elements, q odd, half of those that are not 0 are squares. With chi(x) = 1 for squares, -1 for the others and
chi(0) = 0, the matrix Q[a, b] = chi(a - b) satisfies Q Q^T = q I - J, and a border of ones makes a conference matrix C of order
q + 1 of it: C C^T = q I. Then

    I    q = 3 mod 4:  I + C                                          has order q + 1
    II   q = 1 mod 4:  C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]]   has order 2 (q + 1)

Source: Paley 1933, "On Orthogonal Matrices", https://doi.org/10.1002/sapm1933121311, lemmas 2 and 4.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def is_paley_order(order: int) -> bool:
    """Whether one of the two constructions has this order."""
    return _field_size(order) is not None


def paley(order: int) -> Tensor:
    """A Hadamard matrix, float64 [order, order] of 1 and -1; `is_paley_order(order)` must hold."""
    q = _field_size(order)
    assert q is not None, order
    conference = _conference(q)
    eye = torch.eye(q + 1, dtype=torch.float64)
    if q + 1 == order:
        return eye + conference
    across = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    down = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(conference, across) + torch.kron(eye, down)


def prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) where q = p^k for a prime p; None where there are none."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q, k = q // p, k + 1
    return (p, k) if q == 1 else None


def _field_size(order: int) -> int | None:
    if order % 4:
        return None
    if prime_power(order - 1):  # 3 modulo 4, as the order is a multiple of 4
        return order - 1
    half = order // 2 - 1
    return half if half % 4 == 1 and prime_power(half) else None


def _conference(q: int) -> Tensor:
    """C, float64 [q + 1, q + 1]: skew for q = 3 mod 4, symmetric for q = 1 mod 4."""
    p, k = prime_power(q) or (q, 1)
    places = torch.tensor([p**i for i in range(k)])
    digits = torch.arange(q)[:, None] // places % p
    difference = ((digits[:, None] - digits) % p * places).sum(-1)
    c = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    c[1:, 1:] = _squares(p, k)[difference]
    c[0, 1:] = 1.0
    c[1:, 0] = 1.0 if q % 4 == 1 else -1.0
    return c


def _squares(p: int, k: int) -> Tensor:
    """chi of every element of the field of p^k, float64 [p^k]; element i has the digits of i to the base p as coefficients.

    The element x is multiplied by itself, modulo polynomials x^k = c_0 + ... + c_(k-1) x^(k-1), until one is found under which
    its powers pass through all elements but 0: x generates the field, and every second power is a square.
    """
    for reduction in itertools.product(range(p), repeat=k):
        powers = _powers_of_x(p, reduction)
        if len(powers) == p**k - 1 and 0 not in powers:
            chi = torch.zeros(p**k, dtype=torch.float64)
            chi[powers[::2]], chi[powers[1::2]] = 1.0, -1.0
            return chi
    raise AssertionError(f"the field of {p}^{k} has a generator")


def _powers_of_x(p: int, reduction: tuple[int, ...]) -> list[int]:
    """1, x, x^2, ... as numbers until 1 comes again, or anything that came before."""
    k = len(reduction)
    element, seen, powers = (1, *(0 for _ in range(k - 1))), set(), []
    while element not in seen:
        seen.add(element)
        powers.append(sum(c * p**i for i, c in enumerate(element)))
        top = element[-1]
        element = tuple((low + top * c) % p for low, c in zip((0, *element[:-1]), reduction, strict=True))
    return powers
