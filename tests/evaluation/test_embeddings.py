from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from halfbin.errors import DataError, ModelError
from halfbin.evaluation.embeddings import compare_embeddings, embed, mean_ranks, similarity, spearman


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.table(input_ids))


class Letters:
    """One token a letter: a is 1; padded with 0."""

    bos_token_id = None

    def __call__(self, sentences: list[str], **options: Any) -> dict[str, Tensor]:
        cut = [[ord(letter) - 96 for letter in s][: options["max_length"]] for s in sentences]
        longest = max(len(ids) for ids in cut)
        return {
            "input_ids": torch.tensor([ids + [0] * (longest - len(ids)) for ids in cut]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in cut]),
        }


@pytest.mark.parametrize("batch_size", [pytest.param(n, id=f"batch-{n}") for n in (1, 2, 64)])
def test_an_embedding_is_the_normalised_mean_over_real_tokens_in_the_order_given(batch_size: int) -> None:
    torch.manual_seed(0)
    model = Encoder()
    sentences = ["abc", "d", "efghij", "ba"]
    found = embed(model, Letters(), sentences, max_tokens=5, batch_size=batch_size)
    for sentence, row in zip(sentences, found, strict=True):
        mean = torch.stack([model.table.weight[ord(c) - 96] for c in sentence[:5]]).mean(0)
        torch.testing.assert_close(row, (mean / mean.norm()).detach())


def test_cosine_and_squared_error_of_unit_vectors_belong_together() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (nn.functional.normalize(torch.randn(9, 6, generator=generator), dim=1) for _ in range(2))
    found = compare_embeddings(a, b)
    assert found.mean_squared_error == pytest.approx(2 * (1 - found.mean_cosine) / 6, rel=1e-6)
    assert compare_embeddings(a, a).mean_squared_error == 0
    assert found.mean_cosine == pytest.approx(float(similarity(a, b).mean()))


def test_equal_numbers_share_their_mean_rank() -> None:
    assert mean_ranks(np.array([30.0, 10.0, 20.0, 20.0, 20.0])).tolist() == [5.0, 1.0, 3.0, 3.0, 3.0]


@pytest.mark.parametrize("levels", [pytest.param(n, id=f"{n}-levels") for n in (2, 5, 1000)])
def test_spearman_is_scipys_with_and_without_ties(levels: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(levels)
    a = rng.integers(levels, size=200)
    b = a + rng.integers(levels, size=200)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def test_spearman_sees_order_only() -> None:
    assert spearman([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        pytest.param([1, 2], [1, 2, 3], "one length", id="lengths"),
        pytest.param([1], [1], "2 or more", id="single"),
        pytest.param([1, 1], [1, 2], "constant", id="constant"),
        pytest.param([1, float("nan")], [1, 2], "NaN", id="nan"),
    ],
)
def test_what_has_no_rank_correlation_is_refused(a: list[float], b: list[float], words: str) -> None:
    with pytest.raises(DataError, match=words):
        spearman(a, b)


def test_what_is_no_encoder_is_refused() -> None:
    class Other(Encoder):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=input_ids)

    with pytest.raises(ModelError, match="no last_hidden_state"):
        embed(Other(), Letters(), ["a"])
    with pytest.raises(DataError, match="no sentences"):
        embed(Encoder(), Letters(), [])
    with pytest.raises(DataError, match="shapes"):
        compare_embeddings(torch.zeros(2, 3), torch.zeros(3, 3))
