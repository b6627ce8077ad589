"""The order in which a block's sites are rounded, and leaving the block when everything has been seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from halfbin.formats.checkpoint import open_checkpoint
from halfbin.formats.read import layout_named
from halfbin.models import open_skeleton
from halfbin.models.blocks import find_blocks
from halfbin.models.partial import PartialModel
from halfbin.models.placement import find_places
from halfbin.models.products import Place, Product
from halfbin.models.walk import walk
from halfbin.planning import make_plan, parse_recipe
from halfbin.run.blockwise.stages import Countdown, Order, Site, glance, read_by
from models.zoo import directory_of

RECIPE = 'layout = "halfbin"\n[[rule]]\nmatch = "*"\nweights = "int4-channel"\nmethod = "gptq"\ncorrection = 0.5\n'


class FirstBlock:
    """The first block of a model of the zoo, standing before some tokens."""

    def __init__(self, directory: Path) -> None:
        skeleton = open_skeleton(directory)
        with open_checkpoint(directory) as checkpoint:
            plan = make_plan(
                skeleton, checkpoint, parse_recipe(RECIPE, source="test"), layout_named("halfbin", skeleton.dtype)
            )
            partial = PartialModel(skeleton, checkpoint)
            partial.load(name for name, _ in partial.model.named_parameters())
        ids = torch.randint(3, 48, (2, 24), generator=torch.Generator().manual_seed(0))
        self._walk = walk(partial.model, find_blocks(partial.model), [{"input_ids": ids}])
        self.stop = next(self._walk)
        names = self.stop.block.parameters
        self.parameters = {name: partial.get(name) for name in names}
        on_disk = set(partial.on_disk(names))
        planned = [s for s in plan.sites if s.quantized and s.site.tensor in on_disk]
        places = find_places(partial, [s.site for s in planned])
        self.sites: list[Site] = [(s, places[s.site.tensor]) for s in planned]

    def run(self) -> object:
        with torch.no_grad():
            return self.stop.run(self.stop.calls[0])


def kinds(stage: list[Site]) -> set[str]:
    return {planned.site.tensor.removesuffix(".weight").rpartition(".")[2] for planned, _ in stage}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]),
        ("phi3", [{"qkv_proj"}, {"o_proj"}, {"gate_up_proj"}, {"down_proj"}]),
        ("mixtral", [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"w1", "w3"}, {"w2"}]),
    ],
)
def test_sites_come_in_the_order_of_their_inputs(name: str, expected: list[set[str]]) -> None:
    block = FirstBlock(directory_of(name))
    stages = Order.of(block.run, block.parameters).stages(block.sites)
    assert [kinds(stage) for stage in stages] == expected
    assert sum(map(len, stages)) == len(block.sites)


def test_sites_that_were_not_seen_come_last() -> None:
    block = FirstBlock(directory_of("llama"))
    order = Order.of(block.run, block.parameters)
    hidden = {p for planned, places in block.sites if "q_proj" in planned.site.tensor for p in places}
    order.group = {place: number for place, number in order.group.items() if place not in hidden}
    assert "q_proj" in kinds(order.stages(block.sites)[-1])


def test_a_block_is_left_when_everything_has_been_seen() -> None:
    block = FirstBlock(directory_of("llama"))
    order = Order.of(block.run, block.parameters)
    wanted = read_by(order.stages(block.sites)[1])
    seen: list[Place] = []

    def see(product: Product) -> None:
        seen.append(product.place)

    for countdown in (Countdown(order, wanted), None):
        with glance(block.parameters, see, countdown):
            block.run()
        assert seen[-1] == wanted[-1] if countdown else seen[-1] != wanted[-1]
    assert len(seen) == 4 + 7


def test_an_error_inside_a_glance_is_not_swallowed() -> None:
    block = FirstBlock(directory_of("llama"))
    with pytest.raises(KeyError), glance(block.parameters, lambda product: None, None):
        raise KeyError
