"""The loop over the blocks: load, observe, transform, round, put back, hand on, release."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbin.errors import HalfbinError
from halfbin.formats.checkpoint import Checkpoint
from halfbin.models.mapped import MappedMemory
from halfbin.models.products import Product, Watch
from halfbin.models.walk import Stop, survey, walk
from halfbin.planning import Plan
from halfbin.run.blockwise.feeding import model_inputs, without_cache
from halfbin.run.blockwise.part import PROBE_SEED, Part
from halfbin.run.blockwise.rotating import Rotating
from halfbin.run.blockwise.state import Emit, Outcome, State
from halfbin.run.blockwise.streams import Streams
from halfbin.run.memory import give_back, return_large_tensors

PROBE_TOKENS = 64  # read by the probe: enough that experts are reached and channels are alive


def quantize_blocks(
    plan: Plan,
    checkpoint: Checkpoint,
    batches: Sequence[Tensor],
    emit: Emit,
    *,
    activations: Path | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Carry out what a plan wants data for, and everything in the same blocks.

    Args:
      plan: made from this checkpoint.
      checkpoint: the float weights.
      batches: token ids, int64 [num_samples, length] each.
      emit: given every tensor that was decided, as soon as it is; the others are the caller's.
      activations: a folder for files that hold what stands between blocks; None: it is kept in memory.
      on_step: called with (blocks done, blocks in all).

    Raises:
      HalfbinError: the model reads no text.
    """
    if getattr(plan.skeleton.model, "main_input_name", "input_ids") != "input_ids":
        raise HalfbinError(
            f"recipe {plan.recipe.name} calibrates on text, and {plan.skeleton.model_class.__name__} does not read any; use a "
            "recipe without data, such as int8"
        )
    return_large_tensors()
    state = State(plan, checkpoint, emit)
    with without_cache(state.partial.model):
        _Loop(state, batches, activations).run(on_step)
    return state.outcome


class _Loop:
    """One calibrated run."""

    def __init__(self, state: State, batches: Sequence[Tensor], activations: Path | None) -> None:
        self._state, self._batches, self._activations = state, batches, activations
        self._from_quantized = state.plan.recipe.inputs_from == "quantized"

    def run(self, on_step: Callable[[int, int], None] | None) -> None:
        state, partial, model = self._state, self._state.partial, self._state.partial.model
        rest = partial.outside(state.blocks)
        partial.load(rest)
        probe = self._batches[0][:1, :PROBE_TOKENS]
        (first,) = model_inputs(model, [probe])
        order = survey(model, state.blocks, first, lambda block: partial.loaded(block.parameters))
        state.calls = Counter(order)
        state.streams = Streams(self._batches, float_beside=self._needs_float_stream())
        inputs = model_inputs(model, state.streams.of(probe))
        owners = Counter(name for block in state.blocks for name in state.canonical(block.parameters))
        if any("rotate" in s.transforms for s in state.plan.sites if s.quantized):
            self._rotate(owners, first)
        outside = _Rest(state, rest)
        until = None if outside.wants_all else state.structure.head
        hold = MappedMemory(self._activations).take if self._activations else _leave
        stops = walk(model, state.blocks, inputs, until=until, context=outside.watch, hold=hold)
        for done, stop in enumerate(stops, 1):
            with partial.loaded(stop.block.parameters):
                if stop.visit == 0:
                    self._block(stop)
                    shared = [p for p in stop.block.parameters if owners[partial.canonical(p)] > 1]
                    for name in stop.block.parameters if state.calls[stop.block.name] > 1 else shared:
                        partial.keep(name)
                else:
                    self._hand_on(stop)
            if on_step:
                on_step(done, len(order))
        outside.round()
        state.outcome.blocks = list(dict.fromkeys(order))
        if state.routed_as_ever:
            state.outcome.remarks.append(
                f"experts of {len(state.routed_as_ever)} blocks, such as {state.routed_as_ever[0]}, were observed on the "
                "tokens that the router gave them, not on all: their code takes no other routing"
            )

    def _needs_float_stream(self) -> bool:
        """Whether every sample goes through the float model, too."""
        if not (self._state.plan.needs_float_stream and self._from_quantized):
            return False
        again = [name for name, calls in self._state.calls.items() if calls > 1]
        if again:  # it is rounded then: the stream through it would be float no more
            self._state.outcome.remarks.append(
                f"what earlier layers lost was not made up for: the model calls {again[0]} more than once"
            )
        return not again

    def _rotate(self, owners: Mapping[str, int], inputs: Mapping[str, Any]) -> None:
        """Let every parameter be turned when it is loaded, where a rotation is proved; those outside the blocks now."""
        state, partial = self._state, self._state.partial
        if any(n > 1 for n in (*state.calls.values(), *owners.values())):
            state.outcome.remarks.append("nothing was rotated: the model calls blocks twice, or they share weights")
            return
        rest = partial.outside(state.blocks)
        rotating = Rotating(
            partial,
            [block for block in state.blocks if block.name in state.calls],
            inputs,
            lambda stop: Part(state, stop.block.parameters).find_pairs(stop),
            lambda names: Part(state, names).writable,
            seed=PROBE_SEED,
        )
        state.rotations = rotating.find()
        state.outcome.remarks += state.rotations.remarks
        partial.on_load = self._turn
        partial.release(rest)
        partial.load(rest)

    def _turn(self, names: set[str]) -> None:
        for part in self._state.rotations.parts.values():
            if part.parameters & names:
                part.apply(self._state.partial.get)
                for name in part.parameters:
                    self._round_as_stored(name)

    def _round_as_stored(self, parameter: str) -> None:
        """Take the values that a parameter will have in the type it is stored in, if it is not rounded to codes."""
        dtype = self._state.stored_dtype(parameter)
        if dtype is not None:
            values = self._state.partial.get(parameter).detach()
            values.copy_(values.to(dtype))

    def _hand_on(self, stop: Stop) -> None:
        with torch.no_grad():
            for call in stop.calls:
                stop.answer(call, stop.run(call, final=True))

    def _block(self, stop: Stop) -> None:
        rounded = self._from_quantized
        with torch.no_grad():
            stop.find_mutation()
            part = Part(self._state, stop.block.parameters)
            if self._state.plan.recipe.all_experts:
                part.observing.take_every_expert(stop)
            if self._state.streams.float_beside and part.corrects:
                part.observing.take_in_stages(stop)
            part.observe(stop, final=not rounded)
            give_back()
            part.transform(stop)
            part.round(stop)
            give_back()
            if rounded or part.observing.has_static_inputs:
                part.observing.observe_ranges(stop, final=rounded)
            stop.calls[0].output = stop.run(stop.calls[0], final=True)
            part.give_out()
        del part
        give_back()


class _Rest:
    """The sites outside the blocks: observed in the batches' own threads, rounded at the end."""

    def __init__(self, state: State, names: Sequence[str]) -> None:
        self._state, self._part = state, Part(state, names, only_with_data=True)
        self._batch = 0

    @property
    def wants_all(self) -> bool:
        """Whether what comes after the last block must be computed."""
        return any(planned.needs_data for planned, _ in self._part.sites)

    def watch(self, batch: int) -> contextlib.AbstractContextManager[object]:
        """Entered in each batch's thread; the first batch is the probe's."""
        if not self.wants_all or not self._state.streams.observed(batch):
            return contextlib.nullcontext()

        def see(product: Product) -> None:
            if self._batch != batch:  # another thread's turn
                self._batch = batch
                self._part.observing.begin_call()
            self._part.observing.see(product)

        return Watch(self._part.parameters, see)

    def round(self) -> None:
        with torch.no_grad():
            self._part.round()
            self._part.give_out()


def _leave(arguments: object) -> None:
    """Activations stay in memory."""
