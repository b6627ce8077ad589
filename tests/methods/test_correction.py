"""The corrected weight against least squares, and what it does to a layer whose inputs have moved."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halfbin.calibration import CrossMoment, SecondMoment
from halfbin.errors import DataError, SchemeError
from halfbin.methods import Factor, corrected, factorise, gptq
from halfbin.methods.cholesky import DAMPING
from halfbin.tensor import dequantize, parse_scheme

OUT, IN, TOKENS = 12, 40, 300


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight() -> Tensor:
    return torch.randn(OUT, IN, generator=generator(0)) * 0.05


def inputs() -> tuple[Tensor, Tensor]:
    """Inputs of the float model, correlated, and what earlier rounding has made of them: less of some directions, and noise."""
    mixing = torch.randn(IN, IN, generator=generator(1)) / IN**0.5
    x = torch.randn(TOKENS, IN, generator=generator(2)) @ (torch.eye(IN) + 2 * mixing)
    loss = torch.eye(IN) + 0.1 * torch.randn(IN, IN, generator=generator(3)) / IN**0.5
    return x, 0.95 * x @ loss + 0.1 * torch.randn(TOKENS, IN, generator=generator(4))


def moments(x: Tensor, x_quantized: Tensor, *, damping: float = DAMPING) -> tuple[Tensor, Factor]:
    cross = CrossMoment(IN)
    cross.add(x - x_quantized, x_quantized)
    return cross.matrix(), factorise(second_moment(x_quantized), damping=damping)


def second_moment(x: Tensor) -> Tensor:
    second = SecondMoment(IN)
    second.add(x)
    return second.matrix()


def output_error(w: Tensor, x: Tensor, w_new: Tensor, x_quantized: Tensor) -> float:
    return float((x.double() @ w.double().T - x_quantized.double() @ w_new.double().T).square().sum())


@pytest.mark.parametrize("damping", [0.0, 0.01, 0.5])
def test_it_is_the_least_squares_solution_that_damping_pulls_to_the_weight(damping: float) -> None:
    w, (x, x_quantized) = weight(), inputs()
    second = second_moment(x_quantized)
    pull = (damping * second.diagonal().mean()).sqrt()
    # X_q W'^T = X W^T, and pull * W'^T = pull * W^T, as well as possible.
    left = torch.cat([x_quantized.double(), pull * torch.eye(IN, dtype=torch.float64)])
    right = torch.cat([x.double() @ w.double().T, pull * w.double().T])
    expected = torch.linalg.lstsq(left, right).solution.T
    found = corrected(w, *moments(x, x_quantized, damping=damping), share=1.0)
    # Float32 in a system whose condition is below 2000 here, relative to the change.
    condition = float(torch.linalg.cond(second))
    assert condition < 2000
    bound = 4 * condition * torch.finfo(torch.float32).eps * float((expected - w).norm())
    assert float((found - expected).norm()) < bound + 1e-6 * float(w.norm())


def test_equal_inputs_return_the_weight_itself() -> None:
    w, (_, x_quantized) = weight(), inputs()
    assert torch.equal(corrected(w, *moments(x_quantized, x_quantized), share=1.0), w)


def test_a_share_is_that_much_of_the_way() -> None:
    w, some = weight(), moments(*inputs())
    assert torch.equal(corrected(w, *some, share=0.0), w)
    whole = corrected(w, *some, share=1.0) - w
    assert torch.allclose(corrected(w, *some, share=0.25) - w, 0.25 * whole, rtol=0, atol=1e-7)


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_the_outputs_come_nearer_all_along_the_way(damping: float) -> None:
    w, (x, x_quantized) = weight(), inputs()
    errors = [
        output_error(w, x, corrected(w, *moments(x, x_quantized, damping=damping), share=share), x_quantized)
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    assert errors == sorted(errors, reverse=True) and len(set(errors)) == 5
    assert damping == 1.0 or errors[-1] < 0.5 * errors[0]


def test_rounding_what_was_corrected_is_nearer_to_the_float_outputs_than_rounding_the_weight() -> None:
    w, (x, x_quantized), scheme = weight(), inputs(), parse_scheme("int4-channel")
    moved, factor = moments(x, x_quantized)
    plain, after = (
        output_error(w, x, dequantize(gptq(v, scheme, factor)), x_quantized)
        for v in (w, corrected(w, moved, factor, share=1.0))
    )
    assert after < 0.75 * plain


def test_the_error_left_is_that_of_the_correction_and_that_of_rounding_it() -> None:
    w, (x, x_quantized), scheme = weight(), inputs(), parse_scheme("int4-channel")
    best = corrected(w, *moments(x, x_quantized, damping=0.0), share=1.0)
    w_hat = dequantize(gptq(best, scheme, factorise(second_moment(x_quantized))))
    whole = output_error(w, x, w_hat, x_quantized)
    parts = output_error(w, x, best, x_quantized) + output_error(best, x_quantized, w_hat, x_quantized)
    assert whole == pytest.approx(parts, rel=1e-4)  # Pythagoras; `best` is a float32 solution


def test_stacked_weights_are_corrected_each_for_itself() -> None:
    w, some = weight(), moments(*inputs())
    both = corrected(torch.cat([w, 2 * w]), *some)
    assert torch.allclose(both[:OUT], corrected(w, *some), rtol=1e-5, atol=1e-7)
    assert torch.allclose(both[OUT:], 2 * both[:OUT], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_a_channel_that_died_keeps_its_weights(damping: float) -> None:
    w, (x, x_quantized) = weight(), inputs()
    x_quantized[:, [3, 17]] = 0.0
    found = corrected(w, *moments(x, x_quantized, damping=damping), share=1.0)
    assert torch.equal(found[:, [3, 17]], w[:, [3, 17]])
    assert output_error(w, x, found, x_quantized) < output_error(w, x, w, x_quantized)


def test_fewer_tokens_than_features_are_repaired_by_damping() -> None:
    w, (x, x_quantized) = weight(), (part[:10] for part in inputs())
    found = corrected(w, *moments(x, x_quantized, damping=0.0), share=1.0)
    assert output_error(w, x, found, x_quantized) < 0.5 * output_error(w, x, w, x_quantized)


EYE = factorise(torch.eye(IN))


@pytest.mark.parametrize(
    ("w", "moved", "error", "words"),
    [
        pytest.param(weight()[:, 1:], torch.eye(IN), SchemeError, r"weight \[12, 39\]", id="weight"),
        pytest.param(weight(), torch.eye(IN - 1), SchemeError, r"moment \[39, 39\]", id="cross"),
        pytest.param(weight(), torch.eye(IN) * torch.nan, DataError, "cross moment", id="NaN"),
        pytest.param(weight() * torch.nan, torch.eye(IN), DataError, "NaN", id="NaN in W"),
    ],
)
def test_what_does_not_fit_is_refused(w: Tensor, moved: Tensor, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        corrected(w, moved, EYE)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")], ids=str)
def test_a_share_without_meaning_is_refused(share: float) -> None:
    with pytest.raises(SchemeError, match="share="):
        corrected(weight(), torch.eye(IN), EYE, share=share)
