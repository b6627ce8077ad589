"""Quantized inputs and LLM.int8() simulated on models, and undone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from halfbin.errors import DataError, SchemeError
from halfbin.nn import EXACT, LLMInt8Linear, QuantInputLinear, QuantLinear, Simulation, llm_int8, quantize_inputs
from halfbin.tensor import MixedTensor, parse_inputs, parse_scheme, quantize, take_columns

INT8 = parse_scheme("int8-channel")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Model(nn.Module):
    """A linear, a Conv1D and a convolution, each fed in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(16, 32)
        self.down = Conv1D(16, 32)
        self.mix = nn.Conv1d(5, 5, 3, padding=1)
        self.shared = self.up
        self.table = nn.Embedding(4, 16)
        self.attention = nn.MultiheadAttention(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mix(self.down(x=torch.relu(self.up(input=x))))
        return out


@pytest.fixture
def model() -> Model:
    return Model().eval()


@pytest.fixture
def x() -> Tensor:
    return normal(2, 5, 16)


@torch.no_grad()
def test_a_module_sees_fake_quantized_inputs_and_no_others(model: Model, x: Tensor) -> None:
    before = model(x)
    static = parse_inputs("uint8-tensor-asym").calibrated(0.0, 2.0)
    token, tensor = parse_inputs("int8-token"), parse_inputs("fp8_e4m3-tensor-dynamic")
    with quantize_inputs(model, {"up": token, "down": static, "mix": tensor}) as simulation:
        assert simulation.idle == {"up", "down", "mix"}
        y = model(x)
        assert simulation.idle == set()
    hidden = torch.relu(model.up(token.quantizer().fake_quantize(x)))
    expected = model.mix(tensor.quantizer().fake_quantize(model.down(static.fake_quantize(hidden))))
    assert torch.equal(y, expected)
    assert not torch.equal(y, before)
    assert torch.equal(model(x), before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_quantized_weight_behind_a_hook_is_the_layer_that_quantizes_its_inputs() -> None:
    q, x = quantize(normal(12, 16), INT8), normal(3, 16)
    model = nn.Sequential(QuantLinear(q, kernels=EXACT))
    with quantize_inputs(model, {"0": parse_inputs("fp8_e4m3-token")}):
        assert torch.equal(model(x), QuantInputLinear(q, parse_inputs("fp8_e4m3-token").quantizer())(x))


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("upp", "int8-token", r"no such module below itself; did you mean 'up'\?\s+at module 'upp'"),
        ("", "int8-token", "no such module below itself"),
        ("up", "int8-tensor", r"int8-tensor is static and needs a scale"),
        ("table", "int8-token", "the inputs of an embedding are integers"),
        ("mix", "int8-token", "has no one scale for a sum: use tensor"),
        ("mix", "int8-tensor-dynamic-outliers6", "has no one scale for a sum: use tensor"),
        ("attention.out_proj", "int8-token", "its parent reads its weight past its forward"),
    ],
)
def test_what_cannot_be_simulated_is_refused_and_leaves_no_hook(
    model: Model, name: str, inputs: str, message: str
) -> None:
    with pytest.raises(SchemeError, match=message):
        quantize_inputs(model, {"down": parse_inputs("int8-token"), name: parse_inputs(inputs)})
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_shared_module_is_quantized_once(model: Model) -> None:
    with pytest.raises(SchemeError, match="it is one module with 'up'; name it once"):
        quantize_inputs(model, dict.fromkeys(("up", "shared"), parse_inputs("int8-token")))


def test_inputs_that_are_not_finite_name_the_module(model: Model) -> None:
    with (
        quantize_inputs(model, {"up": parse_inputs("int8-token")}),
        pytest.raises(DataError, match="at the inputs of 'up'"),
    ):
        model(torch.full((2, 5, 16), math.nan))


def test_a_module_that_the_model_goes_past_stays_idle(model: Model, x: Tensor) -> None:
    with quantize_inputs(
        model, {"attention": parse_inputs("int8-token"), "up": parse_inputs("int8-token")}
    ) as simulation:
        model(x)
        assert simulation.idle == {"attention"}


# --- LLM.int8()


@pytest.mark.parametrize("codes", [False, True], ids=["scheme", "codes"])
def test_linears_become_llm_int8_and_come_back(model: Model, x: Tensor, codes: bool) -> None:
    x[..., 3] *= 100
    before, old = model(x), (model.up, model.down)
    up, down = quantize(model.up.weight.detach(), INT8), quantize(model.down.weight.detach().T.contiguous(), INT8)
    with llm_int8(model, {"up": up, "down": down} if codes else {"up": INT8, "down": INT8}) as simulation:
        assert {type(model.get_submodule(name)) for name in ("up", "down")} == {LLMInt8Linear}
        hidden = torch.relu(LLMInt8Linear(up, old[0].bias)(x))
        assert torch.equal(torch.relu(model.up(x)), hidden)
        assert torch.equal(model.down(hidden), LLMInt8Linear(down, old[1].bias)(hidden))
        assert simulation.idle == set()
    assert (model.up, model.down) == old
    assert torch.equal(model(x), before)


def test_a_quantized_linear_lends_its_codes(x: Tensor) -> None:
    layer = QuantLinear(quantize(normal(12, 16), INT8))
    model = nn.Sequential(layer)
    with llm_int8(model, {"0": INT8}):
        assert torch.equal(model(x), LLMInt8Linear(layer.qtensor)(x))
    assert model[0] is layer
    with pytest.raises(SchemeError, match="give its codes, or start from the float model"):
        llm_int8(model, {"0": parse_scheme("int4-channel")})


def test_columns_in_floating_point_are_taken_along(model: Model, x: Tensor) -> None:
    rest, columns = take_columns(model.up.weight.detach(), torch.tensor([3, 5]), torch.float32)
    q, old = quantize(rest, INT8), model.up
    with llm_int8(model, {"up": MixedTensor(q, columns)}):
        assert torch.equal(model.up(x), LLMInt8Linear(q, old.bias, columns=columns)(x))
        assert not torch.equal(model.up(x), LLMInt8Linear(q, old.bias)(x))


def test_what_is_no_linear_is_not_replaced(model: Model) -> None:
    old = model.up
    for name, sites, message in (
        ("mix", INT8, "this is a Conv1d"),
        ("down", parse_scheme("int8-g4"), "one scale for each weight row"),
        ("down", quantize(normal(2, 2), INT8), r"codes are \[2, 2\], but the weight is \[16, 32\]"),
        ("nothing", INT8, "no such module below itself"),
    ):
        with pytest.raises(SchemeError, match=message):
            llm_int8(model, {"up": INT8, name: sites})
        assert model.up is old


def test_a_simulation_is_removed_once() -> None:
    done: list[int] = []
    simulation = Simulation(set())
    for i in range(3):
        simulation.undo_by(lambda i=i: done.append(i))  # type: ignore[misc]  # a lambda's defaults are not inferred
    simulation.remove()
    simulation.remove()
    assert done == [2, 1, 0]
