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
from halfbin.evaluate.logits import BATCH_TOKENS, evaluating
from halfbin.evaluate.perplexity import OnStep
from halfbin.evaluate.windows import Windows


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


@dataclass(slots=True)
class _Sums:
    signal: float = 0.0
    noise: float = 0.0
    max_abs: float = 0.0

    def add(self, signal: Tensor, noise: Tensor) -> None:
        if signal.numel() == 0:
            return
        self.signal += float(signal.double().square().sum())
        self.noise += float(noise.double().square().sum())
        largest = float(noise.abs().max())
        self.max_abs = largest if math.isnan(largest) else max(self.max_abs, largest)

    def error(self) -> TensorError:
        if self.noise == 0:
            return TensorError(0.0, math.inf, self.max_abs)
        relative = math.sqrt(self.noise / self.signal) if self.signal else math.inf
        return TensorError(relative, -20 * math.log10(relative) if relative < math.inf else -math.inf, self.max_abs)


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
    sums = _Sums()
    original, moved = weight.reshape(-1), w_hat.reshape(-1)
    # Not all at once: float64 copies of a large embedding are eight times its codes.
    for begin in range(0, original.numel(), 2**22):
        part = original[begin : begin + 2**22].double()
        sums.add(part, moved[begin : begin + 2**22].double() - part)
    return sums.error()


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
    sums: dict[str, _Sums] = {}
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
    return {name: sums[name].error() for name in chosen if name in sums}


def _weighted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim >= 2:
            yield name, module


def _measure(name: str, module: nn.Module, w_hat: Callable[[str], Tensor], sums: dict[str, _Sums]) -> RemovableHandle:
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
        sums.setdefault(name, _Sums()).add(signal, noise)

    return module.register_forward_hook(hook, with_kwargs=True)
