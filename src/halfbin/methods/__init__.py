"""How codes are chosen for one weight: pure functions (weight, scheme) -> QTensor, one file each."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from halfbin.methods.clip import after_correction, clipped
from halfbin.methods.gptq import Factor, factorise, gptq
from halfbin.methods.hqq import hqq
from halfbin.methods.rtn import rtn
from halfbin.tensor.qtensor import QTensor
from halfbin.tensor.scheme import Scheme

METHODS: dict[str, Callable[[Tensor, Scheme], QTensor]] = {"rtn": rtn, "hqq": hqq}
CALIBRATED = ("gptq",)  # these ask for statistics of the layer's inputs
TILEWISE = frozenset(METHODS)  # these look at no other tile, so rows of whole tiles may come one after the other

__all__ = [
    "CALIBRATED",
    "METHODS",
    "TILEWISE",
    "Factor",
    "after_correction",
    "clipped",
    "factorise",
    "gptq",
    "hqq",
    "rtn",
]
