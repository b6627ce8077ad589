"""What flows into the sites of a part: in one pass over all samples, or stage by stage beside the float model's stream."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from halfbin.calibration import ActivationHistogram, InputStatistics
from halfbin.models.every_expert import EveryExpert
from halfbin.models.inputs import Group, Inputs
from halfbin.models.placement import Places
from halfbin.models.products import Place, Product, Watch
from halfbin.models.walk import Call, Stop
from halfbin.run.blockwise.stages import Countdown, Order, Site, glance, read_by
from halfbin.run.blockwise.state import State


class Observing:
    """Statistics of the inputs of some sites, and ranges of those whose inputs get one scale.

    statistics: of what was observed last.
    ranges:     of inputs with a static scale.
    learns:     whether the block's outputs in float are wanted: they are then kept with each call.
    stages:     the sites in the order in which they are rounded.
    """

    def __init__(self, state: State, parameters: Mapping[str, nn.Parameter], sites: Sequence[Site]) -> None:
        self._state, self._parameters = state, parameters
        self.stages: list[list[Site]] = [list(sites)]
        self.learns = any("autoround" in s.method for s, _ in sites)
        self._routed: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        self._order: Order | None = None  # of products; only where sites are taken in stages
        self._float: dict[str, Tensor] = {}  # there, the parameters with sites as they were before
        self._unrounded: dict[Place, Tensor] = {}  # what the products of a call read in the float stream
        self._static = [p for s, places in sites for p in places if s.inputs is not None and s.inputs.needs_scale]
        self.statistics = self._of(sites)
        self.ranges: Inputs[ActivationHistogram] = Inputs(ActivationHistogram, _inside_of(self._static))

    @property
    def in_stages(self) -> bool:
        """Whether sites are observed when those before them are rounded."""
        return self._order is not None

    @property
    def has_static_inputs(self) -> bool:
        """Whether scales of inputs are to be chosen."""
        return bool(self._static)

    def feeding(self, places: Places) -> list[Group[InputStatistics]]:
        """The groups that a site's matrices read, each once."""
        return list({id(g): g for g in map(self.statistics.feeding, places) if g is not None}.values())

    def see(self, product: Product) -> None:
        """Take a product of a call that runs elsewhere."""
        self.statistics.see(product)
        self.ranges.see(product)

    def begin_call(self) -> None:
        """Say that the next products are another call's."""
        self.statistics.begin_call()
        self.ranges.begin_call()

    def take_every_expert(self, stop: Stop) -> None:
        """From now on observe experts with every token, where their code takes such a routing."""
        experts = EveryExpert(stop.block.module, lambda: stop.run(stop.calls[0]))
        self._routed, structure = experts.routed, self._state.structure
        reached = experts.parameters
        missed = any(n in structure.experts and id(p) not in reached for n, p in self._parameters.items())
        routes = bool(structure.routers & set(self._parameters))
        if missed or (routes and not reached):
            self._state.routed_as_ever.append(stop.block.name)

    def take_in_stages(self, stop: Stop) -> None:
        """From now on observe the input of each site when all sites that come before it are rounded."""
        with self._routed():
            self._order = Order.of(lambda: stop.run(stop.calls[0]), self._parameters)
        (sites,) = self.stages
        self.stages = self._order.stages(sites)

    def observe(self, stop: Stop, *, final: bool) -> None:
        """Run the block on all samples; `final`: its outputs are handed on."""
        with self._routed(), Watch(self._parameters, self.statistics.see):
            for call, _ in self._state.streams.pairs(stop):
                self.statistics.begin_call()
                output = stop.run(call, final=final)
                if final or self.learns:
                    call.output = output
        if self._order is None:
            for _, unrounded in self._state.streams.pairs(stop):
                if unrounded is not None:
                    self._hand_on_float(stop, unrounded, stop.run(unrounded, final=True))

    def remember_float(self) -> None:
        """Keep the parameters with sites as they are, until `forget_float`."""
        held = {place.parameter for stage in self.stages for _, places in stage for place in places}
        self._float = {name: self._parameters[name].detach().clone() for name in held}

    def forget_float(self) -> None:
        """Give them back."""
        self._float.clear()

    def observe_stage(self, stop: Stop, number: int) -> None:
        """See what flows into the sites of a stage in both streams; with the last stage the float one is handed on."""
        assert self._order is not None
        wanted = read_by(self.stages[number])
        holds_a_site, self.statistics = _inside_of(wanted), self._of(self.stages[number])
        inside = self._state.inside(stop.block)
        as_they_were = {inside[name]: value for name, value in self._float.items()}
        last = number == len(self.stages) - 1

        def remember(product: Product) -> None:
            if holds_a_site(product.place):
                self._unrounded[product.place] = product.x.detach()

        for call, unrounded in self._state.streams.pairs(stop):
            assert unrounded is not None
            countdown = None if last else Countdown(self._order, wanted)
            with self._routed(), glance({**self._parameters, **self._float}, remember, countdown):
                output = stop.run_with(unrounded, as_they_were, final=last)
            self.statistics.begin_call()
            with self._routed(), glance(self._parameters, self.statistics.see, Countdown(self._order, wanted)):
                stop.run(call)
            self._unrounded.clear()
            if last:
                self._hand_on_float(stop, unrounded, output)

    def observe_ranges(self, stop: Stop, *, final: bool) -> None:
        """Run the rounded block on the same samples: its outputs, if they are `final`, and the ranges of static inputs."""
        watch = Watch(self._parameters, self.ranges.see) if self._static else contextlib.nullcontext()
        with self._routed() if self._static else contextlib.nullcontext(), watch:
            for call, _ in self._state.streams.pairs(stop):
                self.ranges.begin_call()
                output = stop.run(call, final=final)
                if final:
                    stop.answer(call, output)

    def _hand_on_float(self, stop: Stop, unrounded: Call, output: Any) -> None:
        """Let a batch of the float stream go on, unless its output is still to be learned from."""
        if self.learns:
            unrounded.output = output
        else:
            stop.answer(unrounded, output)

    def _of(self, sites: Sequence[Site]) -> Inputs[InputStatistics]:
        """Statistics of what these sites read. Nothing in them knows this object, which would else wait for the collector."""
        unrounded_of, streams = self._unrounded, self._state.streams

        def take(observer: InputStatistics, product: Product) -> None:
            x, unrounded = product.x, unrounded_of.get(product.place)
            # Experts are given some of the tokens, which need not be the same ones in both streams.
            alike = (
                unrounded is not None and unrounded.shape == x.shape and x.numel() == x.shape[-1] * streams.num_tokens
            )
            observer.add(x, unrounded if alike else None)

        return Inputs(InputStatistics, _inside_of(read_by(sites)), take)


def _inside_of(wanted: Sequence[Place]) -> Callable[[Place], bool]:
    """Whether a place holds one of `wanted`; it knows no observer, which would else wait for the garbage collector."""
    return lambda place: any(each.inside(place) for each in wanted)
