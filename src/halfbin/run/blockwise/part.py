"""Some parameters that are in memory, and the sites among them: a block, or everything outside the blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from halfbin.calibration import InputStatistics
from halfbin.evaluation.layers import rounding_sums
from halfbin.models.inputs import Group
from halfbin.models.placement import Places, find_places
from halfbin.models.probe import Consumer, Pair, Probe, find_pairs, unseen
from halfbin.models.products import Place
from halfbin.models.walk import Stop
from halfbin.planning import SitePlan
from halfbin.run.blockwise.learning import learn_codes, targets_of
from halfbin.run.blockwise.observing import Observing
from halfbin.run.blockwise.ranges import input_quantizer
from halfbin.run.blockwise.rounding import Factors, SiteCodes, output_error, round_site
from halfbin.run.blockwise.smoothing import Smoother
from halfbin.run.blockwise.stages import Site
from halfbin.run.blockwise.state import Rounded, State
from halfbin.run.blockwise.stored import Stored, cast
from halfbin.tensor import MixedTensor, QTensor, dequantize
from halfbin.tensor.matrices import matrices

PROBE_SEED = 0  # of the probe's random factors


class Part:
    """What is observed, transformed, rounded and handed over together."""

    def __init__(self, state: State, parameters: Sequence[str], *, only_with_data: bool = False) -> None:
        """Find the sites; `only_with_data`: those alone that need data, or were turned, and cannot be rounded elsewhere."""
        partial, rotated = state.partial, state.rotations.parameters
        self._state, self._partial = state, partial
        names = state.canonical(parameters)
        self.parameters: Mapping[str, nn.Parameter] = {name: partial.get(name) for name in names}
        self._on_disk = [name for name in partial.on_disk(names) if name not in state.emitted]
        sites = [state.planned[name] for name in self._on_disk if name in state.planned]
        self._places = find_places(partial, [s.site for s in sites])
        self.sites: list[Site] = [
            (s, places)
            for s in sites
            if s.quantized and (places := self._places.get(s.site.tensor))
            if not only_with_data or s.needs_data or places[0].parameter in rotated
        ]
        self.observing = Observing(state, self.parameters, self.sites)
        transposed = {s.site.tensor for s in sites if s.site.transposed}
        self._stored = Stored(partial, self._places, state.shapes, transposed)
        self._changed = rotated & set(names)
        self._transforms = list(dict.fromkeys(t for s, _ in self.sites for t in s.transforms if t != "rotate"))
        self._rounded: list[tuple[SitePlan, Places, Rounded]] = []

    @property
    def corrects(self) -> bool:
        """Whether what earlier layers lost is to be made up for."""
        return any(s.correction for s, _ in self.sites)

    def observe(self, stop: Stop, *, final: bool) -> None:
        """Run the block on all samples, and see what flows into its sites; `final`: its outputs are handed on."""
        if self.observing.in_stages and not self._transforms:
            self.observing.observe_stage(stop, 0)
        else:
            self.observing.observe(stop, final=final)

    def transform(self, stop: Stop) -> None:
        """Apply the transforms that the sites ask for."""
        # A block that comes again gets other inputs then, and the proof has seen the first ones only.
        if not self._transforms or self._state.calls[stop.block.name] > 1:
            return
        pairs = [p for p in self.find_pairs(stop) if self._may_change(p)]
        smoother = Smoother(self._partial, self.observing.statistics, self.sites, self._state.stored_dtype)
        for transform in self._transforms:
            for pair in pairs:
                smoother.apply(pair, transform)
        self._changed |= smoother.changed
        self._state.outcome.pairs += len(pairs)

    def round(self, stop: Stop | None = None) -> None:
        """Choose codes for every site, and put the rounded weights back; those that are learned last, with the block `stop`."""
        learned = [(s, places) for s, places in self.sites if stop is not None and "autoround" in s.method]
        values = {s.site.tensor: self._stored.read(s.site.tensor).clone() for s, _ in learned}
        found: dict[str, SiteCodes] = {}
        seen: dict[str, Mapping[Place, Group[InputStatistics] | None]] = {}
        observing = self.observing
        if observing.in_stages:
            observing.remember_float()
        for number, stage in enumerate(observing.stages):
            if stop is not None and observing.in_stages and (number or self._transforms):
                observing.observe_stage(stop, number)
            factors = Factors()
            # Sites that read the widest inputs come last: by then the statistics of all others are given back.
            order = sorted(stage, key=lambda site: site[1][0].size[1])
            readers = Counter(id(group) for _, places in order for group in observing.feeding(places))
            for planned, places in order:
                groups = {place: observing.statistics.feeding(place) for place in places}
                site = round_site(planned, places, self.parameters[places[0].parameter], groups, factors)
                if (planned, places) in learned:
                    found[planned.site.tensor], seen[planned.site.tensor] = site, groups
                    self._put_back(planned, places, site.q)
                    continue
                self._settle(planned, places, site, self._stored.read(planned.site.tensor))
                for group in observing.feeding(places):
                    readers[id(group)] -= 1
                    if not readers[id(group)]:
                        factors.forget(group)
        observing.forget_float()
        if stop is not None and learned:
            codes = self._learn(stop, learned, {name: site.q for name, site in found.items()}, values)
            for planned, places in learned:
                name = planned.site.tensor
                error = output_error(places, values[name], codes[name], seen[name], transposed=planned.site.transposed)
                self._settle(planned, places, replace(found[name], q=codes[name], output_error=error), values.pop(name))
            for group in observing.statistics.groups():
                group.observer.forget()

    def give_out(self) -> None:
        """Hand every tensor over that was rounded or changed."""
        for planned, places, rounded in self._rounded:
            group = next(filter(None, map(self.observing.ranges.feeding, places)), None)
            self._state.emit(replace(rounded, inputs=input_quantizer(planned, group)))
        for name in self._on_disk:
            parameter_name = self._partial.canonical(self._partial.targets[name].parameter)
            if name not in self._state.emitted and parameter_name in self._changed:
                dtype = self._state.dtype_on_disk(name)
                assert dtype is not None
                self._state.emit(Rounded(name, values=cast(self._stored.read(name), dtype), transformed=True))

    def find_pairs(self, stop: Stop) -> list[Pair]:
        """The block's pairs under their full names; found once for blocks that are alike, and proved in each."""
        prefix = f"{stop.block.name}."
        relative = {p.removeprefix(prefix): self._partial.canonical(p) for p in stop.block.parameters}
        call = stop.calls[0]
        probe = Probe({r: self.parameters[name] for r, name in relative.items()}, stop.handing_on(call))
        generator = torch.Generator().manual_seed(PROBE_SEED)
        key = tuple(f"{r} {list(self.parameters[name].shape)}" for r, name in relative.items())
        known = self._state.pairs.get(key)
        if known is None or not all(probe.holds(pair, generator) for pair in known):
            known = find_pairs(probe, stop.block.module, generator)
            self._state.pairs[key] = known
        experts = {p.removeprefix(prefix) for p in stop.block.parameters if p in self._state.structure.experts}
        hidden = unseen(probe, stop.block.module, experts)
        return [_renamed(p, relative) for p in known if not hidden & {c.place.size[1] for c in p.consumers}]

    def writable(self, parameter: str) -> bool:
        """Whether a parameter can be stored after a change."""
        return self._stored.writable(parameter)

    def _may_change(self, pair: Pair) -> bool:
        names = {*pair.producer.parameters, *(c.place.parameter for c in pair.consumers)}
        owners = [b for b in self._state.blocks if names & set(map(self._partial.canonical, b.parameters))]
        return len(owners) == 1 and all(name in self.parameters and self.writable(name) for name in names)

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
            self._state.emit(replace(rounded, inputs=input_quantizer(planned, None)))

    def _put_back(self, planned: SitePlan, places: Places, q: QTensor | MixedTensor) -> None:
        for place, w_hat in zip(places, matrices(dequantize(q), transposed=planned.site.transposed), strict=True):
            place.view(self.parameters[place.parameter]).copy_(w_hat)

    def _learn(
        self,
        stop: Stop,
        learned: Sequence[Site],
        start: Mapping[str, QTensor | MixedTensor],
        values: Mapping[str, Tensor],
    ) -> dict[str, QTensor]:
        chosen = {s.site.tensor for s, _ in learned}
        pairs = list(self._state.streams.pairs(stop))
        return learn_codes(
            stop,
            [call for call, _ in pairs],
            targets_of([unrounded or call for call, unrounded in pairs]),
            learned,
            self.parameters,
            self._state.inside(stop.block),
            {name: q for name, q in start.items() if name in chosen and isinstance(q, QTensor)},
            values,
        )


def _renamed(pair: Pair, names: Mapping[str, str]) -> Pair:
    producer = replace(pair.producer, parameters=tuple(names[p] for p in pair.producer.parameters))
    consumers = [Consumer(replace(c.place, parameter=names[c.place.parameter]), c.channels) for c in pair.consumers]
    return Pair(producer, tuple(consumers))
