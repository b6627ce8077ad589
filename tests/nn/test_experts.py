"""Stacks of quantized experts: near the float product within the bound of one layer, and following their layers."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from halfbin.errors import DataError
from halfbin.nn import EXACT, KERNELS, CpuFeatures, ExpertStack, MatmulKernel, QuantLinear
from halfbin.nn.experts import TOGETHER, expert_layer
from halfbin.tensor import dequantize, parse_scheme, quantize

pytestmark = pytest.mark.skipif("avx2" not in CpuFeatures.detect().instructions, reason="plain loops are not chosen")
U = 2.0**-24
NUM, ROWS, COLUMNS = 5, 70, 300


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stack(text: str = "int4-g128", dtype: torch.dtype = torch.float32, *, bias: bool = True) -> ExpertStack:
    weights = [quantize(normal(ROWS, COLUMNS, seed=i), parse_scheme(text)) for i in range(NUM)]
    held = nn.Parameter(normal(NUM, ROWS, seed=99).to(dtype), requires_grad=False) if bias else None
    return ExpertStack([expert_layer(q, dtype) for q in weights], held)


def linears(experts: ExpertStack) -> list[QuantLinear]:
    return list(experts._linears)


def routing(tokens: int, slots: int) -> Tensor:
    return normal(tokens, NUM, seed=tokens).topk(slots).indices


def reference(experts: ExpertStack, x: Tensor, chosen: Tensor) -> Tensor:
    """x [t] @ w_hat[chosen[t, i]].T + bias in float64."""
    w_hat = torch.stack([dequantize(layer.qtensor, torch.float64) for layer in linears(experts)])
    y = torch.einsum("tk,tink->tin", x.double(), w_hat[chosen])
    return y if experts.bias is None else y + experts.bias.double()[chosen]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("text", ["int4-g128", "uint4-g64-asym", "int8-channel", "mxfp4"])
@pytest.mark.parametrize("tokens", [1, 9])
def test_it_is_as_near_to_the_float_products_as_rounded_inputs_allow(
    tokens: int, text: str, dtype: torch.dtype
) -> None:
    experts, x, chosen = stack(text, dtype), normal(tokens, COLUMNS).to(dtype), routing(tokens, 2)
    y = experts(x, chosen)
    assert y.dtype == dtype and y.shape == (tokens, 2, ROWS)
    size = experts.scheme.group_size or 128
    rows = x.double()
    # The bound of one layer in test_integers.py: half a step for each input, then roundings.
    step = torch.cat([p.abs().amax(1, keepdim=True).expand_as(p) for p in torch.split(rows, size, 1)], 1) / 127
    moved = step * (0.5 + 127 * 4 * U)
    roundings = (3 * -(-COLUMNS // size) + 2) * U + (0 if dtype == torch.float32 else 2.0**-8)
    w_hat = torch.stack([dequantize(layer.qtensor, torch.float64) for layer in linears(experts)]).abs()[chosen]
    assert experts.bias is not None
    absolute = torch.einsum("tk,tink->tin", rows.abs() + moved, w_hat) + experts.bias.double().abs()[chosen]
    bound = torch.einsum("tk,tink->tin", moved, w_hat) + roundings * absolute
    assert bool(((y.double() - reference(experts, x, chosen)).abs() <= bound).all())


def test_all_experts_lie_one_behind_the_other_and_nothing_else_is_held() -> None:
    experts = stack()
    found = experts._together()
    assert found is not None
    for i, layer in enumerate(linears(experts)):
        assert layer.memory.data_ptr() == found[i].data_ptr()
        assert not layer._buffers.keys() & {"codes", "scale"}
    assert experts._together() is found
    assert experts.multiplied == (TOGETHER, {"triton": experts.multiplied[1]["triton"]})


def test_exact_inputs_can_be_asked_for_and_taken_back() -> None:
    experts, x, chosen = stack(bias=False), normal(9, COLUMNS), routing(9, 2)
    fast = experts(x, chosen)
    experts.choose(EXACT)
    assert experts.multiplied[0] == "reference"
    exact = experts(x, chosen)
    # Sums of 300 products in float32, in any order.
    w_hat = torch.stack([layer.weight for layer in linears(experts)]).double().abs()
    bound = 301 * U * torch.einsum("tk,tink->tin", x.double().abs(), w_hat[chosen])
    assert bool(((exact.double() - reference(experts, x, chosen)).abs() <= bound).all())
    assert not torch.equal(exact, fast)
    experts.choose(KERNELS)
    assert torch.equal(experts(x, chosen), fast)
    assert experts._together() is not None


def test_copies_pickles_and_states_give_the_same_and_share_nothing() -> None:
    experts, x, chosen = stack(), normal(9, COLUMNS), routing(9, 2)
    expected = experts(x, chosen)
    file = io.BytesIO()
    torch.save(experts, file)
    file.seek(0)
    other = stack()
    for layer in linears(other):
        layer.scale = layer.scale * 2
    assert not torch.equal(other(x, chosen), expected)
    other.load_state_dict(experts.state_dict())
    for made in (copy.deepcopy(experts), torch.load(file, weights_only=False), other):
        assert torch.equal(made(x, chosen), expected)
        assert where(made) != where(experts)


def where(experts: ExpertStack) -> int:
    found = experts._together()
    assert found is not None
    return found.data_ptr()


def test_a_changed_layer_is_seen() -> None:
    experts, x, chosen = stack(bias=False), normal(9, COLUMNS), torch.full((9, 1), 3)
    before = experts(x, chosen)
    layer = linears(experts)[3]
    layer.scale = layer.scale * 2
    assert torch.equal(experts(x, chosen), 2 * before)
    layer.hold_packed()
    assert torch.equal(experts(x, chosen), 2 * before)


def test_inputs_of_other_types_and_gradients_go_through_the_reference() -> None:
    experts, chosen = stack(bias=False), routing(9, 2)
    x = normal(9, COLUMNS).requires_grad_()
    experts(x, chosen).sum().backward()
    w_hat = torch.stack([layer.weight for layer in linears(experts)])
    torch.testing.assert_close(x.grad, w_hat[chosen].sum((1, 2)), rtol=1e-4, atol=1e-3)
    double = normal(9, COLUMNS).double()
    torch.testing.assert_close(experts(double, chosen), reference(experts, double, chosen))


@pytest.mark.parametrize("kernels", [KERNELS, EXACT], ids=["together", "one-by-one"])
@pytest.mark.parametrize("bad", [-1, NUM])
def test_an_expert_that_there_is_not_is_refused_by_name(bad: int, kernels: tuple[MatmulKernel, ...]) -> None:
    experts, chosen = stack(), routing(9, 2).clone()
    experts.choose(kernels)
    chosen[2, 1] = bad
    with pytest.raises(DataError, match=rf"token 2 chose expert {bad} \(slot 1\), and there are 0 to 4"):
        experts(normal(9, COLUMNS), chosen)


@pytest.mark.parametrize("shape", [(9, COLUMNS - 1), (9, COLUMNS + 1), (1, 9, COLUMNS)], ids=str)
def test_inputs_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=rf"experts take \[tokens, {COLUMNS}\]"):
        stack()(torch.zeros(shape), routing(9, 2))


def test_a_stack_compiles_to_the_operator() -> None:
    experts, x, chosen = stack(), normal(9, COLUMNS), routing(9, 2)
    with torch.no_grad():
        expected = experts(x, chosen)
        graph = torch.export.export(experts, (x, chosen)).graph
        assert any(node.target is torch.ops.halfbin.experts_linear.default for node in graph.nodes)
        compiled = torch.compile(experts, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x, chosen), expected)
