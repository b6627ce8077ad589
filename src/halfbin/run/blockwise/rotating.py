"""Rotate a model: find what reads and what writes its residual stream, turn all of it, and prove that nothing else changes.

In the turned model every block gets x Q and gives y Q. What writes into the stream, or fills it at the start, is turned
on the side of its outputs, what reads it on that of its inputs; scales of the norms between are folded into the readers
first. Beside that, what attention mixes over tokens only, values on their way to the output projection, is turned head by head.

No name and no architecture is asked for. Which norm feeds which weights is what the probe has proved; a matrix with as many
outputs as the stream is wide, that is no reader itself, is taken for a writer. These are guesses. They count when the model
whose parameters were turned gives, block by block, the turned outputs of the float model, and in the end its very logits.

Source: Ashkboos et al. 2024, "QuaRot", https://arxiv.org/abs/2404.00456, section 4, what folds into weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from halfbin.models.blocks import Block
from halfbin.models.partial import PartialModel
from halfbin.models.probe import Pair, Probe, Producer, producers
from halfbin.models.products import Place, Watch
from halfbin.models.walk import Stop, tensors_in, walk
from halfbin.transforms import largest_order, mean_keeping_hadamard, per_head, random_hadamard

TOLERANCE = (
    5e-4  # of an output's norm: float32's rounding through all blocks; what is turned wrongly differs by its size
)
SMALLEST_HEAD = 4

Turn: TypeAlias = Callable[[Tensor], Tensor]  # x to x Q, [..., width]
PairsOf: TypeAlias = Callable[[Stop], list[Pair]]


@dataclass(frozen=True, slots=True)
class Axis:
    """A direction of a parameter, or a span of it.

    span: the first and last-but-one index; None: all of it.
    """

    parameter: str
    axis: int
    span: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Fold:
    """A norm whose scale moves into what reads it."""

    norm: Producer
    readers: tuple[Axis, ...]


@dataclass(slots=True, eq=False)
class Turned:
    """What is done to the parameters of a block, or to those outside: scales are folded first, then all is turned."""

    folds: list[Fold] = field(default_factory=list)
    turns: list[tuple[Axis, Turn]] = field(default_factory=list)

    @property
    def parameters(self) -> set[str]:
        """Names of those that change."""
        folded = {name for fold in self.folds for name in fold.norm.parameters}
        return (
            folded | {a.parameter for fold in self.folds for a in fold.readers} | {a.parameter for a, _ in self.turns}
        )

    def apply(self, get: Callable[[str], Tensor]) -> None:
        """Change the parameters in memory, float32, in place."""
        for fold in self.folds:
            _fold(fold, get)
        for axis, turn in self.turns:
            values = get(axis.parameter).detach().movedim(axis.axis, -1)
            part = values[..., slice(*(axis.span or (None, None)))]
            part.copy_(turn(part))


@dataclass(slots=True, eq=False)
class Rotations:
    """What was found for a whole model.

    parts:   by the name of a block, "" for what lies outside.
    remarks: what a user should know.
    """

    parts: dict[str, Turned] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    @property
    def parameters(self) -> set[str]:
        """Names of all that change."""
        return set().union(*(part.parameters for part in self.parts.values()))


class NotProvedError(Exception):
    """A model's stream cannot be turned; says why."""


@dataclass(frozen=True, slots=True, eq=False)
class _Passed:
    """What the float model showed of a block.

    entering, leaving: the stream before and after it, [..., width].
    answer:            all that it gave.
    pairs:             its producers and their readers.
    products:          the weights that were multiplied.
    heads:             turns of values, proved.
    """

    entering: Tensor
    leaving: Tensor
    answer: Any
    pairs: Sequence[Pair]
    products: frozenset[Place]
    heads: Sequence[tuple[Axis, Turn]]


class Rotating:
    """Finds the rotations of one model, with some tokens; everything outside its blocks must be in memory."""

    def __init__(
        self,
        partial: PartialModel,
        blocks: Sequence[Block],
        inputs: Mapping[str, Any],
        pairs_of: PairsOf,
        writable: Callable[[Sequence[str]], Callable[[str], bool]],
        *,
        seed: int = 0,
    ) -> None:
        """Look at nothing yet.

        Args:
          partial: the float model.
          blocks: of it, none of which is called twice.
          inputs: of one call of the model.
          pairs_of: the proved pairs of a block that stands before its call.
          writable: of a part's parameters, which of them can be stored after a change.
          seed: of the signs.
        """
        self._partial, self._blocks, self._inputs = partial, blocks, inputs
        self._pairs_of, self._writable, self._seed = pairs_of, writable, seed
        self._passed: dict[str, _Passed] = {}
        self._result: list[Tensor] = []
        self._sizes: dict[str, int] = {}  # of heads, by the name of what makes values in blocks that are alike

    @torch.no_grad()
    def find(self) -> Rotations:
        """All that can be turned; the parameters in memory are afterwards as before."""
        self._result = self._walk(self._look)
        heads = {name: Turned(turns=list(seen.heads)) for name, seen in self._passed.items() if seen.heads}
        remarks = [] if heads else ["no values were turned: no head size left a block's outputs as they were"]
        try:
            return Rotations(self._residual(), tuple(remarks))
        except NotProvedError as reason:
            return Rotations(heads, (f"the residual stream was not turned: {reason}", *remarks))

    def _walk(self, visit: Callable[[Stop], None]) -> list[Tensor]:
        """Let `visit` answer at every block; gives the model's outputs."""
        model, found = self._partial.model, []
        handle = model.register_forward_hook(lambda module, args, output: found.append(output))
        try:
            for stop in walk(model, self._blocks, [self._inputs]):
                with self._partial.loaded(stop.block.parameters):
                    visit(stop)
        finally:
            handle.remove()
        return [t.clone() for t in tensors_in(found) if t.is_floating_point()]

    def _look(self, stop: Stop) -> None:
        (call,) = stop.calls
        stop.find_mutation()
        pairs = self._pairs_of(stop)
        heads = self._heads(stop, pairs)
        parameters = self._own(stop.block.parameters)
        products: set[Place] = set()
        with Watch(parameters, lambda product: products.add(product.place)):
            entering = _stream((call.args, call.kwargs)).clone()
            call.output = stop.run(call, final=True)
        leaving = _stream(call.output).clone()
        self._passed[stop.block.name] = _Passed(entering, leaving, call.output, pairs, frozenset(products), heads)

    def _own(self, parameters: Iterable[str]) -> dict[str, nn.Parameter]:
        return {name: self._partial.get(name) for name in dict.fromkeys(map(self._partial.canonical, parameters))}

    # Values, head by head

    def _heads(self, stop: Stop, pairs: Sequence[Pair]) -> list[tuple[Axis, Turn]]:
        """Turns of what is mixed over tokens only, in a block whose float weights are in memory."""
        expected = _stream(stop.run(stop.calls[0]))
        found: list[tuple[Axis, Turn]] = []
        for pair in pairs:
            name = pair.producer.parameters[0]
            if self._partial.get(name).ndim != 2 or any(bool((c.channels < 0).any()) for c in pair.consumers):
                continue
            kind = name.removeprefix(f"{stop.block.name}.")
            known = [self._sizes[kind]] if kind in self._sizes else []
            for size in (*known, *_head_sizes(pair)):
                turns = self._turns_of_heads(pair, size)
                held = self._holds(stop, Turned(turns=turns), expected)
                if size == 2 and not held:
                    break  # no turn within these channels is allowed
                if held and size >= SMALLEST_HEAD:
                    self._sizes[kind] = size
                    found += turns
                    break
        return found

    def _turns_of_heads(self, pair: Pair, size: int) -> list[tuple[Axis, Turn]]:
        rotation = random_hadamard(size, torch.Generator().manual_seed(self._seed))
        rows = pair.producer.rows
        made = per_head(rotation, (rows[1] - rows[0]) // size)
        turns: list[tuple[Axis, Turn]] = [(Axis(name, 0, rows), made) for name in pair.producer.parameters]
        for consumer in pair.consumers:
            axis = self._axis(consumer.place.parameter, consumer.place.stride[1])
            turns.append((axis, per_head(rotation, consumer.place.size[1] // size)))
        return list({axis: (axis, turn) for axis, turn in turns}.values())

    def _holds(self, stop: Stop, turned: Turned, expected: Tensor) -> bool:
        """Whether the block gives what is expected after a change of its parameters, which are put back if not, or if asked."""
        before = {name: self._partial.get(name).detach().clone() for name in turned.parameters}
        turned.apply(self._partial.get)
        try:
            return alike(_stream(stop.run(stop.calls[0])), expected)
        finally:
            for name, values in before.items():
                self._partial.get(name).detach().copy_(values)

    # The residual stream

    def _residual(self) -> dict[str, Turned]:
        """What is turned in every part, proved.

        Raises:
          NotProvedError: why not.
        """
        widths = {seen.leaving.shape[-1] for seen in self._passed.values()}
        if len(widths) != 1:
            raise NotProvedError(f"its blocks hand on {len(widths)} widths, {sorted(widths)[:4]}; one stream has one")
        (width,) = widths
        failures = []
        for make in (
            random_hadamard,
            mean_keeping_hadamard,
        ):  # the first spreads better, and LayerNorms need the second
            turn = make(width, torch.Generator().manual_seed(self._seed))
            try:
                return self._turned_by(turn, width)
            except NotProvedError as reason:
                failures.append(reason)
        raise failures[-1]

    def _turned_by(self, turn: Turn, width: int) -> dict[str, Turned]:
        parts = {"": self._outside(turn, width)}
        rest = self._partial.outside(self._blocks)
        parts[""].apply(self._partial.get)

        def visit(stop: Stop) -> None:
            (call,) = stop.calls
            seen = self._passed[stop.block.name]
            if not alike(_stream((call.args, call.kwargs)), turn(seen.entering)):
                raise NotProvedError(
                    f"what enters {stop.block.name} is not turned with the tables that fill the stream"
                )
            parts[stop.block.name] = self._inside(stop, seen, turn, width)
            parts[stop.block.name].apply(self._partial.get)
            call.output = stop.run(call, final=True)

        try:
            result = self._walk(visit)
        finally:
            self._partial.release(rest)
            self._partial.load(rest)
        if len(result) != len(self._result) or not all(map(alike, result, self._result)):
            raise NotProvedError("the model's outputs were not what they had been")
        return parts

    def _inside(self, stop: Stop, seen: _Passed, turn: Turn, width: int) -> Turned:
        """How a block is turned, proved on a stream that comes in turned."""
        names = self._own(stop.block.parameters)
        norms = [fold for pair in seen.pairs if (fold := self._norm(pair, width)) is not None]
        expected = turn(seen.leaving)
        for folds in _subsets(norms):
            readers = {axis.parameter for fold in folds for axis in fold.readers}
            writers = {
                self._axis(p.parameter, p.stride[0]): None
                for p in sorted(seen.products, key=lambda p: p.parameter)
                if p.size[0] == width and p.parameter not in readers
            }
            writers |= dict.fromkeys(self._biases(writers, names, width))
            turned = _turned(folds, writers, turn, seen.heads)
            if self._holds(stop, turned, expected):
                self._require_writable(turned, names)
                return turned
        raise NotProvedError(f"{stop.block.name} does not give turned outputs for turned inputs")

    def _require_writable(self, turned: Turned, names: Iterable[str]) -> None:
        writable = self._writable(list(names))
        if fixed := sorted(name for name in turned.parameters if not writable(name)):
            raise NotProvedError(f"{fixed[0]} cannot be stored after a change")

    def _norm(self, pair: Pair, width: int) -> Fold | None:
        """A norm that feeds nothing but weights, each of its channels into their column of the same number."""
        first = pair.producer.parameters[0]
        own = torch.arange(width)
        if self._partial.get(first).ndim != 1 or pair.producer.num_channels != width:
            return None
        if not all(len(c.channels) == width and torch.equal(c.channels, own) for c in pair.consumers):
            return None
        rows: dict[str, int] = {}
        for place in {c.place for c in pair.consumers}:
            rows[place.parameter] = rows.get(place.parameter, 0) + place.size[0] * width
        if any(self._partial.get(name).numel() != size for name, size in rows.items()):
            return None  # it reads a part of a parameter only
        axes = {self._axis(c.place.parameter, c.place.stride[1]): None for c in pair.consumers}
        return Fold(pair.producer, tuple(axes))

    def _axis(self, parameter: str, stride: int) -> Axis:
        """The dimension of a parameter with this step between elements."""
        values = self._partial.get(parameter)
        return Axis(parameter, next(i for i, s in enumerate(values.stride()) if s == stride and values.shape[i] > 1))

    def _biases(self, writers: Iterable[Axis], names: Mapping[str, nn.Parameter], width: int) -> Iterator[Axis]:
        """What is added to the outputs of writers: parameters of their own modules with one dimension less."""
        for axis in writers:
            path = axis.parameter.rpartition(".")[0]
            for name, values in names.items():
                beside = name.rpartition(".")[0] == path and values.ndim == names[axis.parameter].ndim - 1
                if beside and values.shape[-1] == width:
                    yield Axis(name, values.ndim - 1)

    def _outside(self, turn: Turn, width: int) -> Turned:
        """How everything before the first and after the last block is turned, proved for what comes after.

        Raises:
          NotProvedError: nothing does it.
        """
        names = self._own(self._partial.outside(self._blocks))
        probe = Probe(names, lambda: self._rest(lambda answer: answer))
        generator = torch.Generator().manual_seed(self._seed)
        norms = []
        for producer in producers(self._partial.model):
            if set(producer.parameters) <= names.keys() and producer.num_channels == width:
                pair = probe.find(producer, generator)
                fold = None if pair is None else self._norm(pair, width)
                norms += [] if fold is None else [fold]
        tables = dict.fromkeys(self._tables(names, width))
        for folds in _subsets(norms):
            readers = {axis.parameter for fold in folds for axis in fold.readers}
            if shared := readers & {a.parameter for a in tables}:
                raise NotProvedError(
                    f"the embedding and the output head share {min(shared)}, and the scale of the norm before the head must "
                    "move into the head alone: allow two tensors with --untie, or untie = true in the recipe"
                )
            turned = _turned(folds, [a for a in tables if a.parameter not in readers], turn, ())
            if self._rest_holds(turned, turn):
                self._require_writable(turned, names)
                return turned
        raise NotProvedError("what follows the last block does not give the same for a turned stream")

    def _tables(self, names: Mapping[str, nn.Parameter], width: int) -> Iterator[Axis]:
        """What may fill the stream: tables with rows of its width, linears with as many outputs."""
        owners = {name.rpartition(".")[0] for name in names}
        for path in owners:
            module = self._partial.model.get_submodule(path)
            for own, values in module.named_parameters(recurse=False):
                name = self._partial.canonical(f"{path}.{own}" if path else own)
                if name not in names or width not in values.shape:
                    continue
                if isinstance(module, nn.Linear):
                    if module.out_features == width:
                        yield Axis(name, 0)
                elif values.ndim > 1 and values.shape[-1] == width:
                    yield Axis(name, values.ndim - 1)

    def _rest_holds(self, turned: Turned, turn: Turn) -> bool:
        before = {name: self._partial.get(name).detach().clone() for name in turned.parameters}
        turned.apply(self._partial.get)
        try:
            found = [t for t in tensors_in(self._rest(lambda answer: _replaced(answer, turn))) if t.is_floating_point()]
        finally:
            for name, values in before.items():
                self._partial.get(name).detach().copy_(values)
        return len(found) == len(self._result) and all(map(alike, found, self._result))

    def _rest(self, change: Callable[[Any], Any]) -> Any:
        """Run the model with its blocks' answers of before, changed."""
        held = {block.module: self._passed[block.name] for block in self._blocks if block.name in self._passed}
        try:
            for module, seen in held.items():
                module.forward = _answering(change(seen.answer))
            return self._partial.model(**self._inputs)
        finally:
            for module in held:
                del module.forward


def alike(found: Tensor, expected: Tensor) -> bool:
    """Whether two outputs are the same but for rounding."""
    if found.shape != expected.shape:
        return False
    return float((found - expected).norm()) <= TOLERANCE * float(expected.norm())


def _turned(folds: Sequence[Fold], axes: Iterable[Axis], turn: Turn, heads: Iterable[tuple[Axis, Turn]]) -> Turned:
    """Scales folded, then turned: what is named, the readers, and the norms' shifts."""
    shifts = [Axis(name, 0) for fold in folds for name in fold.norm.parameters[1:]]
    readers = [axis for fold in folds for axis in fold.readers]
    every: dict[Axis, Turn] = dict.fromkeys((*axes, *readers, *shifts), turn)
    return Turned(list(folds), [*every.items(), *heads])


def _fold(fold: Fold, get: Callable[[str], Tensor]) -> None:
    first, *shifts = fold.norm.parameters
    scale = get(first).detach() + (1.0 if fold.norm.offset else 0.0)
    for axis in fold.readers:
        get(axis.parameter).detach().movedim(axis.axis, -1).mul_(scale)
    for name in shifts:
        get(name).detach().div_(scale)
    get(first).detach().fill_(0.0 if fold.norm.offset else 1.0)


def _subsets(norms: Sequence[Fold]) -> Iterator[Sequence[Fold]]:
    """All of them, then all but one, and so on to none."""
    for size in range(len(norms), -1, -1):
        yield from itertools.combinations(norms, size)


def _head_sizes(pair: Pair) -> list[int]:
    """Sizes to try: 2, which tells whether anything may be turned at all, then the largest first."""
    rows = pair.producer.num_channels
    sizes = [size for size in range(rows, 1, -1) if rows % size == 0 and largest_order(size) == size]
    return [size for size in (2, *sizes) if all(_in_runs(c.channels, size) for c in pair.consumers)]


def _in_runs(channels: Tensor, size: int) -> bool:
    """Whether inputs read channels in whole runs of `size`, in order."""
    if len(channels) % size:
        return False
    runs = channels.reshape(-1, size)
    return bool((runs == runs[:, :1] + torch.arange(size)).all()) and bool((runs[:, 0] % size == 0).all())


def _stream(value: object) -> Tensor:
    """The first tensor of numbers with a direction for features."""
    found = next((t for t in tensors_in(value) if t.is_floating_point() and t.ndim > 1), None)
    if found is None:
        raise NotProvedError("a block hands no tensor on")
    return found


def _replaced(answer: Any, turn: Turn) -> Any:
    """An answer whose stream is turned."""
    stream = _stream(answer)

    def walk_through(value: Any) -> Any:
        if value is stream:
            return turn(stream)
        if type(value) in (tuple, list):
            return type(value)(map(walk_through, value))
        return value

    return walk_through(answer)


def _answering(answer: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: answer
