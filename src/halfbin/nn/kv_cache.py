"""What a quantized key/value cache costs a model, simulated: keys and values are fake-quantized on their way into the cache.

transformers' attention modules hand their keys and values [batch, heads, tokens, head_dim] to `Cache.update` and attend over
what it returns; 254 of 261 places in the models of transformers 5.23 call it just so. Hence a cache whose `update` rounds what
comes in is all that is needed: hooks give every cache that is passed to a submodule such an `update`, whatever its class and
whoever made it.

What is no key or value is not rounded: states of recurrent layers, and caches that a model keeps in a way of its own.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor, nn

from halfbin.errors import ModelError, SchemeError
from halfbin.nn.simulation import Simulation
from halfbin.tensor import PerGroup, PerToken, Scheme, fake_quantize

PARTS = ("self_attention_cache", "cross_attention_cache")  # of the cache of an encoder-decoder


def quantize_kv_cache(model: nn.Module, keys: Scheme | None, values: Scheme | None) -> Simulation:
    """Let a transformers model keep rounded keys and values, until the result is removed.

    Each forward pass uses a cache, also when the caller asks for none, and attends over rounded keys and values: its own
    tokens' too, as a model does that reads its prompt through a quantized cache.

    Args:
      model: a model whose forward takes `use_cache`.
      keys: "token" for one scale for each token and head, or groups along head_dim ("g32"); None: not rounded. They are
        rounded as they are cached: in most models after the rotary embedding.
      values: the same.

    Returns:
      `idle` is {"keys and values"} until a cache was written to.

    Raises:
      SchemeError: another granularity.
      ModelError: the model takes no `use_cache`; or, from its forward, it ended without writing to a cache.
    """
    for scheme in (keys, values):
        _require_rows(scheme)
    if "use_cache" not in inspect.signature(model.forward).parameters:
        raise ModelError(f"{type(model).__name__} keeps no key/value cache: its forward takes no use_cache")
    simulation = Simulation({"keys and values"})
    simulated = _Simulated(keys, values, simulation.idle)
    for module in model.modules():
        if module is not model and next(module.children(), None) is not None:
            hook = functools.partial(_round_caches, simulated)
            simulation.undo_by(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
    simulation.undo_by(model.register_forward_pre_hook(_use_cache, with_kwargs=True).remove)
    simulation.undo_by(model.register_forward_hook(functools.partial(_require_used, simulated)).remove)
    return simulation


class _Simulated:
    """What the hooks of one simulation share."""

    def __init__(self, keys: Scheme | None, values: Scheme | None, idle: set[str]) -> None:
        self.keys, self.values, self.idle = keys, values, idle

    def fake_quantize(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Both [batch, heads, tokens, head_dim]."""
        self.idle.clear()
        return _rounded(keys, self.keys), _rounded(values, self.values)


class RoundingCache:
    """Put before a transformers Cache class: a cache that rounds what comes in."""

    simulated: _Simulated

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the class behind it, of rounded states."""
        rounded = self.simulated.fake_quantize(key_states, value_states)
        return super().update(*rounded, *args, **kwargs)  # type: ignore[misc]  # it is never an object by itself


def _require_rows(scheme: Scheme | None) -> None:
    granularity = None if scheme is None else scheme.granularity
    if granularity is None or isinstance(granularity, PerToken):
        return
    if not (isinstance(granularity, PerGroup) and granularity.axis == -1):
        raise SchemeError(
            f"{scheme}: keys and values come token by token, so a scale must belong to one: use token, or groups such as g32"
        )


def _rounded(states: Tensor, scheme: Scheme | None) -> Tensor:
    return states if scheme is None else fake_quantize(states, scheme)


def _use_cache(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward pre-hook of the whole model."""
    return args, {**kwargs, "use_cache": True}


def _round_caches(simulated: _Simulated, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of a submodule: every cache among its arguments rounds from now on."""
    from transformers.cache_utils import Cache

    for value in (*args, *kwargs.values()):
        if isinstance(value, Cache):
            for cache in [getattr(value, part) for part in PARTS if hasattr(value, part)] or [value]:
                _round_cache(cache, simulated)


def _round_cache(cache: Any, simulated: _Simulated) -> None:
    if not isinstance(cache, RoundingCache):
        kind = type(cache)
        cache.__class__ = type(f"Rounding{kind.__name__}", (RoundingCache, kind), {})
    cache.simulated = simulated


def _require_used(simulated: _Simulated, model: nn.Module, args: tuple[Any, ...], outputs: object) -> None:
    """A forward hook of the whole model: a simulation that changed nothing would be taken for a perfect score."""
    if simulated.idle:
        raise ModelError(
            f"{type(model).__name__} wrote no keys and values to a cache of transformers: it has none, or one of its own "
            "making, and what rounding it costs cannot be simulated"
        )
