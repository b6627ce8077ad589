from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from evaluation.fake_models import random_tokens, tiny_llama
from halfbin.errors import DataError
from halfbin.evaluation.layers import TensorError, output_errors, weight_error
from halfbin.evaluation.windows import cut

WINDOWS = cut(random_tokens(40, 50), context=9, bos=0)


def test_the_error_of_a_weight_worked_out_by_hand() -> None:
    found = weight_error(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[3.0, 0.3], [0.0, 3.6]]))
    assert found.relative == pytest.approx(0.1, rel=1e-6)
    assert found.snr_db == pytest.approx(20, abs=1e-5)
    assert found.max_abs == pytest.approx(0.4, rel=1e-6)


@pytest.mark.parametrize(
    ("weight", "w_hat", "expected"),
    [
        pytest.param(torch.ones(3), torch.ones(3), TensorError(0.0, math.inf, 0.0), id="nothing-moved"),
        pytest.param(torch.zeros(3), torch.zeros(3), TensorError(0.0, math.inf, 0.0), id="zeros"),
        pytest.param(torch.zeros(3), torch.ones(3), TensorError(math.inf, -math.inf, 1.0), id="from-zeros"),
        pytest.param(torch.zeros(0, 3), torch.zeros(0, 3), TensorError(0.0, math.inf, 0.0), id="empty"),
        pytest.param(torch.tensor(2.0), torch.tensor(1.0), TensorError(0.5, -20 * math.log10(0.5), 1.0), id="scalar"),
    ],
)
def test_edges_are_defined(weight: Tensor, w_hat: Tensor, expected: TensorError) -> None:
    assert weight_error(weight, w_hat) == expected


def test_other_shapes_are_refused() -> None:
    with pytest.raises(DataError, match=r"\[2, 3\].*\[3, 2\]"):
        weight_error(torch.zeros(2, 3), torch.zeros(3, 2))


def test_output_errors_are_those_of_the_outputs_seen_on_the_originals_inputs() -> None:
    model = tiny_llama().double()
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    moved = {name: model.get_submodule(name).weight.detach().clone() * 1.03 for name in names}
    moved[names[1]] = moved[names[1]] / 1.03
    moved[names[1]][:, 0] = 0
    seen: list[Tensor] = []
    down = model.get_submodule(names[1])
    with down.register_forward_hook(lambda module, args, output: seen.append(args[0].detach().flatten(0, 1))):
        found = output_errors(model, moved.__getitem__, WINDOWS, names=names)
    assert found[names[0]].relative == pytest.approx(0.03, rel=1e-9)
    x, w = torch.cat(seen), down.weight.detach()
    noise = x @ (moved[names[1]] - w).T
    assert found[names[1]].relative == pytest.approx(float(noise.norm() / (x @ w.T).norm()), rel=1e-9)
    assert found[names[1]].max_abs == pytest.approx(float(noise.abs().max()), rel=1e-9)


class Biased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 4)
        self.linear = nn.Linear(4, 3)
        self.norm = nn.LayerNorm(3)
        self.unused = nn.Linear(2, 2)

    def forward(self, input_ids: Tensor) -> Tensor:
        normed: Tensor = self.norm(self.linear(self.table(input_ids)))
        return normed


def test_the_bias_counts_in_neither_and_only_called_matrices_are_measured() -> None:
    model = Biased()
    model.linear.bias.data.fill_(1e6)
    found = output_errors(model, lambda name: model.get_submodule(name).get_parameter("weight") * 1.5, WINDOWS)
    assert list(found) == ["table", "linear"]
    assert found["linear"].relative == pytest.approx(0.5, rel=1e-6)
    assert not model.linear._forward_hooks


def test_a_name_that_is_not_there_is_refused() -> None:
    with pytest.raises(DataError, match="'lm_haed'"):
        output_errors(tiny_llama(), lambda name: torch.zeros(1), WINDOWS, names=["lm_haed"])
