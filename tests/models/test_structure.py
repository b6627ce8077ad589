from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from halfbin.models import Structure


class Feed(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)


class Layer(Feed):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__(width, inner)
        self.norm = nn.LayerNorm(width)


class Stack(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.matrices = nn.Parameter(torch.zeros(shape))


class Block(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return x


def listed(kind: type[nn.Module], num: int) -> nn.ModuleList:
    return nn.ModuleList(kind(8, 16) for _ in range(num))


@pytest.mark.parametrize(
    ("block", "routers"),
    [
        pytest.param(Block(gate=nn.Linear(8, 4), experts=listed(Feed, 4)), {"gate.weight"}, id="a list of experts"),
        pytest.param(Block(gate=nn.Linear(8, 4), experts=Stack(4, 16, 8)), {"gate.weight"}, id="a stack of experts"),
        pytest.param(Block(gate=nn.Linear(8, 4), layers=listed(Layer, 4)), set(), id="layers with norms"),
        pytest.param(Block(gate=nn.Linear(8, 3), experts=listed(Feed, 4)), set(), id="another count"),
        pytest.param(Block(gate=nn.Linear(9, 4), experts=listed(Feed, 4)), set(), id="another width"),
        pytest.param(Block(token=Stack(1, 1, 8), gate=nn.Linear(8, 1)), set(), id="a class token"),
        pytest.param(
            Block(shared=Feed(8, 4), experts=listed(Feed, 4)), set(), id="a shared expert as wide as they are many"
        ),
        pytest.param(
            Block(gate=nn.Linear(8, 4), shared_gate=nn.Linear(8, 1), experts=Stack(4, 16, 8)),
            {"gate.weight", "shared_gate.weight"},
            id="the gate of a shared expert",
        ),
    ],
)
def test_a_router_is_what_scores_the_experts_beside_it(block: nn.Module, routers: set[str]) -> None:
    assert Structure(block).routers == routers
    assert Structure(Block(layer=block)).routers == {f"layer.{router}" for router in routers}


def test_a_stack_is_of_experts_only_where_something_routes_to_it() -> None:
    assert Structure(Block(gate=nn.Linear(8, 4), experts=Stack(4, 16, 8))).experts == {"experts.matrices"}
    assert Structure(Block(experts=Stack(4, 16, 8))).experts == set()


def test_a_plain_module_has_no_head_and_ties_nothing() -> None:
    embedding = nn.Embedding(4, 8)
    structure = Structure(Block(embedding=embedding, linear=nn.Linear(8, 4)))
    assert structure.head is None
    assert not structure.ties(embedding)
