"""AutoRound: learn for each weight whether it rounds up or down, and for each tile how much of its range is kept.

Source: Cheng, Zhang, Shen, Cai, He, Lv, Liu 2023, "Optimize Weight Rounding via Signed Gradient Descent for the Quantization
of LLMs", https://arxiv.org/abs/2309.05516, section 3, equations 3 to 5 and algorithm 1.

With u = w / scale, an offset V in [-0.5, 0.5] for each weight and alpha, beta in [0, 1] for each tile:

    codes = clip(round(u + V * gap) + zero_point)      gap: between the two values around u, 1 for integers
    range = [beta * minimum, alpha * maximum]          asymmetric; symmetric: alpha * absmax

All start at round to nearest (V = 0, alpha = beta = 1) and go by signed gradient descent on the loss of a whole block: each
step moves them by the same length, which falls linearly to 0. With the first length 1 / steps all steps together reach 0.5,
so that any weight can change to its other neighbour, and no weight goes further.

Gradients count rounding as the identity, and only the reconstruction w_hat is seen by autograd. With g = d loss / d w_hat and
v = value(code) - zero_point the rest is closed form, and only its signs are used:

    a weight lies        inside the range    clipped
    d loss / d V         g * scale * gap     0
    d loss / d scale     g * (v - u)         g * v
    d loss / d zero      0                   -g * scale

Where we depart from the paper: the last step is judged too; a separate `judge` can tell which step was best; every format is
learned, not integers alone; the descent can begin at the codes of another method; and what is kept as best are codes and
scales as they are stored, so that what was judged is, to the bit, what is returned.

What it gains, on the last decoder layer of the demo model (851,968 weights): squared error of the layer's output on held-out
text, in shares of round to nearest; batches of 8 x 128 tokens drawn from 256 samples, judged on 32 others.

                                           int4-g128    int3-g128    int2-g64
    rounding, searched ranges                0.798        0.571        0.376
    gptq, searched ranges                    0.391        0.272        0.189      2.7 s of one core
    50 steps from the whole range            0.531        0.357        0.297      6 s
    200 steps from the whole range           0.478        0.327        0.275      18 s
    400 steps from the whole range           0.468        0.322        0.271      35 s
    50 steps from searched ranges            0.507        0.311        0.162      6 s
    200 steps from searched ranges           0.454        0.280        0.150      18 s
    400 steps from searched ranges           0.447        0.277        0.149      35 s
    200 steps from that gptq                 0.391        0.272        0.151      18 s

Hence 200 steps: 400 gain 3 % at most. Pass `MeanSquaredError()` as estimator. From 3 bits on GPTQ does as well or better in
less time and leaves little to learn; at 2 bits AutoRound is better by a fifth, from searched ranges or from GPTQ's codes.
On 8 fixed samples the error falls to 0.19 of rounding's, but held-out to 0.42 (int4-g128, third layer, whole range): draw
batches from many samples, and judge.

Tried in vain after GPTQ at 3 and 4 bits, in the second and fifth layer: first steps of 0.0003 to 0.01, ranges kept, offsets
begun at the middle between two rounding borders, momentum, Adam instead of signs. The most that was gained are 5 %
(int3-g128, 0.106 to 0.101, by Adam with slower ranges).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from halfbin.errors import DataError, SchemeError
from halfbin.methods.rtn import rtn
from halfbin.numerics.formats import Format, working
from halfbin.numerics.ranges import RangeEstimator
from halfbin.numerics.scales import ScaleFormat
from halfbin.tensor.fake_quantize import tile_sums
from halfbin.tensor.granularity import spread
from halfbin.tensor.qtensor import QTensor, dequantize, fit, require_finite
from halfbin.tensor.scheme import Scheme

STEPS = 200
SMALLEST_SHARE = 0.01  # of a range: none at all would leave no scale


@dataclass(frozen=True, slots=True, eq=False)
class AutoRounded:
    """What was found, and how it went.

    qtensors:   the best codes and scales, by name.
    losses:     of each step's codes on that step's batch, the start first: steps + 1 of them.
    best_step:  how many steps led to `qtensors`; 0 is the start.
    judgements: step to what `judge` said of it; empty without one.
    """

    qtensors: dict[str, QTensor]
    losses: tuple[float, ...]
    best_step: int
    judgements: dict[int, float] = field(default_factory=dict)


def autoround(
    weights: Mapping[str, Tensor],
    schemes: Mapping[str, Scheme],
    loss: Callable[[Mapping[str, Tensor], int], Tensor],
    *,
    steps: int = STEPS,
    learning_rate: float | None = None,
    learn_range: bool = True,
    estimator: RangeEstimator | None = None,
    start: Mapping[str, QTensor] | None = None,
    judge: Callable[[Mapping[str, Tensor]], float] | None = None,
    judge_every: int = 20,
    on_step: Callable[[int, float], None] | None = None,
) -> AutoRounded:
    """Choose the codes and ranges of one block's weights together, so that the block's loss falls.

    Promise: by the same loss on the same batch, or by `judge`, the result is not worse than the start, which is `rtn`
    unless given. Without `judge` the best step is the one with the lowest loss: that needs a loss which sees the same
    batch in every step. With batches that change, pass a judge, or the luckiest batch wins.

    Memory beside `weights`: 12 bytes a weight (offset, reconstruction, gradient), codes twice, what the loss keeps, and some
    five float32 copies of one weight at a time.

    Args:
      weights: float, by name; any shape that the scheme's granularity accepts; finite.
      schemes: what each is rounded to; the same names.
      loss: (w_hat by name, step) to a scalar that can be differentiated by the w_hat it used. It picks its batch by `step`,
        0 to `steps`. Each w_hat has its weight's dtype and shape. Weights that a batch does not reach stay as they are.
      steps: updates; 0 returns the start.
      learning_rate: the first step's length, in gaps between values and in shares of a range; 1 / steps by default.
      learn_range: whether scales move too; otherwise they remain those of the start to the bit.
      estimator: chooses the range that each scale covers at the start; the whole range by default, and a searched one
        is better in all we measured.
      start: codes and scales to begin with, under the same schemes, such as those of `gptq`.
      judge: w_hat by name to what is to be minimised; called without gradients.
      judge_every: steps from one judgement to the next; the start and the last step are always judged.
      on_step: called with each step and its loss.

    Raises:
      DataError: NaN or infinity in a weight, a loss or a gradient; a loss that depends on no w_hat.
      SchemeError: names, shapes or schemes that do not fit; steps, judge_every or learning_rate out of range.
    """
    _check(weights, schemes, start, steps, judge_every, learning_rate)
    rate = learning_rate if learning_rate is not None else 1 / max(steps, 1)
    best = dict(start) if start else {name: rtn(w, schemes[name], estimator=estimator) for name, w in weights.items()}
    best = {name: best[name] for name in weights}
    learned = {name: _Learned(weights[name], best[name], learn_range=learn_range) for name in weights}
    losses: list[float] = []
    judgements: dict[int, float] = {}
    lowest, best_step, reached = math.inf, 0, False
    for step in range(steps + 1):
        q = {name: one.quantize() for name, one in learned.items()} if step else best
        w_hat = {name: dequantize(q[name], weights[name].dtype) for name in weights}
        value, gradients = _differentiate(loss, w_hat, step, last=step == steps)
        losses.append(value)
        reached = reached or bool(gradients)
        if judge and (step % judge_every == 0 or step == steps):
            judgements[step] = value = _judged(judge, w_hat, step)
        if (not judge or step in judgements) and value < lowest:
            lowest, best_step, best = value, step, q
        if on_step:
            on_step(step, losses[-1])
        for name, gradient in gradients.items():
            learned[name].descend(q[name], gradient, rate * (1 - step / steps))
    if steps and not reached:
        raise DataError("the loss depends on no w_hat: compute it, with gradients, from the weights that it is given")
    return AutoRounded(best, tuple(losses), best_step, judgements)


def _check(
    weights: Mapping[str, Tensor],
    schemes: Mapping[str, Scheme],
    start: Mapping[str, QTensor] | None,
    steps: int,
    judge_every: int,
    learning_rate: float | None,
) -> None:
    if steps < 0 or judge_every < 1:
        raise SchemeError(f"steps={steps} must be 0 or more and judge_every={judge_every} 1 or more")
    if learning_rate is not None and not 0 < learning_rate <= 1:
        raise SchemeError(f"learning_rate={learning_rate} must be above 0 and at most 1; 1 / steps is the default")
    for what, names in (("schemes", schemes.keys()), ("start", weights.keys() if start is None else start.keys())):
        if names != weights.keys():
            wrong = sorted(names ^ weights.keys())
            raise SchemeError(f"weights and {what} must have the same names; only one of them has {wrong}")
    for name, q in (start or {}).items():
        if q.scheme != schemes[name] or q.shape != tuple(weights[name].shape):
            raise SchemeError(
                f"start[{name!r}] is {q.scheme} {list(q.shape)}, but the weight is to be {schemes[name]} "
                f"{list(weights[name].shape)}"
            )
        require_finite(weights[name])


def _differentiate(
    loss: Callable[[Mapping[str, Tensor], int], Tensor], w_hat: dict[str, Tensor], step: int, *, last: bool
) -> tuple[float, dict[str, Tensor]]:
    """The loss, and its gradients by the w_hat that it used; none after the last step."""
    with torch.set_grad_enabled(not last):
        found = loss({name: w.requires_grad_(not last) for name, w in w_hat.items()}, step)
    value = float(found.detach())
    if not math.isfinite(value):
        raise DataError(f"the loss of step {step} is {value}; check the inputs, or use a wider type than they have")
    gradients: dict[str, Tensor] = {}
    if found.requires_grad:
        every = torch.autograd.grad(found, list(w_hat.values()), allow_unused=True)
        gradients = {name: g for name, g in zip(w_hat, every, strict=True) if g is not None}
    for name, w in w_hat.items():
        w_hat[name] = w.detach()
    for name, gradient in gradients.items():
        if not bool(torch.isfinite(gradient).all()):
            raise DataError(
                f"the gradient of {name!r} in step {step} has NaN or infinity, though the loss is {value:g}"
            )
    return value, gradients


@torch.no_grad()
def _judged(judge: Callable[[Mapping[str, Tensor]], float], w_hat: Mapping[str, Tensor], step: int) -> float:
    value = float(judge(w_hat))
    if not math.isfinite(value):
        raise DataError(f"judge said {value} of step {step}; expected a finite number to minimise")
    return value


class _Learned:
    """One weight with what is learned about it: an offset for each element, and its tiles' ranges."""

    def __init__(self, weight: Tensor, first: QTensor, *, learn_range: bool) -> None:
        self._weight = working(weight.detach())
        self._scheme = first.scheme
        self._values = _Values.of(first.scheme.format, self._weight.dtype, self._weight.device)
        self._range = _Range(weight, first) if learn_range else None
        self._first = first.scale, first.zero_point
        self._offsets = torch.zeros_like(self._weight)
        near = self.quantize().codes
        if not torch.equal(near, first.codes):
            steps = self._steps(first.scale)
            value = first.scheme.format.decode(first.codes, steps.dtype) - self._zero(first)
            self._offsets = torch.where(near == first.codes, 0.0, (value - steps) / self._values.gap(steps))

    @torch.no_grad()
    def quantize(self) -> QTensor:
        """Codes and scales as they would be stored."""
        scale, zero_point = self._range.stored() if self._range else self._first
        steps = self._steps(scale)
        moved = steps.add_(self._offsets * self._values.gap(steps))
        if zero_point is not None:  # rounded first, so that 0.0 and the ties do not depend on it
            moved = moved.round_().add_(spread(zero_point, tuple(moved.shape), self._scheme.granularity))
        return QTensor(self._scheme.format.encode(moved), scale, zero_point, self._scheme)

    @torch.no_grad()
    def descend(self, q: QTensor, gradient: Tensor, rate: float) -> None:
        """One signed step of length `rate` against the gradient of the loss by w_hat; `q` is what `quantize` last gave."""
        gradient = gradient.to(self._weight.dtype)
        steps = self._steps(q.scale)
        zero = self._zero(q)
        moved = steps + self._offsets * self._values.gap(steps) + zero
        inside = (moved >= self._values.low) & (moved <= self._values.high)
        if self._range:
            value = q.scheme.format.decode(q.codes, steps.dtype) - zero
            by_scale = tile_sums(gradient * value.sub_(steps.mul_(inside)), q.scheme.granularity)
            by_zero = -q.scale.to(by_scale.dtype) * tile_sums(gradient * ~inside, q.scheme.granularity)
            self._range.descend(by_scale, by_zero, rate)
        # An offset beyond half a gap, which only a given start can have, may go back but no further out.
        reach = self._offsets.abs().clamp_(min=0.5)
        moved = self._offsets.sub_(gradient.sign().mul_(inside), alpha=rate)
        torch.minimum(torch.maximum(moved, -reach), reach, out=moved)

    def _steps(self, scale: Tensor) -> Tensor:
        """weight / scale, a new tensor."""
        shape = tuple(self._weight.shape)
        return self._weight / spread(scale.to(self._weight.dtype), shape, self._scheme.granularity)

    def _zero(self, q: QTensor) -> Tensor | float:
        if q.zero_point is None:
            return 0.0
        return spread(q.zero_point.to(self._weight.dtype), q.shape, q.scheme.granularity)


class _Range:
    """The share of its first range that each tile keeps, for both ends together or, with a zero point, for each.

    The range that a scale and a zero point span is taken, not the tile's: then the share 1 is that scale to the bit.
    A first range that clips may grow to the whole one.
    """

    def __init__(self, weight: Tensor, first: QTensor) -> None:
        self._scheme = first.scheme
        dtype = working(weight[:0] if weight.ndim else weight).dtype
        self._ends = _ends(first.scale, first.zero_point, first.scheme, dtype)
        self._scale = first.scale.to(dtype)
        if first.scheme.scale_format is ScaleFormat.E8M0:
            # Scales from here to twice this are stored alike: begin in the middle, or the first step would halve them.
            self._scale = self._scale * math.sqrt(2)
        whole_scale, whole_zero = fit(weight, first.scheme)
        growth = whole_scale.to(dtype) / first.scale.to(dtype)
        whole = _ends(whole_scale, whole_zero, first.scheme, dtype) * growth
        largest = torch.where(self._ends == 0, 1.0, whole / self._ends)
        self._largest = largest.clamp_(min=1.0)
        self._share = torch.ones_like(self._largest)

    def stored(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point as `QTensor` holds them."""
        scale, low = self._real(self._share)
        stored = self._scheme.scale_format.round(scale)
        if low is None:
            return stored, None
        fmt = self._scheme.format
        # Of the stored scale, which may have been rounded up.
        zero_point = (fmt.minimum - low / stored.to(low.dtype)).round_().clamp_(fmt.minimum, fmt.maximum)
        return stored, zero_point.to(torch.int32)

    def _real(self, share: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scale before it is rounded, and with a zero point the range's low end; differentiable."""
        if self._scheme.symmetric:
            return self._scale * share[0], None
        low, high = self._ends * share
        # Whole numbers of steps first: with shares of 1 their quotient is 1, and the scale stays what it was.
        return self._scale * (
            (high - low) / (self._scheme.format.maximum - self._scheme.format.minimum)
        ), self._scale * low

    def descend(self, by_scale: Tensor, by_zero: Tensor, rate: float) -> None:
        """One signed step against the loss's gradients by scale and zero point."""
        with torch.enable_grad():
            share = self._share.detach().requires_grad_()
            scale, low = self._real(share)
            total = (scale * by_scale).sum()
            if low is not None:
                total = total - (low / scale * by_zero).sum()  # zero_point = qmin - low / scale
            (gradient,) = torch.autograd.grad(total, share)
        moved = self._share - rate * gradient.sign()
        self._share = torch.minimum(moved.clamp_(min=SMALLEST_SHARE), self._largest)


def _ends(scale: Tensor, zero_point: Tensor | None, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """The ends of each tile's range in steps: [1, *scale_shape] of ones, or [2, *scale_shape] low and high."""
    if zero_point is None:
        return torch.ones_like(scale, dtype=dtype).unsqueeze(0)
    fmt = scheme.format
    return torch.stack([fmt.minimum - zero_point.to(dtype), fmt.maximum - zero_point.to(dtype)])


@dataclass(frozen=True, slots=True, eq=False)
class _Values:
    """A format's values in rising order, and how far apart they are.

    rising:    the finite ones.
    gaps:      from each to the next.
    even:      all gaps are 1, as with integers.
    low, high: half a gap outside the last values; what lies beyond is clipped.
    """

    rising: Tensor
    gaps: Tensor
    even: bool
    low: float
    high: float

    @staticmethod
    @functools.cache
    def of(fmt: Format, dtype: torch.dtype, device: torch.device) -> _Values:
        """Those of a format."""
        values = fmt.decode(fmt.codes, torch.float64)
        rising = torch.tensor(sorted(set(values[values.isfinite()].tolist())), dtype=values.dtype)
        gaps = rising.diff()
        low, high = float(rising[0] - gaps[0] / 2), float(rising[-1] + gaps[-1] / 2)
        return _Values(rising.to(device, dtype), gaps.to(device, dtype), bool((gaps == 1).all()), low, high)

    def gap(self, steps: Tensor) -> Tensor | float:
        """Between the two values around each element; beyond the last value that before it."""
        if self.even:
            return 1.0
        return self.gaps[torch.bucketize(steps, self.rising[1:-1], right=True)]
