"""The weight that makes up, as well as it can, for what earlier layers have already lost.

A layer was trained on the inputs X of the float model; once the layers before it are quantized it gets X_q instead. Its outputs
should still be X W^T. Of all weights W' for those inputs (a token a row),

    ||X W^T - X_q W'^T||^2 + lam * ||W' - W||^2        is least for    W' = W + W D (H + lam * I)^-1

with the second moment H = X_q^T X_q and D = (X - X_q)^T X_q, how far the inputs have moved: the gradient in W' is
2 (W' H - W (D + H) + lam (W' - W)). Damping so pulls towards the weight itself, not towards 0, and equal inputs, D = 0, change
nothing. The inverse is the one that GPTQ takes, in the same factor. On the way from W to W' the error falls all along, so that
any share of it gains on the calibration data, and a part of it is less bound to them.

What rounding adds is then GPTQ's problem with H, for without damping ||X W^T - X_q W_hat^T||^2 is the least it can be plus
||X_q (W' - W_hat)^T||^2, whatever W_hat is.

Sources: Arai and Ichikawa 2025, "Quantization Error Propagation", https://arxiv.org/abs/2504.09629, whose correction is
W + share * W (X - X_q)^T X_q H^-1. Li et al. 2025, "GPTAQ", https://arxiv.org/abs/2504.02692,
minimise the same error, but pass each column's part of it on to later columns only, while they round.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbin.errors import DataError, SchemeError
from halfbin.methods.factor import Factor
from halfbin.tensor.qtensor import require_finite

SHARE = 0.5  # of the way from the weight to the minimum
STRIP = 512  # columns of D that are taken to float32 at once


def corrected(weight: Tensor, moved: Tensor, factor: Factor, *, share: float = SHARE) -> Tensor:
    """The weight to quantize instead of `weight`; layers that read the same inputs may be given below one another.

    Args:
      weight: float [out, in], finite.
      moved: D = (X - X_q)^T X_q, float [in, in], finite: X the inputs in the float model, X_q those in the model that is
        quantized so far, on the same tokens.
      factor: of X_q^T X_q, with the damping lam.
      share: how far to go, from 0, the weight itself, to 1, the minimum.

    Returns:
      float32 [out, in]. Columns whose inputs are always 0 in the quantized model stay as they are.

    Raises:
      DataError: NaN or infinity.
      SchemeError: shapes that do not fit, or a share outside [0, 1].
    """
    n = len(factor.order)
    if weight.ndim != 2 or weight.shape[1] != n or moved.shape != (n, n):
        raise SchemeError(
            f"weight {list(weight.shape)}, cross moment {list(moved.shape)} and second moment of {n} features do not fit"
        )
    if not 0.0 <= share <= 1.0:
        raise SchemeError(f"share={share} must be from 0, no correction, to 1, all of it")
    require_finite(weight)
    if not bool(torch.isfinite(moved.sum())):
        raise DataError("the cross moment is not finite: check the samples it was summed over")
    weight = weight.detach().to(torch.float32)
    change = torch.cat([weight @ strip.to(torch.float32) for strip in torch.split(moved, STRIP, dim=1)], dim=1)
    ordered = change[:, factor.order] @ factor.upper.T @ factor.upper
    change[:, factor.order] = ordered
    return weight.add(change, alpha=share)
