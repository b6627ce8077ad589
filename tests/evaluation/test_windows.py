from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfbin.errors import DataError
from halfbin.evaluation.windows import Windows, cut, default_context

BOS = 99


@st.composite
def cuttings(draw: st.DrawFn) -> Windows:
    bos = draw(st.sampled_from([None, BOS]))
    context = draw(st.integers(2, 12))
    stride = draw(st.none() | st.integers(1, context - (bos is not None)))
    num_tokens = draw(st.integers(1 if bos is not None else 2, 60))
    return cut(torch.arange(num_tokens), context=context, stride=stride, bos=bos)


def scored(windows: Windows, batch_size: int) -> list[int]:
    """Token ids, which are positions in the text, in the order in which they are scored."""
    return [
        int(token)
        for batch in windows.batches(batch_size)
        for row in batch.input_ids
        for token in row[batch.first_scored :]
    ]


@given(cuttings(), st.integers(1, 5))
def test_every_token_is_scored_once_and_in_order_but_those_without_anything_before_them(
    windows: Windows, batch_size: int
) -> None:
    found = scored(windows, batch_size)
    everything = list(range(len(windows.tokens)))
    if windows.bos is not None:
        assert found == everything
    elif windows.overlap:
        assert found == everything[1:]
    else:
        assert found == [i for i in everything if i % windows.context]
    assert len(found) == windows.num_scored


@given(cuttings(), st.integers(1, 5))
def test_windows_are_pieces_of_the_text_no_longer_than_the_context_that_score_something(
    windows: Windows, batch_size: int
) -> None:
    count = 0
    for batch in windows.batches(batch_size):
        assert batch.first_window == count
        assert len(batch.input_ids) <= batch_size
        for row in batch.input_ids.tolist():
            assert len(row) <= windows.context
            assert 1 <= batch.first_scored < len(row)
            text = row if windows.bos is None else row[1:]
            assert windows.bos is None or row[0] == BOS
            assert text == list(range(text[0], text[0] + len(text)))
            assert text[0] == count * windows.stride
            count += 1
    assert count == len(windows)


@given(cuttings())
def test_no_window_but_the_first_scores_more_than_a_stride(windows: Windows) -> None:
    for index in range(1, len(windows)):
        _, first_scored, end = windows.span(index)
        assert end - first_scored <= windows.stride


def test_the_default_puts_bos_before_each_window_of_one_token_less_than_the_context() -> None:
    windows = cut([1, 2, 3, 4, 5], context=4, bos=0)
    assert [batch.input_ids.tolist() for batch in windows.batches(1)] == [[[0, 1, 2, 3]], [[0, 4, 5]]]


def test_a_stride_scores_the_first_window_whole_and_the_last_tokens_of_the_others() -> None:
    windows = cut([1, 2, 3, 4, 5, 6], context=4, stride=2, bos=0)
    found = [(batch.input_ids.tolist(), batch.first_scored) for batch in windows.batches(1)]
    assert found == [([[0, 1, 2, 3]], 1), ([[0, 3, 4, 5]], 2), ([[0, 5, 6]], 2)]


def test_windows_that_are_alike_are_batched_and_others_are_not() -> None:
    windows = cut(list(range(11)), context=4, stride=2, bos=99)
    assert [(tuple(b.input_ids.shape), b.first_scored) for b in windows.batches(3)] == [
        ((1, 4), 1),
        ((3, 4), 2),
        ((1, 4), 2),
    ]


def test_a_text_shorter_than_the_context_is_one_window() -> None:
    windows = cut([7, 8], context=512, bos=0)
    assert len(windows) == 1
    assert windows.input_ids(0).tolist() == [0, 7, 8]


@pytest.mark.parametrize(
    ("bos", "stride", "words"),
    [
        pytest.param(
            1, None, "context 8, windows of 7 tokens without overlap, BOS (token 1) before each, every", id="bos"
        ),
        pytest.param(None, None, "nothing before them, the first token of each not scored", id="none"),
        pytest.param(1, 3, "begin every 3, BOS (token 1) before each; all of the first and the last 3 of", id="stride"),
        pytest.param(None, 3, "every token but the text's first scored once", id="none-stride"),
    ],
)
def test_the_definition_is_stated_in_words(bos: int | None, stride: int | None, words: str) -> None:
    assert words in cut(range(20), context=8, stride=stride, bos=bos).describe()


@pytest.mark.parametrize(
    ("tokens", "context", "stride", "bos", "words"),
    [
        pytest.param([], 8, None, 0, "0 tokens", id="empty"),
        pytest.param([5], 8, None, None, "nothing before it", id="one-without-bos"),
        pytest.param([5, 6], 1, None, 0, "at least 2", id="context-1"),
        pytest.param([5, 6], 8, 8, 0, "from 1 to 7", id="stride-skips"),
        pytest.param([5, 6], 8, 0, None, "from 1 to 8", id="stride-0"),
        pytest.param([0.5, 6.0], 8, None, None, "integers", id="floats"),
        pytest.param([[1, 2]], 8, None, None, "one dimension", id="two-dimensions"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    tokens: list[int], context: int, stride: int | None, bos: int | None, words: str
) -> None:
    with pytest.raises(DataError, match=words):
        cut(tokens, context=context, stride=stride, bos=bos)


class Config:
    def __init__(self, stated: int | None) -> None:
        if stated is not None:
            self.max_position_embeddings = stated


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        pytest.param(512, 512, id="small"),
        pytest.param(131072, 2048, id="huge"),
        pytest.param(None, 2048, id="unstated"),
    ],
)
def test_the_default_context_is_what_the_model_states_up_to_a_limit(stated: int | None, expected: int) -> None:
    assert default_context(Config(stated)) == expected
