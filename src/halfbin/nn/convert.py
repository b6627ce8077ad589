"""Swap the weighted layers of any module for quantized ones, in place.

Which class of layer has which quantized form is decided by whose `forward` it runs, not by what it inherits from: a scaled
embedding is an nn.Embedding too, and would lose its scale. What cannot be swapped stays as it is, and the table says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from halfbin.errors import HalfbinError
from halfbin.nn.conv import Geometry, QuantConv
from halfbin.nn.conv1d_transposed import QuantConv1D
from halfbin.nn.embedding import QuantEmbedding
from halfbin.nn.folding import fold
from halfbin.nn.linear import QuantLinear
from halfbin.nn.module import QuantModule
from halfbin.tensor import QTensor, Scheme

Method = Callable[[Tensor, Scheme], QTensor]
Decide = Callable[[str, nn.Module], tuple[Scheme, Method] | None]
OnStep = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Swap:
    """What became of one module with a weight of two dimensions or more.

    name:         its path in the model.
    module_class: the class it had.
    scheme:       what its weight is rounded to; None: it stayed.
    reason:       why it stayed; empty where it was swapped.
    """

    name: str
    module_class: str
    scheme: Scheme | None
    reason: str


@dataclass(frozen=True, slots=True)
class _Form:
    """How a layer becomes quantized: its weight as the matrix [out_features, in_features], and the module that holds it."""

    matrix: Callable[[Tensor], Tensor]
    build: Callable[[Any, QTensor], QuantModule]
    refuses: Callable[[Any], str | None] = lambda module: None


def _linear(old: nn.Linear, q: QTensor) -> QuantModule:
    return QuantLinear(q, old.bias, dtype=old.weight.dtype)


def _conv1d(old: Any, q: QTensor) -> QuantModule:
    return QuantConv1D(q, old.bias, dtype=old.weight.dtype)


def _conv(old: Any, q: QTensor) -> QuantModule:
    return QuantConv(q, Geometry.of(old), old.bias, dtype=old.weight.dtype)


def _embedding(old: nn.Embedding, q: QTensor) -> QuantModule:
    return QuantEmbedding(q, padding_idx=old.padding_idx, dtype=old.weight.dtype)


def _renormalised(old: nn.Embedding) -> str | None:
    return None if old.max_norm is None else f"max_norm={old.max_norm} rewrites the table while it is read"


def _as_it_is(weight: Tensor) -> Tensor:
    return weight  # one function for all that read it so: tied sites are compared by it


_CONV = _Form(matrix=lambda weight: weight.flatten(1), build=_conv)
_FORMS = {
    "torch.nn.modules.linear.Linear": _Form(matrix=_as_it_is, build=_linear),
    "torch.nn.modules.sparse.Embedding": _Form(matrix=_as_it_is, build=_embedding, refuses=_renormalised),
    "torch.nn.modules.conv.Conv1d": _CONV,
    "torch.nn.modules.conv.Conv2d": _CONV,
    "torch.nn.modules.conv.Conv3d": _CONV,
    # By name, so that nothing is imported for it: whoever has such a module has imported it.
    "transformers.pytorch_utils.Conv1D": _Form(matrix=lambda weight: weight.T.contiguous(), build=_conv1d),
}


def quantize_module(model: nn.Module, decide: Decide, *, on_step: OnStep | None = None) -> list[Swap]:
    """Replace layers of `model` by quantized ones.

    Every weight is rounded before the first layer is replaced: after an error the model is what it was. Until then codes and
    float weights are held together.

    A parameter that several modules share is rounded once if all of them are decided alike and read it as the same matrix;
    they then share its codes. Otherwise all of them stay, as one would be untied from the others.

    Args:
      model: any module; changed in place.
      decide: for a module's path and the module, the scheme and the method (weight [out, in], scheme) -> QTensor; None: it
        stays. Asked only about modules that have a quantized form; for one found under several paths, for each.
      on_step: called with (weights rounded, weights in all).

    Returns:
      A row for every module that has a weight of two dimensions or more, in the model's order.

    Raises:
      SchemeError, DataError: from the method, with the module's path.
    """
    sites = [_Site(name, module) for name, module in _weighted(model)]
    for site in sites:
        site.reason = _refusal(site.module, site.name)
        if not site.reason:
            site.decision = decide(site.name, site.module)
            site.reason = "" if site.decision else "not asked for"
    _keep_tied_together(model, sites)
    chosen = [site for site in sites if not site.reason]
    for done, (site, q) in enumerate(_round(chosen)):
        site.q = q
        if on_step:
            on_step(done + 1, len(chosen))
    _replace(model, chosen)
    return [
        Swap(s.name, s.module_class, s.decision[0] if s.decision and not s.reason else None, s.reason) for s in sites
    ]


class _Site:
    """A module with a weight, and what is being made of it."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module, self.module_class = name, module, type(module).__name__
        self.reason = ""
        self.decision: tuple[Scheme, Method] | None = None
        self.q: QTensor | None = None

    @property
    def weight(self) -> nn.Parameter | None:
        return self.module._parameters.get("weight")

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for two sites exactly when their QTensors would be."""
        form = _FORMS.get(forward_owner(self.module))
        return (id(self.weight), self.decision, None if form is None else form.matrix)


def _weighted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that own a matrix, under every path that leads to them."""
    for name, module in model.named_modules(remove_duplicate=False):
        if any(p is not None and p.ndim >= 2 for p in module._parameters.values()) or hasattr(
            module, "parametrizations"
        ):
            yield name, module


def forward_owner(module: nn.Module) -> str:
    """The class whose `forward` runs, by its full name."""
    owner = next(c for c in type(module).__mro__ if "forward" in vars(c))
    return f"{owner.__module__}.{owner.__qualname__}"


def _refusal(module: nn.Module, name: str) -> str:
    """Why a module cannot be swapped; empty when it can."""
    form = _FORMS.get(forward_owner(module))
    if type(module) is NonDynamicallyQuantizableLinear:
        return "its parent reads its weight past its forward"
    if form is None:
        return f"{type(module).__name__} has no quantized form"
    before = [hook for hook in module._forward_pre_hooks.values() if hook is not fold]
    if "forward" in vars(module) or module._forward_hooks or before:
        return "it has forward hooks, which would be lost"
    if not name:
        return "it is the model itself, which cannot be replaced in place"
    return _unreadable(module._parameters.get("weight")) or form.refuses(module) or ""


def _unreadable(weight: nn.Parameter | None) -> str | None:
    if weight is None:
        return "its weight is computed, not stored"
    if weight.is_meta:
        return "its weight is on the meta device, which holds no numbers"
    return None if weight.is_floating_point() else f"its weight is {weight.dtype}, not float"


def _keep_tied_together(model: nn.Module, sites: list[_Site]) -> None:
    """Let a site stay whose parameter or module someone else holds who does not swap to the same QTensor.

    Repeated until nothing changes: a module that stays for its one parameter may hold back another that shares it.
    """
    users: dict[int, list[tuple[str, _Site | None]]] = {}
    by_path = {site.name: site for site in sites}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                site = by_path.get(path) if name == "weight" else None
                users.setdefault(id(parameter), []).append((f"{path}.{name}".lstrip("."), site))
    changed = True
    while changed:
        changed = False
        for site in sites:
            if site.reason:
                continue
            for path, other in users[id(site.weight)]:
                if other is None or other.reason or other.key != site.key:
                    site.reason = f"its weight is shared with {path}, which would not become the same"
                    changed = True
                    break


def _round(sites: list[_Site]) -> Iterator[tuple[_Site, QTensor]]:
    rounded: dict[tuple[Any, ...], QTensor] = {}
    for site in sites:
        assert site.decision is not None and site.weight is not None
        if site.key not in rounded:
            scheme, method = site.decision
            matrix = _FORMS[forward_owner(site.module)].matrix(site.weight.detach())
            try:
                rounded[site.key] = method(matrix, scheme)
            except HalfbinError as error:
                error.add_note(f"while quantizing {site.name!r}, weight {list(site.weight.shape)} {site.weight.dtype}")
                raise
        yield site, rounded[site.key]


def _replace(model: nn.Module, sites: list[_Site]) -> None:
    built: dict[int, QuantModule] = {}
    for site in sites:
        assert site.q is not None
        old = site.module
        if id(old) not in built:
            new = _FORMS[forward_owner(old)].build(old, site.q)
            built[id(old)] = new.train(old.training)
        parent, _, attribute = site.name.rpartition(".")
        model.get_submodule(parent)._modules[attribute] = built[id(old)]
