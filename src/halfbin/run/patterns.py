"""Names of repeated layers: which names differ only in their numbers."""

from __future__ import annotations

from collections.abc import Sequence


def pattern(name: str) -> str:
    """`name` with every number between dots replaced: model.layers.3.mlp.up_proj is model.layers.*.mlp.up_proj."""
    return ".".join("*" if _is_number(part) else part for part in name.split("."))


def layer_index(name: str) -> int | None:
    """The first number between dots, which counts the layers; None where there is none."""
    return next((int(part) for part in name.split(".") if _is_number(part)), None)


def tails(names: Sequence[str]) -> dict[str, str]:
    """Each name without the dotted parts that all of them share at the front and at the back; never empty.

    Where nothing but numbers would remain of some name, the shared end stays: `3.mlp.up_proj` says more than `3`.
    """
    split = [name.split(".") for name in names]
    if len(split) < 2:
        return {name: parts[-1] or name for name, parts in zip(names, split, strict=True)}
    first = _num_shared(split)
    last = _num_shared([parts[:first:-1] for parts in split])
    if any(all(map(_is_number, parts[first : len(parts) - last])) for parts in split):
        last = 0
    return {name: ".".join(parts[first : len(parts) - last]) or name for name, parts in zip(names, split, strict=True)}


def _num_shared(lists: Sequence[Sequence[str]]) -> int:
    """How many leading elements all lists have in common."""
    shortest = min(map(len, lists))
    return next((i for i in range(shortest) if len({parts[i] for parts in lists}) > 1), shortest)


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdecimal()
