"""RMS norm, each number read and written once.

`csrc/norms/norms.h` has the order of operations; every instruction set and number of threads gives the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbin.kernels import instruction_sets
from halfbin.kernels._native import rms_norm as compiled_rms_norm

TYPES = (torch.float32, torch.bfloat16)


def refuses(x: Tensor, weight: Tensor) -> str | None:
    """Why the compiled loop is not for [..., n] and a weight, in words; None: it is."""
    if x.device.type != "cpu" or weight.device.type != "cpu":
        return f"the loop is a CPU's, and the tensors are on {x.device} and {weight.device}"
    if x.dtype not in TYPES or weight.dtype is not x.dtype:
        return f"x is {x.dtype} and the weight {weight.dtype}, not both float32 or both bfloat16"
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        return f"a weight {list(weight.shape)} does not fit x {list(x.shape)}"
    return None


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, one_plus: bool = False, instruction_set: str | None = None
) -> Tensor:
    """x / sqrt(mean(x ** 2) + eps), times the weight (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4).

    Args:
      x: [..., n], with a weight that `refuses` finds no fault with.
      weight: [n] of the same type.
      eps: added to the mean of squares.
      one_plus: multiply by 1 + weight before the one rounding, as Gemma does; else round, then multiply, as Llama does.
      instruction_set: names a compiled form; by default the best one.

    Returns:
      [..., n] of the type of x.

    Raises:
      ValueError: what `refuses` says.
    """
    if reason := refuses(x, weight):
        raise ValueError(reason)
    x, weight, n = x.contiguous(), weight.contiguous(), x.shape[-1]
    y = torch.empty_like(x)
    if x.numel():
        compiled_rms_norm(
            instruction_set or instruction_sets.best(),
            x.data_ptr(),
            weight.data_ptr(),
            y.data_ptr(),
            x.numel() // n,
            n,
            eps,
            one_plus,
            x.dtype is torch.bfloat16,
            torch.get_num_threads(),
        )
    return y
