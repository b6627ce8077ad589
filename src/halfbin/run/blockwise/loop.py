"""The loop over the blocks: load, observe, transform, round, put back, hand on, release."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfbin.calibration import ActivationHistogram, InputStatistics
from halfbin.errors import HalfbinError
from halfbin.evaluation.layers import TensorError, rounding_sums
from halfbin.formats.checkpoint import Checkpoint
from halfbin.kernels.errors import ErrorSums
from halfbin.models import Structure
from halfbin.models.blocks import find_blocks
from halfbin.models.every_expert import EveryExpert
from halfbin.models.inputs import Group, Inputs
from halfbin.models.mapped import MappedMemory
from halfbin.models.partial import PartialModel
from halfbin.models.placement import Places, find_places
from halfbin.models.probe import Consumer, Pair, Probe, find_pairs, unseen
from halfbin.models.products import Place, Product, Watch
from halfbin.models.walk import Call, Stop, survey, walk
from halfbin.planning import Plan, SitePlan
from halfbin.run.blockwise.feeding import model_inputs
from halfbin.run.blockwise.learning import learn_codes, targets_of
from halfbin.run.blockwise.ranges import input_quantizer
from halfbin.run.blockwise.rotating import Rotating, Rotations
from halfbin.run.blockwise.rounding import Factors, SiteCodes, output_error, round_site
from halfbin.run.blockwise.smoothing import Smoother
from halfbin.run.blockwise.stages import Countdown, Order, Site, glance, read_by
from halfbin.run.blockwise.stored import Stored, cast
from halfbin.run.blockwise.streams import Streams
from halfbin.run.memory import give_back, return_large_tensors
from halfbin.tensor import InputQuantizer, MixedTensor, QTensor, dequantize
from halfbin.tensor.matrices import matrices

PROBE_TOKENS = 64  # read by the probe: enough that experts are reached and channels are alive
PROBE_SEED = 0  # of its random factors


@dataclass(frozen=True, slots=True, eq=False)
class Rounded:
    """A tensor on disk that was decided by data, or changed on the way.

    name:         on disk.
    q:            its codes, and columns beside them; None where it stays in floating point.
    values:       the new values of a tensor that a transform changed, as stored; None where there are codes.
    sums:         of the codes' error against what was rounded.
    inputs:       what quantizes its layer's inputs; None: nothing does.
    transformed:  whether the values are others than the original's.
    output_error: of the site's outputs on the calibration data.
    remarks:      what a user should know.
    """

    name: str
    q: QTensor | MixedTensor | None = None
    values: Tensor | None = None
    sums: ErrorSums | None = None
    inputs: InputQuantizer | None = None
    transformed: bool = False
    output_error: TensorError | None = None
    remarks: tuple[str, ...] = ()


@dataclass(slots=True)
class Outcome:
    """What happened besides.

    blocks: names of the blocks in the order in which they were called.
    pairs:  how many pairs of producer and consumers were used.
    remarks: what a user should know about the whole model.
    """

    blocks: list[str] = field(default_factory=list)
    pairs: int = 0
    remarks: list[str] = field(default_factory=list)


Emit = Callable[[Rounded], None]


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
    return _Loop(plan, checkpoint, batches, emit, activations).run(on_step)


class _Loop:
    """One calibrated run."""

    def __init__(
        self, plan: Plan, checkpoint: Checkpoint, batches: Sequence[Tensor], emit: Emit, activations: Path | None
    ) -> None:
        self._plan, self._emit, self._batches, self._activations = plan, emit, batches, activations
        self._from_quantized = plan.recipe.inputs_from == "quantized"
        self._partial = PartialModel(plan.skeleton, checkpoint)
        self._blocks = find_blocks(self._partial.model)
        self.structure = Structure(self._partial.model)
        self._planned = {s.site.tensor: s for s in plan.sites}
        shapes = {name: tuple(checkpoint.info(name).shape) for name in checkpoint.names}
        self._shapes = shapes
        self._pairs: dict[tuple[str, ...], list[Pair]] = {}  # by the names in a block: blocks are mostly alike
        self._calls: Counter[str] = Counter()  # how often each block is called
        self._outcome = Outcome()
        self._emitted: set[str] = set()
        self.rotations = Rotations()
        self.routed_as_ever: list[str] = []  # blocks with experts that take no other routing

    def emit(self, rounded: Rounded) -> None:
        """Hand a tensor over; it is not looked at again, though other blocks may share it."""
        self._emitted.add(rounded.name)
        self._emit(rounded)

    def run(self, on_step: Callable[[int, int], None] | None) -> Outcome:
        partial, model = self._partial, self._partial.model
        rest = partial.outside(self._blocks)
        partial.load(rest)
        probe = self._batches[0][:1, :PROBE_TOKENS]
        (first,) = model_inputs(model, [probe])
        order = survey(model, self._blocks, first, lambda block: partial.loaded(block.parameters))
        self._calls = Counter(order)
        # A block that comes again is rounded then: the stream through it would be float no more.
        beside = self._plan.needs_float_stream and self._from_quantized and max(self._calls.values(), default=0) == 1
        self.streams = Streams(self._batches, float_beside=beside)
        inputs = model_inputs(model, self.streams.of(probe))
        owners = Counter(
            partial.canonical(p) for block in self._blocks for p in set(map(partial.canonical, block.parameters))
        )
        if any("rotate" in s.transforms for s in self._plan.sites if s.quantized):
            self._rotate(order, owners, first)
        outside = _Rest(self, rest)
        until = None if outside.wants_all else self.structure.head
        hold = MappedMemory(self._activations).take if self._activations else _leave
        for done, stop in enumerate(
            walk(model, self._blocks, inputs, until=until, context=outside.watch, hold=hold), 1
        ):
            with partial.loaded(stop.block.parameters):
                if stop.visit == 0:
                    self._block(stop)
                    shared = [p for p in stop.block.parameters if owners[partial.canonical(p)] > 1]
                    for name in stop.block.parameters if self._calls[stop.block.name] > 1 else shared:
                        partial.keep(name)
                else:
                    self._hand_on(stop)
            if on_step:
                on_step(done, len(order))
        outside.round()
        self._outcome.blocks = list(dict.fromkeys(order))
        if self.routed_as_ever:
            self._outcome.remarks.append(
                f"experts of {len(self.routed_as_ever)} blocks, such as {self.routed_as_ever[0]}, were observed on the tokens "
                "that the router gave them, not on all: their code takes no other routing"
            )
        return self._outcome

    def _rotate(self, order: Sequence[str], owners: Mapping[str, int], inputs: Mapping[str, Any]) -> None:
        """Let every parameter be turned when it is loaded, where a rotation is proved; those outside the blocks now."""
        partial, rest = self._partial, self._partial.outside(self._blocks)
        if len(set(order)) < len(order) or any(n > 1 for n in owners.values()):
            self._outcome.remarks.append("nothing was rotated: the model calls blocks twice, or they share weights")
            return
        called = [block for block in self._blocks if block.name in set(order)]
        rotating = Rotating(
            partial,
            called,
            inputs,
            lambda stop: Part(self, stop.block.parameters).find_pairs(stop),
            lambda names: Part(self, names).writable,
            seed=PROBE_SEED,
        )
        self.rotations = rotating.find()
        self._outcome.remarks += self.rotations.remarks
        partial.on_load = self._turn
        partial.release(rest)
        partial.load(rest)

    def _turn(self, names: set[str]) -> None:
        for part in self.rotations.parts.values():
            if part.parameters & names:
                part.apply(self._partial.get)
                for name in part.parameters:
                    self.round_as_stored(name)

    def round_as_stored(self, parameter: str) -> None:
        """Take the values that a parameter will have in the type it is stored in, if it is not rounded to codes."""
        dtype = self.stored_dtype(parameter)
        if dtype is not None:
            values = self._partial.get(parameter).detach()
            values.copy_(values.to(dtype))

    def stored_dtype(self, parameter: str) -> torch.dtype | None:
        """The type that a parameter will be stored in; None where it is rounded to codes."""
        return next((self.dtype_on_disk(name) for name in self._partial.on_disk([parameter])), None)

    def dtype_on_disk(self, name: str) -> torch.dtype | None:
        """The same for a tensor by its name on disk."""
        planned = self._planned.get(name)
        if planned is None:
            return self._plan.others[name][0]
        if planned.quantized:
            return None
        return planned.weights if isinstance(planned.weights, torch.dtype) else planned.site.dtype

    def _hand_on(self, stop: Stop) -> None:
        with torch.no_grad():
            for call in stop.calls:
                stop.answer(call, stop.run(call, final=True))

    def _block(self, stop: Stop) -> None:
        rounded = self._from_quantized
        with torch.no_grad():
            stop.find_mutation()
            part = Part(self, stop.block.parameters)
            if self._plan.recipe.all_experts:
                part.take_every_expert(stop)
            if self.streams.float_beside and part.corrects:
                part.take_in_stages(stop)
            part.observe(stop, final=not rounded)
            give_back()
            part.transform(stop)
            part.round(stop)
            give_back()
            if rounded or part.has_static_inputs:
                part.observe_ranges(stop, final=rounded)
            stop.calls[0].output = stop.run(stop.calls[0], final=True)
            part.give_out()
        del part
        give_back()


class Part:
    """Some parameters that are in memory, and the sites among them: a block, or everything outside the blocks."""

    def __init__(self, loop: _Loop, parameters: Sequence[str]) -> None:
        partial = loop._partial
        self._loop, self._partial = loop, partial
        self.names = list(dict.fromkeys(map(partial.canonical, parameters)))
        self.parameters: Mapping[str, nn.Parameter] = {name: partial.get(name) for name in self.names}
        self._on_disk = [name for name in partial.on_disk(self.names) if name not in loop._emitted]
        sites = [loop._planned[name] for name in self._on_disk if name in loop._planned]
        self._places = find_places(partial, [s.site for s in sites])
        self._sites: list[tuple[SitePlan, Places]] = [
            (s, self._places[s.site.tensor]) for s in sites if s.quantized and self._places.get(s.site.tensor)
        ]
        self._unrounded: dict[Place, Tensor] = {}  # what the products of a call read in the float stream
        self.inputs = self._observing(self._sites)
        self._stored = Stored(partial, self._places, loop._shapes)
        self._changed = loop.rotations.parameters & set(self.names)
        self.corrects = any(s.correction for s, _ in self._sites)
        self._learns = any("autoround" in s.method for s, _ in self._sites)
        self._routed: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        self._order: Order | None = None  # of products; only where sites are taken in stages
        self._float: dict[str, Tensor] = {}  # there, the parameters with sites as they were before
        self._stages: list[list[Site]] = [self._sites]
        self._transforms = list(dict.fromkeys(t for s, _ in self._sites for t in s.transforms if t != "rotate"))
        self._static = [p for s, places in self._sites for p in places if s.inputs is not None and s.inputs.needs_scale]
        self.ranges: Inputs[ActivationHistogram] = Inputs(ActivationHistogram, _inside_of(self._static))
        self._rounded: list[tuple[SitePlan, Places, Rounded]] = []

    @property
    def has_static_inputs(self) -> bool:
        """Whether scales of inputs are to be chosen."""
        return bool(self._static)

    def take_every_expert(self, stop: Stop) -> None:
        """From now on observe experts with every token, where their code takes such a routing."""
        experts = EveryExpert(stop.block.module, lambda: stop.run(stop.calls[0]))
        self._routed = experts.routed
        reached = experts.parameters
        missed = any(n in self._loop.structure.experts and id(p) not in reached for n, p in self.parameters.items())
        routes = bool(self._loop.structure.routers & set(self.names))
        if missed or (routes and not reached):
            self._loop.routed_as_ever.append(stop.block.name)

    def take_in_stages(self, stop: Stop) -> None:
        """From now on observe the input of each site when all sites that come before it are rounded."""
        with self._routed():
            self._order = Order.of(lambda: stop.run(stop.calls[0]), self.parameters)
        self._stages = self._order.stages(self._sites)

    def observe(self, stop: Stop, *, final: bool) -> None:
        """Run the block on all samples, and see what flows into its sites; `final`: its outputs are handed on."""
        if self._order is not None and not self._transforms:
            self._observe_stage(stop, 0)
            return
        with self._routed(), Watch(self.parameters, self.inputs.see):
            for call, _ in self._loop.streams.pairs(stop):
                self.inputs.begin_call()
                output = stop.run(call, final=final)
                if final or self._learns:
                    call.output = output
        if self._order is None:
            for _, unrounded in self._loop.streams.pairs(stop):
                if unrounded is not None:
                    self._hand_on_float(stop, unrounded, stop.run(unrounded, final=True))

    def _hand_on_float(self, stop: Stop, unrounded: Call, output: Any) -> None:
        """Let a batch of the float stream go on, unless its output is still to be learned from."""
        if self._learns:
            unrounded.output = output
        else:
            stop.answer(unrounded, output)

    def _observe_stage(self, stop: Stop, number: int) -> None:
        """See what flows into the sites of a stage in both streams; with the last stage the float one is handed on."""
        assert self._order is not None
        wanted = read_by(self._stages[number])
        holds_a_site, self.inputs = _inside_of(wanted), self._observing(self._stages[number])
        as_they_were = {self._inner(stop)[name]: value for name, value in self._float.items()}
        last = number == len(self._stages) - 1

        def remember(product: Product) -> None:
            if holds_a_site(product.place):
                self._unrounded[product.place] = product.x.detach()

        for call, unrounded in self._loop.streams.pairs(stop):
            assert unrounded is not None
            countdown = None if last else Countdown(self._order, wanted)
            with self._routed(), glance({**self.parameters, **self._float}, remember, countdown):
                output = stop.run_with(unrounded, as_they_were, final=last)
            self.inputs.begin_call()
            with self._routed(), glance(self.parameters, self.inputs.see, Countdown(self._order, wanted)):
                stop.run(call)
            self._unrounded.clear()
            if last:
                self._hand_on_float(stop, unrounded, output)

    def _inner(self, stop: Stop) -> dict[str, str]:
        """From the names of the block's parameters to those inside the block."""
        prefix = f"{stop.block.name}."
        return {self._partial.canonical(p): p.removeprefix(prefix) for p in stop.block.parameters}

    def _observing(self, sites: Sequence[Site]) -> Inputs[InputStatistics]:
        """Statistics of what these sites read. Nothing in them knows this part, which would else wait for the collector."""
        unrounded_of, loop = self._unrounded, self._loop

        def take(observer: InputStatistics, product: Product) -> None:
            x, unrounded = product.x, unrounded_of.get(product.place)
            # Experts are given some of the tokens, which need not be the same ones in both streams.
            num_tokens = loop.streams.num_tokens
            alike = unrounded is not None and unrounded.shape == x.shape and x.numel() == x.shape[-1] * num_tokens
            observer.add(x, unrounded if alike else None)

        return Inputs(InputStatistics, _inside_of(read_by(sites)), take)

    def observe_ranges(self, stop: Stop, *, final: bool) -> None:
        """Run the rounded block on the same samples: its outputs, if they are `final`, and the ranges of static inputs."""
        watch = Watch(self.parameters, self.ranges.see) if self._static else contextlib.nullcontext()
        with self._routed() if self._static else contextlib.nullcontext(), watch:
            for call, _ in self._loop.streams.pairs(stop):
                self.ranges.begin_call()
                output = stop.run(call, final=final)
                if final:
                    stop.answer(call, output)

    def transform(self, stop: Stop) -> None:
        """Apply the transforms that the sites ask for."""
        wanted = self._transforms
        # A block that comes again gets other inputs then, and the proof has seen the first ones only.
        if not wanted or self._loop._calls[stop.block.name] > 1:
            return
        pairs = [p for p in self.find_pairs(stop) if self._may_change(p)]
        smoother = Smoother(self._partial, self.inputs, self._sites, self._loop.stored_dtype)
        for transform in wanted:
            for pair in pairs:
                smoother.apply(pair, transform)
        self._changed |= smoother.changed
        self._loop._outcome.pairs += len(pairs)

    def round(self, stop: Stop | None = None) -> None:
        """Choose codes for every site, and put the rounded weights back; those that are learned last, with the block `stop`."""
        learned = [(s, places) for s, places in self._sites if stop is not None and "autoround" in s.method]
        values = {s.site.tensor: self._stored.read(s.site.tensor).clone() for s, _ in learned}
        found: dict[str, SiteCodes] = {}
        seen: dict[str, Mapping[Place, Group[InputStatistics] | None]] = {}
        if self._order is not None:
            held = {place.parameter for _, places in self._sites for place in places}
            self._float = {name: self.parameters[name].detach().clone() for name in held}
        for number, stage in enumerate(self._stages):
            if stop is not None and self._order is not None and (number or self._transforms):
                self._observe_stage(stop, number)
            factors = Factors()
            # Sites that read the widest inputs come last: by then the statistics of all others are given back.
            order = sorted(stage, key=lambda site: site[1][0].size[1])
            readers = Counter(id(group) for _, places in order for group in self._feeding(places))
            for planned, places in order:
                groups = {place: self.inputs.feeding(place) for place in places}
                site = round_site(planned, places, self.parameters[places[0].parameter], groups, factors)
                if (planned, places) in learned:
                    found[planned.site.tensor], seen[planned.site.tensor] = site, groups
                    self._put_back(planned, places, site.q)
                    continue
                self._settle(planned, places, site, self._stored.read(planned.site.tensor))
                for group in self._feeding(places):
                    readers[id(group)] -= 1
                    if not readers[id(group)]:
                        factors.forget(group)
        self._float.clear()
        if stop is not None and learned:
            codes = self._learn(stop, learned, {name: site.q for name, site in found.items()}, values)
            for planned, places in learned:
                name = planned.site.tensor
                error = output_error(places, values[name], codes[name], seen[name], transposed=planned.site.transposed)
                self._settle(planned, places, replace(found[name], q=codes[name], output_error=error), values.pop(name))
            for group in self.inputs.groups():
                group.observer.forget()

    def _settle(self, planned: SitePlan, places: Places, site: SiteCodes, values: Tensor) -> None:
        """Put a site's rounded weights back, and hand its codes over unless a scale of its inputs is still to come."""
        rounded = Rounded(
            planned.site.tensor,
            site.q,
            sums=rounding_sums(values, site.q),
            transformed=bool(self._changed & {place.parameter for place in places}),
            output_error=site.output_error,
            remarks=site.remarks,
        )
        self._put_back(planned, places, site.q)
        if planned.inputs is not None and planned.inputs.needs_scale:
            self._rounded.append((planned, places, rounded))
        else:
            self._loop.emit(replace(rounded, inputs=input_quantizer(planned, None)))

    def _feeding(self, places: Places) -> list[Group[InputStatistics]]:
        """The groups that a site's matrices read, each once."""
        return list({id(g): g for g in map(self.inputs.feeding, places) if g is not None}.values())

    def _put_back(self, planned: SitePlan, places: Places, q: QTensor | MixedTensor) -> None:
        for place, w_hat in zip(places, matrices(dequantize(q), transposed=planned.site.transposed), strict=True):
            place.view(self.parameters[place.parameter]).copy_(w_hat)

    def _learn(
        self,
        stop: Stop,
        learned: Sequence[tuple[SitePlan, Places]],
        start: Mapping[str, QTensor | MixedTensor],
        values: Mapping[str, Tensor],
    ) -> dict[str, QTensor]:
        chosen = {s.site.tensor for s, _ in learned}
        pairs = list(self._loop.streams.pairs(stop))
        return learn_codes(
            stop,
            [call for call, _ in pairs],
            targets_of([unrounded or call for call, unrounded in pairs]),
            learned,
            self.parameters,
            self._inner(stop),
            {name: q for name, q in start.items() if name in chosen and isinstance(q, QTensor)},
            values,
        )

    def give_out(self) -> None:
        """Hand every tensor over that was rounded or changed."""
        for planned, places, rounded in self._rounded:
            group = next(filter(None, map(self.ranges.feeding, places)), None)
            self._loop.emit(replace(rounded, inputs=input_quantizer(planned, group)))
        for name in self._on_disk:
            parameter_name = self._partial.canonical(self._partial.targets[name].parameter)
            if name not in self._loop._emitted and parameter_name in self._changed:
                dtype = self._loop.dtype_on_disk(name)
                assert dtype is not None
                self._loop.emit(Rounded(name, values=cast(self._stored.read(name), dtype), transformed=True))

    def find_pairs(self, stop: Stop) -> list[Pair]:
        """The block's pairs under their full names; found once for blocks that are alike, and proved in each."""
        prefix = f"{stop.block.name}."
        relative = {p.removeprefix(prefix): self._partial.canonical(p) for p in stop.block.parameters}
        call = stop.calls[0]
        probe = Probe({r: self.parameters[name] for r, name in relative.items()}, stop.handing_on(call))
        generator = torch.Generator().manual_seed(PROBE_SEED)
        key = tuple(f"{r} {list(self.parameters[name].shape)}" for r, name in relative.items())
        known = self._loop._pairs.get(key)
        if known is None or not all(probe.holds(pair, generator) for pair in known):
            known = find_pairs(probe, stop.block.module, generator)
            self._loop._pairs[key] = known
        experts = {p.removeprefix(prefix) for p in stop.block.parameters if p in self._loop.structure.experts}
        hidden = unseen(probe, stop.block.module, experts)
        return [_renamed(p, relative) for p in known if not hidden & {c.place.size[1] for c in p.consumers}]

    def _may_change(self, pair: Pair) -> bool:
        names = {*pair.producer.parameters, *(c.place.parameter for c in pair.consumers)}
        owners = [b for b in self._loop._blocks if names & set(map(self._partial.canonical, b.parameters))]
        return len(owners) == 1 and all(name in self.parameters and self.writable(name) for name in names)

    def writable(self, parameter: str) -> bool:
        """Whether a parameter can be stored after a change."""
        return self._stored.writable(parameter)


class _Rest:
    """The sites outside the blocks: observed in the batches' own threads, rounded at the end."""

    def __init__(self, loop: _Loop, names: Sequence[str]) -> None:
        self._part = Part(loop, names)
        turned = loop.rotations.parameters
        self._sites = [s for s, _ in self._part._sites if s.needs_data]
        self._part._sites = [
            (s, places) for s, places in self._part._sites if s.needs_data or places[0].parameter in turned
        ]
        self._batch = 0

    @property
    def wants_all(self) -> bool:
        """Whether what comes after the last block must be computed."""
        return bool(self._sites)

    def watch(self, batch: int) -> contextlib.AbstractContextManager[object]:
        """Entered in each batch's thread; the first batch is the probe's."""
        if not self._sites or not self._part._loop.streams.observed(batch):
            return contextlib.nullcontext()

        def see(product: Product) -> None:
            if self._batch != batch:  # another thread's turn
                self._batch = batch
                self._part.inputs.begin_call()
                self._part.ranges.begin_call()
            self._part.inputs.see(product)
            self._part.ranges.see(product)

        return Watch(self._part.parameters, see)

    def round(self) -> None:
        with torch.no_grad():
            self._part.round()
            self._part.give_out()


def _leave(arguments: object) -> None:
    """Activations stay in memory."""


def _inside_of(wanted: Sequence[Place]) -> Callable[[Place], bool]:
    """Whether a place holds one of `wanted`; it knows no `Part`, which would else wait for the garbage collector."""
    return lambda place: any(each.inside(place) for each in wanted)


def _renamed(pair: Pair, names: Mapping[str, str]) -> Pair:
    producer = replace(pair.producer, parameters=tuple(names[p] for p in pair.producer.parameters))
    consumers = [Consumer(replace(c.place, parameter=names[c.place.parameter]), c.channels) for c in pair.consumers]
    return Pair(producer, tuple(consumers))
