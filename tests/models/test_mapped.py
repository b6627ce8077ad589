"""Tensors in mapped files: the same numbers for whoever has them, and nothing left on the disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from halfbin.errors import OutputError
from halfbin.models.mapped import MappedMemory

LARGE = 40_000  # numbers


def numbers(count: int = LARGE) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(count))


def in_a_file(x: Tensor) -> bool:
    return x.untyped_storage().filename is not None


def test_numbers_stay_and_lie_in_a_file_that_has_no_name(tmp_path: Path) -> None:
    x, other, memory = numbers(), numbers(LARGE + 1).to(torch.bfloat16), MappedMemory(tmp_path)
    before, was = [x.clone(), other.clone()], x
    memory.take(((x,), {"cache": SimpleNamespace(keys=[other])}))
    assert in_a_file(x) and in_a_file(other) and was is x
    assert torch.equal(x, before[0]) and torch.equal(other, before[1])
    assert memory.num_bytes == 4 * LARGE + 2 * (LARGE + 1)
    assert not list(tmp_path.iterdir())


def test_views_of_one_memory_go_on_sharing_it(tmp_path: Path) -> None:
    x = numbers().view(200, 200)
    turned = x.T
    MappedMemory(tmp_path).take([x, turned])
    x[3, 5] = 7.0
    assert in_a_file(x) and in_a_file(turned)
    assert float(turned[5, 3]) == 7.0 and turned.stride() == (1, 200)


def test_what_was_moved_is_not_moved_again(tmp_path: Path) -> None:
    x, memory = numbers(), MappedMemory(tmp_path)
    memory.take(x)
    memory.take([x])
    assert memory.num_bytes == 4 * LARGE


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(numbers(100), id="small"),
        pytest.param(nn.Parameter(numbers()), id="a parameter"),
        pytest.param(numbers(4 * LARGE)[:LARGE], id="a small part of a large memory"),
    ],
)
def test_what_is_not_worth_it_or_belongs_to_others_stays(value: Tensor, tmp_path: Path) -> None:
    memory = MappedMemory(tmp_path)
    memory.take(value)
    assert not in_a_file(value)
    assert memory.num_bytes == 0


def test_a_full_disk_is_told_before_a_page_is_missing_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    x = numbers()
    with pytest.raises(OutputError, match="No space left on device.*--activations memory"):
        MappedMemory(tmp_path).take(x)
    assert not list(tmp_path.iterdir())
    assert not in_a_file(x) and torch.equal(x, numbers())


def test_where_nothing_can_be_reserved_zeros_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []

    def unknown(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    def write(descriptor: int, data: memoryview) -> int:
        written.append(len(data))
        return really(descriptor, data)

    really = os.write
    monkeypatch.setattr(os, "posix_fallocate", unknown)
    monkeypatch.setattr(os, "write", write)
    x = numbers(300_000)
    MappedMemory(tmp_path).take(x)
    assert in_a_file(x) and torch.equal(x, numbers(300_000))
    assert sum(written) == 4 * 300_000
