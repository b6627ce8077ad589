"""What stands between two blocks: the same result from files as from memory, and a run that cannot be held is refused."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import halfbin as hb
from halfbin.errors import HalfbinError, OutputError
from halfbin.models import mapped
from halfbin.planning import Plan
from halfbin.planning.footprint import Reading
from halfbin.run import activations
from halfbin.run.activations import require_memory, with_reading
from models.zoo import directory_of

GPTQ = '[[rule]]\nmatch = "*"\nweights = "int4-g16"\nmethod = "gptq"\n'
READING = Reading(num_samples=128, length=512, at_once=2048)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "gptq.toml").write_text(GPTQ)
    return tmp_path / "gptq.toml"


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(3, 48, (12, 32)))
    return tmp_path / "tokens.npy"


def run(name: str, out: Path, recipe: Path, tokens: Path, where: str) -> bytes:
    hb.quantize(directory_of(name), out, recipe=recipe, calibration=tokens, evaluate=False, activations=where)
    return (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["llama", "t5", "mamba"])
def test_files_give_the_bytes_that_memory_gives_and_leave_nothing(
    name: str, tmp_path: Path, recipe: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "SMALLEST_BYTES", 256)
    taken: list[int] = []
    copy = mapped.MappedMemory._copy

    def counted(self: mapped.MappedMemory, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        taken.append(storage.nbytes())
        return copy(self, storage)

    monkeypatch.setattr(mapped.MappedMemory, "_copy", counted)
    expected = run(name, tmp_path / "memory", recipe, tokens, "memory")
    assert not taken
    assert run(name, tmp_path / "disk", recipe, tokens, "disk") == expected
    assert taken
    assert not list(tmp_path.rglob(".*"))


def test_a_disk_that_fills_up_ends_the_run_and_leaves_no_output(
    tmp_path: Path, recipe: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(mapped, "SMALLEST_BYTES", 256)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match="No space left"):
        run("llama", tmp_path / "out", recipe, tokens, "disk")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gptq.toml", "tokens.npy"]


@pytest.mark.parametrize(
    ("choice", "free", "in_files"),
    [
        pytest.param("auto", 10**12, False, id="small beside the memory"),
        pytest.param("auto", 10**6, True, id="more than a quarter of it"),
        pytest.param("auto", None, False, id="memory unknown"),
        pytest.param("memory", 10**6, False, id="asked for memory"),
        pytest.param("disk", 10**12, True, id="asked for files"),
    ],
)
def test_the_size_decides_unless_the_user_does(
    choice: str, free: int | None, in_files: bool, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = hb.plan(directory_of("llama"), recipe=recipe)
    monkeypatch.setattr(activations, "available_bytes", lambda: free)
    found = with_reading(plan, READING, choice)
    assert found.reading == dataclasses.replace(READING, in_files=in_files)


def test_another_place_is_refused(recipe: Path) -> None:
    with pytest.raises(HalfbinError, match="auto, memory, disk"):
        hb.plan(directory_of("llama"), recipe=recipe, activations="tape")


def planned(recipe: Path) -> Plan:
    return hb.plan(directory_of("llama"), recipe=recipe, num_samples=100_000, activations="memory")


def test_a_run_that_cannot_be_held_is_refused_before_the_work(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(recipe)
    free = int(plan.peak_memory_bytes / activations.TOLERANCE) - 1
    monkeypatch.setattr(activations, "available_bytes", lambda: free)
    with pytest.raises(HalfbinError, match=r"--activations disk.*--num-samples"):
        require_memory(plan)
    monkeypatch.setattr(activations, "available_bytes", lambda: free + 2)
    require_memory(plan)


def test_a_recipe_without_data_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = hb.plan(directory_of("llama"), recipe="int8", num_samples=10**9)
    monkeypatch.setattr(activations, "available_bytes", lambda: 1)
    require_memory(plan)
    assert plan.to_json()["activations"] is None
