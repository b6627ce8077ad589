"""What every quantized module shares: a `QTensor` held as buffers that no cast can corrupt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from halfbin.errors import SchemeError
from halfbin.tensor import QTensor, Scheme, dequantize


class QuantModule(nn.Module):
    """A module whose weight is a `QTensor`.

    Buffers, and so entries of its state_dict: `codes`, `scale`, and `zero_point` when asymmetric, with the types that the
    scheme fixes. `module.to(bfloat16)` casts every floating buffer of an ordinary module; scales keep their type here, since
    codes were chosen with exactly these. What such a cast changes is `dtype`, the type the weight is read as.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    _cast: Tensor
    uncast: ClassVar[tuple[str, ...]] = ("scale",)  # floating buffers whose type the scheme fixes

    def __init__(self, q: QTensor, dtype: torch.dtype) -> None:
        """Hold `q`, without a copy; its weight is read as `dtype` until the module is cast."""
        super().__init__()
        self.scheme: Scheme = q.scheme
        self.codes_shape = q.shape
        self.register_buffer("codes", q.codes)
        self.register_buffer("scale", q.scale)
        self.register_buffer("zero_point", q.zero_point)
        self.register_buffer("_cast", torch.empty(0, dtype=dtype, device=q.codes.device), persistent=False)

    @property
    def qtensor(self) -> QTensor:
        """The codes and how to read them, sharing this module's memory."""
        return QTensor(self.codes, self.scale, self.zero_point, self.scheme)

    @property
    def memory(self) -> Tensor:
        """What holds the codes: modules that share a weight share this."""
        return self.codes

    @property
    def multiplied(self) -> tuple[str, Mapping[str, str]]:
        """What multiplies by the weight, and why faster kernels do not, by their names."""
        return "reference", {}

    @property
    def dtype(self) -> torch.dtype:
        """The type that the weight is read as: that of the weight it replaced, then of the last cast."""
        return self._cast.dtype

    @property
    def weight(self) -> Tensor:
        """The reconstruction, in the replaced module's shape: made anew at each access, for code that looks at weights."""
        return dequantize(self.qtensor, self.dtype)

    def extra_repr(self) -> str:
        """The weight's shape and scheme."""
        return f"{list(self.codes_shape)}, {self.scheme}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantModule:
        # A cast leaves integers alone, so scales go through as bytes; a move to another device moves them all the same.
        held = {name: scale for name in self.uncast if (scale := self._buffers.get(name)) is not None}
        self._buffers.update(dict.fromkeys(held))
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
            moved = {name: fn(scale.view(torch.uint8)).view(scale.dtype) for name, scale in held.items()}
        except BaseException:
            self._buffers.update(held)
            raise
        self._buffers.update(moved)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Copying into a buffer casts without a word: codes of another scheme would be read as this one's.
        for name in ("codes", "zero_point", *self.uncast):
            held, given = self._buffers[name], state_dict.get(prefix + name)
            if held is not None and isinstance(given, Tensor) and given.dtype != held.dtype:
                raise SchemeError(
                    f"{prefix}{name} is {given.dtype}, but {self.scheme} holds it as {held.dtype}: the state was saved from "
                    "a model with another scheme; quantize this one with the same recipe before loading it"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)
