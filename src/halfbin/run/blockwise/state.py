"""What all parts of one calibrated run share, and what they hand over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from halfbin.evaluation.layers import TensorError
from halfbin.formats.checkpoint import Checkpoint
from halfbin.kernels.errors import ErrorSums
from halfbin.models import Structure
from halfbin.models.blocks import Block, find_blocks
from halfbin.models.partial import PartialModel
from halfbin.models.probe import Pair
from halfbin.planning import Plan
from halfbin.run.blockwise.rotating import Rotations
from halfbin.run.blockwise.streams import Streams
from halfbin.tensor import InputQuantizer, MixedTensor, QTensor


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


class State:
    """The model of which a part is in memory, its plan, and what was found and done so far.

    planned:         the plan's sites by their names on disk.
    shapes:          of all tensors on disk.
    pairs:           found so far, by the names in a block: blocks are mostly alike.
    calls:           how often each block is called in one pass through the model.
    emitted:         names of the tensors that were handed over; other blocks may share them.
    routed_as_ever:  blocks with experts that take no other routing.
    """

    def __init__(self, plan: Plan, checkpoint: Checkpoint, emit: Emit) -> None:
        self.plan = plan
        self.partial = PartialModel(plan.skeleton, checkpoint)
        self.blocks = find_blocks(self.partial.model)
        self.structure = Structure(self.partial.model)
        self.planned = {s.site.tensor: s for s in plan.sites}
        self.shapes = {name: tuple(checkpoint.info(name).shape) for name in checkpoint.names}
        self.streams = Streams((), float_beside=False)
        self.rotations = Rotations()
        self.outcome = Outcome()
        self.pairs: dict[tuple[str, ...], list[Pair]] = {}
        self.calls: Counter[str] = Counter()
        self.emitted: set[str] = set()
        self.routed_as_ever: list[str] = []
        self._emit = emit

    def emit(self, rounded: Rounded) -> None:
        """Hand a tensor over."""
        self.emitted.add(rounded.name)
        self._emit(rounded)

    def canonical(self, parameters: Sequence[str]) -> list[str]:
        """Names of parameters, each once, though it may have several."""
        return list(dict.fromkeys(map(self.partial.canonical, parameters)))

    def inside(self, block: Block) -> dict[str, str]:
        """From the names of a block's parameters to those inside the block."""
        return {self.partial.canonical(p): p.removeprefix(f"{block.name}.") for p in block.parameters}

    def dtype_on_disk(self, name: str) -> torch.dtype | None:
        """The type that a tensor will be stored in, by its name on disk; None where it is rounded to codes."""
        planned = self.planned.get(name)
        if planned is None:
            return self.plan.others[name][0]
        if planned.quantized:
            return None
        return planned.weights if isinstance(planned.weights, torch.dtype) else planned.site.dtype

    def stored_dtype(self, parameter: str) -> torch.dtype | None:
        """The same for a parameter."""
        return next((self.dtype_on_disk(name) for name in self.partial.on_disk([parameter])), None)
