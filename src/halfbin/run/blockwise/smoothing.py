"""Move scales between a block's producers and consumers, where the probe has proved that this changes nothing.

A scale s of a channel divides what the producer gives and multiplies the columns that read it. Norms are stored in 16 bits:
the producer takes p / s rounded to its type, and the columns the ratio of the two values that it really has, so that rounding
the producer costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbin.calibration import InputStatistics
from halfbin.models.inputs import Group, Inputs
from halfbin.models.partial import PartialModel
from halfbin.models.probe import Consumer, Pair, by_input, scale_producer
from halfbin.models.products import Place
from halfbin.numerics.low_rank import low_rank
from halfbin.planning import SitePlan
from halfbin.tensor import Scheme
from halfbin.tensor.matrices import scheme_of_matrix
from halfbin.transforms import (
    RATIOS,
    awq_scale,
    layer_loss,
    product_loss,
    search_scale,
    smoothing_scale,
)

SEARCHED_ROWS = 512  # rows of a weight, and of its inputs, that stand for all in a search
ALPHA = 0.5  # the paper's default, where nothing is known of how inputs are rounded
ALPHAS = tuple(i / 20 for i in range(4, 20))  # searched where it is


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """A planned matrix of a consumer: its values now, its scheme, and which channels its columns read."""

    planned: SitePlan
    weight: Tensor
    scheme: Scheme
    channels: Tensor
    group: Group[InputStatistics]


class Smoother:
    """Applies one block's pairs, and keeps statistics in step with them."""

    def __init__(
        self,
        partial: PartialModel,
        inputs: Inputs[InputStatistics],
        sites: Sequence[tuple[SitePlan, Sequence[Place]]],
        stored_dtype: Callable[[str], torch.dtype | None],
    ) -> None:
        """Look at one block.

        Args:
          partial: with the block in memory.
          inputs: what was seen of its inputs.
          sites: its quantized sites, and where they lie.
          stored_dtype: the type that a parameter will be stored in; None where it is rounded to codes.
        """
        self._partial, self._inputs, self._sites, self._stored_dtype = partial, inputs, sites, stored_dtype
        self.changed: set[str] = set()

    def apply(self, pair: Pair, transform: str) -> None:
        """Choose a scale for a pair whose consumers ask for `transform`, and move it."""
        consumers = list(self._weights(pair, transform))
        if not consumers:
            return
        scale = self._awq(pair, consumers) if transform == "awq" else self._smoothquant(pair, consumers)
        self._move(pair, scale)

    def _weights(self, pair: Pair, transform: str) -> Iterator[Weights]:
        for consumer in pair.consumers:
            for planned, places in self._sites:
                for place in places:
                    group = self._inputs.feeding(place)
                    if transform not in planned.transforms or not place.inside(consumer.place) or group is None:
                        continue
                    assert isinstance(planned.weights, Scheme)
                    site = planned.site
                    scheme = scheme_of_matrix(planned.weights, len(site.shape), transposed=site.transposed)
                    weight = place.view(self._partial.get(place.parameter))
                    yield Weights(planned, weight, scheme, consumer.channels, group)

    def _awq(self, pair: Pair, consumers: Sequence[Weights]) -> Tensor:
        importance = _by_channel(pair, consumers, lambda w: w.group.observer.channels.mean_magnitude, torch.mean)
        moments = {id(w.group): low_rank(w.group.observer.matrix()) for w in consumers}

        def loss(scale: Tensor) -> float:
            total = 0.0
            for w in consumers:
                step = max(1, len(w.weight) // SEARCHED_ROWS)
                own = by_input(scale, w.channels)
                total += layer_loss(w.weight[::step], w.scheme, moments[id(w.group)], own)
            return total

        return search_scale((awq_scale(importance, ratio) for ratio in RATIOS), loss)[0]

    def _smoothquant(self, pair: Pair, consumers: Sequence[Weights]) -> Tensor:
        x_absmax = _by_channel(pair, consumers, lambda w: w.group.observer.channels.absmax, torch.amax)
        w_absmax = _by_channel(pair, consumers, lambda w: w.weight.abs().amax(0), torch.amax)
        rounded = [w for w in consumers if w.planned.inputs is not None]
        given = {w.planned.options.alpha for w in consumers} - {None}
        alphas = sorted(a for a in given if a is not None)
        if len(alphas) == 1 or not rounded:
            return smoothing_scale(x_absmax, w_absmax, alphas[0] if alphas else ALPHA)

        def loss(scale: Tensor) -> float:
            total = 0.0
            for w in rounded:
                assert w.planned.inputs is not None
                step = max(1, len(w.weight) // SEARCHED_ROWS)
                rows = w.group.observer.rows
                rows = rows[:: max(1, len(rows) // SEARCHED_ROWS)]
                own, seen = by_input(scale, w.channels), w.group.observer.channels
                # A static range is that of all tokens, not of the few that stand for them here.
                inputs = w.planned.inputs.calibrated((seen.minimum / own).min(), (seen.maximum / own).max())
                total += product_loss(rows, w.weight[::step], own, inputs=inputs, weights=w.scheme)
            return total

        unchanged = torch.ones(pair.producer.num_channels)
        candidates = (smoothing_scale(x_absmax, w_absmax, a) for a in alphas or ALPHAS)
        return search_scale(candidates if alphas else [unchanged, *candidates], loss)[0]

    def _move(self, pair: Pair, scale: Tensor) -> None:
        parameters = _Parameters(self._partial)
        scale = self._as_stored(pair, scale.to(torch.float32))
        scale_producer(parameters, pair.producer, 1 / scale)
        for name in pair.producer.parameters:
            self._round_stored(name)
        for consumer in pair.consumers:
            consumer.place.view(self._partial.get(consumer.place.parameter)).mul_(by_input(scale, consumer.channels))
        for group, channels in self._groups(pair.consumers):
            group.observer.divide(by_input(scale, channels))
        self.changed |= {*pair.producer.parameters, *(c.place.parameter for c in pair.consumers)}

    def _groups(self, consumers: Sequence[Consumer]) -> Iterator[tuple[Group[InputStatistics], Tensor]]:
        """Each group that reads the scaled channels, once."""
        done = set()
        for consumer in consumers:
            for group in self._inputs.groups():
                if id(group) not in done and any(
                    p.inside(consumer.place) or consumer.place.inside(p) for p in group.places
                ):
                    done.add(id(group))
                    yield group, consumer.channels

    def _as_stored(self, pair: Pair, scale: Tensor) -> Tensor:
        """The scale that a producer's first parameter can have in the type it is stored in."""
        name = pair.producer.parameters[0]
        dtype = self._stored_dtype(name)
        values = self._partial.get(name).detach()[slice(*pair.producer.rows)]
        if dtype in (None, torch.float32) or values.ndim > 1:
            return scale
        shift = 1.0 if pair.producer.offset else 0.0
        wanted = ((values + shift) / scale - shift).to(dtype).to(torch.float32)
        real = (values + shift) / (wanted + shift)
        return torch.where(torch.isfinite(real) & (real > 0), real, torch.ones_like(real))

    def _round_stored(self, name: str) -> None:
        dtype = self._stored_dtype(name)
        if dtype is not None:
            values = self._partial.get(name).detach()
            values.copy_(values.to(dtype))


class _Parameters(Mapping[str, "torch.nn.Parameter"]):
    """A model's parameters by name, as they are now."""

    def __init__(self, partial: PartialModel) -> None:
        self._partial = partial

    def __getitem__(self, name: str) -> torch.nn.Parameter:
        return self._partial.get(name)

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self._partial.model.named_parameters())

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _by_channel(
    pair: Pair,
    consumers: Sequence[Weights],
    values: Callable[[Weights], Tensor],
    reduce: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """One value for each of the producer's channels from those of all inputs that read it, float32 [num_channels]."""
    found = []
    how = "amax" if reduce is torch.amax else "mean"
    for w in consumers:
        reads = w.channels >= 0
        into = torch.zeros(pair.producer.num_channels, dtype=torch.float32)
        found.append(
            into.scatter_reduce(0, w.channels[reads], values(w)[reads].to(torch.float32), how, include_self=False)
        )
    return reduce(torch.stack(found), 0)
