"""A text as the tokens that are scored: what the tokenizer makes of it, with nothing added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from halfbin.errors import DataError


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    @property
    def bos_token_id(self) -> int | None:
        """The begin-of-sequence token, if there is one."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        """Text, or texts, to `input_ids` and more."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """A tokenized text.

    ids:       int64 [num_tokens], without special tokens.
    num_bytes: length of the text in UTF-8, for bits per byte.
    bos:       the tokenizer's begin-of-sequence token, None where it has none.
    """

    ids: Tensor
    num_bytes: int
    bos: int | None


def tokenize(tokenizer: Tokenizer, text: str) -> Tokens:
    """Tokenize the whole text at once, without special tokens.

    Raises:
      DataError: the text is empty, or the tokenizer makes no token of it.
    """
    # verbose: the whole text is longer than any model's context, and the tokenizer would warn of it; it is cut later.
    found: Sequence[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
    if not found:
        raise DataError(f"the text of {len(text)} characters has no token to score; give a text that is not empty")
    ids = torch.tensor(found, dtype=torch.int64)
    return Tokens(ids, len(text.encode("utf-8", errors="surrogatepass")), tokenizer.bos_token_id)
