"""Sites: the checkpoint tensors that meet activations in a product, found from the model's structure alone.

A site is named as on disk. What it is comes from the module that its tensor is loaded into:

    linear       nn.Linear, or transformers' Conv1D (stored transposed, [in, out])
    expert       a weight that is merged into, or already is, a parameter with one matrix per expert
    router       the matrix that scores the experts beside it, or the gate of the one that all tokens share
    head         the linear that gives the logits; tied when the embedding's tensor serves for it
    embedding    nn.Embedding: of tokens, positions, types, relative distances
    convolution  nn.Conv1d, nn.Conv2d, nn.Conv3d and their transposed forms

Everything else (norms, biases, tables that are bare parameters, state-space parameters) is no site and is copied as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from transformers.pytorch_utils import Conv1D

from halfbin.models.skeleton import Skeleton, Target, targets
from halfbin.models.structure import Structure


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
    # "Linear", "Conv1D", "Embedding", "Conv2d"; "Expert" for a matrix that is merged into a stack when it is loaded; "" for
    # any other tensor without a module of its own
    module_class: str
    transposed: bool = False  # stored [in_features, out_features], for experts [experts, in_features, out_features]
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
    modules = dict(skeleton.model.named_modules(remove_duplicate=False))
    structure = Structure(skeleton.model)
    found = []
    for name, target in targets(skeleton, weights.names).items():
        info = weights.info(name)
        if len(info.shape) < 2 or 0 in info.shape or not info.dtype.is_floating_point:
            continue
        site = _site(name, info, target, modules, structure)
        if site is not None:
            found.append(site)
    return tuple(found)


def _site(
    name: str, info: StoredTensor, target: Target, modules: dict[str, nn.Module], structure: Structure
) -> Site | None:
    owner_name, _, parameter = target.parameter.rpartition(".")
    owner = modules.get(owner_name)
    role = None if owner is None else _role(target, owner, parameter, structure)
    if owner is None or role is None:
        return None
    return Site(
        name.removesuffix(".weight"),
        name,
        tuple(info.shape),
        info.dtype,
        role,
        _module_class(name, owner, target, info, role),
        transposed=isinstance(owner, Conv1D | _ConvTransposeNd)
        or (role == "expert" and len(info.shape) == 3 and bool(getattr(owner, "is_transposed", False))),
        tied=parameter == "weight" and structure.ties(owner),
    )


def _role(target: Target, owner: nn.Module, parameter: str, structure: Structure) -> str | None:
    """The role of the tensor that becomes a part or the whole of `owner`'s parameter; None where it is no site."""
    if target.parameter in structure.routers:
        return "router"
    if target.parameter in structure.experts:
        return "expert"
    if parameter == "weight" and isinstance(owner, nn.Linear | nn.Embedding | _ConvNd | Conv1D):
        return structure.role(owner)
    weight = getattr(owner, parameter, None)
    # Matrices that are merged into a stack are an expert each, whatever routes to them.
    merged = not target.unchanged and isinstance(weight, nn.Parameter) and weight.ndim == 3
    return "expert" if merged else None


def _module_class(name: str, owner: nn.Module, target: Target, info: StoredTensor, role: str) -> str:
    """The class as runtimes know it: a subclass of nn.Linear counts as one."""
    if not name.endswith(".weight"):  # no name of a module
        return ""
    if role == "expert":
        return "Expert" if len(info.shape) == 2 and not target.unchanged else ""
    if not target.unchanged:
        return ""
    for base in (nn.Linear, nn.Embedding, Conv1D):
        if isinstance(owner, base):
            return base.__name__
    return type(owner).__name__
