from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel, T5Config, T5ForConditionalGeneration

from evaluation.fake_models import Bigram, random_bigram, random_tokens, tiny_llama
from halfbin.errors import DataError, ModelError
from halfbin.evaluation import logits
from halfbin.evaluation.perplexity import perplexity
from halfbin.evaluation.windows import Windows, cut

CUTS = [
    pytest.param(9, None, 0, id="bos"),
    pytest.param(9, None, None, id="no-bos"),
    pytest.param(9, 3, 0, id="bos-stride"),
    pytest.param(9, 3, None, id="no-bos-stride"),
]


def slowly(model: nn.Module, windows: Windows) -> float:
    """Mean nats per token, one window after the other in float64, straight from the definition."""
    total, count = 0.0, 0
    double = model.double()
    for index in range(len(windows)):
        begin, first_scored, end = windows.span(index)
        ids = windows.input_ids(index)
        with torch.no_grad():
            rows = double(input_ids=ids[None]).logits[0]
        lead = len(ids) - (end - begin)
        for position in range(first_scored, end):
            row = rows[position - begin + lead - 1].tolist()
            top = max(row)
            log_sum = top + math.log(sum(math.exp(v - top) for v in row))
            total += log_sum - row[int(windows.tokens[position])]
            count += 1
    assert count == windows.num_scored
    return total / count


@pytest.mark.parametrize(("context", "stride", "bos"), CUTS)
def test_it_is_what_the_definition_gives_in_float64(context: int, stride: int | None, bos: int | None) -> None:
    windows = cut(random_tokens(50, 50), context=context, stride=stride, bos=bos)
    model = tiny_llama()
    found = perplexity(model, windows)
    # Logits of a two-layer model are off by some tens of eps of their size (about 20), and a mean is no worse.
    assert found.nll == pytest.approx(slowly(model, windows), abs=1e-4)
    assert found.value == pytest.approx(math.exp(found.nll), rel=1e-12)
    assert found.num_tokens == windows.num_scored


def test_a_bigram_model_worked_out_by_hand() -> None:
    # After token 0 come 0, 1, 2 with probabilities 1/2, 1/4, 1/4; after 1 always 0, nearly; after 2 all alike.
    table = torch.tensor([[0.5, 0.25, 0.25], [1 - 2e-6, 1e-6, 1e-6], [1 / 3, 1 / 3, 1 / 3]]).log()
    windows = cut([0, 1, 0, 2, 2], context=6, bos=0, num_bytes=10)
    found = perplexity(Bigram(table), windows)
    bits = 1 + 2 + 0 + 2 + math.log2(3)  # 0 after BOS, 1 after 0, 0 after 1, 2 after 0, 2 after 2
    assert found.nll == pytest.approx(bits * math.log(2) / 5, abs=2e-6)
    assert found.bits_per_byte == pytest.approx(bits / 10, abs=2e-6)


def test_uniform_predictions_have_the_vocabularys_size_as_perplexity() -> None:
    assert perplexity(Bigram(torch.zeros(7, 7)), cut([1, 2, 3, 4], context=3, bos=0)).value == pytest.approx(
        7, rel=1e-6
    )


def test_bits_per_byte_is_not_given_when_some_token_was_not_scored() -> None:
    assert perplexity(Bigram(torch.zeros(7, 7)), cut([1, 2, 3], context=3, bos=None, num_bytes=3)).bits_per_byte is None


@pytest.mark.parametrize(("context", "stride", "bos"), CUTS)
def test_batches_and_chunks_change_nothing_but_rounding(
    context: int, stride: int | None, bos: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = cut(random_tokens(90, 50), context=context, stride=stride, bos=bos)
    model = tiny_llama()
    whole = perplexity(model, windows).nll
    monkeypatch.setattr(logits, "CHUNK_BYTES", 4 * 50 * 2)  # two positions at a time
    assert perplexity(model, windows).nll == pytest.approx(whole, abs=1e-5)


def test_the_head_never_gives_more_logits_at_once_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    sizes: list[int] = []
    bodies: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.numel() * 4))
    model.model.layers[0].register_forward_hook(lambda module, args, output: bodies.append(1))
    windows = cut(random_tokens(40, 50), context=41, bos=0)
    allowed = 4 * 50 * 8
    monkeypatch.setattr(logits, "CHUNK_BYTES", allowed)
    perplexity(model, windows)
    probe, read = 2, 1
    assert max(sizes[probe:]) == allowed
    assert len(sizes) - probe == 5  # 40 scored positions, 8 at a time
    assert len(bodies) == probe + read  # the body ran once for all of them


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_llama().train()
    model.lm_head.eval()
    perplexity(model, cut(random_tokens(20, 50), context=8, bos=0))
    assert model.training
    assert not model.lm_head.training
    assert "forward" not in vars(model.model)


def test_steps_count_the_windows() -> None:
    steps: list[tuple[int, int]] = []
    windows = cut(random_tokens(20, 7), context=8, bos=0)
    perplexity(random_bigram(7, 0), windows, on_step=lambda done, total: steps.append((done, total)))
    assert steps == [(2, 3), (3, 3)]


def test_nan_is_reported_with_its_token_and_window() -> None:
    model = random_bigram(5, 0)
    model.table.data[3] = float("nan")
    # Windows of 3: [0] 1 2 4 | [0] 2 3 1: what follows the 3 is token 3 of window 1.
    with pytest.raises(ModelError, match="NaN for token 3 of window 1"):
        perplexity(model, cut([1, 2, 4, 2, 3, 1], context=4, bos=0))


def test_a_hopeless_model_has_infinite_perplexity_instead_of_an_overflow() -> None:
    table = torch.zeros(2, 2)
    table[:, 1] = -2000.0
    assert perplexity(Bigram(table), cut([1, 1], context=3, bos=0)).value == math.inf


def test_an_encoder_that_sees_the_future_is_refused() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        is_decoder=False,
    )
    windows = cut(random_tokens(20, 30), context=8, bos=None)
    with pytest.raises(ModelError, match="sees the tokens that it should predict"):
        perplexity(BertForMaskedLM(config), windows)
    with pytest.raises(ModelError, match="gives no logits"):
        perplexity(BertModel(config), windows)


def test_an_encoder_decoder_is_refused() -> None:
    config = T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ModelError, match="encoder-decoder"):
        perplexity(T5ForConditionalGeneration(config), cut(random_tokens(20, 30), context=8, bos=None))


@pytest.mark.parametrize(
    "model", [pytest.param(tiny_llama(), id="states-it"), pytest.param(random_bigram(50, 0), id="not")]
)
def test_a_token_outside_the_vocabulary_is_refused_with_both_numbers(model: nn.Module) -> None:
    tokens = [*range(20), 60]
    with pytest.raises(DataError, match=r"token 60.* has 50 tokens"):
        perplexity(model, cut(tokens, context=30, bos=0))
