"""Run samples through a model one block after the other, by the model's own code.

Each batch of samples runs the model's `forward` in a thread of its own, which stands still wherever a block is called: its
state between blocks (hidden states, masks, positions, what an encoder or an earlier block left for later ones) stays in the
thread's own frames, whatever the architecture. Only one thread runs at a time, in the order of the batches, and blocks are
computed by the caller. So nothing needs to be known of how one block's outputs become another's inputs.
"""

from __future__ import annotations

import contextlib
import copy
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from halfbin.models.blocks import Block

Inputs: TypeAlias = Mapping[str, Any]


@dataclass(slots=True, eq=False)
class Call:
    """A batch that stands before a block: the arguments of the call, and the answer that it waits for."""

    batch: int
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    answered: bool = False


@dataclass(slots=True, eq=False)
class Stop:
    """A block, and the calls of all batches that stand before it.

    block:   which one.
    visit:   how often they stood here before.
    forward: computes the block: forward(*args, **kwargs).
    calls:   in the order of the batches; each must get its `output` before the walk goes on.
    resume:  lets the batch of a call that has its output go on until it stands before the next block.
    """

    block: Block
    visit: int
    forward: Callable[..., Any]
    calls: list[Call]
    resume: Callable[[Call], None]
    mutates: bool = False

    def answer(self, call: Call, output: Any) -> None:
        """Give a call its output and let its batch go on at once, so that what it was called with is given back."""
        call.output = output
        self.resume(call)

    def run(self, call: Call, *, final: bool = False) -> Any:
        """Compute the block for one batch.

        The arguments stay as they are: caches and other objects that a block may add to are copied, tensors too where it was
        found to write into them. The `final` run, whose output is the answer, gets the model's own objects.
        """
        if final:
            return self.forward(*call.args, **call.kwargs)
        args, kwargs = copied((call.args, call.kwargs), tensors=self.mutates)
        return self.forward(*args, **kwargs)

    def run_with(self, call: Call, parameters: Mapping[str, Tensor], *, final: bool = False) -> Any:
        """Compute the block for one batch with other values for some parameters, by their names in the block."""
        args, kwargs = call.args, call.kwargs
        if not final:
            args, kwargs = copied((args, kwargs), tensors=self.mutates)
        return functional_call(self.block.module, dict(parameters), args, kwargs)

    def handing_on(self, call: Call) -> Callable[[], Any]:
        """Computes the block's output, and what it left in the objects that it was given for other blocks."""

        def run() -> Any:
            args, kwargs = copied((call.args, call.kwargs), tensors=self.mutates)
            output = self.forward(*args, **kwargs)
            return output, args, kwargs

        return run

    def find_mutation(self) -> None:
        """See whether the block writes into its arguments' tensors, which are then copied for each run."""
        args, kwargs = copied((self.calls[0].args, self.calls[0].kwargs), tensors=True)
        tensors = list(tensors_in((args, kwargs)))
        before = [t._version for t in tensors]
        self.forward(*args, **kwargs)
        self.mutates = before != [t._version for t in tensors]


class _Abandoned(BaseException):
    """Ends a thread whose walk is over; no model code may catch it."""


class _Runner:
    """One batch's thread."""

    def __init__(
        self,
        index: int,
        model: nn.Module,
        inputs: Inputs,
        context: Callable[[int], Any],
        hold: Callable[[Any], None],
    ) -> None:
        self.index = index
        self.call: Call | None = None  # what it waits for
        self.error: BaseException | None = None
        self.finished = False
        self._go: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._stands: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._model, self._inputs, self._context, self._hold = model, inputs, context, hold
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._body, name=f"halfbin-sample-{index}", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._stands.get()

    def go_on(self, with_error: BaseException | None = None) -> None:
        """Let the thread run until it stands before a block again or has finished."""
        self._go.put(with_error)
        self._stands.get()

    def stand(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called in the thread: wait for the block's output."""
        self._hold((args, kwargs))
        call = self.call = Call(self.index, module, args, kwargs)
        self._stands.put(None)
        error = self._go.get()
        self.call = None
        if error is not None:
            raise error
        return call.output

    def abandon(self) -> None:
        if self._thread.ident is None:  # an earlier batch failed before this one began
            return
        if not self.finished and self._thread.is_alive():
            self.go_on(_Abandoned())
        self._thread.join()

    def _body(self) -> None:
        _RUNNING.runner = self
        try:
            torch.set_num_threads(self._threads)  # a new thread would begin with torch's own default
            with torch.no_grad(), self._context(self.index):
                self._model(**self._inputs)
        except _Abandoned:
            pass
        except BaseException as error:  # handed to the caller's thread, which raises it
            self.error = error
        finally:
            self.finished = True
            self._stands.put(None)


_RUNNING = threading.local()


def walk(
    model: nn.Module,
    blocks: Sequence[Block],
    batches: Sequence[Inputs],
    *,
    until: nn.Module | None = None,
    context: Callable[[int], Any] = contextlib.nullcontext,
    hold: Callable[[Any], None] = lambda arguments: None,
) -> Iterator[Stop]:
    """Yield each block with the calls that stand before it, in the order in which the model calls them.

    The caller answers every call of a stop (`call.output`) before it asks for the next one. It may leave at any time. A block
    that a model calls twice comes twice.

    Args:
      model: in evaluation mode; only the weights outside the blocks need be in memory.
      blocks: where to stop.
      batches: keyword arguments of the model's calls, one mapping for each batch.
      until: where a batch's way ends: a module whose outputs nobody needs, such as the head.
      context: context(batch) is entered in that batch's thread, around everything outside the blocks.
      hold: given the arguments of each call when a batch begins to wait before a block; may move what they hold.

    Raises:
      Whatever the model raises.
    """
    runners = [_Runner(i, model, inputs, context, hold) for i, inputs in enumerate(batches)]

    def resume(call: Call) -> None:
        call.answered = True
        runners[call.batch].go_on()
        call.args, call.kwargs, call.output = (), {}, None
        _raise_from(runners[call.batch])

    by_module = {block.module: block for block in blocks}
    forwards = {module: module.forward for module in by_module}
    visits: dict[str, int] = {}
    for module, forward in forwards.items():
        module.forward = _standing(module, forward)
    end = until.register_forward_pre_hook(_end) if until is not None else None
    try:
        for runner in runners:
            runner.start()
            _raise_from(runner)
        while standing := [r.call for r in runners if r.call is not None]:
            module = standing[0].module
            block = by_module[module]
            visit = visits.get(block.name, 0)
            visits[block.name] = visit + 1
            calls = [call for call in standing if call.module is module]
            yield Stop(block, visit, forwards[module], calls, resume)
            for call in calls:
                if not call.answered:
                    resume(call)
    finally:
        for runner in runners:
            runner.abandon()
        for module in by_module:
            del module.forward
        if end is not None:
            end.remove()


def survey(model: nn.Module, blocks: Sequence[Block], inputs: Inputs, load: Callable[[Block], Any]) -> list[str]:
    """The names of the blocks in the order in which the model calls them, found by running it once.

    Args:
      model, blocks: as for `walk`.
      inputs: one batch; a few tokens will do.
      load: a context manager inside which a block's weights are in memory.
    """
    order = []
    for stop in walk(model, blocks, [inputs]):
        order.append(stop.block.name)
        with torch.no_grad(), load(stop.block):
            for call in stop.calls:
                call.output = stop.run(call, final=True)
    return order


def _end(module: nn.Module, args: object) -> None:
    if getattr(_RUNNING, "runner", None) is not None:
        raise _Abandoned


def _standing(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def stand(*args: Any, **kwargs: Any) -> Any:
        runner: _Runner | None = getattr(_RUNNING, "runner", None)
        return forward(*args, **kwargs) if runner is None else runner.stand(module, args, kwargs)

    return stand


def _raise_from(runner: _Runner) -> None:
    if runner.error is not None:
        raise runner.error


def tensors_in(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """All tensors inside containers and objects."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part, seen)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part, seen)
    elif _holds_state(value):
        for part in vars(value).values():
            yield from tensors_in(part, seen)


def copied(value: Any, *, tensors: bool, made: dict[int, Any] | None = None) -> Any:
    """A copy of containers and objects, so that what is written into it does not reach the original.

    Args:
      value: arguments of a call.
      tensors: copy tensors as well; otherwise the copy holds the same ones.
      made: copies by the identity of what they are of.
    """
    made = {} if made is None else made
    if id(value) in made:
        return made[id(value)]
    if isinstance(value, Tensor):
        made[id(value)] = value.clone() if tensors else value
    elif type(value) is dict:
        made[id(value)] = {key: copied(part, tensors=tensors, made=made) for key, part in value.items()}
    elif type(value) in (list, tuple):
        made[id(value)] = type(value)(copied(part, tensors=tensors, made=made) for part in value)
    elif _holds_state(value):
        double = made[id(value)] = copy.copy(value)
        for name, part in vars(value).items():
            setattr(double, name, copied(part, tensors=tensors, made=made))
    else:
        return value
    return made[id(value)]


def _holds_state(value: Any) -> bool:
    """Whether a value is an object that a block may write into: a cache of keys and values, a state of a recurrence."""
    if isinstance(value, nn.Module | type | torch.dtype | torch.device | Tensor) or callable(value):
        return False
    return hasattr(value, "__dict__") and not hasattr(value, "to_json_string")  # a configuration is only read
