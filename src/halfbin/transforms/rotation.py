"""An orthogonal matrix that is applied without being built: signs, then blocks that are Kronecker products of small matrices.

    Q = diag(signs) blockdiag(K, ..., K),   K = F_1 (x) ... (x) F_m

A row x of n numbers costs n times the sum of the factors' orders: for n = 4096 = 64 x 64 a 32nd of a product with Q, which
would hold 128 MiB. The signs come first: a constant row would otherwise be gathered into a single number instead of spread.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbin.errors import SchemeError
from halfbin.transforms.hadamard import kronecker_factors, largest_order

_CHUNK = 1 << 18  # numbers that are rotated at once: 2 MiB in float64, twice as fast as 32 MiB


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """Q, orthogonal, [size, size].

    signs:   float64 [size], each 1 or -1.
    factors: orthogonal float64 [f_i, f_i]; the product of their orders divides size; none for Q = diag(signs).
    """

    signs: Tensor
    factors: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        if self.size % self.block_size:
            raise SchemeError(f"blocks of {self.block_size} do not fill a rotation of {self.size}")

    @property
    def size(self) -> int:
        """Numbers that are rotated together."""
        return len(self.signs)

    @property
    def block_size(self) -> int:
        """Of the blocks on Q's diagonal, which do not mix with each other."""
        return math.prod(len(f) for f in self.factors)

    def __call__(self, x: Tensor) -> Tensor:
        """x Q, computed in float64 and rounded once to x's type.

        Args:
          x: float [..., size].

        Raises:
          SchemeError: another last dimension.
        """
        if x.ndim == 0 or x.shape[-1] != self.size:
            raise SchemeError(f"a rotation of {self.size} cannot turn a tensor of shape {list(x.shape)}")
        rows = x.reshape(-1, self.size)
        turned = torch.empty_like(rows)
        step = max(_CHUNK // max(self.size, 1), 1)
        for start in range(0, len(rows), step):
            turned[start : start + step] = self._turn(rows[start : start + step].to(torch.float64))
        return turned.reshape(x.shape)

    def _turn(self, rows: Tensor) -> Tensor:
        rows = rows * self.signs.to(rows.device)
        after = 1
        for factor in reversed(self.factors):
            parts = rows.reshape(-1, len(factor), after)
            f = factor.to(rows.device)
            rows = parts.squeeze(-1) @ f if after == 1 else f.T @ parts
            after *= len(factor)
        return rows.reshape(-1, self.size)

    def matrix(self) -> Tensor:
        """Q itself, float64 [size, size]."""
        rows_first = (
            f.contiguous() for f in self.factors
        )  # torch.kron of others keeps their order, and then fails on it
        block = functools.reduce(torch.kron, rows_first, torch.ones(1, 1, dtype=torch.float64))
        return self.signs[:, None] * torch.kron(torch.eye(self.size // self.block_size, dtype=torch.float64), block)


def random_hadamard(n: int, generator: torch.Generator | None = None) -> Rotation:
    """A Hadamard matrix with random signs, divided by its root; blocks of the largest order that is known where n is none.

    Which blocks those are is the result's `block_size`: 1 for odd n, where only signs change.

    Args:
      n: numbers to rotate together.
      generator: of the signs; torch's own when absent.

    Source: Ashkboos et al. 2024, https://arxiv.org/abs/2404.00456, section 3; blocks are ours.
    """
    signs = torch.randint(0, 2, (n,), generator=generator).to(torch.float64) * 2 - 1
    return Rotation(signs, tuple(f / math.sqrt(len(f)) for f in kronecker_factors(largest_order(n))))


@dataclass(frozen=True, slots=True, eq=False)
class Composed:
    """Rotations one after the other, orthogonal as each of them is.

    parts: of one size; x goes through the first one first.
    """

    parts: tuple[Rotation, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """x Q, computed in float64 and rounded once to x's type; x is float [..., size]."""
        wide = x.to(torch.float64)
        for part in self.parts:
            wide = part(wide)
        return wide.to(x.dtype)


def mean_keeping_hadamard(n: int, generator: torch.Generator | None = None) -> Composed:
    """Q = H D H^T with random signs D that leaves rows of equal numbers as they are: Q 1 = 1.

    So it commutes with taking the mean away, and a LayerNorm needs no centring: centre(x Q) = centre(x) Q. H's first column
    is all ones, and D's first sign in each block is 1. The entries of a block are sums of b random signs over b: of the order
    of 1 / sqrt(b), where `random_hadamard` has exactly that, so that a single large number is spread a little less evenly.

    Args:
      n: numbers to rotate together; in blocks where n is no order of a Hadamard matrix, as `random_hadamard`.
      generator: of the signs; torch's own when absent.
    """
    signs = torch.randint(0, 2, (n,), generator=generator).to(torch.float64) * 2 - 1
    block = largest_order(n)
    signs[::block] = 1
    factors = tuple(f * f[:, :1] / math.sqrt(len(f)) for f in kronecker_factors(block))
    there = Rotation(torch.ones(n, dtype=torch.float64), factors)
    return Composed((there, Rotation(signs, tuple(f.T for f in factors))))
