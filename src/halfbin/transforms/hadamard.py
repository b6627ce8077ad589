"""Hadamard matrices: all entries 1 or -1, all rows orthogonal, H H^T = n I.

Divided by sqrt(n) it is orthogonal, and spreads a vector's single large entry over all n equally: none can spread more.

A Hadamard matrix of order a times b is the Kronecker product of two of order a and b. Orders here are products of powers of two
(Sylvester), of orders from finite fields (`paley.py`) and from circulants (`williamson.py`): 4096 = 2^12, 5120 = 20 x 256,
11008 = 172 x 64, 14336 = 28 x 512. Orders above 2 are multiples of 4; the smallest one that is missing here is 116.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from halfbin.errors import SchemeError
from halfbin.transforms import williamson
from halfbin.transforms.paley import is_paley_order, paley

LARGEST_BASE = 1024  # of a matrix that is no Kronecker product


def hadamard(n: int) -> Tensor:
    """A Hadamard matrix, float64 [n, n] of 1 and -1.

    Raises:
      SchemeError: none of this order is known here.
    """
    return functools.reduce(torch.kron, kronecker_factors(n), torch.ones(1, 1, dtype=torch.float64))


def kronecker_factors(n: int, *, largest: int = 64) -> tuple[Tensor, ...]:
    """Hadamard matrices whose Kronecker product, in their order, has order n: float64, none for n = 1.

    Args:
      n: the order.
      largest: powers of two are cut into factors of at most this order, so that applying them one by one is cheap.

    Raises:
      SchemeError: none of this order is known here.
    """
    orders = _orders(n)
    if orders is None:
        raise SchemeError(
            f"no Hadamard matrix of order {n} is known here; the largest whose order divides it has {largest_order(n)}"
        )
    factors = []
    for order in orders:
        rest = order
        while rest & (rest - 1) == 0 and rest > largest:
            factors.append(_base(largest).clone())
            rest //= largest
        factors.append(_base(rest).clone())
    return tuple(factors)


@functools.cache
def largest_order(n: int) -> int:
    """The largest divisor of n that is an order of a Hadamard matrix known here; n itself for all that `hadamard` makes."""
    return next(d for d in reversed(_divisors(n)) if _orders(d) is not None)


@functools.cache
def _orders(n: int) -> tuple[int, ...] | None:
    """Orders of the factors, a power of two first, with the smallest last ones; None where nothing fits."""
    if n & (n - 1) == 0:
        return (n,) if n > 1 else ()
    if n % 4:
        return None
    bases = [d for d in _divisors(n) if d <= LARGEST_BASE and _is_base(d)]
    for base in bases:
        power = n // base
        if power & (power - 1) == 0:
            return (power, base) if power > 1 else (base,)
    for base in bases:
        rest = _orders(n // base) if n > base else None
        if rest is not None:
            return (*rest, base)
    return None


def _is_base(order: int) -> bool:
    return order & (order - 1) != 0 and (is_paley_order(order) or order in williamson.ORDERS)


@functools.lru_cache(maxsize=32)
def _base(order: int) -> Tensor:
    if order & (order - 1) == 0:
        h = torch.ones(1, 1, dtype=torch.float64)
        for _ in range(order.bit_length() - 1):
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
        return h
    return paley(order) if is_paley_order(order) else williamson.williamson(order)


def _divisors(n: int) -> list[int]:
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return low + [n // d for d in reversed(low) if d * d != n]
