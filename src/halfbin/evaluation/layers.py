"""How far one tensor moved, and how far that moves the outputs of the layer that holds it.

weight error   w_hat - w                     relative: ||w_hat - w|| / ||w||, Frobenius norms
output error   x @ (w_hat - w), x as seen    relative: the same, over all tokens of all windows; the bias counts in neither
snr_db         -20 log10(relative)           6 dB more for each bit, in theory
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from halfbin.errors import DataError
from halfbin.evaluation.logits import BATCH_TOKENS, evaluating
from halfbin.evaluation.perplexity import OnStep
from halfbin.evaluation.windows import Windows
from halfbin.kernels.errors import ErrorSums
from halfbin.tensor.mixed import MixedTensor
from halfbin.tensor.qtensor import QTensor, dequantize
from halfbin.tensor.rowwise import rowwise


@dataclass(frozen=True, slots=True)
class TensorError:
    """How far a tensor is from another.

    relative: ||x_hat - x|| / ||x||; 0 where both are zero, infinite where only x is.
    snr_db:   the same in decibels, -20 log10(relative); infinite when nothing moved.
    max_abs:  the largest move of one element.
    """

    relative: float
    snr_db: float
    max_abs: float

    @classmethod
    def of(cls, sums: ErrorSums) -> TensorError:
        """From the sums over all elements."""
        if sums.noise == 0:
            return cls(0.0, math.inf, sums.max_abs)
        relative = math.sqrt(sums.noise / sums.signal) if sums.signal else math.inf
        return cls(relative, -20 * math.log10(relative) if relative < math.inf else -math.inf, sums.max_abs)


def weight_error(weight: Tensor, w_hat: Tensor) -> TensorError:
    """How far a reconstruction is from a weight.

    Args:
      weight: float, any shape.
      w_hat: float, the same shape.

    Raises:
      DataError: the shapes differ.
    """
    if weight.shape != w_hat.shape:
        raise DataError(f"a weight of shape {list(weight.shape)} has no reconstruction of shape {list(w_hat.shape)}")
    return TensorError.of(_sums(weight, w_hat))


def rounding_sums(weight: Tensor, q: QTensor | MixedTensor) -> ErrorSums:
    """The sums behind the `weight_error` of what `q` stands for in float32; those of a weight's parts may be added.

    Args:
      weight: float, of the shape of `q`; on the CPU.
      q: what it was rounded to.
    """
    if isinstance(q, MixedTensor):
        return _sums(weight, dequantize(q))
    rows = rowwise(weight, q.scheme)
    return _sums(weight, dequantize(q)) if isinstance(rows, str) else rows.error_sums(q.codes, q.scale, q.zero_point)


def _sums(x: Tensor, x_hat: Tensor) -> ErrorSums:
    """Of two tensors, not all at once: float64 copies of a large embedding are eight times its codes."""
    sums = ErrorSums()
    original, moved = x.reshape(-1), x_hat.reshape(-1)
    for begin in range(0, original.numel(), 2**22):
        part = original[begin : begin + 2**22].double()
        sums += _sums_of(part, moved[begin : begin + 2**22].double() - part)
    return sums


def _sums_of(signal: Tensor, noise: Tensor) -> ErrorSums:
    if signal.numel() == 0:
        return ErrorSums()
    return ErrorSums(
        signal=float(signal.double().square().sum()),
        noise=float(noise.double().square().sum()),
        max_abs=float(noise.abs().max()),
    )


def output_errors(
    model: nn.Module,
    w_hat: Callable[[str], Tensor],
    windows: Windows,
    *,
    names: Collection[str] | None = None,
    on_step: OnStep | None = None,
) -> dict[str, TensorError]:
    """How far each layer's outputs would move if it alone had the weight `w_hat(name)`; the inputs are the original's.

    Args:
      model: the original.
      w_hat: from a module's name to the reconstruction of its weight, in the weight's own shape. Asked for every batch, so
        that no second copy of the model is held.
      windows: the text that gives the inputs.
      names: modules to measure; None: every one whose `weight` has two dimensions or more.
      on_step: called with (windows done, windows in all) after each batch.

    Returns:
      For each module that was called, its name and the error of its outputs.

    Raises:
      DataError: a name is no module with a weight, or a reconstruction has another shape.
    """
    modules = dict(_weighted(model))
    if unknown := set(names or ()) - set(modules):
        raise DataError(f"no module with a weight is called {sorted(unknown)[0]!r}; those there are: {list(modules)}")
    sums: dict[str, ErrorSums] = {}
    chosen = [name for name in modules if names is None or name in names]
    handles = [_measure(name, modules[name], w_hat, sums) for name in chosen]
    first = next(model.parameters())
    try:
        with evaluating(model):
            for batch in windows.batches(max(1, BATCH_TOKENS // windows.context)):
                model(input_ids=batch.input_ids.to(first.device))
                if on_step:
                    on_step(batch.first_window + len(batch.input_ids), len(windows))
    finally:
        for handle in handles:
            handle.remove()
    return {name: TensorError.of(sums[name]) for name in chosen if name in sums}


def _weighted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim >= 2:
            yield name, module


def _measure(
    name: str, module: nn.Module, w_hat: Callable[[str], Tensor], sums: dict[str, ErrorSums]
) -> RemovableHandle:
    """Watch a module that is linear in its weight: without a bias its outputs under w_hat - w are the outputs' move."""

    inside = False  # the two calls below come by here again

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal inside
        if inside:
            return
        weight, moved = module.get_parameter("weight"), w_hat(name)
        if moved.shape != weight.shape:
            raise DataError(f"{name}: weight {list(weight.shape)} got a reconstruction {list(moved.shape)}")
        difference = (moved.double() - weight.double()).to(weight.dtype)
        zeros = {key: torch.zeros_like(value) for key, value in module.named_parameters() if key != "weight"}
        inside = True
        try:
            signal = functional_call(module, {"weight": weight, **zeros}, args, kwargs)
            noise = functional_call(module, {"weight": difference, **zeros}, args, kwargs)
        finally:
            inside = False
        sums[name] = sums.get(name, ErrorSums()) + _sums_of(signal, noise)

    return module.register_forward_hook(hook, with_kwargs=True)
