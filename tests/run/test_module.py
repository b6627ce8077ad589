"""`hb.quantize(module)`: any torch module in memory, its layers replaced in place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import halfbin as hb
from halfbin.nn import QuantConv, QuantEmbedding, QuantLinear
from halfbin.tensor import dequantize, parse_scheme, quantize
from models import zoo


class Network(nn.Module):
    """A little of everything; the last linear shares its weight with the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 48)
        self.conv = nn.Conv1d(48, 32, 3, padding=1, groups=2)
        self.norm = nn.LayerNorm(32)
        self.first = nn.Linear(32, 40)
        self.second = nn.Linear(40, 40)
        self.again = nn.Linear(40, 40)
        self.again.weight = self.second.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.conv(self.table(ids).transpose(1, 2)).transpose(1, 2))
        out: Tensor = self.again(self.second(self.first(x).relu()).relu())
        return out


def network() -> Network:
    torch.manual_seed(0)
    return Network().eval()


def classes(model: nn.Module, *names: str) -> list[type]:
    return [type(model.get_submodule(name)) for name in names]


IDS = torch.arange(14).view(2, 7)
EVERYTHING = (
    '[[rule]]\nmatch = "role:embedding"\nweights = "int8-channel"\n[[rule]]\nmatch = "*"\nweights = "int8-channel"\n'
)


@torch.no_grad()
def test_the_outputs_are_those_of_the_dequantized_weights(tmp_path: Path) -> None:
    (tmp_path / "all.toml").write_text(EVERYTHING)
    model, by_hand = network(), network()
    for layer in (by_hand.table, by_hand.conv, by_hand.first, by_hand.second):
        rows = layer.weight.flatten(1)
        layer.weight.copy_(dequantize(quantize(rows, parse_scheme("int8-channel"))).view(layer.weight.shape))
    swaps = hb.quantize(model, recipe=tmp_path / "all.toml")
    assert [swap.name for swap in swaps if swap.scheme] == ["table", "conv", "first", "second", "again"]
    assert classes(model, "table", "conv", "first") == [QuantEmbedding, QuantConv, QuantLinear]
    expected, found = by_hand(IDS), model(IDS)
    # Products of at most 144 terms of float32, summed in another order, four layers deep.
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_layers_that_share_a_weight_share_its_codes() -> None:
    model = network()
    hb.quantize(model, recipe="int8")
    assert classes(model, "second", "again") == [QuantLinear, QuantLinear]
    assert model.get_buffer("second.codes").data_ptr() == model.get_buffer("again.codes").data_ptr()


def test_embeddings_stay_unless_a_rule_names_them() -> None:
    model = network()
    swaps = hb.quantize(model, recipe="int4")
    assert classes(model, "table") == [nn.Embedding]
    assert next(swap for swap in swaps if swap.name == "table").scheme is None


def test_after_an_error_the_module_is_what_it_was() -> None:
    model = network()
    before = dict(model.named_modules())
    with torch.no_grad():
        model.again.weight[3, 4] = float("nan")
    with pytest.raises(hb.HalfbinError, match=r"\[3, 4\]") as caught:
        hb.quantize(model, recipe="int8")
    assert "second" in str(caught.value)
    assert dict(model.named_modules()) == before


@torch.no_grad()
def test_a_transformers_model_in_memory_becomes_what_its_directory_becomes(tmp_path: Path) -> None:
    source = zoo.directory_of("llama")
    hb.quantize(source, tmp_path / "out", recipe="int8", evaluate=False)
    from_disk, in_memory = hb.load(tmp_path / "out", dtype=torch.float32), hb.load(source, dtype=torch.float32)
    hb.quantize(in_memory, recipe="int8")
    ids = torch.arange(3, 15)[None]
    expected, found = from_disk(ids).logits, in_memory(ids).logits
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
