from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from evaluation.fake_models import Bigram, random_bigram, random_tokens, tiny_llama
from halfbin.errors import ModelError
from halfbin.evaluation import logits
from halfbin.evaluation.compare import Spread, compare, token_kl
from halfbin.evaluation.perplexity import perplexity
from halfbin.evaluation.windows import cut

WINDOWS = cut(random_tokens(60, 50), context=9, bos=0)


def test_identical_models_have_a_divergence_of_exactly_zero_and_agree_always() -> None:
    model = tiny_llama()
    found = compare(model, copy.deepcopy(model), WINDOWS)
    assert found.kl == Spread(0.0, 0.0, 0.0, 0.0)
    assert found.top1_agreement == 1.0
    assert found.before == found.after


def test_divergence_and_agreement_are_those_of_torchs_distributions() -> None:
    tokens = random_tokens(30, 11)
    one = random_bigram(11, 1)
    two = Bigram(one.table.detach() + random_bigram(11, 2, spread=1.5).table.detach())
    found = compare(one, two, cut(tokens, context=31, bos=0))
    before = torch.cat([torch.tensor([0]), tokens[:-1]])
    p, q = one.table.detach().double()[before], two.table.detach().double()[before]
    kl = kl_divergence(Categorical(logits=p), Categorical(logits=q)).numpy()
    # KL is a sum of 11 terms of size up to 10, each right to eps.
    expected = [kl.mean(), np.median(kl), np.quantile(kl, 0.99), kl.max()]
    assert [found.kl.mean, found.kl.median, found.kl.p99, found.kl.maximum] == pytest.approx(expected, abs=2e-5)
    assert found.top1_agreement == float((p.argmax(1) == q.argmax(1)).double().mean())
    assert 0 < found.top1_agreement < 1
    assert found.num_tokens == 30


def test_before_and_after_are_the_perplexities_of_each_model_alone() -> None:
    one, two = tiny_llama(seed=1), tiny_llama(seed=2)
    found = compare(one, two, WINDOWS)
    assert (found.before, found.after) == (perplexity(one, WINDOWS), perplexity(two, WINDOWS))
    assert found.before != found.after
    assert found.definition == found.before.definition == WINDOWS.definition


def test_divergence_is_of_the_original_from_the_model_and_not_the_other_way_round() -> None:
    certain, uniform = Bigram(torch.tensor([[20.0, 0.0], [20.0, 0.0]])), Bigram(torch.zeros(2, 2))
    windows = cut([0, 0, 0], context=4, bos=0)
    assert compare(certain, uniform, windows).kl.mean == pytest.approx(math.log(2), abs=1e-6)
    assert compare(uniform, certain, windows).kl.mean == pytest.approx(10 - math.log(2), abs=1e-6)


def test_a_small_divergence_is_not_lost_in_the_rounding_of_log_softmax() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5000, generator=generator) * 5
    y = x + torch.randn(200, 5000, generator=generator) * 3e-4
    exact = kl_divergence(Categorical(logits=x.double()), Categorical(logits=y.double()))
    found = token_kl(x.log_softmax(-1), y.log_softmax(-1)).double()
    # Plainly summed P (ln P - ln Q) is off by up to 4e-7 here, ten times the mean divergence. What remains is a product of
    # two small numbers: differences d of size 1e-3, each off by eps times a log-probability of up to 40.
    assert 1e-8 < exact.mean() < 1e-7
    assert (found - exact).abs().max() < 40 * torch.finfo(torch.float32).eps * 1e-3


def test_a_token_that_the_original_finds_all_but_impossible_and_the_model_likely_does_not_overflow() -> None:
    log_p = torch.tensor([[-95.0, 0.0]])  # exp(95) is beyond float32
    log_q = torch.tensor([[math.log(0.5), math.log(0.5)]])
    assert token_kl(log_p, log_q).tolist() == pytest.approx([math.log(2)], abs=1e-6)


def test_impossible_tokens_count_nothing_where_the_original_finds_them_impossible_too() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.5, 0.0, 0.5]])
    q = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5], [0.5, 0.5, 0.0]])
    assert token_kl(p.log(), q.log()).tolist() == pytest.approx([0.0, math.log(2), math.inf], abs=1e-6)


def test_chunks_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = tiny_llama(seed=1), tiny_llama(seed=2)
    whole = compare(one, two, WINDOWS)
    monkeypatch.setattr(logits, "CHUNK_BYTES", 4 * 50 * 3)
    chunked = compare(one, two, WINDOWS)
    assert chunked.kl.mean == pytest.approx(whole.kl.mean, rel=1e-5)
    assert chunked.kl.maximum == pytest.approx(whole.kl.maximum, rel=1e-5)
    assert chunked.after.nll == pytest.approx(whole.after.nll, rel=1e-6)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        pytest.param(tiny_llama(50), tiny_llama(64), id="both-state-it"),
        pytest.param(random_bigram(50, 0), random_bigram(64, 0), id="seen-in-the-logits"),
    ],
)
def test_other_vocabularies_are_refused_with_both_sizes(one: torch.nn.Module, two: torch.nn.Module) -> None:
    with pytest.raises(ModelError, match="has 50 tokens and the other's has 64"):
        compare(one, two, WINDOWS)


def test_nan_says_which_model_gave_it() -> None:
    bad = random_bigram(50, 0)
    bad.table.data[int(WINDOWS.tokens[12])] = float("nan")
    with pytest.raises(ModelError, match="the quantized model gives NaN"):
        compare(random_bigram(50, 0), bad, WINDOWS)


def test_quantiles_interpolate_between_ranks() -> None:
    assert Spread.of(torch.arange(101.0)) == Spread(mean=50.0, median=50.0, p99=99.0, maximum=100.0)
    assert Spread.of(torch.tensor([1.0, 2.0])).median == 1.5
