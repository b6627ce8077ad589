"""What is timed, and what is thrown away."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halfbin.errors import ModelError
from halfbin.evaluation.speed import Times, measure_speed

PROMPT = torch.arange(5)[None]


class Counting(nn.Module):
    """Says that the next token is the last one plus 1; remembers what it was asked."""

    def __init__(self, clock: Any, seconds: tuple[float, ...]) -> None:
        super().__init__()
        self.asked: list[tuple[list[int], Any, dict[str, Any]]] = []
        self.clock, self.seconds = clock, iter(seconds)

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False, **rest: Any) -> Any:
        assert use_cache and torch.is_inference_mode_enabled()
        self.asked.append((input_ids[0].tolist(), past_key_values, rest))
        self.clock.now += next(self.seconds)
        logits = nn.functional.one_hot((input_ids + 1) % 50, 50).float()
        return types.SimpleNamespace(logits=logits, past_key_values="cache")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    found = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr("halfbin.evaluation.speed.time.perf_counter", lambda: found.now)
    return found


def test_the_prompt_is_read_at_once_and_tokens_one_by_one_with_the_cache(clock: Any) -> None:
    model = Counting(clock, (9, 9, 9, 4, 1, 3, 6, 2, 2))
    steps: list[tuple[int, int]] = []
    found = measure_speed(model, PROMPT, new_tokens=2, rounds=2, on_step=lambda *step: steps.append(step))
    one_round: list[tuple[list[int], Any, dict[str, Any]]] = [
        ([0, 1, 2, 3, 4], None, {}),
        ([5], "cache", {}),
        ([6], "cache", {}),
    ]
    assert model.asked == 3 * one_round
    # The first round, of 9 seconds a call, is not measured.
    assert found.prefill == Times(5.0, 4.0, 6.0)
    assert found.step == Times(2.0, 1.0, 3.0)
    assert (found.prefill_rate, found.decode_rate) == (1.0, 0.5)
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_logits_of_the_prompts_last_token_alone_are_asked_for_where_that_can_be_said(clock: Any) -> None:
    class Saving(Counting):
        def forward(  # type: ignore[override]
            self, input_ids: Tensor, cache: Any = None, logits_to_keep: int = 0, **rest: Any
        ) -> Any:
            found = super().forward(input_ids, cache, **rest | {"logits_to_keep": logits_to_keep})
            return types.SimpleNamespace(logits=found.logits, cache="newer name")

    model = Saving(clock, (1.0,) * 4)
    measure_speed(model, PROMPT, new_tokens=1, rounds=1)
    assert [rest["logits_to_keep"] for _, _, rest in model.asked] == [1, 0, 1, 0]
    assert [cache for _, cache, _ in model.asked] == [None, "newer name"] * 2


def test_a_model_without_a_cache_is_refused() -> None:
    class Forgetful(nn.Module):
        def forward(self, input_ids: Tensor, **rest: Any) -> Any:
            return types.SimpleNamespace(logits=torch.zeros(1, input_ids.shape[1], 8), past_key_values=None)

    with pytest.raises(ModelError, match="Forgetful keeps no keys and values"):
        measure_speed(Forgetful(), PROMPT, new_tokens=1, rounds=1)
