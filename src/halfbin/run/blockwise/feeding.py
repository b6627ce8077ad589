"""Samples as the keyword arguments of a model's call, for whatever kind of text model."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn


def model_inputs(model: nn.Module, batches: Sequence[Tensor]) -> list[dict[str, Any]]:
    """What to call `model` with for each batch of token ids, int64 [num_samples, length].

    The decoder of an encoder-decoder reads the same tokens as its encoder: calibration needs plausible activations, not a
    sensible answer.
    """
    config = getattr(model, "config", None)
    always: dict[str, Any] = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    both = bool(getattr(config, "is_encoder_decoder", False))
    return [{"input_ids": ids} | ({"decoder_input_ids": ids} if both else {}) | always for ids in batches]


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Inside, a model keeps no keys and values, though its forward has no argument to say so."""
    every: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in every if getattr(config, "use_cache", False)}
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs.values():
            config.use_cache = True
