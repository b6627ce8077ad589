"""Whether Triton's kernels can run on a device, in words. Nothing here imports triton.

Triton reads TRITON_INTERPRET when it is imported. With it, kernels are stepped through on the CPU by NumPy: for tests.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

FIRST = (8, 0)  # tensor cores for bfloat16 and INT8, with the loads that Triton's pipelining wants
FIRST_WITH_FLOAT8 = (8, 9)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter; which spellings mean yes is Triton's choice."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def stored_as(dtype: torch.dtype) -> torch.dtype:
    """The type that kernels store results of `dtype` in: Triton's interpreter cuts bfloat16 off, where torch and GPUs round."""
    return torch.float32 if dtype is torch.bfloat16 and interpreted() else dtype


def on_the_device_of_x(launch: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """What launches kernels for `x`, its first argument: Triton launches on the current device, wherever tensors are."""

    @functools.wraps(launch)
    def launched(x: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # torch leaves it untyped
            return launch(x, *args, **kwargs)

    return launched


def refuses(device: torch.device) -> str | None:
    """Why no kernel runs on tensors of this device; None: they do."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"its codes are on {device}, and Triton's kernels run on CUDA"
    if not _installed():
        return "triton is not installed: pip install 'halfbin[gpu]'"
    return None if device.type == "cpu" else _too_old(device, FIRST, "bfloat16 and INT8")


def refuses_float8(device: torch.device) -> str | None:
    """Why no product of FP8 with FP8 runs there; None: it does."""
    if reason := refuses(device):
        return reason
    return None if device.type == "cpu" else _too_old(device, FIRST_WITH_FLOAT8, "FP8")


def _too_old(device: torch.device, first: tuple[int, int], types: str) -> str | None:
    if torch.version.hip is not None:
        return "torch is built for ROCm, and these kernels were written for CUDA"
    found = torch.cuda.get_device_capability(device)
    if found >= first:
        return None
    name, (major, minor), least = torch.cuda.get_device_name(device), found, ".".join(map(str, first))
    return f"{name} has compute capability {major}.{minor}, and products of {types} want {least}"


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
