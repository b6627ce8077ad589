"""Compiled loops run on torch's threads where those are found, and survive a fork."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from halfbin.kernels import openmp
from halfbin.kernels.openmp import _loaded_runtime

TORCH = Path(torch.__file__).parent

PROGRAM = """
import os, sys, torch
from halfbin.kernels import _native
from halfbin.kernels.openmp import share_torchs_threads

torch.set_num_threads(2)
words = torch.arange(2**16)
total = int(words.sum())
assert _native.streaming_read(words.data_ptr(), 2**19, 2) == total  # our own pool
assert not _native.uses_openmp()
assert share_torchs_threads()
for _ in range(100):
    assert _native.streaming_read(words.data_ptr(), 2**19, 2) == total
    assert int(words.sum()) == total
child = os.fork()
if not child:
    assert not _native.uses_openmp()
    for _ in range(100):
        assert _native.streaming_read(words.data_ptr(), 2**19, 2) == total
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert _native.uses_openmp() and _native.streaming_read(words.data_ptr(), 2**19, 2) == total
"""


@pytest.mark.skipif(
    not list((TORCH / "lib").glob("libgomp*")) or not openmp.MAPS.exists(), reason="no GNU OpenMP in torch"
)
def test_loops_run_on_torchs_threads_and_a_forked_child_has_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False, env=os.environ
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_torchs_runtime_is_preferred_and_of_several_others_none_is_taken() -> None:
    own, system, third = TORCH / "lib" / "libgomp.so.1", Path("/usr/lib/libgomp.so.1"), Path("/opt/libgomp.so.1")
    other = Path("/usr/lib/libc.so.6")
    assert _loaded_runtime([other, system, own]) == own
    assert _loaded_runtime([other, system]) == system
    assert _loaded_runtime([system, third]) is None
    assert _loaded_runtime([other]) is None


def test_no_map_of_the_process_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(openmp, "MAPS", tmp_path / "none")
    assert openmp._mapped_files() == []
