"""The symmetric rank-k update: within its bound of the exact sums, and the same bits on every instruction set and cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halfbin.kernels.instruction_sets import usable
from halfbin.kernels.moments import add_products, refuses, upper_product

EVERY_SET = pytest.mark.parametrize("instruction_set", usable())
SIZES = [*range(1, 20), 47, 48, 49, 95, 97, 383, 385]
EPS = 2.0**-24


def sample(num_tokens: int, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * num_tokens + n)
    return torch.randn(num_tokens, n, generator=generator) ** 3


@EVERY_SET
@pytest.mark.parametrize("num_tokens", [1, 2, 255, 256, 257, 600])
def test_every_element_is_within_the_bound_of_float32_sums(num_tokens: int, instruction_set: str) -> None:
    for n in SIZES:
        x = sample(num_tokens, n)
        exact, magnitudes = x.double().T @ x.double(), x.double().abs().T @ x.double().abs()
        found = upper_product(x, instruction_set=instruction_set)
        # A fused product for each of 256 tokens, then an addition for each such part.
        bound = (min(num_tokens, 256) + -(-num_tokens // 256)) * EPS * magnitudes
        assert bool((found.double() - exact).abs().le(bound).logical_or(torch.ones(n, n).tril(-1).bool()).all()), n
        assert torch.equal(found, found.triu())


@EVERY_SET
@pytest.mark.parametrize("n", [1, 100, 1300])  # 1300 columns are more than a block
def test_cuts_threads_and_instruction_sets_do_not_change_the_bits(n: int, instruction_set: str) -> None:
    x = sample(300, n)
    expected = upper_product(x)
    before = torch.get_num_threads()
    try:
        for threads, height in ((1, n), (2, 97), (2, 384), (2, 500)):
            torch.set_num_threads(threads)
            assert torch.equal(upper_product(x, instruction_set=instruction_set), expected)
            strips = [torch.ones(min(height, n - i), n - i, dtype=torch.float64) for i in range(0, n, height)]
            add_products(x, strips, instruction_set=instruction_set)
            whole = torch.cat([torch.nn.functional.pad(s, (n - s.shape[1], 0)) for s in strips]).triu()
            assert torch.equal(whole, expected.double() + torch.ones(n, n, dtype=torch.float64).triu())
    finally:
        torch.set_num_threads(before)


def test_nothing_outside_of_the_sums_is_touched() -> None:
    x = sample(5, 50)
    room = torch.full((52, 50), 7.0, dtype=torch.float64)
    add_products(x, [room[1:-1]])
    assert bool((room[0] == 7).all()) and bool((room[-1] == 7).all())
    with pytest.raises(ValueError, match="do not fit"):
        add_products(x, [room])
    with pytest.raises(ValueError, match="do not fit"):
        add_products(x, [room[1:-1]], instruction_set="none")


def test_an_empty_sample_adds_nothing_and_other_devices_are_refused() -> None:
    strips = [torch.ones(3, 3, dtype=torch.float64)]
    add_products(torch.zeros(0, 3), strips)
    assert bool((strips[0] == 1).all()) and not bool(upper_product(torch.zeros(0, 3)).any())
    assert "on meta" in (refuses(torch.zeros(1, 1, device="meta")) or "")
