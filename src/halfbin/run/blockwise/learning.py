"""AutoRound in a block: the codes of its sites are learned together, so that the block gives what the float one gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from halfbin.methods import autoround
from halfbin.models.products import Place
from halfbin.models.walk import Call, Stop, tensors_in
from halfbin.planning import SitePlan
from halfbin.tensor import QTensor, Scheme
from halfbin.tensor.matrices import matrices

NUM_JUDGED = 2  # calls whose loss decides which step was best


def learn_codes(
    stop: Stop,
    calls: Sequence[Call],
    targets: Sequence[Tensor],
    sites: Sequence[tuple[SitePlan, Sequence[Place]]],
    parameters: Mapping[str, Tensor],
    names: Mapping[str, str],
    start: Mapping[str, QTensor],
    values: Mapping[str, Tensor],
) -> dict[str, QTensor]:
    """Codes of the sites, by their names on disk.

    Args:
      stop: the block.
      calls: of it, to learn from.
      targets: for each call, what the block should give.
      sites: those to learn, and where their matrices lie.
      parameters: the block's, by full name, rounded; what these sites hold is not used.
      names: from full names to those inside the block.
      start: codes to begin with.
      values: the float weights as they are stored, by their names on disk.
    """
    chosen = {planned.site.tensor: (planned, places) for planned, places in sites}
    weights = {name: values[name].to(torch.float32) for name in chosen}
    schemes = {name: p.weights for name, (p, _) in chosen.items() if isinstance(p.weights, Scheme)}
    sizes = [float(t.square().mean()) or 1.0 for t in targets]

    def error(w_hat: Mapping[str, Tensor], index: int) -> Tensor:
        with_them = _parameters(chosen, w_hat, parameters)
        output = stop.run_with(calls[index], {names[p]: value for p, value in with_them.items()})
        return mse_loss(first_of(output), targets[index]) / sizes[index]

    def judge(w_hat: Mapping[str, Tensor]) -> float:
        judged = range(min(NUM_JUDGED, len(calls)))
        return sum(float(error(w_hat, index)) for index in judged)

    found = autoround(
        weights,
        schemes,
        lambda w_hat, step: error(w_hat, step % len(calls)),
        steps=max(planned.options.steps for planned, _ in sites),
        start=start,
        judge=judge,
    )
    return found.qtensors


def first_of(output: object) -> Tensor:
    """The block's main output: the first tensor of numbers in it."""
    return next(t for t in tensors_in(output) if t.is_floating_point())


def targets_of(calls: Sequence[Call]) -> list[Tensor]:
    """What a block that has been run gave for each call."""
    return [first_of(call.output).detach() for call in calls]


def _parameters(
    chosen: Mapping[str, tuple[SitePlan, Sequence[Place]]],
    w_hat: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The parameters that hold these sites, made of their reconstructions so that gradients reach them."""
    found: dict[str, Tensor] = {}
    for name, (planned, places) in chosen.items():
        for place, matrix in zip(places, matrices(w_hat[name], transposed=planned.site.transposed), strict=True):
            whole = found.get(place.parameter, parameters[place.parameter].detach())
            if matrix.numel() == whole.numel() and w_hat[name].shape == whole.shape:
                found[place.parameter] = w_hat[name]
            else:
                found[place.parameter] = torch.as_strided_scatter(whole, matrix, place.size, place.stride, place.offset)
    return found
