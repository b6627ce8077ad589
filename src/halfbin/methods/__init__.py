"""How codes are chosen for one weight: pure functions (weight, scheme) -> QTensor, one file each."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from halfbin.methods.autoround import AutoRounded, autoround
from halfbin.methods.gptq import Factor, factorise, gptq
from halfbin.methods.hqq import hqq
from halfbin.methods.rtn import rtn
from halfbin.tensor.qtensor import QTensor
from halfbin.tensor.scheme import Scheme

METHODS: dict[str, Callable[[Tensor, Scheme], QTensor]] = {"rtn": rtn, "hqq": hqq}
TILEWISE = frozenset(
    {"rtn", "hqq"}
)  # these look at no other tile, so rows of whole tiles may be given one after the other

__all__ = ["METHODS", "TILEWISE", "AutoRounded", "Factor", "autoround", "factorise", "gptq", "hqq", "rtn"]
