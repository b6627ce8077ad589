from __future__ import annotations

from typing import Any

import pytest

from halfbin.errors import DataError
from halfbin.evaluation.text import tokenize


class Characters:
    def __init__(self, bos: int | None) -> None:
        self.bos_token_id = bos
        self.asked: dict[str, Any] = {}

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        self.asked = options
        return {"input_ids": [ord(c) for c in text.strip()]}


@pytest.mark.parametrize("bos", [pytest.param(0, id="bos-0"), pytest.param(None, id="no-bos")])
def test_a_text_is_tokenized_without_special_tokens_and_its_bytes_are_counted(bos: int | None) -> None:
    tokenizer = Characters(bos)
    found = tokenize(tokenizer, "aé€")
    assert found.ids.tolist() == [97, 233, 8364]
    assert (found.num_bytes, found.bos) == (6, bos)
    assert tokenizer.asked["add_special_tokens"] is False


@pytest.mark.parametrize("text", [pytest.param("", id="empty"), pytest.param("  ", id="no-tokens")])
def test_a_text_without_tokens_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="no token to score"):
        tokenize(Characters(1), text)
