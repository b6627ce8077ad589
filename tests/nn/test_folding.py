"""Float layers fold their inputs: the same numbers, and strides that torch multiplies without copying the weight."""

import pytest
import torch
from torch import nn

from halfbin.methods import rtn
from halfbin.nn import QuantLinear, quantize_module
from halfbin.nn.folding import fold_inputs
from halfbin.tensor import parse_scheme


def seen_by(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.inference_mode():
        layer(x)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("batch", [1, 3])
def test_the_last_hidden_states_get_strides_that_fold(batch: int) -> None:
    layer = nn.Linear(8, 5).requires_grad_(False)
    fold_inputs(layer)
    last = torch.randn(batch, 4, 8)[:, -1:, :]
    seen = seen_by(layer, last)
    assert seen.stride()[0] == seen.stride()[1] * seen.shape[1]  # what torch asks before it folds
    assert torch.equal(seen, last)


def test_outputs_stay_what_they_were() -> None:
    layer = nn.Linear(8, 5).requires_grad_(False)
    x = torch.randn(2, 3, 8)
    before = layer(x[:, -1:]), layer(x[0]), layer(x[0, 0])
    fold_inputs(layer)
    after = layer(x[:, -1:]), layer(x[0]), layer(x[0, 0])
    assert [y.shape for y in after] == [y.shape for y in before]
    for a, b in zip(after, before, strict=True):
        # The sum of 8 products and a bias, in another order: each within 9 roundings of the sum of magnitudes.
        bound = 9 * 2.0**-24 * (x.abs().max() * layer.weight.abs().sum() + 1)
        assert (a - b).abs().max() <= bound


def test_an_input_given_by_name_is_left_alone() -> None:
    layer = nn.Linear(8, 5).requires_grad_(False)
    fold_inputs(layer)
    assert layer(input=torch.ones(1, 2, 8)).shape == (1, 2, 5)


def test_a_layer_that_only_folds_can_still_be_quantized() -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    fold_inputs(model)
    quantize_module(model, lambda name, module: (parse_scheme("int8-channel"), rtn))
    assert isinstance(model[0], QuantLinear)
