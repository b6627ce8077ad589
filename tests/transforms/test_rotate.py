"""Each rewrite leaves a tiny network's function as it was, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, scaled_dot_product_attention

from halfbin.errors import SchemeError
from halfbin.transforms import centred, fold_norm, fold_scale, per_head, random_hadamard, rotate_inputs, rotate_outputs

HIDDEN, INNER, TOKENS, HEADS, KV_HEADS, WIDTH = 24, 40, 6, 4, 2, 8
TIGHT = 1e-12  # values around 1, a few hundred operations of float64


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rms_norm(x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale


def same(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) <= TIGHT * max(float(a.abs().max()), 1.0)


def test_a_norms_scale_moves_into_the_columns_zeros_too() -> None:
    x, scale, weight = numbers(1, TOKENS, HIDDEN), numbers(2, HIDDEN), numbers(3, INNER, HIDDEN)
    scale[5] = 0
    assert same(rms_norm(x, scale) @ weight.T, rms_norm(x) @ fold_scale(weight, scale).T)


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_a_layer_norms_scale_and_shift_move_into_the_linear(with_bias: bool) -> None:
    x, scale, shift, weight = (
        numbers(1, TOKENS, HIDDEN),
        numbers(2, HIDDEN),
        numbers(3, HIDDEN),
        numbers(4, INNER, HIDDEN),
    )
    bias = numbers(5, INNER) if with_bias else None
    new_weight, new_bias = fold_norm(weight, bias, scale, shift)
    expected = linear(layer_norm(x, (HIDDEN,), scale, shift), weight, bias)
    assert same(expected, linear(layer_norm(x, (HIDDEN,)), new_weight, new_bias))


def test_centred_writers_make_a_layer_norm_an_rms_norm() -> None:
    tokens = torch.tensor([3, 1, 4, 1, 5])
    embedding, weight, bias = numbers(1, 10, HIDDEN), numbers(2, HIDDEN, HIDDEN), numbers(3, HIDDEN)
    new_embedding, new = centred(embedding.T)[0].T, centred(weight, bias)

    def stream(e: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return e[tokens] + linear(torch.tanh(embedding[tokens]), w, b)

    before, after = stream(embedding, weight, bias), stream(new_embedding, *new)
    assert float(after.mean(-1).abs().max()) < TIGHT
    assert same(layer_norm(before, (HIDDEN,), eps=1e-6), rms_norm(after))
    assert centred(weight)[1] is None


@pytest.mark.parametrize("hidden", [24, 50, 7], ids=["whole", "blocks of 2", "signs only"])
def test_a_rotated_residual_stream_gives_what_the_plain_one_gives(hidden: int) -> None:
    tokens, q = torch.tensor([0, 2, 2, 7]), random_hadamard(hidden, torch.Generator().manual_seed(0))
    embedding, head, scale = numbers(1, 9, hidden), numbers(2, 9, hidden), numbers(3, hidden)
    up, down = (numbers(4, INNER, hidden), numbers(5, INNER)), (numbers(6, hidden, INNER), numbers(7, hidden))

    x = embedding[tokens]
    y = x + linear(torch.relu(linear(rms_norm(x, scale), *up)), *down)
    expected = rms_norm(y, scale) @ head.T

    x = rotate_inputs(embedding, q)[tokens]
    inner = torch.relu(linear(rms_norm(x), rotate_inputs(fold_scale(up[0], scale), q), up[1]))
    rotated = x + linear(inner, *rotate_outputs(*down, q))
    assert same(rms_norm(rotated) @ rotate_inputs(fold_scale(head, scale), q).T, expected)
    assert same(rotated, q(y))


def attention(x: Tensor, query: Tensor, key: Tensor, value: tuple[Tensor, Tensor], out: Tensor) -> Tensor:
    """Grouped queries: HEADS of queries share KV_HEADS of keys and values."""
    q, k, v = (y.reshape(TOKENS, -1, WIDTH).transpose(0, 1) for y in (x @ query.T, x @ key.T, linear(x, *value)))
    k, v = (y.repeat_interleave(HEADS // KV_HEADS, 0) for y in (k, v))
    return scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(TOKENS, -1) @ out.T


def test_values_are_rotated_head_by_head_through_attention() -> None:
    x = numbers(1, TOKENS, HIDDEN)
    query, key = numbers(2, HEADS * WIDTH, HIDDEN), numbers(3, KV_HEADS * WIDTH, HIDDEN)
    value, bias = numbers(4, KV_HEADS * WIDTH, HIDDEN), numbers(5, KV_HEADS * WIDTH)
    out = numbers(6, HIDDEN, HEADS * WIDTH)
    q = random_hadamard(WIDTH, torch.Generator().manual_seed(0))
    new_value, new_bias = rotate_outputs(value, bias, per_head(q, KV_HEADS))
    assert new_bias is not None
    new_out = rotate_inputs(out, per_head(q, HEADS))
    expected = attention(x, query, key, (value, bias), out)
    assert same(attention(x, query, key, (new_value, new_bias), new_out), expected)
    assert not same(new_value, value)
    assert not same(attention(x, query, key, (new_value, new_bias), out), expected)


def test_heads_do_not_mix() -> None:
    q = random_hadamard(8, torch.Generator().manual_seed(0))
    assert torch.equal(per_head(q, 3).matrix(), torch.kron(torch.eye(3, dtype=torch.float64), q.matrix()))


def test_outputs_are_those_of_the_transposed_matrix() -> None:
    q, weight, bias = (
        random_hadamard(HIDDEN, torch.Generator().manual_seed(0)),
        numbers(1, HIDDEN, 5),
        numbers(2, HIDDEN),
    )
    new_weight, new_bias = rotate_outputs(weight, bias, q)
    assert new_bias is not None
    assert same(new_weight, q.matrix().T @ weight)
    assert same(new_bias, q.matrix().T @ bias)
    assert new_weight.is_contiguous()


def test_an_outlier_channel_of_the_stream_is_gone_from_the_weights_that_read_it() -> None:
    weight = numbers(1, 16, 64)
    weight[:, 9] = 40.0
    turned = rotate_inputs(weight, random_hadamard(64, torch.Generator().manual_seed(0)))
    peak = [float((w.abs().amax(1) / w.square().mean(1).sqrt()).mean()) for w in (weight, turned)]
    assert peak[0] > 7  # nearly sqrt(64): one column holds it all
    assert peak[1] < 3  # as of 64 normal numbers


def test_shapes_that_do_not_fit_are_refused() -> None:
    q = random_hadamard(8)
    with pytest.raises(SchemeError, match=r"weight \[4, 8\] needs one scale for each column, got \[4\]"):
        fold_scale(torch.ones(4, 8), torch.ones(4))
    with pytest.raises(SchemeError, match=r"one shift"):
        fold_norm(torch.ones(4, 8), None, torch.ones(8), torch.ones(4))
    with pytest.raises(SchemeError, match=r"rotation of 8"):
        rotate_outputs(torch.ones(4, 8), None, q)
    with pytest.raises(SchemeError, match=r"num_heads=0"):
        per_head(q, 0)
