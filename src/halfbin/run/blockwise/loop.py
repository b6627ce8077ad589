"""The loop over the blocks: load, observe, transform, round, put back, hand on, release."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from halfbin.calibration import ActivationHistogram, InputStatistics
from halfbin.errors import DataError, HalfbinError
from halfbin.evaluation.layers import TensorError, rounding_sums
from halfbin.formats.checkpoint import Checkpoint
from halfbin.kernels.errors import ErrorSums
from halfbin.models import Structure
from halfbin.models.blocks import find_blocks
from halfbin.models.inputs import Group, Inputs
from halfbin.models.partial import PartialModel
from halfbin.models.placement import Places, find_places
from halfbin.models.probe import Consumer, Pair, Probe, find_pairs, unseen
from halfbin.models.products import Place, Product, Watch
from halfbin.models.walk import Stop, survey, walk
from halfbin.planning import Plan, SitePlan
from halfbin.run.blockwise.feeding import model_inputs
from halfbin.run.blockwise.learning import learn_codes, targets_of
from halfbin.run.blockwise.rounding import Factors, SiteCodes, output_error, round_site
from halfbin.run.blockwise.smoothing import Smoother
from halfbin.run.blockwise.stored import Stored, cast
from halfbin.run.memory import give_back, return_large_tensors
from halfbin.tensor import InputQuantizer, QTensor, dequantize
from halfbin.tensor.matrices import matrices

PROBE_TOKENS = 64  # read by the probe: enough that experts are reached and channels are alive


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a calibrated run goes about it.

    from_quantized: a block's inputs come from the blocks before it as they were rounded, not from the float ones.
    seed: of the probe's random factors.
    """

    from_quantized: bool = True
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Rounded:
    """A tensor on disk that was decided by data, or changed on the way.

    name:         on disk.
    q:            its codes; None where it stays in floating point.
    values:       the new values of a tensor that a transform changed, as stored; None where there are codes.
    sums:         of the codes' error against what was rounded.
    inputs:       what quantizes its layer's inputs; None: nothing does.
    transformed:  whether the values are others than the original's.
    output_error: of the site's outputs on the calibration data.
    remarks:      what a user should know.
    """

    name: str
    q: QTensor | None = None
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
    """

    blocks: list[str] = field(default_factory=list)
    pairs: int = 0


Emit = Callable[[Rounded], None]


def quantize_blocks(
    plan: Plan,
    checkpoint: Checkpoint,
    batches: Sequence[Tensor],
    emit: Emit,
    *,
    settings: Settings | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Carry out what a plan wants data for, and everything in the same blocks.

    Args:
      plan: made from this checkpoint.
      checkpoint: the float weights.
      batches: token ids, int64 [num_samples, length] each.
      emit: given every tensor that was decided, as soon as it is; the others are the caller's.
      settings: how.
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
    return _Loop(plan, checkpoint, batches, emit, settings or Settings()).run(on_step)


class _Loop:
    """One calibrated run."""

    def __init__(
        self, plan: Plan, checkpoint: Checkpoint, batches: Sequence[Tensor], emit: Emit, settings: Settings
    ) -> None:
        self._plan, self._emit, self._settings = plan, emit, settings
        self._partial = PartialModel(plan.skeleton, checkpoint)
        self._blocks = find_blocks(self._partial.model)
        self.structure = Structure(self._partial.model)
        self._planned = {s.site.tensor: s for s in plan.sites}
        shapes = {name: tuple(checkpoint.info(name).shape) for name in checkpoint.names}
        self._shapes = shapes
        probe = batches[0][:1, :PROBE_TOKENS]
        self._inputs = model_inputs(self._partial.model, [probe, *batches])
        self._pairs: dict[tuple[str, ...], list[Pair]] = {}  # by the names in a block: blocks are mostly alike
        self._calls: Counter[str] = Counter()  # how often each block is called
        self._outcome = Outcome()
        self._emitted: set[str] = set()

    def emit(self, rounded: Rounded) -> None:
        """Hand a tensor over; it is not looked at again, though other blocks may share it."""
        self._emitted.add(rounded.name)
        self._emit(rounded)

    def run(self, on_step: Callable[[int, int], None] | None) -> Outcome:
        partial, model = self._partial, self._partial.model
        rest = partial.outside(self._blocks)
        partial.load(rest)
        order = survey(model, self._blocks, self._inputs[0], lambda block: partial.loaded(block.parameters))
        self._calls = Counter(order)
        owners = Counter(
            partial.canonical(p) for block in self._blocks for p in set(map(partial.canonical, block.parameters))
        )
        outside = _Rest(self, rest)
        until = None if outside.wants_all else self.structure.head
        for done, stop in enumerate(walk(model, self._blocks, self._inputs, until=until, context=outside.watch), 1):
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
        return self._outcome

    def _hand_on(self, stop: Stop) -> None:
        with torch.no_grad():
            for call in stop.calls:
                stop.answer(call, stop.run(call, final=True))

    def _block(self, stop: Stop) -> None:
        rounded = self._settings.from_quantized
        with torch.no_grad():
            stop.find_mutation()
            part = Part(self, stop.block.parameters)
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
        self.wanted = [place for s, places in self._sites for place in places if s.site.role != "embedding"]
        self.inputs: Inputs[InputStatistics] = Inputs(InputStatistics, _inside_of(self.wanted))
        self._stored = Stored(partial, self._places, loop._shapes)
        self._changed: set[str] = set()
        self._static = [p for s, places in self._sites for p in places if s.inputs is not None and s.inputs.needs_scale]
        self.ranges: Inputs[ActivationHistogram] = Inputs(ActivationHistogram, _inside_of(self._static))
        self._rounded: list[tuple[SitePlan, Places, Rounded]] = []

    @property
    def has_static_inputs(self) -> bool:
        """Whether scales of inputs are to be chosen."""
        return bool(self._static)

    def observe(self, stop: Stop, *, final: bool) -> None:
        """Run the block on all samples but the probe's, and see what flows into its sites."""
        wanted = final or any("autoround" in s.method for s, _ in self._sites)
        with Watch(self.parameters, self.inputs.see):
            for call in stop.calls[1:]:
                self.inputs.begin_call()
                output = stop.run(call, final=final)
                if wanted:
                    call.output = output

    def observe_ranges(self, stop: Stop, *, final: bool) -> None:
        """Run the rounded block on the same samples: its outputs, if they are `final`, and the ranges of static inputs."""
        watch = Watch(self.parameters, self.ranges.see) if self._static else contextlib.nullcontext()
        with watch:
            for call in stop.calls[1:]:
                self.ranges.begin_call()
                output = stop.run(call, final=final)
                if final:
                    stop.answer(call, output)

    def transform(self, stop: Stop) -> None:
        """Apply the transforms that the sites ask for."""
        wanted = list(dict.fromkeys(t for s, _ in self._sites for t in s.transforms))
        # A block that comes again gets other inputs then, and the proof has seen the first ones only.
        if not wanted or self._loop._calls[stop.block.name] > 1:
            return
        pairs = [p for p in self._find_pairs(stop) if self._may_change(p)]
        smoother = Smoother(self._partial, self.inputs, self._sites, self._stored_dtype)
        for transform in wanted:
            for pair in pairs:
                smoother.apply(pair, transform)
        self._changed = smoother.changed
        self._loop._outcome.pairs += len(pairs)

    def round(self, stop: Stop | None = None) -> None:
        """Choose codes for every site, and put the rounded weights back; those that are learned last, with the block `stop`."""
        learned = [(s, places) for s, places in self._sites if stop is not None and "autoround" in s.method]
        values = {s.site.tensor: self._stored.read(s.site.tensor).clone() for s, _ in learned}
        found, factors = {}, Factors()
        self._readers = Counter(id(group) for _, places in self._sites for group in self._feeding(places))
        # Sites that read the widest inputs come last: by then the statistics of all others are given back.
        for planned, places in sorted(self._sites, key=lambda site: site[1][0].size[1]):
            groups = {place: self.inputs.feeding(place) for place in places}
            site = round_site(planned, places, self.parameters[places[0].parameter], groups, factors)
            if (planned, places) in learned:
                found[planned.site.tensor] = site
            else:
                self._settle(planned, places, site, self._stored.read(planned.site.tensor))
                self._forget(places, factors)
        if stop is not None and learned:
            codes = self._learn(stop, learned, {name: site.q for name, site in found.items()}, values)
            for planned, places in learned:
                name = planned.site.tensor
                groups = {place: self.inputs.feeding(place) for place in places}
                error = output_error(places, values[name], codes[name], groups, transposed=planned.site.transposed)
                self._settle(planned, places, replace(found[name], q=codes[name], output_error=error), values.pop(name))
                self._forget(places, factors)

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
            self._loop.emit(replace(rounded, inputs=self._input_quantizer(planned, places)))

    def _forget(self, places: Places, factors: Factors) -> None:
        """Give back what was seen of inputs that no further site reads."""
        for group in self._feeding(places):
            self._readers[id(group)] -= 1
            if not self._readers[id(group)]:
                factors.forget(group)

    def _feeding(self, places: Places) -> list[Group[InputStatistics]]:
        """The groups that a site's matrices read, each once."""
        return list({id(g): g for g in map(self.inputs.feeding, places) if g is not None}.values())

    def _put_back(self, planned: SitePlan, places: Places, q: QTensor) -> None:
        for place, w_hat in zip(places, matrices(dequantize(q), transposed=planned.site.transposed), strict=True):
            place.view(self.parameters[place.parameter]).copy_(w_hat)

    def _learn(
        self,
        stop: Stop,
        learned: Sequence[tuple[SitePlan, Places]],
        start: Mapping[str, QTensor],
        values: Mapping[str, Tensor],
    ) -> dict[str, QTensor]:
        prefix = f"{stop.block.name}."
        names = {self._partial.canonical(p): p.removeprefix(prefix) for p in stop.block.parameters}
        chosen = {s.site.tensor for s, _ in learned}
        return learn_codes(
            stop,
            targets_of(stop.calls[1:]),
            learned,
            self.parameters,
            names,
            {name: q for name, q in start.items() if name in chosen},
            values,
        )

    def give_out(self) -> None:
        """Hand every tensor over that was rounded or changed."""
        for planned, places, rounded in self._rounded:
            self._loop.emit(replace(rounded, inputs=self._input_quantizer(planned, places)))
        for name in self._on_disk:
            parameter_name = self._partial.canonical(self._partial.targets[name].parameter)
            if name not in self._loop._emitted and parameter_name in self._changed:
                dtype = self._dtype_on_disk(name)
                assert dtype is not None
                self._loop.emit(Rounded(name, values=cast(self._stored.read(name), dtype), transformed=True))

    def _input_quantizer(self, planned: SitePlan, places: Places) -> InputQuantizer | None:
        if planned.inputs is None or not planned.inputs.needs_scale:
            return planned.inputs.quantizer() if planned.inputs else None
        group = next(filter(None, map(self.ranges.feeding, places)), None)
        if group is None:
            raise DataError(
                f"{planned.site.name}: its inputs are {planned.inputs}, with a scale from calibration, and no calibration "
                "sample reached it; give it a rule of its own, with dynamic inputs or none"
            )
        grid = planned.inputs.scheme.grid
        return planned.inputs.calibrated(*group.observer.range(grid, planned.input_estimator))

    def _find_pairs(self, stop: Stop) -> list[Pair]:
        """The block's pairs under their full names; found once for blocks that are alike, and proved in each."""
        prefix = f"{stop.block.name}."
        relative = {p.removeprefix(prefix): self._partial.canonical(p) for p in stop.block.parameters}
        call = stop.calls[0]
        probe = Probe({r: self.parameters[name] for r, name in relative.items()}, stop.handing_on(call))
        generator = torch.Generator().manual_seed(self._loop._settings.seed)
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
        return len(owners) == 1 and all(name in self.parameters and self._stored.writable(name) for name in names)

    def _stored_dtype(self, parameter: str) -> torch.dtype | None:
        return next((self._dtype_on_disk(name) for name in self._stored.names(parameter)), None)

    def _dtype_on_disk(self, name: str) -> torch.dtype | None:
        planned = self._loop._planned.get(name)
        if planned is None:
            return self._loop._plan.others[name][0]
        if planned.quantized:
            return None
        return planned.weights if isinstance(planned.weights, torch.dtype) else planned.site.dtype


class _Rest:
    """The sites outside the blocks: observed in the batches' own threads, rounded at the end."""

    def __init__(self, loop: _Loop, names: Sequence[str]) -> None:
        self._part = Part(loop, names)
        self._sites = [s for s, _ in self._part._sites if s.needs_data]
        self._part._sites = [(s, places) for s, places in self._part._sites if s.needs_data]
        self._batch = 0

    @property
    def wants_all(self) -> bool:
        """Whether what comes after the last block must be computed."""
        return bool(self._sites)

    def watch(self, batch: int) -> contextlib.AbstractContextManager[object]:
        """Entered in each batch's thread; the first batch is the probe's."""
        if not self._sites or batch == 0:
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


def _inside_of(wanted: Sequence[Place]) -> Callable[[Place], bool]:
    """Whether a place holds one of `wanted`; it knows no `Part`, which would else wait for the garbage collector."""
    return lambda place: any(each.inside(place) for each in wanted)


def _renamed(pair: Pair, names: Mapping[str, str]) -> Pair:
    producer = replace(pair.producer, parameters=tuple(names[p] for p in pair.producer.parameters))
    consumers = [Consumer(replace(c.place, parameter=names[c.place.parameter]), c.channels) for c in pair.consumers]
    return Pair(producer, tuple(consumers))
