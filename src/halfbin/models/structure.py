"""What the tree of modules tells about roles: which matrices are experts, what routes to them, which linear is the head.

No name and no architecture is asked for. Experts and their router vouch for each other: a stack [experts, a, b], or a list of
as many alike feed-forward modules, is one of experts where a matrix [experts, a or b] stands beside it; a stack of three
dimensions alone may be a class token [1, 1, hidden] or a table of positions. A class that transformers itself declares to be
one of experts (`use_experts_implementation`) needs no such witness, and its router may score a few more than are stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D


class Structure:
    """Facts about a whole model; needs no numbers, so the model may be on the meta device.

    head:    the module that gives the logits, None where there is none.
    experts: full names of the parameters that hold one matrix for each expert.
    routers: full names of the matrices that choose among experts.
    """

    def __init__(self, model: nn.Module) -> None:
        """Look through `model` once."""
        self.head = _called(model, "get_output_embeddings") or _classifier(model)
        self.experts: set[str] = set()
        self.routers: set[str] = set()
        self._tied = _tied(model, self.head)
        for path, block in model.named_modules():
            self._find_experts(f"{path}." if path else "", block)
        self._routing = {id(p) for name, p in model.named_parameters() if name in self.routers}

    def role(self, module: nn.Module) -> str:
        """The role of a linear, an embedding or a convolution."""
        if isinstance(module, nn.Embedding):
            return "embedding"
        if isinstance(module, _ConvNd):
            return "convolution"
        if module is self.head:
            return "head"
        return "router" if id(getattr(module, "weight", None)) in self._routing else "linear"

    def ties(self, module: nn.Module) -> bool:
        """Whether an embedding and the output head share this module's weight."""
        return self._tied is not None and getattr(module, "weight", None) is self._tied

    def _find_experts(self, prefix: str, block: nn.Module) -> None:
        for name, child in block.named_children():
            for path, group in _groups(child):
                routers = list(_routers(block, name, group))
                if routers or group.declared:
                    self.experts.update(".".join(filter(None, (prefix + name, path, p))) for p in group.stacks)
                    self.routers.update(prefix + router for router in routers)
                    self.routers.update(prefix + gate for gate in _shared_gates(block, group))


@dataclass(frozen=True, slots=True)
class _Group:
    """What may be experts. widths: sizes of what goes in and out of them.  stacks: own parameters [num, a, b]."""

    num: int
    widths: frozenset[int]
    stacks: tuple[str, ...] = ()
    declared: bool = False  # by transformers


def _groups(module: nn.Module) -> Iterator[tuple[str, _Group]]:
    """What may be experts in a module, or, as stacks, right inside it; each with its path from there."""
    if found := _stacked(module) or _listed(module):
        yield "", found
    for name, child in module.named_children():
        if found := _stacked(child):
            yield name, found


def _stacked(module: nn.Module) -> _Group | None:
    """Parameters with a matrix for each expert."""
    stacks = {name: p.shape for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
    sizes = {shape[0] for shape in stacks.values()}
    declared = bool(stacks) and hasattr(module, "has_gate") and hasattr(module, "is_transposed")
    if not stacks or isinstance(module, _ConvNd) or (max(sizes) < 2 and not declared):
        return None
    widths = frozenset(n for shape in stacks.values() for n in shape[1:])
    return _Group(max(sizes), widths, tuple(stacks), declared)


def _listed(module: nn.Module) -> _Group | None:
    """A list of alike feed-forward modules: linears only, which tells them from a model's layers with their norms."""
    if not isinstance(module, nn.ModuleList | nn.ModuleDict) or len(module) < 2:
        return None
    members = list(module.children())
    linears = [m for m in members[0].modules() if isinstance(m, nn.Linear | Conv1D)]
    of_linears = {id(p) for linear in linears for p in linear.parameters(recurse=False)}
    alike = len({type(member) for member in members}) == 1
    if not alike or len(linears) < 2 or any(id(p) not in of_linears for p in members[0].parameters()):
        return None
    return _Group(len(members), frozenset(n for linear in linears for n in linear.weight.shape))


def _routers(block: nn.Module, beside: str, group: _Group) -> Iterator[str]:
    """Names in `block` of matrices [experts, width]: the only matrix of a module beside the experts, or the block's own."""
    for name, parameter in block.named_parameters(recurse=False):
        if _scores(parameter, group):
            yield name
    for name, child in block.named_children():
        if name != beside:
            matrices = [(n, p) for n, p in child.named_parameters() if p.ndim > 1 and min(p.shape) > 1]
            if len(matrices) == 1 and matrices[0][0].count(".") < 2 and _scores(matrices[0][1], group):
                yield f"{name}.{matrices[0][0]}"


def _scores(parameter: nn.Parameter, group: _Group) -> bool:
    if parameter.ndim != 2 or parameter.shape[1] not in group.widths:
        return False
    rows = parameter.shape[0]
    return rows == group.num or (group.declared and group.num < rows < 2 * group.num)  # shared or empty experts besides


def _shared_gates(block: nn.Module, group: _Group) -> Iterator[str]:
    """Linears [1, width] beside the experts: how much the shared expert counts, token by token."""
    for name, child in block.named_children():
        if isinstance(child, nn.Linear) and child.out_features == 1 and child.in_features in group.widths:
            yield f"{name}.weight"


def _classifier(model: nn.Module) -> nn.Module | None:
    """The last linear that stands outside the base model and gives as many outputs as the configuration has labels."""
    base, labels = getattr(model, "base_model", model), getattr(getattr(model, "config", None), "num_labels", None)
    if base is model or not isinstance(base, nn.Module):
        return None
    inside = set(base.modules())
    outside = [m for m in model.modules() if isinstance(m, nn.Linear) and m not in inside and m.out_features == labels]
    return outside[-1] if outside else None


def _tied(model: nn.Module, head: nn.Module | None) -> nn.Parameter | None:
    """The head's weight where an embedding shares it."""
    weight = getattr(head, "weight", None)
    shared = any(isinstance(m, nn.Embedding) and m.weight is weight for m in model.modules())
    return weight if isinstance(weight, nn.Parameter) and shared else None


def _called(model: nn.Module, method: str) -> nn.Module | None:
    """What `model.method()` gives, None where the model has no such thing."""
    try:
        found = getattr(model, method)()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None
