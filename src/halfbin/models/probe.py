"""Find, by measuring, which parameters scale which inputs, so that a scale can move from one to the other.

A *producer* is multiplied channel by channel with random factors t, and the block is run again on the same inputs. If every
channel j of some product's input comes back as r_j times what it was, on all tokens, and each r_j is one of the t or 1, then
that product's columns can take the inverse. They do, and the block is run again: what reads the scaled channels later on is
found that way, and in the end the block's outputs must be what they were. That is the proof; what fails it is not used.

No name and no architecture is asked for. The idea and its tolerances: docs/architecture.md, "Probe, don't parse".
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from halfbin.models.products import Place, Product, Watch
from halfbin.models.walk import tensors_in

SPREAD = 0.7  # factors lie between exp(-SPREAD) and exp(SPREAD)
CHANNEL_TOLERANCE = 5e-5  # of a channel's largest value: float32's rounding, through a norm
OUTPUT_TOLERANCE = 5e-5  # of the block's largest output
ROUNDS = 6  # of finding what reads the scaled channels

Run: TypeAlias = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Producer:
    """Parameters with a value, or a row, for each channel of something that is computed.

    parameters: their names, relative to the block: a norm's weight and bias, a linear's weight and bias.
    offset:     the first one stores w of 1 + w, as some norms do.
    rows:       the rows of them that are meant: fused projections hold several things.
    """

    parameters: tuple[str, ...]
    offset: bool
    rows: tuple[int, int]

    @property
    def num_channels(self) -> int:
        """How many channels it scales."""
        return self.rows[1] - self.rows[0]


@dataclass(frozen=True, slots=True, eq=False)
class Consumer:
    """A weight that reads a producer's channels.

    place:    the weight.
    channels: int64 [in_features]: the producer's channel that scales each input, -1 for none.
    """

    place: Place
    channels: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """A producer and all that reads it: a scale can move between them and leave the block's function as it was."""

    producer: Producer
    consumers: tuple[Consumer, ...]


@dataclass(slots=True, eq=False)
class Probe:
    """A block that can be run again and again on the same inputs.

    parameters: the block's, by their names relative to it.
    run:        computes the block's outputs, and what else it hands on.
    """

    parameters: Mapping[str, nn.Parameter]
    run: Run
    _inputs: list[Product] = field(default_factory=list)
    _outputs: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._inputs, self._outputs = self._watched()

    def find(self, producer: Producer, generator: torch.Generator) -> Pair | None:
        """What reads a producer; None where its scale cannot move, or nothing reads it."""
        t = _factors(producer.num_channels, generator)
        consumers: dict[Place, Tensor] = {}
        for _ in range(ROUNDS):
            with self.scaled(producer, t, consumers):
                inputs, outputs = self._watched()
            fresh, consistent = self._readers(inputs, t, consumers)
            if consistent and not fresh:
                if not consumers or not _alike(self._outputs, outputs):
                    return None
                return Pair(producer, tuple(Consumer(place, c) for place, c in self._everywhere(consumers).items()))
            if not fresh:
                return None
            consumers |= fresh
            consumers = self._everywhere(consumers)
        return None

    def holds(self, pair: Pair, generator: torch.Generator) -> bool:
        """Whether a pair that was found in a block like this one is one here too."""
        t = _factors(pair.producer.num_channels, generator)
        with self.scaled(pair.producer, t, {c.place: c.channels for c in pair.consumers}):
            _, outputs = self._watched()
        return _alike(self._outputs, outputs)

    def scaled(self, producer: Producer, t: Tensor, consumers: Mapping[Place, Tensor]) -> _Scaled:
        """Inside, the producer is scaled by `t` and its consumers by the inverse; afterwards all is to the bit as before."""
        return _Scaled(self.parameters, producer, t, consumers)

    def _watched(self) -> tuple[list[Product], list[Tensor]]:
        inputs: list[Product] = []

        def keep(product: Product) -> None:
            inputs.append(Product(product.place, product.x.detach().clone(), product.source))

        with torch.no_grad(), Watch(self.parameters, keep):
            output = self.run()
        return inputs, [t.detach().clone() for t in tensors_in(output)]

    def _readers(
        self, inputs: list[Product], t: Tensor, known: Mapping[Place, Tensor]
    ) -> tuple[dict[Place, Tensor], bool]:
        """Products whose inputs are scaled and that are not known yet, up to the first that is moved in another way.

        The second value says whether there was none of those.
        """
        if [p.place for p in inputs] != [p.place for p in self._inputs]:
            same = next(
                (i for i, (a, b) in enumerate(zip(inputs, self._inputs, strict=False)) if a.place != b.place), 0
            )
            inputs, complete = inputs[:same], False
        else:
            complete = True
        fresh: dict[Place, Tensor] = {}
        for before, after in zip(self._inputs, inputs, strict=False):
            if before.x.shape != after.x.shape:
                return fresh, False
            expected = known.get(after.place, fresh.get(after.place))
            if expected is None and _same(before.x, after.x):
                continue
            channels = _match(before.x, after.x, t)
            if channels is None:
                return fresh, False
            if expected is None:
                fresh[after.place] = channels
            elif not torch.equal(expected, channels):
                return fresh, False
        return fresh, complete

    def _everywhere(self, consumers: Mapping[Place, Tensor]) -> dict[Place, Tensor]:
        """Consumers, with every matrix of a stack of which one is: experts that no token reached read the same."""
        found = dict(consumers)
        for place, channels in consumers.items():
            parameter = self.parameters[place.parameter]
            if parameter.ndim == 3:
                step = parameter.stride(0)
                for i in range(parameter.shape[0]):
                    found.setdefault(
                        Place(place.parameter, place.size, place.stride, place.offset % step + i * step), channels
                    )
        return found


class _Scaled:
    """Scales a producer and its consumers, and puts everything back."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], producer: Producer, t: Tensor, consumers: Mapping[Place, Tensor]
    ) -> None:
        self._parameters, self._producer, self._t, self._consumers = parameters, producer, t, consumers
        self._before: dict[str, Tensor] = {}

    def __enter__(self) -> None:
        touched = {*self._producer.parameters, *(place.parameter for place in self._consumers)}
        self._before = {name: self._parameters[name].detach().clone() for name in touched}
        scale_producer(self._parameters, self._producer, self._t)
        for place, channels in self._consumers.items():
            place.view(self._parameters[place.parameter]).div_(by_input(self._t, channels))

    def __exit__(self, *_: object) -> None:
        for name, before in self._before.items():
            self._parameters[name].detach().copy_(before)


def scale_producer(parameters: Mapping[str, nn.Parameter], producer: Producer, t: Tensor) -> None:
    """Multiply a producer's channels by `t`, float [num_channels], in place."""
    rows = slice(*producer.rows)
    for i, name in enumerate(producer.parameters):
        part = parameters[name].detach()[rows]
        if producer.offset and i == 0:
            part.add_(1).mul_(t).sub_(1)
        else:
            part.mul_(t.reshape(-1, *(1 for _ in part.shape[1:])))


def by_input(t: Tensor, channels: Tensor) -> Tensor:
    """The factor of each input: `t` of its channel, 1 where it has none."""
    return torch.where(channels >= 0, t[channels.clamp(min=0)], torch.ones((), dtype=t.dtype))


def producers(block: nn.Module) -> Iterator[Producer]:
    """What may be a producer in a block: the vectors of each norm, the rows of each linear.

    Yields both readings of a vector, `w` and `1 + w`, one after the other.
    """
    for path, module in block.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own or any(True for _ in module.children()):
            continue
        names = {name: f"{path}.{name}" if path else name for name in own}
        matrices = [name for name, p in own.items() if p.ndim == 2]
        vectors = [name for name, p in own.items() if p.ndim == 1]
        if not matrices and vectors and len({len(own[name]) for name in vectors}) == 1:
            size = len(own[vectors[0]])
            first = sorted(vectors, key=lambda name: name != "weight")
            for offset in (False, True):
                yield Producer(tuple(names[name] for name in first), offset, (0, size))
        elif len(matrices) == 1:
            rows = own[matrices[0]].shape[0]
            biases = [name for name in vectors if len(own[name]) == rows]
            if len(biases) == len(vectors) and isinstance(module, nn.Linear):
                yield Producer(tuple(names[name] for name in (*matrices, *biases)), False, (0, rows))


def parts_of(producer: Producer, widths: set[int]) -> Iterator[Producer]:
    """Row ranges of a fused projection that may be foldable though the whole is not.

    [q | k | v] with an output of `width` inputs: the last (rows - width) / 2 are v; halves of [gate | up].
    """
    rows = producer.num_channels
    tails = {(rows - width) // 2 for width in widths if width < rows and (rows - width) % 2 == 0}
    ranges = [(rows - tail, rows) for tail in tails if 0 < tail < rows]
    if rows % 2 == 0 and rows // 2 in widths:
        ranges += [(rows // 2, rows), (0, rows // 2)]
    for span in sorted(dict.fromkeys(ranges), key=lambda span: span[0] - span[1]):  # the largest first
        yield Producer(producer.parameters, producer.offset, span)


def find_pairs(probe: Probe, block: nn.Module, generator: torch.Generator) -> list[Pair]:
    """All pairs of a block, in the order of its modules."""
    found: list[Pair] = []
    done: set[tuple[str, ...]] = set()
    widths = {product.place.size[1] for product in probe._inputs}
    for producer in producers(block):
        if producer.parameters in done:
            continue
        pair = probe.find(producer, generator)
        if pair is None and not producer.offset and probe.parameters[producer.parameters[0]].ndim == 2:
            parts = (probe.find(part, generator) for part in parts_of(producer, widths))
            pair = next((part for part in parts if part is not None), None)
        if pair is not None:
            found.append(pair)
            done.add(producer.parameters)
    return found


def unseen(probe: Probe, block: nn.Module, experts: Collection[str]) -> set[int]:
    """in_features of linears and stacks of experts that the probe's inputs never reached.

    A producer that scales inputs of so many features may scale theirs too, and nobody would know.

    Args:
      probe: of the block.
      block: its modules.
      experts: which of the probe's parameters hold a matrix for each expert; others of three dimensions multiply nothing, or
        on every token.
    """
    seen = {product.place.parameter for product in probe._inputs}
    linears = {f"{path}.weight": m for path, m in block.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    hidden = {
        int(m.weight.shape[1 if isinstance(m, nn.Linear) else 0]) for name, m in linears.items() if name not in seen
    }
    stacks = [p for name, p in probe.parameters.items() if name in experts and name not in seen]
    return hidden | {n for p in stacks for n in p.shape[1:]}


def _factors(count: int, generator: torch.Generator) -> Tensor:
    """Factors around 1, all different, float32 [count]."""
    t = torch.linspace(-SPREAD, SPREAD, count) if count > 1 else torch.full((count,), SPREAD)
    return t[torch.randperm(count, generator=generator)].exp()


def _same(before: Tensor, after: Tensor) -> bool:
    size = float(before.abs().max()) if before.numel() else 0.0
    return not before.numel() or float((before - after).abs().max()) <= OUTPUT_TOLERANCE * size


def _match(before: Tensor, after: Tensor, t: Tensor) -> Tensor | None:
    """For each input, the channel whose factor it was multiplied by, -1 for none; None where it is no such thing.

    An input that is zero on every token tells nothing; it is taken to read the channel at its own place, as its neighbours do.
    """
    x, y = before.reshape(-1, before.shape[-1]).double(), after.reshape(-1, after.shape[-1]).double()
    energy = (x * x).sum(0)
    dead = energy == 0
    if bool((y[:, dead] != 0).any()):
        return None
    ratio = (x * y).sum(0) / energy.clamp(min=1e-300)
    size = x.abs().amax(0)
    if bool(((y - x * ratio).abs().amax(0) > CHANNEL_TOLERANCE * ratio.abs() * size + 1e-30).any()):
        return None
    options = torch.cat([torch.ones(1, dtype=torch.float64), t.double()])
    order = torch.argsort(options)
    nearest = _nearest(options[order], ratio)
    channels = order[nearest] - 1
    off = (options[order][nearest] / ratio.where(~dead, torch.ones_like(ratio)) - 1).abs()
    own = torch.arange(len(ratio)) if len(ratio) == len(t) else None
    if own is not None:  # neighbours may be closer than rounding can tell; one's own place is then the better guess
        near_own = (t.double() / ratio.where(~dead, torch.ones_like(ratio)) - 1).abs() <= CHANNEL_TOLERANCE
        channels = torch.where(near_own, own, channels)
        off = torch.where(near_own, torch.zeros_like(off), off)
    if bool((off[~dead] > CHANNEL_TOLERANCE).any()):
        return None
    if bool(dead.any()):
        if own is None or not bool((channels[~dead] == own[~dead]).all()):
            return None
        channels = torch.where(dead, own, channels)
    return channels


def _nearest(rising: Tensor, values: Tensor) -> Tensor:
    right = (
        torch.searchsorted(rising, values).clamp(1, len(rising) - 1)
        if len(rising) > 1
        else torch.zeros_like(values).long()
    )
    left = (right - 1).clamp(min=0)
    return torch.where((values - rising[left]).abs() <= (rising[right] - values).abs(), left, right)


def _alike(before: list[Tensor], after: list[Tensor]) -> bool:
    if len(before) != len(after):
        return False
    return all(
        a.shape == b.shape and (not a.is_floating_point() or _same(a, b)) for a, b in zip(before, after, strict=True)
    )
