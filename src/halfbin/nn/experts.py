"""Experts of a mixture with quantized weights: all that a router chose for a batch of tokens in one call a projection.

`ExpertStack` takes the place of a parameter [experts, out, in], `QuantExperts` that of a module that holds two of them and that
transformers says it can run for itself (`use_experts_implementation`): up, gate, down, the router's weights, a sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from halfbin.errors import DataError
from halfbin.kernels import experts
from halfbin.nn.integers import BY_GROUP, IntegerInputs
from halfbin.nn.kernels import KERNELS
from halfbin.nn.linear import QuantLinear, wants_gradient
from halfbin.nn.matmul import MatmulKernel
from halfbin.nn.packed_weight import PackedWeight, readable
from halfbin.tensor import Scheme

TOGETHER = "int8-inputs, experts together"  # what reports call the call for all of them
RUN_BY_TRANSFORMERS = ("grouped_mm", "batched_mm")  # its own ways, which do for every class what `QuantExperts` does

assert experts.GRID == BY_GROUP  # so that one expert, and all of them, round a token alike


class ExpertStack(nn.Module):
    """y[t, i] = x[t] @ w_hat[chosen[t, i]].T + bias[chosen[t, i]], in the activation's type.

    Each expert is a `QuantLinear` that holds its kernel's layout alone. Where that is the one of integer products, they lie one
    behind the other and are multiplied in one call, each token rounded once; otherwise an expert after the other is.
    """

    bias: nn.Parameter | None

    def __init__(self, layers: Sequence[QuantLinear], bias: nn.Parameter | None = None) -> None:
        """Make one of layers without biases, of one shape and scheme, and a float bias [experts, out_features]."""
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._linears = tuple(layers)  # the same once more, without the way through __getattr__ at each call
        self.register_parameter("bias", bias)
        self._stack: Tensor | None = None
        self._stacked: list[PackedWeight | None] = []
        self._together()

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Float [tokens, in_features], and integers [tokens, slots], to [tokens, slots, out_features] of x's type.

        Raises:
          DataError: an expert is chosen that there is not, or inputs are of another width.
        """
        first, bias = self._linears[0], self._parameters["bias"]
        kernel, stack = first.kernel, None
        if isinstance(kernel, IntegerInputs) and kernel.declines(x) is None and not wants_gradient(x, bias):
            stack = self._together()
        if x.ndim != 2 or x.shape[1] != first.in_features:  # the call below would read beyond it
            raise DataError(f"inputs are {list(x.shape)}, and these experts take [tokens, {first.in_features}]")
        if stack is not None:
            return experts.linear(x, stack, chosen, readable(bias), first.out_features)
        experts.require_known(x, chosen, len(self.layers))
        y = x.new_zeros(*chosen.shape, first.out_features)
        for expert in torch.unique(chosen).tolist():
            tokens, slots = torch.where(chosen == expert)
            product = self.layers[expert](x[tokens])
            y[tokens, slots] = product if bias is None else product + bias[expert].to(x.dtype)
        return y

    def choose(self, kernels: Sequence[MatmulKernel]) -> None:
        """Multiply by the first of these that does not refuse: `nn.EXACT` for float inputs as they are."""
        for layer in self._linears:
            layer.choose(kernels)
        self._together()

    @property
    def multiplied(self) -> tuple[str, Mapping[str, str]]:
        """The kernel, and why those before it would not."""
        name, refusals = self._first.multiplied
        return (TOGETHER, refusals) if isinstance(self._first.kernel, IntegerInputs) else (name, refusals)

    @property
    def scheme(self) -> Scheme:
        """Of each expert's matrix."""
        return self._first.scheme

    @property
    def shape(self) -> tuple[int, ...]:
        """Experts, out_features, in_features."""
        return len(self.layers), *self._first.codes_shape

    @property
    def _first(self) -> QuantLinear:
        return self._linears[0]

    def _together(self) -> Tensor | None:
        """All experts as they are now, one behind the other: uint8 [experts, bytes]; None where their kernel has no layout.

        Whoever changes a layer, or copies it, gives it memory of its own: then they are brought together again. While that is
        done, one stack is held twice.
        """
        if torch.compiler.is_compiling() and self._stack is not None:
            return self._stack
        held = [layer._alone for layer in self._linears]
        if self._stack is None or held != self._stacked:  # by identity
            self._stack = None
            for layer in self._linears:
                layer.hold_packed()  # one that somebody assigned to holds codes
            packed = [layer._alone for layer in self._linears if layer._alone is not None]
            if len(packed) < len(held):
                return None
            stack = experts.stack(len(packed), packed[0].memory.numel())
            for i, (layer, one) in enumerate(zip(self._linears, packed, strict=True)):
                stack[i] = one.memory
                layer._alone = replace(one, memory=stack[i])
            self._stack, self._stacked = stack, [layer._alone for layer in self._linears]
        return self._stack

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stack": None, "_stacked": []}  # the layers have all of it


class QuantExperts(nn.Module):
    """Takes the place of a module of experts; `refuses_experts` says of which.

    What a router's weights count for is applied in torch, and in the order of transformers' own ways to run experts.
    """

    def __init__(self, old: nn.Module, up: ExpertStack, down: ExpertStack) -> None:
        """Make one of the module, whose two stacked parameters are let go of, and of what takes their place."""
        super().__init__()
        names = stacks_of(old)
        for name in [n for n in old._parameters if n.removesuffix("_bias") in names]:
            del old._parameters[name]
        self.rest = old  # its activation, its norm and its way to gate
        self._up_name, self._down_name = names
        self.add_module(names[0], up)
        self.add_module(names[1], down)

    @property
    def num_stacked(self) -> int:
        """How many experts it holds."""
        return int(getattr(self, self._down_name).shape[0])

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Activations [tokens, hidden], the experts of each token [tokens, slots] and their weights, to [tokens, hidden].

        Raises:
          DataError: an expert is chosen that there is not.
        """
        rest: Any = self.rest
        tokens, slots = top_k_index.shape
        x = getattr(self, self._up_name)(hidden_states, top_k_index).flatten(0, 1)
        x = rest._apply_gate(x) if rest.has_gate else rest.act_fn(x)
        y: Tensor = getattr(self, self._down_name)(x, top_k_index.reshape(-1, 1)).flatten(0, 1)
        if rest.has_post_expert_norm:
            y = rest.post_expert_norm(y)
        weighted = y * top_k_weights.reshape(-1, 1)
        y = weighted.view(tokens, slots, -1).sum(1)
        return y.to(hidden_states.dtype)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # such as `num_experts`, which the model may ask for
            if name == "rest":
                raise
            return getattr(super().__getattr__("rest"), name)


def stacks_of(module: nn.Module) -> tuple[str, str]:
    """The names of the stacks that go up and down in a module that transformers can run for itself."""
    return ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"), "down_proj"


def refuses_experts(module: nn.Module) -> str | None:
    """Why `QuantExperts` cannot take the place of a module, in words; None: it can."""
    kind = type(module).__name__
    declared = all(
        hasattr(module, a) for a in ("config", "has_gate", "has_bias", "has_post_expert_norm", "is_transposed")
    )
    if not declared or not hasattr(module, "_apply_gate"):
        return f"{kind} is not declared to be one of experts that others may run, and its forward is its own"
    way = getattr(module.config, "_experts_implementation", None)
    if way not in RUN_BY_TRANSFORMERS:
        return (
            f"{kind} is run by {way or 'nothing'} and not by what all classes share, {' or '.join(RUN_BY_TRANSFORMERS)}"
        )
    if getattr(module, "_is_expert_parallel", False):
        return f"{kind} holds only some of its experts, the others are in other processes"
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks, which would be lost"
    missing = [name for name in stacks_of(module) if module._parameters.get(name) is None]
    return f"{kind} has no parameter {missing[0]}" if missing else None


def refuses_kernel(layer: QuantLinear) -> str | None:
    """Why experts like this one are better multiplied as floats; None: a compiled kernel takes them."""
    if isinstance(layer.kernel, IntegerInputs):
        return None
    return "; ".join(f"{name}: {reason}" for name, reason in layer.refusals.items() if name == IntegerInputs().name)


def expert_layer(q: Any, dtype: torch.dtype) -> QuantLinear:
    """One expert's matrix, in its kernel's layout."""
    layer = QuantLinear(q, None, dtype=dtype, kernels=KERNELS).eval()
    layer.hold_packed()
    return layer
