"""Every expert sees every token, and the block gives what it always gave."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halfbin.models.every_expert import EveryExpert
from halfbin.models.products import Product, Watch, unwatched
from halfbin.models.structure import Structure
from halfbin.models.walk import Stop
from models.walking import walking

NUM_EXPERTS = 4


class Experts(nn.Module):
    """Like those of transformers; `takes` is how many experts of a token its code can do."""

    def __init__(self, takes: int = NUM_EXPERTS) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(NUM_EXPERTS, 6, 3, generator=torch.Generator().manual_seed(0)))
        self.down = nn.Parameter(torch.randn(NUM_EXPERTS, 3, 6, generator=torch.Generator().manual_seed(1)))
        self.takes = takes

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for slot in range(min(chosen.shape[1], self.takes)):
            for expert in range(NUM_EXPERTS):
                rows = chosen[:, slot] == expert
                hidden = torch.relu(x[rows] @ self.up[expert].T)
                y[rows] += hidden @ self.down[expert].T * weights[rows, slot, None]
        return y


class Mixture(nn.Module):
    """Every token goes to experts 0 and 1."""

    def __init__(self, takes: int = NUM_EXPERTS) -> None:
        super().__init__()
        self.experts = Experts(takes)

    def forward(self, x: Tensor) -> Tensor:
        chosen = torch.tensor([0, 1]).expand(len(x), -1)
        out: Tensor = self.experts(x, chosen, torch.full((len(x), 2), 0.5))
        return out


def rows_of(module: nn.Module, run: Any) -> Counter[tuple[str, int]]:
    rows: Counter[tuple[str, int]] = Counter()
    parameters = dict(module.named_parameters())

    def see(product: Product) -> None:
        place = product.place
        each = parameters[place.parameter][0].numel() if parameters[place.parameter].ndim == 3 else place.offset + 1
        rows[place.parameter, place.offset // each] += product.x.numel() // product.x.shape[-1]

    with Watch(parameters, see):
        run()
    return +rows


def test_all_rows_are_seen_once_and_the_output_stays() -> None:
    block, x = Mixture(), torch.randn(7, 3, generator=torch.Generator().manual_seed(2))
    expected = block(x)
    experts, outputs = EveryExpert(block, lambda: block(x)), []
    with experts.routed():
        rows = rows_of(block, lambda: outputs.append(block(x)))
    assert rows == {(f"experts.{name}", e): 7 for name in ("up", "down") for e in range(NUM_EXPERTS)}
    assert torch.equal(outputs[0], expected)
    assert set(rows_of(block, lambda: block(x))) == {(f"experts.{n}", e) for n in ("up", "down") for e in (0, 1)}
    assert "forward" not in vars(block.experts)


def test_code_that_takes_no_other_routing_is_left_alone() -> None:
    block, x = Mixture(takes=2), torch.randn(7, 3, generator=torch.Generator().manual_seed(2))
    experts = EveryExpert(block, lambda: block(x))
    assert not experts.parameters
    with experts.routed():
        rows = rows_of(block, lambda: block(x))
    assert {expert for _, expert in rows} == {0, 1}


def test_code_that_raises_is_left_alone() -> None:
    class Strict(Experts):
        def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
            if chosen.shape[1] != 2:
                raise ValueError("two experts, please")
            return super().forward(x, chosen, weights)

    block, x = Mixture(), torch.randn(7, 3)
    block.experts = Strict()
    assert not EveryExpert(block, lambda: block(x)).parameters


def test_nothing_is_seen_while_nobody_watches_and_watching_goes_on_after_an_error() -> None:
    linear, x, seen = nn.Linear(3, 3), torch.ones(1, 3), list[Product]()
    with Watch(dict(linear.named_parameters()), seen.append):
        with pytest.raises(ZeroDivisionError), unwatched():
            linear(x)
            raise ZeroDivisionError
        assert not seen
        linear(x)
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss", "granite-moe", "switch"])
def test_the_mixtures_of_transformers_take_it(name: str) -> None:
    with walking(name) as w:
        structure, found = Structure(w.partial.model), list[int]()

        def look(stop: Stop) -> None:
            call = stop.calls[0]
            before = stop.run(call)
            experts = EveryExpert(stop.block.module, lambda: stop.run(call))
            held = {p: w.partial.get(p) for p in stop.block.parameters if ".experts." in p or p in structure.experts}
            matrices = {p: value for p, value in held.items() if value.ndim >= 2 and not p.endswith("bias")}
            assert {id(p) for p in held.values()} <= experts.parameters
            if not matrices:
                return
            tokens, rows = call.args[0].shape[:2].numel(), Counter[tuple[str, int]]()

            def see(product: Product) -> None:
                place = product.place
                stacked = matrices[place.parameter].ndim == 3
                expert = place.offset // matrices[place.parameter][0].numel() if stacked else 0
                rows[place.parameter, expert] += product.x.numel() // product.x.shape[-1]

            with experts.routed(), Watch(matrices, see):
                after = stop.run(call)
            expected = {
                (p, e): tokens for p, value in matrices.items() for e in range(len(value) if value.ndim == 3 else 1)
            }
            assert rows == expected
            first, second = (x[0] if isinstance(x, tuple) else x for x in (before, after))
            assert torch.equal(first, second)
            found.append(len(rows))

        w.stops(w.inputs(1, length=6, size=1), look)
        assert found
