"""X^T X of a sample of activations, compiled: the upper half alone, and added to float64 sums as it is made.

Within a sample an element is summed in float32, as `csrc/moments/syrk.h` says: its bits depend on the sample alone, not on
threads or the instruction set. Where there are no vector instructions that we know, torch's product is faster.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from halfbin.kernels import instruction_sets
from halfbin.kernels._native import add_to_strips
from halfbin.kernels._native import upper_product as compiled_upper_product


def refuses(x: Tensor) -> str | None:
    """Why the compiled loops are not for `x`, in words; None: they are."""
    if x.device.type != "cpu":
        return f"the loops are a CPU's, and the sample is on {x.device}"
    if instruction_sets.best() == instruction_sets.PORTABLE:
        return "this processor has no vector instructions that the loops were written for"
    return None


def add_products(x: Tensor, strips: Sequence[Tensor], *, instruction_set: str | None = None) -> None:
    """Add x^T x to its rows, from their diagonal to the right; what comes to lie below the diagonal means nothing.

    Args:
      x: float32 [num_tokens, n].
      strips: float64 [height, n - rows of the strips before], all rows together.
      instruction_set: names a compiled form; by default the best one.
    """
    if x.numel():
        add_to_strips(instruction_set or instruction_sets.best(), x.contiguous(), strips, torch.get_num_threads())


def upper_product(x: Tensor, *, instruction_set: str | None = None) -> Tensor:
    """x^T x of float32 [num_tokens, n] on and above the diagonal, float32 [n, n]; 0 below it."""
    product = torch.zeros(x.shape[1], x.shape[1])
    if x.numel():
        name = instruction_set or instruction_sets.best()
        compiled_upper_product(name, x.contiguous(), product, torch.get_num_threads())
    return product.triu_()
