"""Let every expert see every token while statistics are taken, whatever the router says; what the block gives stays the same.

A module of experts is called with activations [tokens, in], the experts of each token, integers [tokens, k], and as many
weights: transformers' own interface, under whatever names. It is called as the model calls it, unseen, for its output; and
again, seen, with a routing that sends each token to all of them, whose output is thrown away. Nothing of the experts' own code
is repeated here, so what their second matrices read is right too.

That a module takes such a routing is tried: only where each expert then multiplied exactly as many rows as there are tokens is
it used. Cost: a block of E experts, k of them for a token, computes E / k times as much there.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from halfbin.models.products import Product, Watch, unwatched

Forward = Callable[..., Any]


class EveryExpert:
    """The modules of experts inside a block that take any routing."""

    def __init__(self, module: nn.Module, run: Callable[[], object]) -> None:
        """Find and try them.

        Args:
          module: the block.
          run: computes it on a few tokens.
        """
        self._modules: list[nn.Module] = []
        with contextlib.ExitStack() as stack:
            for candidate in module.modules():
                if (num_experts := _num_experts(candidate)) is not None:
                    stack.enter_context(_calling(candidate, self._trying(candidate, num_experts)))
            run()

    @property
    def parameters(self) -> set[int]:
        """The identities of the parameters that are reached."""
        return {id(p) for module in self._modules for p in module.parameters()}

    @contextlib.contextmanager
    def routed(self) -> Iterator[None]:
        """Inside, products of these experts are seen with every token."""
        with contextlib.ExitStack() as stack:
            for module in self._modules:
                num_experts = _num_experts(module)
                assert num_experts is not None
                stack.enter_context(_calling(module, _seen_with_all(num_experts)))
            yield

    def _trying(self, module: nn.Module, num_experts: int) -> Callable[[Forward], Forward]:
        def wrap(forward: Forward) -> Forward:
            def call(*args: Any, **kwargs: Any) -> Any:
                routed = _to_all(args, kwargs, num_experts)
                if routed is not None and module not in self._modules and _reaches_all(module, forward, *routed):
                    self._modules.append(module)
                return forward(*args, **kwargs)

            return call

        return wrap


def _seen_with_all(num_experts: int) -> Callable[[Forward], Forward]:
    def wrap(forward: Forward) -> Forward:
        def call(*args: Any, **kwargs: Any) -> Any:
            routed = _to_all(args, kwargs, num_experts)
            if routed is None:
                return forward(*args, **kwargs)
            with unwatched():
                output = forward(*args, **kwargs)
            forward(*routed[0], **routed[1])
            return output

        return call

    return wrap


@contextlib.contextmanager
def _calling(module: nn.Module, wrap: Callable[[Forward], Forward]) -> Iterator[None]:
    before = vars(module).get("forward")
    module.forward = wrap(module.forward)
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _num_experts(module: nn.Module) -> int | None:
    """How many experts a module holds: stacks [num, ...] of its own, or as many modules of one class; else None."""
    stacks = {p.shape[0] for p in module._parameters.values() if p is not None and p.ndim == 3}
    if len(stacks) == 1:
        return next(iter(stacks))
    children = list(module.children())
    alike = isinstance(module, nn.ModuleDict | nn.ModuleList) and len({type(child) for child in children}) == 1
    return len(children) if alike and len(children) > 1 else None


def _to_all(
    args: tuple[Any, ...], kwargs: dict[str, Any], num_experts: int
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of a call with a routing to all experts; None where they are not activations, experts and weights."""
    named = [*enumerate(args), *kwargs.items()]
    tensors = [(key, value) for key, value in named if isinstance(value, Tensor)]
    if len(tensors) != 3:
        return None
    (_, x), (index_at, index), (weights_at, weights) = tensors
    integers = not index.is_floating_point() and not index.is_complex() and index.dtype != torch.bool
    if not (x.is_floating_point() and integers and weights.is_floating_point() and index.ndim >= 2 and x.ndim >= 2):
        return None
    num_tokens = x.numel() // max(x.shape[-1], 1)
    if index.shape[0] != num_tokens or weights.shape[0] != num_tokens:
        return None
    everyone = _everyone(index, num_tokens, num_experts)
    if everyone is None:
        return None
    share = weights.new_full((num_tokens, num_experts), 1 / num_experts)
    new = {index_at: everyone, weights_at: share}
    return tuple(new.get(i, value) for i, value in enumerate(args)), {k: new.get(k, v) for k, v in kwargs.items()}


def _everyone(index: Tensor, num_tokens: int, num_experts: int) -> Tensor | None:
    """All experts of each token: numbers [tokens, experts], or ones and zeros [tokens, experts, experts], as `index` is."""
    if index.ndim == 2:
        return torch.arange(num_experts, dtype=index.dtype, device=index.device).expand(num_tokens, -1).contiguous()
    if index.ndim == 3 and index.shape[-1] == num_experts:
        one_each = torch.eye(num_experts, dtype=index.dtype, device=index.device)
        return one_each.expand(num_tokens, -1, -1).contiguous()
    return None


def _reaches_all(module: nn.Module, forward: Forward, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether each matrix of each expert then multiplies as many rows as there are tokens."""
    rows: Counter[tuple[str, int]] = Counter()
    parameters = {name: p for name, p in module.named_parameters() if p.ndim >= 2}

    def see(product: Product) -> None:
        place = product.place
        expert = place.offset // parameters[place.parameter][0].numel() if parameters[place.parameter].ndim == 3 else 0
        rows[place.parameter, expert] += product.x.numel() // product.x.shape[-1]

    x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    try:
        with Watch(parameters, see):
            forward(*args, **kwargs)
    except Exception:  # the experts' own code may raise anything at a routing that it was not written for
        return False
    seen = {name for name, _ in rows}
    matrices = {(name, i) for name in seen for i in range(len(parameters[name]) if parameters[name].ndim == 3 else 1)}
    held = {name for name, p in parameters.items() if p.ndim == 3} or set(parameters)
    multiplied = {name for name in held if "bias" not in name.rpartition(".")[2] or name in seen}
    num_tokens = x.numel() // x.shape[-1]
    return bool(rows) and multiplied <= seen and matrices == set(rows) and set(rows.values()) == {num_tokens}
