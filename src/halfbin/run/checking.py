"""Is a calibration set good for this model? Its tokens are counted, and the float model reads it block by block.

What is looked at in the layers: channels that were always zero, experts that hardly any token reached, and how far the ranges
of inputs would be off if half of the samples had been left out: what half of them did not see, the next text may bring.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbin.calibration import ChannelStatistics
from halfbin.evaluation import tokenize
from halfbin.evaluation.logits import embedded_vocabulary
from halfbin.formats.checkpoint import open_checkpoint
from halfbin.models import Skeleton, open_skeleton
from halfbin.models.blocks import find_blocks
from halfbin.models.inputs import Inputs
from halfbin.models.partial import PartialModel
from halfbin.models.products import Watch
from halfbin.models.structure import Structure
from halfbin.models.walk import Stop, walk
from halfbin.run import jsonable
from halfbin.run.blockwise.feeding import model_inputs, without_cache
from halfbin.run.blockwise.rounding import ENOUGH_TOKENS
from halfbin.run.calibration import TOKENS_AT_ONCE, Calibration, samples_for
from halfbin.run.events import Event, OnEvent
from halfbin.run.measure import evaluation_text, load_tokenizer
from halfbin.samples.overview import Likeness, TokenOverview, likeness, overview

RANGE_CHANGE = 0.25  # a range that half of the samples miss by more than this is not known yet
FEW_SAMPLES = 32  # the second moment of a wide layer needs some tens of thousands of tokens
UNLIKE_TIMES, UNLIKE_BITS = (
    1.6,
    0.08,
)  # divergence above so many times that of halves, and so much more: docs/calibration.md
COPIED = 0.01  # of the other text; files of one kind that share headers and set phrases have up to 0.006


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCheck:
    """What the samples did at one input.

    name:          of a weight that reads it, as in memory.
    num_tokens:    rows that came by.
    num_channels:  its width.
    dead_channels: those that were zero on every token.
    range_change:  how much lower the largest |x| is when half of the samples is left out, the worse half: 0.3 is 30 %.
    """

    name: str
    num_tokens: int
    num_channels: int
    dead_channels: int
    range_change: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationCheck:
    """What is to be said of a calibration set; `warnings` are about what matters, each naming its layer."""

    model: str
    text: str
    definition: str
    tokens: TokenOverview
    likeness: Likeness | None
    layers: tuple[LayerCheck, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The value that `halfbin check --json` prints."""
        return dict(jsonable.to_json(self))


def check_calibration(
    directory: Path,
    calibration: Calibration,
    *,
    name: str | None = None,
    against: Path | None = None,
    trust_remote_code: bool = False,
    on_event: OnEvent | None = None,
) -> CalibrationCheck:
    """Read the samples with the float model, one block in memory at a time, and look at what they do to it.

    Args:
      directory: the model.
      calibration: which samples.
      name: what the model is called in the result; the directory's name by default.
      against: a text that the model will be measured on, or used for.
      trust_remote_code: run Python code that the directory brings along.
      on_event: told of progress.

    Raises:
      HalfbinError: a file that cannot be read, or a model that reads no text.
    """
    skeleton = open_skeleton(directory, trust_remote_code=trust_remote_code)
    samples = samples_for(skeleton, calibration)
    found = None
    if against is not None:
        text = evaluation_text(against).text
        found = likeness(samples, tokenize(load_tokenizer(skeleton), text).ids)
    tokens = overview(samples, embedded_vocabulary(skeleton.model))
    layers = _layers(skeleton, samples.batches(TOKENS_AT_ONCE), on_event)
    return CalibrationCheck(
        model=name or directory.name,
        text=samples.name,
        definition=samples.how,
        tokens=tokens,
        likeness=found,
        layers=layers,
        warnings=tuple(_warnings(tokens, found, layers)),
    )


class _Halves:
    """Statistics of the even and of the odd calls."""

    def __init__(self, num_features: int) -> None:
        self.halves = (ChannelStatistics(num_features), ChannelStatistics(num_features))
        self._turn = 0

    def add(self, x: Tensor) -> None:
        self.halves[self._turn].add(x)
        self._turn = 1 - self._turn

    def check(self, name: str) -> LayerCheck:
        first, second = self.halves
        absmax = torch.maximum(first.absmax, second.absmax)
        whole = float(absmax.max())
        least = min(float(half.absmax.max()) for half in self.halves if half.num_tokens or half is first)
        return LayerCheck(
            name=name,
            num_tokens=first.num_tokens + second.num_tokens,
            num_channels=first.num_features,
            dead_channels=int((absmax == 0).sum()),
            range_change=1 - least / whole if whole and second.num_tokens else 0.0,
        )


def _layers(skeleton: Skeleton, batches: Sequence[Tensor], on_event: OnEvent | None) -> tuple[LayerCheck, ...]:
    checks: list[LayerCheck] = []
    with open_checkpoint(skeleton.path) as checkpoint, torch.no_grad():
        partial = PartialModel(skeleton, checkpoint)
        blocks = find_blocks(partial.model)
        partial.load(partial.outside(blocks))
        inputs = model_inputs(partial.model, batches)
        with without_cache(partial.model):
            for done, stop in enumerate(walk(partial.model, blocks, inputs, until=Structure(partial.model).head), 1):
                with partial.loaded(stop.block.parameters):
                    checks += _look(partial, stop)
                if on_event:
                    on_event(Event("reading", done, max(len(blocks), done), "blocks"))
    return tuple(checks)


def _look(partial: PartialModel, stop: Stop) -> list[LayerCheck]:
    seen: Inputs[_Halves] = Inputs(_Halves)
    with Watch({name: partial.get(name) for name in stop.block.parameters}, seen.see):
        for call in stop.calls:
            seen.begin_call()
            call.output = stop.run(call, final=True)
    found = []
    for group in seen.groups():
        place = group.places[0]
        shape = partial.get(place.parameter).shape
        expert = f"[{place.offset // (shape[1] * shape[2])}]" if len(shape) == 3 else ""
        found.append(group.observer.check(place.parameter.removesuffix(".weight") + expert))
    return found


def _warnings(tokens: TokenOverview, found: Likeness | None, layers: Sequence[LayerCheck]) -> list[str]:
    told = []
    if tokens.num_samples < FEW_SAMPLES:
        told.append(f"{tokens.num_samples} samples are few: {FEW_SAMPLES} and more give steadier results")
    if tokens.num_repeated:
        told.append(f"{tokens.num_repeated} samples repeat an earlier one, and count double")
    if found is not None and found.divergence > UNLIKE_TIMES * found.own + UNLIKE_BITS:
        told.append(
            f"the samples are unlike the other text: {found.divergence:.2f} bits of divergence, where halves of the samples "
            f"have {found.own:.2f}; {found.covered:.0%} of its tokens are of kinds that were seen"
        )
    if found is not None and found.shared > COPIED:
        told.append(
            f"{found.shared:.1%} of the other text stands in the samples: what is measured on it flatters; take one of them "
            "elsewhere"
        )
    starved = [layer for layer in layers if layer.num_tokens < ENOUGH_TOKENS]
    dead = [layer for layer in layers if layer.dead_channels]
    open_ranges = [layer for layer in layers if layer.range_change > RANGE_CHANGE]
    few = f"inputs were reached by fewer than {ENOUGH_TOKENS} tokens, and will be rounded without data"
    told += _about(starved, few, lambda c: c.num_tokens)
    told += _about(dead, "inputs have channels that were always zero", lambda c: -c.dead_channels)
    told += _about(
        open_ranges,
        "inputs have a range that half of the samples miss by more than a quarter",
        lambda c: -c.range_change,
    )
    return told


def _about(layers: Sequence[LayerCheck], what: str, worst: Callable[[LayerCheck], float]) -> list[str]:
    if not layers:
        return []
    first = min(layers, key=worst)
    return [f"{len(layers)} {what}, such as {first.name}"]
