"""A checkpoint as a model that computes with its codes: quantized layers where that is possible, float ones elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from halfbin.formats.read import QuantizedCheckpoint, open_quantized
from halfbin.models.partial import PartialModel
from halfbin.models.skeleton import Skeleton
from halfbin.nn import quantize_inputs
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

    What has no quantized layer (an expert that is merged into a stack, a convolution) is dequantized.

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
        dequantized: dict[str, str] = {}
        inputs: dict[str, InputQuantizer] = {}
        quantized = [name for name in checkpoint.names if checkpoint.scheme(name) is not None]
        for done, name in enumerate(quantized, 1):
            reason = _place(partial, checkpoint, name)
            if reason is not None:
                dequantized[name] = reason
                if (quantizer := checkpoint.input_quantizer(name)) is not None:
                    inputs[partial.targets[name].parameter.removesuffix(".weight")] = quantizer
            if on_step:
                on_step(done, len(quantized))
        partial.load([name for name, parameter in partial.model.named_parameters() if parameter.is_meta])
        quantize_inputs(partial.model, inputs)
        return Running(partial.model, dequantized)


def _place(partial: PartialModel, checkpoint: QuantizedCheckpoint, name: str) -> str | None:
    """Let every layer that holds a tensor compute with its codes; why that is impossible, None where it is done."""
    target = partial.targets[name]
    if not target.unchanged:
        return f"it is merged with others into {target.parameter}"
    paths = [alias.removesuffix(".weight") for alias in partial.names_of(target.parameter)]
    if not target.parameter.endswith(".weight"):
        return f"{target.parameter} is no layer's weight"
    codes, inputs = checkpoint.read(name), checkpoint.input_quantizer(name)
    assert not isinstance(codes, Tensor)
    # A tensor of several layers computes with codes in all of them or in none.
    reasons = [reason for path in paths if (reason := refuses_codes(partial.model, path, codes, inputs))]
    if reasons:
        return reasons[0]
    for path in paths:
        place_codes(partial.model, path, codes, inputs)
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
