"""Experts in one call give the bits of each expert's own product, on every instruction set and number of threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halfbin.errors import DataError
from halfbin.kernels import experts, products

SETS = products.instruction_sets()
sets = pytest.mark.parametrize("name", SETS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def stacked(num: int, n: int, k: int, size: int, *, bits: int = 4, zeros: bool = False) -> Tensor:
    """`num` random weights [n, k] of unsigned codes in groups of `size` columns, packed."""
    generator = torch.Generator().manual_seed(num * 7919 + n * 1009 + k)
    shape, memory = (n, -(-k // size)), []
    for _ in range(num):
        codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
        zero = torch.randint(0, 2**bits, shape, generator=generator).int() if zeros else None
        scale = (torch.rand(shape, generator=generator) * 0.02 + 1e-3).half()
        memory.append(products.pack(codes, scale, zero, bits=bits, least=0, group_size=size))
    held = experts.stack(num, memory[0].numel())
    for i, one in enumerate(memory):
        held[i] = one
    return held


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def one_by_one(x: Tensor, packed: Tensor, chosen: Tensor, bias: Tensor | None, n: int) -> Tensor:
    """The same by the single product, an expert after the other."""
    y = torch.full((*chosen.shape, n), torch.nan, dtype=x.dtype)
    for expert in range(len(packed)):
        tokens, slots = torch.where(chosen == expert)
        its = None if bias is None else bias[expert].contiguous()
        if len(tokens):
            y[tokens, slots] = products.linear(x[tokens], packed[expert], its, n, experts.GRID)
    return y


def same_bits(a: Tensor, b: Tensor) -> bool:
    whole = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(a.view(whole), b.view(whole))


def routings(tokens: int, num: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(tokens)
    scores = torch.rand(tokens, num, generator=random)
    return {
        "top-2": scores.topk(2).indices,  # with few tokens, most experts have none or one
        "top-1": scores.argmax(1, keepdim=True),
        "all to one expert": torch.full((tokens, 1), num - 1),
        "the same expert twice": torch.full((tokens, 2), 1),
        "every expert": torch.arange(num).expand(tokens, num),
    }


@sets
@dtypes
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 20, 70])
@pytest.mark.parametrize(("n", "k", "size"), [(1, 1, 32), (70, 96, 32), (64, 130, 128), (193, 64, 64)], ids=str)
def test_the_bits_are_those_of_each_experts_own_product(
    n: int, k: int, size: int, tokens: int, dtype: torch.dtype, name: str
) -> None:
    num = 5
    packed, x, bias = stacked(num, n, k, size), floats(tokens, k, dtype=dtype), floats(num, n, dtype=dtype)
    for what, chosen in routings(tokens, num).items():
        with products.forced(name, 1):
            expected = one_by_one(x, packed, chosen, bias, n)
        for threads in (1, 2):
            with products.forced(name, threads):
                found = experts.linear(x, packed, chosen, bias, n)
            assert same_bits(found, expected), (what, threads)


@sets
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zero-points"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_of_every_width(bits: int, zeros: bool, name: str) -> None:
    packed, x = stacked(3, 130, 160, 32, bits=bits, zeros=zeros), floats(11, 160)
    chosen = routings(11, 3)["top-2"]
    with products.forced(name, 2):
        assert same_bits(experts.linear(x, packed, chosen, None, 130), one_by_one(x, packed, chosen, None, 130))


def test_what_would_be_chosen_gives_the_same_bits_where_experts_have_few_and_many_tokens() -> None:
    """AMX takes the expert with many tokens and AVX-512 the one with one, where there are both; the plain loops arbitrate."""
    packed, x = stacked(4, 200, 256, 128), floats(40, 256)
    chosen = torch.zeros(40, 1, dtype=torch.int64)
    chosen[7], chosen[9] = 2, 3
    with products.forced("portable", 1):
        expected = one_by_one(x, packed, chosen, None, 200)
    assert same_bits(experts.linear(x, packed, chosen, None, 200), expected)


def test_an_expert_with_more_tokens_than_fit_a_task() -> None:
    """3000 tokens times 64 rows of float32 are more than what results of a task should take."""
    packed, x = stacked(2, 140, 32, 32), floats(3000, 32)
    chosen = routings(3000, 2)["top-1"]
    assert same_bits(experts.linear(x, packed, chosen, None, 140), one_by_one(x, packed, chosen, None, 140))


def test_a_token_that_is_not_finite_gives_nan_and_spoils_no_other() -> None:
    packed, x, chosen = stacked(3, 70, 64, 32), floats(6, 64), routings(6, 3)["top-2"]
    expected = experts.linear(x, packed, chosen, None, 70)
    x[2, 5] = torch.inf
    found = experts.linear(x, packed, chosen, None, 70)
    assert bool(found[2].isnan().all())
    others = torch.arange(6) != 2
    assert same_bits(found[others], expected[others])


@pytest.mark.parametrize("bad", [-1, 3, 2**40, -(2**63)])
def test_an_expert_that_there_is_not_is_refused_by_name(bad: int) -> None:
    packed, x, chosen = stacked(3, 70, 64, 32), floats(6, 64), routings(6, 3)["top-2"].clone()
    chosen[4, 1] = bad
    with pytest.raises(DataError, match=rf"token 4 chose expert {bad} \(slot 1\), and there are 0 to 2"):
        experts.linear(x, packed, chosen, None, 70)


@pytest.mark.parametrize(
    "chosen", [torch.zeros(5, 2).long(), torch.zeros(6).long(), torch.zeros(6, 2)], ids=["tokens", "one-axis", "floats"]
)
def test_a_routing_of_another_shape_or_type_is_refused(chosen: Tensor) -> None:
    with pytest.raises(DataError, match=r"expected integers \[6, slots\]"):
        experts.linear(floats(6, 64), stacked(3, 70, 64, 32), chosen, None, 70)


@pytest.mark.parametrize(("tokens", "slots"), [(0, 2), (4, 0)])
def test_no_tokens_and_no_slots_are_taken(tokens: int, slots: int) -> None:
    chosen = torch.zeros(tokens, slots, dtype=torch.int32)
    found = experts.linear(floats(tokens, 64), stacked(3, 70, 64, 32), chosen, None, 70)
    assert found.shape == (tokens, slots, 70)


def test_steps_in_memory_are_taken_as_they_are() -> None:
    packed, x, chosen = stacked(3, 70, 64, 32), floats(64, 6).T, routings(6, 3)["top-2"].T.contiguous().T
    expected = one_by_one(x, packed, chosen, None, 70)
    assert same_bits(experts.linear(x, packed, chosen, None, 70), expected)


def test_the_operator_has_a_fake_and_compilers_see_it() -> None:
    packed, x, chosen = stacked(3, 70, 64, 32), floats(6, 64), routings(6, 3)["top-2"]
    torch.library.opcheck(torch.ops.halfbin.experts_linear.default, (x, packed, chosen, None, 70))
    graph = torch.export.export(_Layer(packed), (x, chosen)).graph
    assert any(node.target is torch.ops.halfbin.experts_linear.default for node in graph.nodes)


class _Layer(torch.nn.Module):
    def __init__(self, packed: Tensor) -> None:
        super().__init__()
        self.register_buffer("packed", packed)

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        assert isinstance(self.packed, Tensor)
        return experts.linear(x, self.packed, chosen, None, 70)
