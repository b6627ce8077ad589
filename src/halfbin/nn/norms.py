"""Norms of a model that only runs, in one pass each instead of torch's seven.

Nobody's class is trusted by its name: what looks like an RMS norm is asked for the norm of some numbers, and replaced where
these are what the compiled loop gives.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from halfbin.kernels import norms
from halfbin.kernels.products import is_plain

_EPS = ("variance_epsilon", "eps")  # what transformers' classes call it


class RmsNorm(nn.Module):
    """An RMS norm computed by halfbin's loop, or, where that refuses or somebody looks on, by the model's own module."""

    def __init__(self, original: nn.Module, eps: float, *, one_plus: bool) -> None:
        """Take the place of `original`, which keeps its parameter `weight` [n]; so does this module, under the same name."""
        super().__init__()
        self.weight: nn.Parameter = original.weight  # type: ignore[assignment]
        self.eps, self.one_plus = eps, one_plus
        self._original = (original,)  # in a tuple: it is no child, or its weight would have two names
        self.train(original.training)

    def forward(self, x: Tensor) -> Tensor:
        """Float [..., n] to the same shape and type."""
        weight = self.weight
        tracked = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        if tracked or not is_plain(x) or norms.refuses(x, weight):
            original = self._original[0]
            original._parameters["weight"] = weight  # it may have been moved or converted
            y: Tensor = original(x)
            return y
        return norms.rms_norm(x, weight, self.eps, one_plus=self.one_plus)

    def extra_repr(self) -> str:
        """Size and eps."""
        return f"{list(self.weight.shape)}, eps={self.eps}"


def fuse_norms(model: nn.Module) -> int:
    """Replace RMS norms by `RmsNorm` where that gives their numbers; how many were."""
    fused = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if (replacement := _fused(child)) is not None:
                setattr(parent, name, replacement)
                fused += 1
    return fused


def _fused(module: nn.Module) -> RmsNorm | None:
    """What computes the same as a module, or None where it is no RMS norm that we know."""
    eps = next((value for name in _EPS if isinstance(value := getattr(module, name, None), float)), None)
    weight = dict(module.named_parameters()).get("weight")
    if eps is None or weight is None or not _stands_alone(module):
        return None
    x = _tokens(weight)
    if norms.refuses(x, weight):
        return None
    with torch.inference_mode():
        try:
            expected = module(x)
        except Exception:  # whatever it is, it takes other arguments than a norm does
            return None
        for one_plus in (False, True):
            if _agree(expected, norms.rms_norm(x, weight, eps, one_plus=one_plus)):
                return RmsNorm(module, eps, one_plus=one_plus)
    return None


def _stands_alone(module: nn.Module) -> bool:
    """Whether a module is one weight [n], with nothing below it and nobody who listens to it."""
    state = module.state_dict()
    alone = not (isinstance(module, RmsNorm) or module._forward_hooks or module._forward_pre_hooks)
    return alone and state.keys() == {"weight"} and state["weight"].dim() == 1 and state["weight"].numel() > 0


def _tokens(weight: Tensor) -> Tensor:
    """Inputs [3, n] for a norm with this weight: ordinary ones, large ones, and some so small that eps decides."""
    x = torch.randn(3, weight.shape[0], generator=torch.Generator().manual_seed(0))
    return (x * torch.tensor([[1.0], [30.0], [1e-3]])).to(weight.device, weight.dtype)


def _agree(expected: object, got: Tensor) -> bool:
    """Whether two results are one but for sums in another order: a few roundings of the type, each half of its eps."""
    if not isinstance(expected, Tensor) or expected.shape != got.shape or expected.dtype is not got.dtype:
        return False
    bound = 4 * torch.finfo(got.dtype).eps
    return bool(((expected.float() - got.float()).abs() <= bound * expected.float().abs()).all())
