"""`int_matmul`: the product of two tensors of integer codes, as integer hardware computes it. Slow, plain, and exact.

With x_hat = scale_x (q - z) for a row of x, and w_hat = scale_w (p - y) for a row of w, over the K elements of one group:

    sum (q - z)(p - y)  =  sum q p  -  y sum q  -  z (sum p - K y)
                           [1]        [2]          [3]

so the inner loop [1] multiplies codes only, [2] needs one sum per row of x, and [3] one per row of w, known beforehand.

No integer on the way leaves INT32. Let Q = max|q|, P = max|p| over all codes, D = max|q - z|, E = max|p - y| over codes
and zero points. In the order above, left to right, what is ever held is a sum over some or all of K elements of

    q p                 each at most Q P
    q                   at most Q,  and  y q                 at most Q P: a zero point is itself a code, so |y| <= P
    p - y               at most E,  and  z (p - y)           at most Q E, as |z| <= Q
    q (p - y)           at most Q E                          after [2]
    (q - z)(p - y)      at most D E                          after [3]

and Q, P, E >= 1. So |.| <= K max(QP, QE, DE), and that bound is attained: by rows of the code and zero point that each
maximum belongs to. It holds for the terms taken in any order and in any number of partial sums, so that a kernel may
saturate, or count signed overflow as an error, and still agree. (With wrapping arithmetic K D E alone would do.)

Source: Jacob et al. 2017, https://arxiv.org/abs/1712.05877, section 2.3, equations 7 and 8; the same terms in gemmlowp,
doc/quantization.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbin.errors import SchemeError
from halfbin.numerics.formats import IntegerFormat
from halfbin.tensor.qtensor import QTensor

INT32_MAX = 2**31 - 1


def int_matmul(x: QTensor, w: QTensor) -> Tensor:
    """x_hat @ w_hat^T: integer products summed exactly in INT32, one group of w at a time, then scaled in float32.

    Each group's sum is converted to float32, multiplied by w's scale and added to those of earlier groups; x's scale
    comes last. With G groups that is at most G + 2 roundings, each of 2**-24 of sum_g |sum_g| scale_w scale_x.

    Args:
      x: integer codes [M, K], symmetric or not, one scale for each row or for all of them.
      w: integer codes [N, K], symmetric or not, any granularity: runs of K that share a scale are one group.

    Returns:
      float32 [M, N].

    Raises:
      SchemeError: codes that are no integers, shapes that do not fit, x with several scales a row, or a K that INT32
        could not hold for the worst codes: it depends on formats and zero points, never on the codes at hand.
    """
    _check_shapes(x, w)
    k, size = x.shape[1], w.scheme.granularity.tile(w.shape)[1]
    _check_bound(min(k, size), x, w)
    x_scale, w_scale = _rows(x.scale.to(torch.float32), x), _rows(w.scale.to(torch.float32), w)
    x_zero = None if x.zero_point is None else _rows(x.zero_point, x)
    w_zero = None if w.zero_point is None else _rows(w.zero_point, w)
    product = torch.zeros(x.shape[0], w.shape[0], dtype=torch.float32, device=x.codes.device)
    for group in range(w_scale.shape[1]):
        part = slice(group * size, (group + 1) * size)
        total = accumulate(
            x.codes[:, part], w.codes[:, part], x_zero, None if w_zero is None else w_zero[:, group : group + 1]
        )
        product += total.to(torch.float32) * w_scale[:, group]
    return product * x_scale if k else product


def accumulate(x: Tensor, w: Tensor, x_zero: Tensor | None, w_zero: Tensor | None) -> Tensor:
    """sum_k (x - x_zero)(w - w_zero) in INT32, from the codes' product and the cross terms, in the order shown above.

    Args:
      x: integer codes [M, K].
      w: integer codes [N, K].
      x_zero: int32 [M, 1] or [1, 1]; None for 0.
      w_zero: int32 [N, 1] or [1, 1]; None for 0.

    Returns:
      int32 [M, N].
    """
    total = (product if x.device.type == "cpu" else product_in_float64)(x, w)
    w_sum = w.sum(1, dtype=torch.int32)
    if w_zero is not None:
        total -= w_zero[:, 0] * x.sum(1, keepdim=True, dtype=torch.int32)
        w_sum = w_sum - x.shape[1] * w_zero[:, 0]
    if x_zero is not None:
        total -= x_zero * w_sum
    return total


def product(x: Tensor, w: Tensor) -> Tensor:
    """Integer codes [M, K] and [N, K] to x @ w^T, int32 [M, N]."""
    return x.to(torch.int32) @ w.to(torch.int32).T


def product_in_float64(x: Tensor, w: Tensor) -> Tensor:
    """The same where torch multiplies no integers, as on GPUs: float64 holds every sum below 2**53, and so all of INT32."""
    return (x.to(torch.float64) @ w.to(torch.float64).T).to(torch.int32)


def accumulator_bound(
    k: int,
    x_format: IntegerFormat,
    w_format: IntegerFormat,
    *,
    x_zero_points: tuple[int, int] | None = None,
    w_zero_points: tuple[int, int] | None = None,
) -> int:
    """The largest magnitude that any INT32 on the way can reach over `k` elements, for the worst codes; attained.

    Args:
      k: elements summed before a scale is applied: in_features, or the group size of w.
      x_format: the codes of x.
      w_format: the codes of w.
      x_zero_points: the lowest and highest zero point of x; None when symmetric. (qmin, qmax) is the worst case.
      w_zero_points: those of w.

    Returns:
      k max(QP, QE, DE), see the top of this file; a product is exact when this is at most 2**31 - 1.

    Raises:
      SchemeError: zero points that are no codes of their format; the bound needs them to be.
    """
    q, d = _magnitudes(x_format, x_zero_points)
    p, e = _magnitudes(w_format, w_zero_points)
    return k * max(q * p, q * e, d * e)


def _magnitudes(fmt: IntegerFormat, zero_points: tuple[int, int] | None) -> tuple[int, int]:
    """The largest |code| and the largest |code - zero_point|."""
    low, high = zero_points or (0, 0)
    if not fmt.qmin <= low <= high <= fmt.qmax:
        raise SchemeError(f"zero points from {low} to {high} are no codes of {fmt.name}, {fmt.qmin} to {fmt.qmax}")
    return max(-fmt.qmin, fmt.qmax), max(fmt.qmax - low, high - fmt.qmin)


def _integers(q: QTensor) -> IntegerFormat:
    if not isinstance(q.scheme.format, IntegerFormat):
        raise SchemeError(f"the codes of {q.scheme} are no integers: dequantize both and multiply those, or use int8")
    return q.scheme.format


def _check_shapes(x: QTensor, w: QTensor) -> None:
    if len(x.shape) != 2 or len(w.shape) != 2 or x.shape[1] != w.shape[1]:
        raise SchemeError(
            f"x is {list(x.shape)} and w {list(w.shape)}; expected [M, K] and [N, K] with one K: flatten x's leading "
            "dimensions before it is quantized"
        )
    if x.scale.shape[1] > 1:
        raise SchemeError(
            f"x has {x.scale.shape[1]} scales in each row of {x.shape[1]} ({x.scheme}), and a sum has one: use token or "
            "tensor for x; groups belong to w"
        )


def _check_bound(k: int, x: QTensor, w: QTensor) -> None:
    formats, zero_points = (_integers(x), _integers(w)), (_extremes(x.zero_point), _extremes(w.zero_point))
    one = accumulator_bound(1, *formats, x_zero_points=zero_points[0], w_zero_points=zero_points[1])
    if k * one > INT32_MAX:
        most = INT32_MAX // one
        raise SchemeError(
            f"sums over {k} products of {formats[0].name} and {formats[1].name} codes can reach {k * one}, and INT32 "
            f"ends at {INT32_MAX}: at most {most} fit. Split K into parts of at most {most} and add their float32 "
            f"products, or give w groups of at most {most}"
        )


def _extremes(zero_point: Tensor | None) -> tuple[int, int] | None:
    if zero_point is None or not zero_point.numel():
        return None
    return int(zero_point.min()), int(zero_point.max())


def _rows(params: Tensor, q: QTensor) -> Tensor:
    """One value for every row, or one for all, and every group: [rows or 1, groups]."""
    rows, _ = q.shape
    tall = q.scheme.granularity.tile(q.shape)[0]
    return params.repeat_interleave(tall, 0)[:rows] if 1 < tall < rows else params
