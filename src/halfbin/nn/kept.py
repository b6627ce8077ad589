"""What was made of some tensors, kept until they change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class Kept:
    """Holds one value. Copies of it, and what is pickled, hold none: a layer's copy makes its own."""

    __slots__ = ("_seen", "value")

    def __init__(self) -> None:
        self.value: Any = None
        self._seen: list[object] = []

    def of(self, tensors: tuple[Tensor | None, ...], make: Callable[[], Any]) -> Any:
        """The value that `make` gave for these tensors: made anew when one is another tensor or was written to since."""
        # A list is made in half the time of a generator's tuple, and this is asked before every product.
        seen: list[object] = [None if t is None else (id(t), t.data_ptr(), _version(t)) for t in tensors]
        if self.value is None or seen != self._seen:
            self.value = None  # its memory is free before the next one is made
            self.value, self._seen = make(), seen
        return self.value

    def clear(self) -> None:
        """Let go of it."""
        self.value, self._seen = None, []

    def __deepcopy__(self, memo: object) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # torch counts no writes to inference tensors
