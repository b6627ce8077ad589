"""Names of repeated layers: which names differ only in their numbers."""

from __future__ import annotations

import os


def pattern(name: str) -> str:
    """`name` with every number between dots replaced: model.layers.3.mlp.up_proj is model.layers.*.mlp.up_proj."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def layer_index(name: str) -> int | None:
    """The first number between dots, which counts the layers; None where there is none."""
    return next((int(part) for part in name.split(".") if part.isascii() and part.isdecimal()), None)


def tails(names: list[str]) -> dict[str, str]:
    """Each name without the leading and trailing dotted parts that all of them share; a short name stays as it is."""
    split = [name.split(".") for name in names]
    if len(split) < 2:
        return {name: parts[-1] for name, parts in zip(names, split, strict=True)}
    first = len(os.path.commonprefix(split))
    last = len(os.path.commonprefix([parts[:first:-1] for parts in split]))
    return {name: ".".join(parts[first : len(parts) - last]) or name for name, parts in zip(names, split, strict=True)}
