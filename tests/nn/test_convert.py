from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from halfbin.errors import DataError
from halfbin.nn import EXACT, QuantConv, QuantConv1D, QuantEmbedding, QuantLinear, Swap, quantize_module
from halfbin.tensor import QTensor, Scheme, dequantize, parse_scheme, quantize

INT8 = parse_scheme("int8-channel")


def rtn(weight: Tensor, scheme: Scheme) -> QTensor:
    return quantize(weight, scheme)


def everything(name: str, module: nn.Module) -> tuple[Scheme, Any]:
    return INT8, rtn


def reasons(swaps: list[Swap]) -> dict[str, str]:
    return {swap.name: swap.reason for swap in swaps}


class Tied(nn.Module):
    """An embedding whose table is the output head's weight, as language models have it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(9, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.table(ids)))
        return logits


def test_each_layer_is_swapped_for_its_form_and_computes_with_rounded_weights() -> None:
    torch.manual_seed(0)
    tail = nn.Sequential(Conv1D(4, 8), nn.Conv1d(5, 3, 2))
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.ReLU(), tail)
    expected = copy.deepcopy(model)
    for module in expected.modules():
        if isinstance(module, Conv1D):
            module.weight.data = dequantize(quantize(module.weight.detach().T.contiguous(), INT8)).T
        elif "weight" in module._parameters:
            weight = module.get_parameter("weight")
            weight.data = dequantize(quantize(weight.detach().flatten(1), INT8)).reshape(weight.shape)
    swaps = quantize_module(model, everything)
    assert [type(m) for m in (model[0], model[1], tail[0], tail[1])] == [
        QuantEmbedding,
        QuantLinear,
        QuantConv1D,
        QuantConv,
    ]
    assert swaps == [
        Swap("0", "Embedding", INT8, ""),
        Swap("1", "Linear", INT8, ""),
        Swap("3.0", "Conv1D", INT8, ""),
        Swap("3.1", "Conv1d", INT8, ""),
    ]
    ids = torch.arange(5)
    torch.testing.assert_close(model(ids), expected(ids), rtol=0, atol=1e-6)  # Conv1D sums 8 terms in another order


def test_groups_of_conv1d_lie_along_its_inputs_and_those_of_a_convolution_along_all_it_sums() -> None:
    model = nn.Sequential(Conv1D(4, 32), nn.Conv2d(4, 6, 3))
    quantize_module(model, lambda name, module: (parse_scheme("int4-g16"), rtn))
    assert model[0].get_buffer("scale").shape == (4, 2)
    assert model[1].get_buffer("scale").shape == (6, 3)  # 36 inputs: 16, 16 and 4


def test_what_decide_leaves_is_the_very_same_module() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    kept = model[1]
    swaps = quantize_module(model, lambda name, module: None if name == "1" else everything(name, module))
    assert model[1] is kept
    assert swaps[1] == Swap("1", "Linear", None, "not asked for")


def test_tied_layers_that_are_decided_alike_share_their_codes() -> None:
    model = Tied()
    expected = copy.deepcopy(model)
    expected.table.weight.data = dequantize(quantize(expected.table.weight.detach(), INT8))
    expected.body.weight.data = dequantize(quantize(expected.body.weight.detach(), INT8))
    assert set(reasons(quantize_module(model, everything)).values()) == {""}
    assert model.table.get_buffer("codes").data_ptr() == model.head.get_buffer("codes").data_ptr()
    for layer in model.children():
        if isinstance(layer, QuantLinear):
            layer.choose(EXACT)
    assert torch.equal(model(torch.arange(9)), expected(torch.arange(9)))


@pytest.mark.parametrize(
    "decision",
    [
        pytest.param(lambda name: None if name == "head" else (INT8, rtn), id="one-stays"),
        pytest.param(lambda name: (parse_scheme("int4" if name == "head" else "int8"), rtn), id="other-scheme"),
        pytest.param(lambda name: (INT8, rtn if name == "head" else quantize), id="other-method"),
    ],
)
def test_tied_layers_that_would_come_apart_stay(decision: Any) -> None:
    model = Tied()
    swaps = quantize_module(model, lambda name, module: decision(name))
    assert model.head.weight is model.table.weight
    assert [type(m) for m in model.children()] == [nn.Embedding, QuantLinear, nn.Linear]
    assert "shared with head.weight" in reasons(swaps)["table"]
    assert swaps[0].scheme is None


def test_a_parameter_that_something_else_reads_stays() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Bilinear(2, 2, 4))
    model[0].weight = nn.Parameter(torch.ones(4, 4))
    model.register_parameter("also", model[0].weight)
    assert reasons(quantize_module(model, everything)) == {
        "0": "its weight is shared with also, which would not become the same",
        "1": "Bilinear has no quantized form",
        "": "Sequential has no quantized form",
    }


def test_a_linear_and_a_conv1d_of_one_parameter_stay_as_they_read_it_differently() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Conv1D(4, 4))
    model[1].weight = model[0].weight
    assert all("shared with" in reason for reason in reasons(quantize_module(model, everything)).values())


def test_a_module_under_two_names_is_swapped_once_for_both_or_not_at_all() -> None:
    linear = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": linear, "b": linear})
    quantize_module(model, everything)
    assert isinstance(model["a"], QuantLinear)
    assert model["a"] is model["b"]
    model = nn.ModuleDict({"a": linear, "b": linear})
    swaps = quantize_module(model, lambda name, module: None if name == "b" else everything(name, module))
    assert model["a"] is model["b"] is linear
    assert "shared with b.weight" in reasons(swaps)["a"]


class Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 8


class Renamed(nn.Linear):
    """Inherits its forward, so it computes what a linear layer does."""


def with_hook() -> nn.Module:
    linear = nn.Linear(4, 4)
    linear.register_forward_pre_hook(lambda module, args: None)
    return linear


def with_own_forward() -> nn.Module:
    linear = nn.Linear(4, 4)
    linear.forward = lambda x: x  # type: ignore[assignment,method-assign]  # what offloading wrappers do
    return linear


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        pytest.param(Scaled(4, 4), "Scaled has no quantized form", id="own-forward"),
        pytest.param(nn.Embedding(4, 4, max_norm=1.0), "max_norm=1.0 rewrites", id="max-norm"),
        pytest.param(with_hook(), "hooks", id="hook"),
        pytest.param(with_own_forward(), "hooks", id="replaced-forward"),
        pytest.param(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "computed, not stored", id="weight-norm"),
        pytest.param(nn.ConvTranspose2d(4, 4, 2), "ConvTranspose2d has no", id="transposed-convolution"),
        pytest.param(nn.Linear(4, 4, dtype=torch.complex64), "complex64, not float", id="complex"),
    ],
)
def test_what_has_no_form_stays_and_the_table_says_why(layer: nn.Module, words: str) -> None:
    model = nn.Sequential(layer)
    assert words in reasons(quantize_module(model, everything))["0"]
    assert model[0] is layer


def test_a_subclass_that_only_inherits_is_swapped() -> None:
    model = nn.Sequential(Renamed(4, 4))
    assert quantize_module(model, everything) == [Swap("0", "Renamed", INT8, "")]


def test_attention_that_reads_its_weights_itself_still_computes() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    found = reasons(quantize_module(model, everything))
    assert "reads its weight past its forward" in found["0.self_attn.out_proj"]
    assert found["0.linear1"] == ""
    assert torch.isfinite(model(torch.ones(1, 3, 8))).all()


def test_a_model_that_is_one_layer_cannot_be_replaced_in_place() -> None:
    assert "model itself" in quantize_module(nn.Linear(4, 4), everything)[0].reason


def test_after_an_error_the_model_is_what_it_was_and_the_layer_is_named() -> None:
    model = nn.ModuleDict({"good": nn.Linear(4, 4), "bad": nn.Linear(4, 4)})
    model["bad"].get_parameter("weight").data[0, 0] = float("nan")
    with pytest.raises(DataError, match=r"while quantizing 'bad', weight \[4, 4\]") as caught:
        quantize_module(model, everything)
    assert "NaN" in str(caught.value)
    assert isinstance(model["good"], nn.Linear)


def test_steps_count_the_weights() -> None:
    steps: list[tuple[int, int]] = []
    quantize_module(Tied(), everything, on_step=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_training_mode_and_the_weights_type_carry_over() -> None:
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16)).eval()
    quantize_module(model, everything)
    assert not model[0].training
    assert isinstance(model[0], QuantLinear)
    assert model[0].dtype == torch.bfloat16
    assert model(torch.ones(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(
            GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
                )
            ),
            id="gpt2",
        ),
        pytest.param(
            BertModel(
                BertConfig(
                    vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
                )
            ),
            id="bert",
        ),
    ],
)
def test_every_matrix_of_a_transformer_is_swapped_and_its_outputs_stay_near(model: nn.Module) -> None:
    model.eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = model(input_ids=ids)[0]
        swaps = quantize_module(model, everything)
        after = model(input_ids=ids)[0]
    assert set(reasons(swaps).values()) == {""}
    assert 0 < (after - before).norm() < 0.02 * before.norm()  # a 256th per weight, averaged over sums
