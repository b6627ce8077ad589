"""Where Triton's kernels run in this process: on a GPU, or in the interpreter, or nowhere."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version

import pytest
import torch

from halfbin.kernels.triton import machine

INSTALLED = importlib.util.find_spec("triton") is not None
# Triton 3.6's interpreter stops at loops with NumPy 2.4 and later, which makes no numbers of arrays of one element.
INTERPRETS = INSTALLED and tuple(int(n) for n in version("triton").split(".")[:2]) >= (3, 7)
ON_GPU = torch.cuda.is_available() and not machine.interpreted()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
UNIT = 2.0**-23 if ON_GPU else 2.0**-24  # tensor cores may drop bits where the interpreter rounds


def only_where_kernels_run() -> None:
    """Skip the calling module elsewhere."""
    if not (ON_GPU or (INTERPRETS and machine.interpreted())):
        reason = "Triton's kernels run on a GPU, or with TRITON_INTERPRET=1: test_interpreter.py runs these so"
        pytest.skip(reason, allow_module_level=True)
