"""Half-quadratic quantization: a scale (and zero point) for each tile that leaves most weights with small errors.

Rounding to the whole range lets the one largest weight of a tile set the step of all others. HQQ minimises an lp norm
of the error with p < 1 instead, under which one large error costs little and many small ones cost much:

    minimise over scale s and zero point z of a tile:   F(s, z) = sum_i |w_i - s * (value(code_i) - z)|^p

No gradient helps with p < 1, so an auxiliary error e takes the norm's place and is tied to the true one by a square:

    minimise   sum_i |e_i|^p / p  +  beta/2 * sum_i (e_i - (w_i - w_hat_i))^2

and one half is solved at a time, each in closed form:

    codes   nearest values under (s, z)
    e       shrink(w - w_hat), the generalised soft threshold:  sign(x) * max(|x| - |x|^(p-1) / beta, 0)
    s, z    least squares of the target t = w - e on the codes

Source: Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models",
https://mobiusml.github.io/hqq_blog/, section "Half-Quadratic Solver".

Where we depart from it:

1. The source keeps s and moves a real-valued z. Our files hold integer zero points, or none, so s moves too. Asymmetric:
   the regression t = a * code + b gives s = a and z = round(-b / a), and then s once more for that z,
   s = <t, v> / <v, v> with v = code - z. Without zero point, v = value(code), for integers, floats and tables alike.
2. The problem is solved in steps of the tile's first scale. The source applies one beta to raw weights; there the same
   beta means "shrink everything to 0" for small weights and nothing for large ones. In steps, doubling a weight doubles
   its scale and keeps its codes.
3. Neither the rounding of z and s to what is stored nor the nearest code minimises F exactly, so F may rise between
   two iterations. Every iterate is judged with the scale as it will be stored, and each tile keeps its best one. The first
   iterate is round to nearest, hence the promise: F is not larger than under `rtn`, in any tile.

Tried in vain: further starts, from 0.8 and 0.6 of the range. They lower F by another 2 to 15 %, by clipping so much that
the squared error, which a layer's output feels, rises: 1.1 to 1.7 times its root for int4-g128, 4 to 6 times for int8-channel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbin.errors import SchemeError
from halfbin.kernels import instruction_sets
from halfbin.kernels._native import solve_hqq
from halfbin.kernels.rounding import SCALE_TYPES, compiled
from halfbin.numerics.affine import Grid
from halfbin.numerics.formats import IntegerFormat, working
from halfbin.tensor.granularity import regions
from halfbin.tensor.qtensor import QTensor, fit, quantize, require_finite
from halfbin.tensor.rowwise import encoder
from halfbin.tensor.scheme import Scheme

_CHUNK = 1 << 18  # elements worked on at once: about ten float32 temporaries of 1 MiB each


def hqq(
    weight: Tensor,
    scheme: Scheme,
    *,
    iterations: int = 20,
    p: float = 0.7,
    beta: float = 2.5,
    growth: float = 1.01,
) -> QTensor:
    """Choose the scales, and zero points, with the smallest lp error, p < 1, then round to nearest with them.

    Promise: no tile's sum of |error|^p is larger than under `rtn`. The same weight gives the same bits, whatever else
    is in the tensor.

    Args:
      weight: float, any shape that the scheme's granularity accepts; finite.
      scheme: what to round to.
      iterations: alternations from each start; 20 in the source.
      p: exponent of the norm, 0 < p <= 1; 0.7 in the source.
      beta: weight of the square, in steps of the first scale. At 2.5 errors below half a step, all those that are not
        clipped, are shrunk to 0, and clipped weights count less the further they lie outside.
      growth: factor on beta after each iteration; 1.01 in the source.

    Raises:
      DataError: NaN or infinity in `weight`.
      SchemeError: the scheme does not fit the shape, or p is outside (0, 1].
    """
    if not 0 < p <= 1:
        raise SchemeError(f"p={p}: the shrinkage is derived for 0 < p <= 1; use estimator ranges for other norms")
    require_finite(weight)
    first_scale, first_zero = fit(weight, scheme)
    scale, zero_point = first_scale.clone(), None if first_zero is None else first_zero.clone()
    schedule = Schedule(iterations, p, beta, growth)
    for region in regions(tuple(weight.shape), scheme.granularity):
        tiles = region.rows(weight)
        best_scale = first_scale[region.tiles].reshape(-1, 1)
        best_zero = None if first_zero is None else first_zero[region.tiles].reshape(-1, 1)
        if refuses(weight) is None:
            best = [solve_compiled(tiles, scheme.grid, best_scale, best_zero, schedule)]
        else:
            best = [
                solve(
                    tiles[part], scheme.grid, best_scale[part], None if best_zero is None else best_zero[part], schedule
                )
                for part in _parts(*tiles.shape)
            ]
        scale[region.tiles] = torch.cat([s for s, _ in best]).reshape(scale[region.tiles].shape)
        if zero_point is not None:
            found = torch.cat([z for _, z in best if z is not None])
            zero_point[region.tiles] = found.reshape(zero_point[region.tiles].shape)
    return quantize(weight, scheme, scale=scale, zero_point=zero_point)


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how hard to alternate; the fields are those of `hqq`."""

    iterations: int
    p: float
    beta: float
    growth: float


def refuses(weight: Tensor) -> str | None:
    """Why the compiled loop cannot take a weight, in words; None: it can."""
    if weight.device.type != "cpu" or not compiled():
        return f"it is compiled for little-endian CPUs, and the tensor is on {weight.device}"
    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"its arithmetic is float32, and the tensor is {weight.dtype}"
    return None


def solve_compiled(
    tiles: Tensor,
    grid: Grid,
    scale: Tensor,
    zero_point: Tensor | None,
    schedule: Schedule,
    *,
    instruction_set: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`solve`, tile by tile in the nearest cache (`csrc/hqq/`); its powers are within 2^-19 of the exact ones."""
    found = scale.to(torch.float32, copy=True).flatten()
    zeros = None if zero_point is None else zero_point.to(torch.int32, copy=True).flatten()
    solve_hqq(
        instruction_set or instruction_sets.best(),
        tiles.detach().to(torch.float32).contiguous(),
        encoder(grid.format).format,
        SCALE_TYPES[scale.dtype],
        found,
        zeros,
        schedule.iterations,
        schedule.p,
        schedule.beta,
        schedule.growth,
        torch.get_num_threads(),
    )
    return found.to(scale.dtype).view(scale.shape), None if zeros is None else zeros.view(scale.shape)


def solve(
    tiles: Tensor, grid: Grid, scale: Tensor, zero_point: Tensor | None, schedule: Schedule
) -> tuple[Tensor, Tensor | None]:
    """The best scale and zero point that the alternation visits, for each tile by itself.

    Args:
      tiles: float [num_tiles, tile_size], a tile a row.
      grid: what they are rounded to.
      scale: as stored [num_tiles, 1], where the alternation starts and what a step is.
      zero_point: int32 [num_tiles, 1], or None when symmetric.
      schedule: see `hqq`.

    Returns:
      scale and zero_point of the smallest objective, shaped and typed as they came.
    """
    unit = scale.to(working(tiles[:0]).dtype)
    best_scale, best_zero, lowest = scale, zero_point, torch.full_like(unit, torch.inf, dtype=torch.float64)
    now_scale, now_zero, beta = scale, zero_point, schedule.beta
    for _ in range(schedule.iterations + 1):  # the first one judges round to nearest, the last one moves nothing
        sums = _Sums.of(tiles, grid, unit, now_scale, now_zero, p=schedule.p, beta=beta)
        better = sums.objective < lowest
        lowest = torch.where(better, sums.objective, lowest)
        best_scale = torch.where(better, now_scale, best_scale)
        if best_zero is not None and now_zero is not None:
            best_zero = torch.where(better, now_zero, best_zero)
        now_scale, now_zero = sums.least_squares(grid, unit, now_scale, now_zero)
        beta *= schedule.growth
    return best_scale, best_zero


def shrink(error: Tensor, powers: Tensor, beta: float) -> Tensor:
    """The generalised soft threshold: float [...] errors, and |error|^p of the same shape, to the auxiliary errors.

    Source: Badri and Shaji 2023, equation of sub-problem 1. |x|^(p-1) is |x|^p / |x|: one power serves both.
    """
    size = error.abs()
    kept = (size - powers / size.clamp(min=torch.finfo(size.dtype).tiny) / beta).clamp_(min=0)
    return torch.copysign(kept, error)


@dataclass(frozen=True, slots=True)
class _Sums:
    """What one pass over the tiles leaves: the objective and the moments of codes and targets, float64 [num_tiles, 1].

    Codes are values v = value(code) before the zero point; targets are in units of the first scale.
    """

    count: int
    objective: Tensor
    v: Tensor
    vv: Tensor
    t: Tensor
    tv: Tensor

    @classmethod
    def of(
        cls, tiles: Tensor, grid: Grid, unit: Tensor, scale: Tensor, zero_point: Tensor | None, *, p: float, beta: float
    ) -> _Sums:
        """Round with (scale, zero_point), shrink the errors, and sum; a long tile in pieces of `_CHUNK` elements."""
        sums = torch.zeros(5, *unit.shape, dtype=torch.float64, device=unit.device)
        ratio = scale.to(unit.dtype) / unit
        for start in range(0, tiles.shape[1], _CHUNK):
            x = working(tiles[:, start : start + _CHUNK])
            values = grid.format.decode(grid.encode(x, scale, zero_point), x.dtype)
            centred = values if zero_point is None else values - zero_point
            x = x / unit
            error = x - centred * ratio
            powers = error.abs().pow_(p)
            target = x.sub_(shrink(error, powers, beta))
            terms = (powers, values, values * values, target, target * values)
            sums += torch.stack([term.sum(1, keepdim=True, dtype=torch.float64) for term in terms])
        return cls(tiles.shape[1], *sums)

    def least_squares(
        self, grid: Grid, unit: Tensor, scale: Tensor, zero_point: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The stored scale and zero point nearest to the regression of targets on codes; as they were where it has none."""
        if zero_point is None:
            return self._usable(self.tv / self.vv, unit, scale, grid), None
        fmt = grid.format
        assert isinstance(fmt, IntegerFormat)
        n = self.count
        slope = (n * self.tv - self.t * self.v) / (n * self.vv - self.v * self.v)
        intercept = (self.t - slope * self.v) / n
        moved = (-intercept / slope).round_()
        usable = (slope > 0) & moved.isfinite()
        zero = torch.where(usable, moved.clamp_(fmt.qmin, fmt.qmax), zero_point.to(moved.dtype))
        step = (self.tv - zero * self.t) / (self.vv - 2 * zero * self.v + n * zero * zero)
        return self._usable(step, unit, scale, grid), zero.to(torch.int32)

    @staticmethod
    def _usable(step: Tensor, unit: Tensor, scale: Tensor, grid: Grid) -> Tensor:
        usable = (step > 0) & step.isfinite()
        return torch.where(usable, _stored(unit * step.to(unit.dtype), unit, grid), scale)


def _stored(scale: Tensor, unit: Tensor, grid: Grid) -> Tensor:
    """`scale` as the file will hold it; steps that are no positive number become the first scale."""
    return grid.scale_format.round(torch.where(scale > 0, scale, unit))


def _parts(num_tiles: int, tile_size: int) -> Iterator[slice]:
    """Slices of neighbouring tiles that hold about `_CHUNK` elements, one tile at least."""
    step = max(1, _CHUNK // max(1, tile_size))
    return (slice(start, start + step) for start in range(0, num_tiles, step))
