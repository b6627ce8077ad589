"""Products of tokens with the experts that a router chose for them: one call for all experts of a layer.

    y[t, i] = x_hat[t] @ w_hat[chosen[t, i]].T + bias[chosen[t, i]]

with the bits of `products.linear` for each expert alone. A token is rounded once, whoever chose it, and threads share out the
panels of all experts that anybody chose; `csrc/matmul/experts.h` says how. What the outputs of a token's experts count for, and
their sum, stay in torch: an activation and sometimes a norm come before, and the sum's order is the model's own.

Experts are packed one behind the other (`stack`), each as `products.pack` lays it out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfbin.errors import DataError
from halfbin.kernels import _native, products

GRID = products.InputGrid()  # a scale for each token and group of columns


def linear(x: Tensor, packed: Tensor, chosen: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """The products of each token with its experts: x.dtype [tokens, slots, out_features].

    A token that holds NaN or infinity gets NaN for all its outputs.

    Args:
      x: float32 or bfloat16 [tokens, in_features]; how wide the packed weights are is the caller's to know.
      packed: uint8 [experts, bytes], contiguous: weights of one shape and scheme.
      chosen: integers [tokens, slots], from 0 to experts - 1; a token may choose one more than once.
      bias: float32 or bfloat16 [experts, out_features].
      out_features: rows of each weight.

    Raises:
      DataError: `chosen` is not shaped so, or names an expert that there is not.
    """
    call = _multiply if products.is_plain(x) else _operator
    return call(x, packed, chosen, bias, out_features)


def stack(num_experts: int, num_bytes: int) -> Tensor:
    """Memory for so many packed weights, uint8 [experts, bytes]: `out=lambda n: stack[i]` lets `products.pack` fill one."""
    return torch.empty(num_experts, num_bytes, dtype=torch.uint8)


def require_known(x: Tensor, chosen: Tensor, num_experts: int) -> None:
    """What `linear` checks of a routing.

    Raises:
      DataError: `chosen` is not [tokens, slots], or names an expert that there is not.
    """
    _require_shape(x, chosen)
    outside = ((chosen < 0) | (chosen >= num_experts)).flatten().nonzero()
    if len(outside):
        raise _unknown(chosen, int(outside[0]), num_experts)


def _require_shape(x: Tensor, chosen: Tensor) -> None:
    if chosen.ndim != 2 or len(chosen) != len(x) or chosen.is_floating_point():
        raise DataError(
            f"chosen experts are {chosen.dtype} {list(chosen.shape)}, expected integers [{len(x)}, slots]: a row for each of "
            f"the tokens {list(x.shape)}"
        )


def _unknown(chosen: Tensor, place: int, num_experts: int) -> DataError:
    token, slot = divmod(place, chosen.shape[1])
    return DataError(
        f"token {token} chose expert {int(chosen[token, slot])} (slot {slot}), and there are 0 to {num_experts - 1}; "
        "look at the router before this layer"
    )


def _multiply(x: Tensor, packed: Tensor, chosen: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    _require_shape(x, chosen)
    x, chosen = x.contiguous(), chosen.to(torch.int64).contiguous()
    num_experts, num_bytes = packed.shape
    tokens, slots = chosen.shape
    y = x.new_empty(tokens, slots, out_features)
    found = _native.matmul_experts(
        packed.data_ptr(),
        num_experts,
        num_bytes,
        x.data_ptr(),
        x.dtype is torch.bfloat16,
        tokens,
        chosen.data_ptr(),
        slots,
        GRID.symmetric,
        GRID.by_group,
        GRID.qmin,
        GRID.qmax,
        0 if bias is None else bias.data_ptr(),
        bias is not None and bias.dtype is torch.bfloat16,
        y.data_ptr(),
        products.forced_set(),
        products.num_threads(),
    )
    if found < -1:
        raise _unknown(chosen, -2 - found, num_experts)
    return y


_torch_library: Any = torch.library  # it has no types
_library = _torch_library.Library("halfbin", "FRAGMENT")
_library.define("experts_linear(Tensor x, Tensor packed, Tensor chosen, Tensor? bias, int out_features) -> Tensor")
_library.impl("experts_linear", _multiply, "CPU")


def _shape(x: Tensor, packed: Tensor, chosen: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    return x.new_empty((*chosen.shape, out_features))


_torch_library.register_fake("halfbin::experts_linear", _shape, lib=_library)
_operator = torch.ops.halfbin.experts_linear.default
