"""Sites: the checkpoint tensors that meet activations in a product, found from the model's structure alone.

A site is named as on disk. What it is comes from the module that its tensor is loaded into:

    linear       nn.Linear, or transformers' Conv1D (stored transposed, [in, out])
    expert       a weight that is merged into, or already is, a parameter with one matrix per expert
    router       a linear whose outputs are as many as the experts that stand beside it
    head         the linear that gives the logits; tied when the embedding's tensor serves for it
    embedding    nn.Embedding
    convolution  nn.Conv1d, nn.Conv2d, nn.Conv3d and their transposed forms

Everything else (norms, biases, position tables, state-space parameters) is no site and is copied as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from halfbin.models.skeleton import Skeleton, Target, targets


class StoredTensor(Protocol):
    """What is known of a tensor from a checkpoint's header."""

    @property
    def dtype(self) -> torch.dtype:
        """Its type on disk."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape on disk."""
        ...


class Weights(Protocol):
    """A checkpoint, as far as sites need it."""

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name on disk."""
        ...

    def info(self, name: str) -> StoredTensor:
        """The header's entry for one tensor."""
        ...


@dataclass(frozen=True, slots=True)
class Site:
    """A place where a weight meets an activation."""

    name: str  # the tensor's name on disk without ".weight"
    tensor: str  # the tensor's name on disk
    shape: tuple[int, ...]  # as stored
    dtype: torch.dtype
    role: str  # "linear", "expert", "router", "head", "embedding" or "convolution"
    module_class: str  # "Linear", "Conv1D", "Embedding", "Conv2d"; "" when the tensor has no module of its own
    transposed: bool = False  # stored [in_features, out_features]
    tied: bool = False  # the output head shares this tensor

    @property
    def num_weights(self) -> int:
        """How many weights the tensor holds."""
        count = 1
        for n in self.shape:
            count *= n
        return count


def find_sites(skeleton: Skeleton, weights: Weights) -> tuple[Site, ...]:
    """The sites of a model, in the order of the checkpoint."""
    modules = dict(skeleton.model.named_modules())
    structure = _Structure(skeleton.model)
    found = []
    for name, target in targets(skeleton, weights.names).items():
        info = weights.info(name)
        if len(info.shape) < 2 or not info.dtype.is_floating_point:
            continue
        site = _site(name, info, target, modules, structure)
        if site is not None:
            found.append(site)
    return tuple(found)


def _site(
    name: str, info: StoredTensor, target: Target, modules: dict[str, nn.Module], structure: _Structure
) -> Site | None:
    owner_name, _, parameter = target.parameter.rpartition(".")
    owner = modules.get(owner_name)
    site_name = name.removesuffix(".weight")
    if owner is None:
        return None
    weight = getattr(owner, parameter, None)
    merged = isinstance(weight, nn.Parameter) and weight.ndim == 3 and not isinstance(owner, _ConvNd)
    if merged and len(info.shape) in (2, 3):
        return Site(site_name, name, tuple(info.shape), info.dtype, "expert", "")
    if parameter != "weight" or not isinstance(owner, nn.Linear | nn.Embedding | _ConvNd | Conv1D):
        return None
    role = structure.role(owner_name, owner)
    return Site(
        site_name,
        name,
        tuple(info.shape),
        info.dtype,
        role,
        _module_class(owner) if target.unchanged else "",
        transposed=isinstance(owner, Conv1D),
        tied=structure.tied and role in ("embedding", "head"),
    )


def _module_class(module: nn.Module) -> str:
    """The class as runtimes know it: a subclass of nn.Linear counts as one."""
    for base in (nn.Linear, nn.Embedding, Conv1D):
        if isinstance(module, base):
            return base.__name__
    return type(module).__name__


class _Structure:
    """What the module tree tells about roles."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.head = _called(model, "get_output_embeddings")
        inputs = _called(model, "get_input_embeddings")
        config = getattr(model, "config", None)
        self.tied = bool(getattr(config, "tie_word_embeddings", False)) and self.head is not None and inputs is not None

    def role(self, name: str, module: nn.Module) -> str:
        """The role of a linear, an embedding or a convolution."""
        if isinstance(module, nn.Embedding):
            return "embedding"
        if isinstance(module, _ConvNd):
            return "convolution"
        if module is self.head:
            return "head"
        return "router" if self._routes(name, module) else "linear"

    def _routes(self, name: str, module: nn.Module) -> bool:
        """Whether as many experts stand beside this linear as it has outputs."""
        outputs = getattr(module, "out_features", 0)
        if outputs < 2 or not name:
            return False
        parent = self.model.get_submodule(name.rpartition(".")[0])
        return any(_num_experts(sibling) == outputs for sibling in parent.children() if sibling is not module)


def _num_experts(module: nn.Module) -> int:
    """How many alike experts a module holds: as a list of modules, or as one parameter with a matrix for each."""
    if isinstance(module, nn.ModuleList):
        alike = {type(child) for child in module}
        return len(module) if len(alike) == 1 and not any(isinstance(child, nn.Linear) for child in module) else 0
    stacked = [p.shape[0] for p in module.parameters(recurse=False) if p.ndim == 3]
    if stacked and not isinstance(module, _ConvNd):
        return stacked[0]
    return max((_num_experts(child) for child in module.children() if isinstance(child, nn.ModuleList)), default=0)


def _called(model: nn.Module, method: str) -> nn.Module | None:
    """What `model.method()` gives, None where the model has no such thing."""
    try:
        found = getattr(model, method)()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None
