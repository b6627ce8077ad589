"""Give an embedding and an output head that share one tensor a tensor each, so that one of them can change alone."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection

import torch
from torch import nn

from halfbin.models.skeleton import Skeleton, build_like, targets


def untied(skeleton: Skeleton, names: Collection[str]) -> Skeleton:
    """The same model with `tie_word_embeddings` off; what it shares besides stays shared.

    Args:
      skeleton: the model as it is.
      names: of its tensors on disk.

    Returns:
      A skeleton whose `copies` tell what must be read under a new name; the given one where nothing was tied.
    """
    config = copy.deepcopy(skeleton.config)
    for part in (config, getattr(config, "text_config", None)):
        if part is not None and getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False
    with torch.device("meta"):
        model = build_like(skeleton, config)
    parted = dataclasses.replace(skeleton, config=config, model=model)
    filled = {target.parameter for target in targets(parted, names).values()}
    missing = [name for name in _parameters(model) if name not in filled]
    sources = {target.parameter: name for name, target in targets(skeleton, names).items() if target.unchanged}
    copies = {}
    shared = _shared(skeleton.model)
    for name in missing:
        if source := next((sources[alias] for alias in shared.get(name, ()) if alias in sources), None):
            copies[name] = source
    return dataclasses.replace(parted, copies=copies) if copies else skeleton


def _parameters(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def _shared(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For each name of a parameter that has several, all of them."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: tuple(every) for every in names.values() if len(every) > 1 for name in every}
