"""A module whose weight is multiplied from a kernel's layout, beside its codes or in place of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from halfbin.nn.kept import Kept
from halfbin.nn.module import QuantModule
from halfbin.nn.packed_weight import PackedWeight
from halfbin.tensor import QTensor

WEIGHT = ("codes", "scale", "zero_point")


class PackedModule(QuantModule):
    """What a kernel made of the weight is kept until the weight changes: another 0.5 bytes for each code of up to 4 bits, 1 for
    wider ones, and the scales. It is made by the first forward, or by `prepare`.

    After `hold_packed` it is all that there is. `codes`, `scale` and `zero_point` are then made anew at each access, as
    `weight` always is: writing into them changes nothing, assigning to them works. State dicts, copies and pickles hold codes
    as ever; a kernel's layout never leaves the process.
    """

    _alone: PackedWeight | None

    def __init__(self, q: QTensor, dtype: torch.dtype) -> None:
        """Hold `q`, without a copy."""
        super().__init__(q, dtype)
        self._packed = Kept()
        self._alone = None

    @property
    def qtensor(self) -> QTensor:
        """The codes and how to read them, sharing this module's memory unless that is packed."""
        return super().qtensor if self._alone is None else self._alone.unpack(self.scheme)

    @property
    def memory(self) -> Tensor:
        """What holds the codes, packed or not: modules that share a weight share this."""
        return super().memory if self._alone is None else self._alone.memory

    def prepare(self) -> Any:
        """Bring the weight into the kernel's layout now, and not at the first forward. Needed before compiling or exporting."""
        if self._alone is not None:
            return self._alone
        held = self._buffers
        return self._packed.of((held["codes"], held["scale"], held["zero_point"]), self._pack)

    def hold_packed(self) -> None:
        """Let go of the codes and keep what the kernel reads, where there is such a thing and inputs of `dtype` go that way.

        Codes that others hold too stay in memory; then this saves nothing.
        """
        if self._alone is None and self._is_packed() and isinstance(packed := self.prepare(), PackedWeight):
            self._alone = packed
            self._packed.clear()
            for name in WEIGHT:
                del self._buffers[name]  # None in its place would be counted by torch 2.13's export, which then fails

    def _pack(self) -> Any:
        """The weight in the kernel's layout."""
        raise NotImplementedError

    def _is_packed(self) -> bool:
        """Whether inputs of `dtype` are multiplied from the kernel's layout."""
        raise NotImplementedError

    def _prepared(self) -> Any:
        """What `prepare` made; None where a compiler looks on, which sees no memory, and nothing was made before."""
        if self._alone is not None:
            return self._alone
        return self._packed.value if torch.compiler.is_compiling() else self.prepare()

    @contextlib.contextmanager
    def _unpacked(self) -> Iterator[None]:
        """Within the block, codes are held; behind it, they are packed again if they were before and still can be."""
        alone = self._alone is not None
        if alone:
            self._hold(self.qtensor)
        try:
            yield
        finally:
            self._packed.clear()  # the memory goes now, not at the next forward
            if alone:
                self.hold_packed()

    def _hold(self, q: QTensor) -> None:
        self._alone = None
        self._buffers.update(codes=q.codes, scale=q.scale, zero_point=q.zero_point)

    def __getattr__(self, name: str) -> Any:
        if name in WEIGHT and self.__dict__.get("_alone") is not None:
            return getattr(self.qtensor, name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in WEIGHT and self.__dict__.get("_alone") is not None:
            self._hold(self.qtensor)
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self._alone is not None:
            q = self.qtensor
            buffers = {**self._buffers, "codes": q.codes, "scale": q.scale, "zero_point": q.zero_point}
            state.update(_alone=True, _buffers=buffers)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_alone": None})  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if state["_alone"]:
            self.hold_packed()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        with self._unpacked():
            super()._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._alone is not None:
            q = self.qtensor
            held = {"codes": q.codes, "scale": q.scale, "zero_point": q.zero_point}
            destination.update({prefix + name: tensor for name, tensor in held.items() if tensor is not None})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        with self._unpacked():
            super()._load_from_state_dict(state_dict, prefix, *args)
