"""Modules of experts that compute with a checkpoint's codes: which tensors on disk are which expert's rows.

On disk an expert's matrix is a tensor, or several that transformers merges when it loads them (gate above up), or a slice of
a stack. What a conversion does is seen, not looked up: it is done with tensors of two by two numbers, whatever the real sizes,
and where the numbers arrive tells whose rows they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.core_model_loading import dot_natural_key

from halfbin.errors import SchemeError
from halfbin.formats.read import QuantizedCheckpoint
from halfbin.models.partial import PartialModel
from halfbin.nn.experts import ExpertStack, QuantExperts, expert_layer, refuses_experts, refuses_kernel, stacks_of
from halfbin.nn.linear import QuantLinear
from halfbin.tensor import PerChannel, PerGroup, QTensor
from halfbin.tensor.matrices import scheme_of_matrix


@dataclass(frozen=True, slots=True)
class Placed:
    """What became of the tensors on disk that go into modules of experts.

    codes: those that are computed with as codes.
    refused: the others, each with the reason.
    """

    codes: frozenset[str]
    refused: Mapping[str, str]


class _RefusedError(Exception):
    """Why a module of experts computes with floats, in words."""


def place_experts(
    partial: PartialModel,
    checkpoint: QuantizedCheckpoint,
    names: Sequence[str],
    on_step: Callable[[], None] = lambda: None,
) -> Placed:
    """Let modules of experts compute with codes wherever both of their stacks are made of these tensors on disk.

    Their other parameters are to be loaded. Memory beyond the packed weights: the codes of one tensor on disk and of what it is
    merged with, and one stack twice.

    Args:
      partial: its model is changed in place.
      checkpoint: read from.
      names: tensors that the checkpoint holds as codes and that are no layer's weight.
      on_step: called after each module.
    """
    by_module: dict[str, dict[str, list[str]]] = {}
    for name in names:
        path, _, parameter = partial.targets[name].parameter.rpartition(".")
        by_module.setdefault(path, {}).setdefault(parameter, []).append(name)
    codes, refused = set(), {}
    for path, sources in by_module.items():
        concerned = [name for its in sources.values() for name in its]
        try:
            _place(partial, checkpoint, path, sources)
            codes.update(concerned)
        except _RefusedError as reason:
            refused.update(dict.fromkeys(concerned, str(reason)))
        on_step()
    return Placed(frozenset(codes), refused)


def _place(
    partial: PartialModel, checkpoint: QuantizedCheckpoint, path: str, sources: Mapping[str, Sequence[str]]
) -> None:
    old = partial.model.get_submodule(path)
    if reason := refuses_experts(old):
        raise _RefusedError(reason)
    stacks = []
    for parameter in stacks_of(old):
        if len(partial.names_of(f"{path}.{parameter}")) > 1:
            raise _RefusedError(f"{parameter} is shared by several modules of experts")
        if parameter not in sources:
            raise _RefusedError(f"{parameter} of the same experts is held as floats")
        for name in sources[parameter]:
            _require_codes_alone(checkpoint, name)
        matrices = _matrices(partial, checkpoint, old, f"{path}.{parameter}", sources[parameter])
        stacks.append(_stack(matrices, old, parameter, partial.dtype))
    parent, _, attribute = path.rpartition(".")
    partial.model.get_submodule(parent)._modules[attribute] = QuantExperts(old, *stacks).eval()


def _require_codes_alone(checkpoint: QuantizedCheckpoint, name: str) -> None:
    if (inputs := checkpoint.inputs(name)) is not None:
        raise _RefusedError(f"its inputs are {inputs}, and experts together take float ones")
    if checkpoint.columns(name) is not None:
        raise _RefusedError("it keeps columns in floating point")


def _stack(matrices: Iterator[QTensor], old: nn.Module, parameter: str, dtype: torch.dtype) -> ExpertStack:
    layers: list[QuantLinear] = []
    num, *shape = old._parameters[parameter].shape  # type: ignore[union-attr]  # refuses_experts found it
    expected = tuple(reversed(shape)) if old.is_transposed else tuple(shape)
    for q in matrices:
        layer = expert_layer(q, dtype)
        if reason := refuses_kernel(layer):
            raise _RefusedError(reason)
        if q.shape != expected or (layers and layer.scheme != layers[0].scheme):
            raise _RefusedError(
                f"experts are not alike: {q.scheme} {list(q.shape)} among others, expected {list(expected)}"
            )
        layers.append(layer)
    if len(layers) != num:
        raise _RefusedError(f"{len(layers)} of {num} experts are on disk")
    return ExpertStack(layers, old._parameters.get(f"{parameter}_bias") if old.has_bias else None)


def _matrices(
    partial: PartialModel, checkpoint: QuantizedCheckpoint, old: nn.Module, parameter: str, names: Sequence[str]
) -> Iterator[QTensor]:
    """Each expert's matrix [out_features, in_features]."""
    transposed = bool(old.is_transposed)
    if partial.targets[names[0]].unchanged:
        q = checkpoint.read(names[0])
        if len(names) > 1 or not isinstance(q, QTensor) or q.codes.ndim != 3:
            raise _RefusedError(f"{parameter} is made of {len(names)} tensors, and none is a stack")
        yield from _slices(q, transposed=transposed)
        return
    for parts in _rows(partial, parameter, names, transposed=transposed):
        yield _above_each_other([_read(checkpoint, part) for part in parts])


def _read(checkpoint: QuantizedCheckpoint, name: str) -> QTensor:
    q = checkpoint.read(name)
    assert isinstance(q, QTensor)
    return q


def _slices(q: QTensor, *, transposed: bool) -> Iterator[QTensor]:
    """The matrices of a stack [experts, out, in], or [experts, in, out]."""
    try:
        scheme = scheme_of_matrix(q.scheme, 3, transposed=transposed)
    except SchemeError as error:
        raise _RefusedError(str(error)) from error

    def matrix(stack: Tensor, i: int) -> Tensor:
        return (stack[i].T if transposed else stack[i]).contiguous()

    for i in range(len(q.codes)):
        zero_point = None if q.zero_point is None else matrix(q.zero_point, i)
        yield QTensor(matrix(q.codes, i), matrix(q.scale, i), zero_point, scheme)


def _above_each_other(parts: Sequence[QTensor]) -> QTensor:
    """Matrices of as many columns as one, the rows of the first above those of the next."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if any(q.scheme != first.scheme for q in parts):
        raise _RefusedError(
            f"it is merged with a matrix of another scheme: {', '.join(sorted({str(q.scheme) for q in parts}))}"
        )
    if any(q.shape[1:] != first.shape[1:] for q in parts):
        raise _RefusedError(
            f"it is merged with a matrix of other columns: {', '.join(str(list(q.shape)) for q in parts)}"
        )
    by_row = isinstance(first.scheme.granularity, PerChannel | PerGroup) and first.scheme.granularity.axis in (
        (0,) if isinstance(first.scheme.granularity, PerChannel) else (-1, 1)
    )
    if not by_row:
        raise _RefusedError(f"it is merged with others, and {first.scheme} has scales that rows share")
    zero_points = [q.zero_point for q in parts if q.zero_point is not None]
    return replace(
        first,
        codes=torch.cat([q.codes for q in parts]),
        scale=torch.cat([q.scale for q in parts]),
        zero_point=torch.cat(zero_points) if zero_points else None,
    )


def _rows(partial: PartialModel, parameter: str, names: Sequence[str], *, transposed: bool) -> list[tuple[str, ...]]:
    """For each expert, the tensors on disk that its rows are, from the first row on."""
    patterns = {name: partial.targets[name].pattern or "" for name in names}
    conversion = partial.conversion(patterns[names[0]])
    ordered = sorted(names, key=dot_natural_key)  # as transformers reads them
    for i, name in enumerate(ordered):
        conversion.add_tensor(parameter, name, patterns[name], torch.arange(4 * i, 4 * i + 4).reshape(2, 2))
    try:
        arrived = list(conversion.convert(parameter, model=partial.model, config=partial.model.config).values())
    except Exception as error:  # a conversion may count on the real sizes
        raise _RefusedError(f"how it is merged cannot be seen: {type(error).__name__}: {error}") from error
    if len(arrived) != 1 or arrived[0].ndim != 3:
        raise _RefusedError("it is not merged into one stack")
    stack = arrived[0].transpose(1, 2) if transposed else arrived[0]
    tiles = stack.reshape(len(stack), -1, 4) if stack.shape[2] == 2 else stack.new_zeros(1, 1, 4)
    if not torch.equal(tiles, tiles[..., :1] + torch.arange(4)) or bool((tiles[..., 0] % 4 != 0).any()):
        raise _RefusedError("its rows are shuffled with those of others when they are merged")
    return [tuple(ordered[int(first) // 4] for first in expert) for expert in tiles[..., 0]]
