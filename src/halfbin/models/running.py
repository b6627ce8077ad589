"""A checkpoint as a model that computes with its codes: quantized layers where that is possible, float ones elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from halfbin.formats.read import QuantizedCheckpoint, open_quantized
from halfbin.models.expert_stacks import place_experts
from halfbin.models.partial import PartialModel
from halfbin.models.skeleton import Skeleton
from halfbin.nn import fold_inputs, fuse_norms, quantize_inputs
from halfbin.nn.placing import place_codes, refuses_codes
from halfbin.tensor import InputQuantizer


@dataclass(frozen=True, slots=True, eq=False)
class Running:
    """A model that is ready to run.

    model:  in evaluation mode.
    dequantized: tensors that the checkpoint holds as codes and the model as floats: names on disk, each with the reason.
    """

    model: nn.Module
    dequantized: Mapping[str, str]


def load_running(
    skeleton: Skeleton,
    directory: Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Running:
    """The model of a checkpoint of any layout, with `QuantLinear` and its like where the checkpoint holds codes.

    Each layer is brought into its kernel's layout as soon as its codes are read, and holds nothing else: so the most memory
    that loading takes is the model as it stays and one layer's codes. So are stacks of experts (`expert_stacks`). What has no
    quantized form (a convolution, experts whose kernel or class refuses) is dequantized.

    Args:
      skeleton: the opened model.
      directory: where the weights lie; the skeleton's own directory by default.
      dtype: of activations and of the weights that are no codes; the config's own by default.
      on_step: called with (tensors read, tensors in all).

    Raises:
      FormatError: a file that is not what it claims to be.
      ModelError: a parameter that no weight fills.
    """
    dtype = dtype or skeleton.dtype
    with open_quantized(directory or skeleton.path) as checkpoint:
        source = _Dequantized(checkpoint, skeleton.copies if directory is None else {}, dtype)
        partial = PartialModel(skeleton, source, dtype=dtype, experts=None)
        quantized = [name for name in checkpoint.names if checkpoint.scheme(name) is not None]
        dequantized = {name: reason for name in quantized if (reason := _refuses_target(partial, name))}
        layers = [name for name in quantized if name not in dequantized]
        # Floats first: transformers asks the model for its state, which would bring all codes back, a byte each.
        stacks = [name for name in dequantized if _may_be_experts(partial, name)]
        _load_all_but(partial, [*layers, *stacks])
        experts = place_experts(partial, checkpoint, stacks, lambda: on_step(0, len(layers)) if on_step else None)
        dequantized = {
            name: "; ".join(filter(None, (reason, experts.refused.get(name))))
            for name, reason in dequantized.items()
            if name not in experts.codes
        }
        _load_all_but(partial, layers)
        for done, name in enumerate(layers, 1):
            if reason := _place(partial, checkpoint, name):
                dequantized[name] = reason
            if on_step:
                on_step(done, len(layers))
        partial.load(_missing(partial))
        quantize_inputs(partial.model, _inputs(partial, checkpoint, dequantized))
        fold_inputs(partial.model)
        if quantized:
            fuse_norms(partial.model)  # a float model runs as it is, to the bit
        return Running(partial.model, dequantized)


def _load_all_but(partial: PartialModel, names: Iterable[str]) -> None:
    """Bring all parameters into memory but those that these tensors on disk become."""
    waiting = {partial.canonical(partial.targets[name].parameter) for name in names}
    partial.load(name for name in _missing(partial) if partial.canonical(name) not in waiting)


def _missing(partial: PartialModel) -> list[str]:
    """The parameters that are not loaded yet."""
    return [name for name, parameter in partial.model.named_parameters() if parameter.is_meta]


def _inputs(
    partial: PartialModel, checkpoint: QuantizedCheckpoint, dequantized: Mapping[str, str]
) -> dict[str, InputQuantizer]:
    """What the inputs of dequantized layers are rounded to, by the layers' names."""
    found = {partial.targets[name].parameter: checkpoint.input_quantizer(name) for name in dequantized}
    return {name.removesuffix(".weight"): quantizer for name, quantizer in found.items() if quantizer is not None}


def _refuses_target(partial: PartialModel, name: str) -> str | None:
    """Why no layer holds a tensor as it lies on disk, in words; None: one does."""
    target = partial.targets[name]
    if not target.unchanged:
        return f"it is merged with others into {target.parameter}"
    return None if target.parameter.endswith(".weight") else f"{target.parameter} is no layer's weight"


def _may_be_experts(partial: PartialModel, name: str) -> bool:
    """Whether a tensor goes into a stack of matrices."""
    return partial.get(partial.targets[name].parameter).ndim == 3


def _place(partial: PartialModel, checkpoint: QuantizedCheckpoint, name: str) -> str | None:
    """Let every layer that holds a tensor compute with its codes; why that is impossible, None where it is done."""
    paths = [alias.removesuffix(".weight") for alias in partial.names_of(partial.targets[name].parameter)]
    codes, inputs = checkpoint.read(name), checkpoint.input_quantizer(name)
    assert not isinstance(codes, Tensor)
    # A tensor of several layers computes with codes in all of them or in none.
    reasons = [reason for path in paths if (reason := refuses_codes(partial.model, path, codes, inputs))]
    if reasons:
        return reasons[0]
    # Codes that a table reads rows of stay in memory, for all its layers.
    table = any(isinstance(partial.model.get_submodule(path), nn.Embedding) for path in paths)
    for path in paths:
        place_codes(partial.model, path, codes, inputs, packed=not table)
    return None


class _Dequantized:
    """A checkpoint's tensors by their names, as floats."""

    def __init__(self, checkpoint: QuantizedCheckpoint, copies: Mapping[str, str], dtype: torch.dtype) -> None:
        self._checkpoint, self._copies, self._dtype = checkpoint, copies, dtype

    @property
    def names(self) -> tuple[str, ...]:
        return (*self._checkpoint.names, *self._copies)

    def read(self, name: str) -> Tensor:
        return self._checkpoint.read_values(self._copies.get(name, name), self._dtype)
