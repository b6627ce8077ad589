"""The baseline that the demo model is held against, beside a plain version that looks every count up in the text."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SMOOTHINGS = ["kneser-ney", "witten-bell"]
ORDER = 2
WIDTH = 3  # eight symbols


def load() -> Any:
    path = Path(__file__).parents[2] / "bench" / "ngram.py"
    spec = importlib.util.spec_from_file_location("bench_ngram", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name while the class is made
    spec.loader.exec_module(module)
    return module


ngram = load()


def text(seed: int, length: int) -> list[int]:
    """Symbols that depend on the one before, so that context says something; rare ones stay rare."""
    rng = np.random.default_rng(seed)
    symbols = [0]
    for _ in range(length):
        symbols.append(int((symbols[-1] + rng.geometric(0.5)) % 8))
    return symbols[1:]


def plain_probability(train: list[int], context: tuple[int, ...], symbol: int, smoothing: str, longest: int) -> float:
    """P(symbol | context) by the definitions, slowly."""
    order = len(context)
    lower = 1 / 8 if order == 0 else plain_probability(train, context[1:], symbol, smoothing, longest)
    padded = [0] * longest + train

    def occurrences(length: int) -> list[tuple[int, ...]]:
        return [tuple(padded[i - length + 1 : i + 1]) for i in range(longest, len(padded))]

    if smoothing == "witten-bell" or order == longest:
        seen = occurrences(order + 1)
    else:
        seen = [gram[1:] for gram in sorted(set(occurrences(order + 2)))]  # one per symbol found before the gram
    table: dict[tuple[int, ...], int] = {}
    for gram in seen:
        table[gram] = table.get(gram, 0) + 1
    after = [count for gram, count in table.items() if gram[:-1] == context]
    if not after:
        return lower
    count = table.get((*context, symbol), 0)
    if smoothing == "witten-bell":
        return (count + len(after) * lower) / (sum(after) + len(after))
    taken = ngram.discounts(np.array(list(table.values())))
    freed = sum(taken[min(c, 3)] for c in after)
    return float((count - taken[min(count, 3)] + freed * lower) / sum(after))


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_bits_are_those_of_the_plain_definition(smoothing: str) -> None:
    train, test = text(0, 120), text(1, 40)
    bits = ngram.ngram_bits(
        np.array(train, np.uint64), np.array(test, np.uint64), width=3, order=2, smoothing=smoothing
    )
    padded = [0, 0, *test]
    expected = [
        -np.log2(plain_probability(train, (padded[i], padded[i + 1]), padded[i + 2], smoothing, ORDER))
        for i in range(len(test))
    ]
    # Some twenty float64 operations a symbol.
    np.testing.assert_allclose(bits, expected, rtol=64 * np.finfo(np.float64).eps)


@pytest.mark.parametrize("length", [1, 5, 400])
@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_probabilities_of_all_symbols_sum_to_one_after_any_context(smoothing: str, length: int) -> None:
    train = np.array(text(2, length), np.uint64)
    for first in range(8):
        for second in range(8):
            total = 0.0
            for symbol in range(8):
                test = np.array([first, second, symbol], np.uint64)
                total += 2.0 ** -ngram.ngram_bits(train, test, width=WIDTH, order=ORDER, smoothing=smoothing)[-1]
            assert total == pytest.approx(1.0, abs=1e-12)


def test_grams_too_long_for_an_integer_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit in 64 bits"):
        ngram.ngram_bits(np.zeros(1, np.uint64), np.zeros(1, np.uint64), width=12, order=5, smoothing="kneser-ney")
