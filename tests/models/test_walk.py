"""Walking through a model block by block computes what the model computes, with one block in memory."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from halfbin.models.blocks import find_blocks
from halfbin.models.products import Place, Watch
from halfbin.models.walk import Stop, copied, survey, walk
from models.walking import TEXT, walking
from models.zoo import loaded


@pytest.mark.parametrize("name", TEXT)
def test_the_outputs_are_the_models_own(name: str) -> None:
    with walking(name) as w:
        outputs: list[Any] = []
        w.partial.model.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
        inputs = w.inputs()
        w.stops(inputs)
        with torch.no_grad():
            expected = [loaded(name)(**each)[0] for each in inputs]
    for got, wanted in zip(outputs, expected, strict=True):
        # The same operations on the same numbers; only experts may be summed in another order.
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", TEXT)
def test_one_block_is_in_memory_at_a_time_and_every_linear_of_it_is_seen(name: str) -> None:
    with walking(name) as w:
        seen: set[str] = set()
        linears: set[str] = set()

        def look(stop: Stop) -> None:
            model = w.partial.model
            there = {p for p, value in model.named_parameters() if not value.is_meta}
            others = {p for b in w.blocks if b is not stop.block for p in b.parameters} - set(stop.block.parameters)
            assert not there & others
            with Watch({p: w.partial.get(p) for p in stop.block.parameters}, lambda p: seen.add(p.place.parameter)):
                stop.run(stop.calls[0])
            modules = stop.block.module.named_modules()
            inside = (f"{stop.block.name}.{n}.weight" for n, m in modules if isinstance(m, torch.nn.Linear))
            linears.update(inside)

        w.stops(w.inputs(1, length=40, size=1), look)
        assert seen
        assert linears <= seen


def test_a_block_that_fails_raises_in_the_callers_thread_and_leaves_the_model_as_it_was() -> None:
    with walking("llama-tied") as w:
        w.partial.load(p for block in w.blocks for p in block.parameters)
        bad = {"input_ids": torch.full((1, 4), 10_000)}
        with pytest.raises(IndexError):
            next(iter(walk(w.partial.model, w.blocks, [bad, *w.inputs(2)])))
        assert all("forward" not in vars(block.module) for block in w.blocks)


def test_leaving_early_ends_all_threads() -> None:
    import threading

    with walking("llama-tied") as w:
        stops = walk(w.partial.model, w.blocks, w.inputs(3))
        next(stops)
        assert sum(t.name.startswith("halfbin-sample") for t in threading.enumerate()) == 3
        stops.close()  # type: ignore[attr-defined]  # a generator, typed as what it yields
        assert not any(t.name.startswith("halfbin-sample") for t in threading.enumerate())


def test_a_batch_that_is_answered_goes_on_and_lets_go_of_what_the_block_was_called_with() -> None:
    with walking("llama-tied") as w:
        w.partial.load(p for block in w.blocks for p in block.parameters)
        stops = walk(w.partial.model, w.blocks, w.inputs(2))
        with torch.no_grad():
            for call in (embedded := next(stops)).calls:  # the model itself holds what the first block reads
                call.output = embedded.run(call, final=True)
            first = next(stops)
            called_with = [weakref.ref(call.args[0]) for call in first.calls]
            first.answer(first.calls[0], first.run(first.calls[0], final=True))
            assert called_with[0]() is None
            assert called_with[1]() is not None
            assert first.calls[1].args


def test_the_survey_tells_the_order_of_the_calls() -> None:
    with walking("t5") as w:
        import contextlib

        w.partial.load(p for block in w.blocks for p in block.parameters)
        order = survey(w.partial.model, w.blocks, w.inputs(1)[0], lambda block: contextlib.nullcontext())
        assert order == ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]


def test_blocks_are_elements_of_the_outermost_lists() -> None:
    assert [b.name for b in find_blocks(loaded("llava"))] == [
        "model.vision_tower.encoder.layers.0",
        "model.vision_tower.encoder.layers.1",
        "model.language_model.layers.0",
        "model.language_model.layers.1",
    ]


def test_a_copy_of_arguments_takes_writes_away_from_the_original() -> None:
    class Cache:
        def __init__(self) -> None:
            self.keys = [torch.zeros(2)]

    cache, hidden = Cache(), torch.zeros(3)
    args, kwargs = copied(((hidden,), {"cache": cache, "same": cache}), tensors=False)
    kwargs["cache"].keys.append(torch.ones(1))
    assert len(cache.keys) == 1
    assert kwargs["same"] is kwargs["cache"]
    assert args[0] is hidden
    copied((hidden,), tensors=True)[0].add_(1)
    assert float(hidden.sum()) == 0


def test_a_place_knows_which_rows_of_another_it_is() -> None:
    stack = Place("p", (8, 4), (4, 1), 32)  # the second matrix of a stack [2, 8, 4]
    up = Place("p", (4, 4), (4, 1), 48)
    interleaved = Place("p", (4, 4), (8, 1), 36)  # every second row, from the second on
    assert up.inside(stack)
    assert interleaved.inside(stack)
    assert not stack.inside(up)
    assert not Place("p", (4, 4), (4, 1), 52).inside(stack)  # reaches over its end
    assert not Place("p", (4, 4), (1, 8), 32).inside(stack)  # other columns
