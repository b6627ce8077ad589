"""An n-gram model with interpolated smoothing, on arrays: the baseline that a trained network has to beat.

P_k(w | c) mixes what followed the last k symbols c in training with P_{k-1}, down to the uniform distribution.
A gram of k + 1 symbols is one unsigned integer, the symbol to predict in the lowest bits and the oldest in the highest:

    | oldest of context | ... | newest of context | predicted |      each `width` bits

so that the same gram without its oldest symbol is a mask away, its context a shift away, and sorted grams have sorted
contexts. Two smoothings, both of which give probabilities that sum to one over all symbols:

    Witten-Bell   P_k = (count + T * P_{k-1}) / (N + T)      N: how often c was seen; T: how many symbols followed it
    Kneser-Ney    P_k = (count - D(count)) / N + L(c) * P_{k-1}, where L(c) is the mass that the discounts D freed.
                  Below the highest order, a count is the number of different symbols seen before the gram.

Source: Chen and Goodman 1998, An Empirical Study of Smoothing Techniques for Language Modeling, TR-10-98, sections 2.4
(Witten-Bell) and 3 (modified Kneser-Ney, three discounts).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Smoothing = Literal["kneser-ney", "witten-bell"]
Integers = npt.NDArray[np.uint64]
Counts = npt.NDArray[np.int64]
Reals = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Grams:
    """The different grams of one length, with how often each was counted."""

    keys: Integers  # sorted, all different
    counts: Counts


def ngram_bits(train: Integers, test: Integers, *, width: int, order: int, smoothing: Smoothing) -> Reals:
    """What each symbol of `test` costs, in bits, after the `order` symbols before it.

    Args:
      train, test: symbols below 2**width; both texts count as preceded by `order` zeros.
      width: bits of a symbol; (order + 1) * width must fit in 64.
      order: symbols of context.
    """
    if (order + 1) * width > 64:
        raise ValueError(f"{order + 1} symbols of {width} bits do not fit in 64 bits")
    ladder = [tally(grams(train, width, order))]
    for k in range(order - 1, -1, -1):
        ladder.append(shortened(ladder[-1], width, k, distinct=smoothing == "kneser-ney"))
    wanted = grams(test, width, order)
    probability = np.full(len(test), 2.0**-width)
    for k, table in enumerate(reversed(ladder)):
        probability = interpolated(table, wanted & mask(width, k), probability, width, smoothing)
    return -np.log2(probability)


def mask(width: int, order: int) -> np.uint64:
    """The bits of a gram with `order` symbols of context."""
    return np.uint64(2 ** (width * (order + 1)) - 1)


def grams(symbols: Integers, width: int, order: int) -> Integers:
    """The gram that ends at each symbol."""
    padded = np.concatenate([np.zeros(order, np.uint64), symbols.astype(np.uint64)])
    keys = np.zeros(len(symbols), np.uint64)
    for i in range(order + 1):
        keys = (keys << np.uint64(width)) | padded[i : i + len(symbols)]
    return keys


def tally(keys: Integers) -> Grams:
    """Each different gram, and how often it occurs."""
    different, counts = np.unique(keys, return_counts=True)
    return Grams(different, counts.astype(np.int64))


def shortened(longer: Grams, width: int, order: int, *, distinct: bool) -> Grams:
    """The grams without their oldest symbol; `distinct` counts the different longer grams instead of occurrences."""
    keys = longer.keys & mask(width, order)
    by_key = np.argsort(keys, kind="stable")
    keys = keys[by_key]
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    weights = np.ones(len(keys), np.int64) if distinct else longer.counts[by_key]
    return Grams(keys[first], np.add.reduceat(weights, first))


def interpolated(table: Grams, wanted: Integers, lower: Reals, width: int, smoothing: Smoothing) -> Reals:
    """P_k of each wanted gram, from the table of its length and P_{k-1}; a context never seen leaves P_{k-1}."""
    contexts = table.keys >> np.uint64(width)
    first = np.flatnonzero(np.concatenate([[True], contexts[1:] != contexts[:-1]]))
    seen = np.add.reduceat(table.counts, first)
    if smoothing == "witten-bell":
        freed = np.diff(first, append=len(contexts)).astype(np.float64)
        total, kept = seen + freed, table.counts.astype(np.float64)
    else:
        taken = discounts(table.counts)[np.minimum(table.counts, 3)]
        freed = np.add.reduceat(taken, first)
        total, kept = seen.astype(np.float64), table.counts - taken
    c, has_context = find(contexts[first], wanted >> np.uint64(width))
    g, has_gram = find(table.keys, wanted)
    mixed = (np.where(has_gram, kept[g], 0.0) + freed[c] * lower) / total[c]
    return np.where(has_context, mixed, lower)


def find(table: Integers, wanted: Integers) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]:
    """Where each wanted key stands in a sorted table, and whether it does."""
    at = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    return at, table[at] == wanted


def discounts(counts: Counts) -> Reals:
    """What is taken from counts of 0, 1, 2 and 3 or more (Chen and Goodman, section 3.2, equation 26).

    Where a short text leaves one of the counts of counts at zero, the formula means nothing: 0.5, 1 and 1.5, as in KenLM.
    """
    n1, n2, n3, n4 = (int(np.count_nonzero(counts == i)) for i in (1, 2, 3, 4))
    if not (n1 and n2 and n3 and n4):
        return np.array([0.0, 0.5, 1.0, 1.5])
    y = n1 / (n1 + 2 * n2)
    found = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    return np.clip(found, 0.0, [0.0, 1.0, 2.0, 3.0])
