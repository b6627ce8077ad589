"""`hb.quantize(module)`: any torch module in memory, its layers replaced in place."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import halfbin as hb
from halfbin.nn import EXACT, QuantConv, QuantEmbedding, QuantLinear
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


def exactly(model: Any) -> Any:
    """The same model, with float inputs as they are: its layers' kernels would round them."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.choose(EXACT)
    return model


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
    expected, found = by_hand(IDS), exactly(model)(IDS)
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
@pytest.mark.parametrize("preset", ["int4", "int8", "fp8", "nf4"])
def test_every_preset_works_on_pictures_and_their_convolutions(preset: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, 10)
    ).eval()
    by_hand = copy.deepcopy(model)
    swaps = {swap.name: swap.scheme for swap in hb.quantize(model, recipe=preset)}
    assert list(swaps) == ["0", "3"] and swaps["0"] is not None and str(swaps["0"]).endswith("-channel")
    for name, scheme in swaps.items():
        assert scheme is not None
        weight = by_hand.get_submodule(name).get_parameter("weight")
        weight.copy_(dequantize(quantize(weight.flatten(1), scheme)).view(weight.shape))
    pictures = torch.randn(2, 3, 16, 16)
    expected, found = by_hand(pictures), exactly(model)(pictures)
    # At most 392 products of float32, summed in another order.
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_a_padding_row_stays_zero_and_a_scaled_embedding_its_own(tmp_path: Path) -> None:
    (tmp_path / "all.toml").write_text(EVERYTHING)
    model = nn.Sequential(nn.Embedding(6, 8, padding_idx=0), nn.Linear(8, 4, bias=False))
    hb.quantize(model, recipe=tmp_path / "all.toml")
    assert isinstance(model[0], QuantEmbedding)
    assert not model(torch.tensor([0])).any() and model(torch.tensor([1])).any()


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        pytest.param("fp16", r"casts to torch.float16.*model.to\(torch.float16\)", id="a cast"),
        pytest.param(
            '[[rule]]\nmatch = "secnd"\nweights = "int8"\n', "'secnd' matches no site.*'second'", id="no such layer"
        ),
        pytest.param('[[rule]]\nmatch = "*"\nweigths = "int8"\n', "weigths", id="unknown key"),
        pytest.param('remainder = "refuse"\n[[rule]]\nmatch = "*"\nweights = "int4-g24"\n', "first", id="no divisor"),
    ],
)
def test_a_recipe_that_does_not_serve_leaves_the_module_alone(rules: str, words: str, tmp_path: Path) -> None:
    model = network()
    before = dict(model.named_modules())
    if "\n" in rules:
        (tmp_path / "mine.toml").write_text(rules)
        rules = str(tmp_path / "mine.toml")
    with pytest.raises(hb.HalfbinError, match=f"(?s){words}"):
        hb.quantize(model, recipe=rules)
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("given", [{"output": "out"}, {"format": "halfbin"}, {"max_kl": 0.1}, {"text": "x"}], ids=str)
def test_what_is_said_of_directories_is_not_passed_over(given: dict[str, Any]) -> None:
    with pytest.raises(hb.HalfbinError, match=f"{next(iter(given))}: for model directories only"):
        hb.quantize(network(), **given)


def test_a_layer_without_numbers_stays_with_the_reason() -> None:
    swaps = hb.quantize(nn.Sequential(nn.Linear(4, 4, device="meta"), nn.Linear(4, 4)), recipe="int8")
    assert [swap.scheme is None for swap in swaps] == [True, False] and "meta device" in swaps[0].reason


@torch.no_grad()
def test_a_transformers_model_in_memory_becomes_what_its_directory_becomes(tmp_path: Path) -> None:
    source = zoo.directory_of("llama")
    hb.quantize(source, tmp_path / "out", recipe="int8", evaluate=False)
    from_disk, in_memory = (
        hb.load(tmp_path / "out", torch.float32, dequantize=True),
        hb.load(source, torch.float32, dequantize=True),
    )
    hb.quantize(in_memory, recipe="int8")
    ids = torch.arange(3, 15)[None]
    expected, found = from_disk(ids).logits, exactly(in_memory)(ids).logits
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
