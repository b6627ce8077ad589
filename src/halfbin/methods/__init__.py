"""How codes are chosen for one weight: pure functions (weight, scheme) -> QTensor, one file each."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from halfbin.methods.autoround import AutoRounded, autoround
from halfbin.methods.clip import after_correction, clipped
from halfbin.methods.correction import corrected
from halfbin.methods.factor import Factor, factorise
from halfbin.methods.gptq import gptq
from halfbin.methods.hqq import hqq
from halfbin.methods.rtn import rtn
from halfbin.tensor.qtensor import QTensor
from halfbin.tensor.scheme import Scheme

METHODS: dict[str, Callable[[Tensor, Scheme], QTensor]] = {"rtn": rtn, "hqq": hqq}
CALIBRATED = ("gptq", "autoround", "gptq+autoround")  # these ask for statistics of inputs, or the inputs themselves
TILEWISE = frozenset(METHODS)  # these look at no other tile, so rows of whole tiles may come one after the other

__all__ = [
    "CALIBRATED",
    "METHODS",
    "TILEWISE",
    "AutoRounded",
    "Factor",
    "after_correction",
    "autoround",
    "clipped",
    "corrected",
    "factorise",
    "gptq",
    "hqq",
    "rtn",
]
