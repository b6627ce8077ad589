"""See every product of activations with a known weight, whatever module, function or slice of a stack makes it.

A weight is known by its memory: `linear(x, stack[expert])`, `addmm(bias, x, weight)` and `bmm(x, stack)` all hand a view of a
parameter to torch, and the view's offset and strides say which part. What copies a weight first is not seen.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True, slots=True)
class Place:
    """A matrix [out_features, in_features] inside a parameter's memory.

    stride: steps from one row, and from one column, to the next, in elements.
    offset: of its first element.
    """

    parameter: str
    size: tuple[int, int]
    stride: tuple[int, int]
    offset: int

    def view(self, parameter: Tensor) -> Tensor:
        """The matrix, sharing memory with the contiguous `parameter`."""
        return torch.as_strided(parameter.detach(), self.size, self.stride, self.offset)

    def inside(self, other: Place) -> bool:
        """Whether these rows are rows of `other`, all columns in their order."""
        if self.parameter != other.parameter or self.size[1] != other.size[1] or self.stride[1] != other.stride[1]:
            return False
        first, beyond = divmod(self.offset - other.offset, other.stride[0])
        step, odd = divmod(self.stride[0], other.stride[0])
        last = first + step * (self.size[0] - 1)
        return beyond == odd == 0 and first >= 0 and last < other.size[0]


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """x @ weight^T.

    place: the weight.
    x:     float [..., in_features].
    source: the tensor that the model passed; several products of one tensor read the same input.
    """

    place: Place
    x: Tensor
    source: Tensor


_UNWATCHED = threading.local()


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Inside, in this thread, no `Watch` sees a product."""
    before = getattr(_UNWATCHED, "now", False)
    _UNWATCHED.now = True
    try:
        yield
    finally:
        _UNWATCHED.now = before


class Watch(TorchFunctionMode):
    """Inside a `with` block, `on_product` is called before every product with one of the parameters."""

    def __init__(self, parameters: Mapping[str, Tensor], on_product: Callable[[Product], None]) -> None:
        super().__init__()
        self._names = {p.untyped_storage().data_ptr(): name for name, p in parameters.items() if p.ndim >= 2}
        self._on_product = on_product

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch for each of its functions."""
        kwargs = kwargs or {}
        factors = _FACTORS.get(func)
        if factors is not None and not getattr(_UNWATCHED, "now", False):
            for product in self._products(*factors(*args, **kwargs)):
                self._on_product(product)
        return func(*args, **kwargs)

    def _products(self, left: Any, right: Any) -> Iterator[Product]:
        """Of a matrix product left @ right."""
        if not isinstance(left, Tensor) or not isinstance(right, Tensor) or left.ndim < 1 or right.ndim < 2:
            return
        name = self._name(right)
        if name is not None:
            yield from self._with(name, left, right.transpose(-1, -2), left)
        elif left.ndim >= 2 and (name := self._name(left)) is not None:
            yield from self._with(name, right.transpose(-1, -2), left, right)

    def _with(self, name: str, x: Tensor, weight: Tensor, source: Tensor) -> Iterator[Product]:
        """x [..., n, in] with weight [out, in], or with a stack [num, out, in] one by one."""
        if weight.ndim == 2:
            yield Product(_place(name, weight), x, source)
        elif weight.ndim == 3 and x.ndim >= 3 and x.shape[-3] in (1, weight.shape[0]):
            for i in range(weight.shape[0]):
                yield Product(_place(name, weight[i]), x.select(-3, i if x.shape[-3] > 1 else 0), source)

    def _name(self, tensor: Tensor) -> str | None:
        return self._names.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None


def _place(name: str, weight: Tensor) -> Place:
    rows, columns = weight.shape
    return Place(name, (rows, columns), (weight.stride(0), weight.stride(1)), int(weight.storage_offset()))


def _of_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Any, Any]:
    return input, weight.transpose(-1, -2)


def _of_matmul(input: Any, other: Any, **_: Any) -> tuple[Any, Any]:
    return input, other


def _of_mm(input: Any, mat2: Any, **_: Any) -> tuple[Any, Any]:
    return input, mat2


def _of_addmm(input: Any, mat1: Any, mat2: Any, **_: Any) -> tuple[Any, Any]:
    return mat1, mat2


def _of_baddbmm(input: Any, batch1: Any, batch2: Any, **_: Any) -> tuple[Any, Any]:
    return batch1, batch2


def _swapped(other: Any, input: Any, **_: Any) -> tuple[Any, Any]:
    return input, other


_FACTORS: dict[Any, Callable[..., tuple[Any, Any]]] = {
    functional.linear: _of_linear,
    torch.matmul: _of_matmul,
    Tensor.matmul: _of_matmul,
    Tensor.__matmul__: _of_matmul,
    Tensor.__rmatmul__: _swapped,
    torch.mm: _of_mm,
    Tensor.mm: _of_mm,
    torch.bmm: _of_mm,
    Tensor.bmm: _of_mm,
    torch.addmm: _of_addmm,
    Tensor.addmm: _of_addmm,
    torch.baddbmm: _of_baddbmm,
    Tensor.baddbmm: _of_baddbmm,
}
