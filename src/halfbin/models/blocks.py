"""The blocks of a model: the parts that are loaded, observed and rounded one at a time.

A block is an element of an outermost list of modules (nn.ModuleList, nn.Sequential) that is more than a single layer and
holds a matrix. No name is asked for; in which order blocks are called, and with what, the model itself shows while it runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """One block.

    name:       its path in the model.
    parameters: full names of its parameters, also of those that other blocks share.
    """

    name: str
    module: nn.Module
    parameters: tuple[str, ...]


def find_blocks(model: nn.Module) -> tuple[Block, ...]:
    """The blocks of a model in the order of its modules; none where it has no lists of modules."""
    return tuple(_blocks(model, ""))


def _blocks(module: nn.Module, prefix: str) -> Iterator[Block]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList | nn.Sequential) and any(map(_is_block, child)):
            for index, element in child.named_children():
                if _is_block(element):
                    yield Block(f"{path}.{index}", element, _parameters(element, f"{path}.{index}."))
        else:
            yield from _blocks(child, f"{path}.")


def _is_block(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and any(p.ndim >= 2 for p in module.parameters())


def _parameters(module: nn.Module, prefix: str) -> tuple[str, ...]:
    return tuple(prefix + name for name, _ in module.named_parameters(remove_duplicate=False))
