"""Triton decides when it is imported whether it interprets: tests that need the interpreter get a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from halfbin.kernels.triton import machine
from kernels.triton.where import INTERPRETS

TESTS = Path(__file__).parents[2]
FILES = ["kernels/triton/test_weight_only.py", "kernels/triton/test_quantized_inputs.py", "nn/test_gpu.py"]


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETS, reason="there is no Triton 3.7: pip install 'halfbin[gpu]'")
@pytest.mark.skipif(machine.interpreted(), reason="the tests run here already")
@pytest.mark.parametrize("name", FILES)
def test_under_the_interpreter(name: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", str(TESTS / name)]
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    told = f"{done.stdout}\n{done.stderr}"
    assert done.returncode == 0 and " passed" in told and "skipped" not in told, told
