"""The weight that makes up, as well as it can, for what earlier layers have already lost.

A layer was trained on the inputs X of the float model; once the layers before it are quantized it gets X_q instead. Its outputs
should still be X W^T. Of all weights W' for those inputs (a token a row),

    ||X W^T - X_q W'^T||^2 + lam * ||W' - W||^2        is least for    W' = W + W (C - H) (H + lam * I)^-1

with the cross moment C = X^T X_q and the second moment H = X_q^T X_q: the gradient in W' is
2 (W' H - W C + lam (W' - W)). Damping so pulls towards the weight itself, not towards 0, and equal inputs, C = H, change
nothing. On the way from W to W' the error falls all along, so that any share of it gains on the calibration data, and a part
of it is less bound to them.

What rounding adds is then GPTQ's problem with H, for without damping ||X W^T - X_q W_hat^T||^2 is the least it can be plus
||X_q (W' - W_hat)^T||^2, whatever W_hat is.

Sources: Arai and Ichikawa 2025, "Quantization Error Propagation", https://arxiv.org/abs/2504.09629, whose correction is
W + share * W (X - X_q)^T X_q H^-1, with (X - X_q)^T X_q = C - H. Li et al. 2025, "GPTAQ", https://arxiv.org/abs/2504.02692,
minimise the same error, but pass each column's part of it on to later columns only, while they round.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbin.errors import DataError, SchemeError
from halfbin.methods.cholesky import DAMPING, solve
from halfbin.tensor.qtensor import require_finite

SHARE = 0.5  # of the way from the weight to the minimum


def corrected(
    weight: Tensor, cross: Tensor, second_moment: Tensor, *, share: float = SHARE, damping: float = DAMPING
) -> Tensor:
    """The weight to quantize instead of `weight`; layers that read the same inputs may be given below one another.

    Args:
      weight: float [out, in], finite.
      cross: X^T X_q, float [in, in]: a row for each feature of the float model's inputs.
      second_moment: X_q^T X_q, float [in, in], of the inputs of the model that is quantized so far, on the same tokens.
      share: how far to go, from 0, the weight itself, to 1, the minimum.
      damping: lam, as a share of the mean diagonal of `second_moment`; `cholesky.solve` takes more where it must.

    Returns:
      float32 [out, in]. Columns whose inputs are always 0 in the quantized model stay as they are.

    Raises:
      DataError: moments that are not square, not finite or beyond repair; NaN or infinity in `weight`.
      SchemeError: shapes that do not fit, or a share outside [0, 1].
    """
    n = len(second_moment)
    if weight.ndim != 2 or weight.shape[1] != n or cross.shape != (n, n):
        raise SchemeError(
            f"weight {list(weight.shape)}, cross moment {list(cross.shape)} and second moment of {n} features do not fit"
        )
    if not 0.0 <= share <= 1.0:
        raise SchemeError(f"share={share} must be from 0, no correction, to 1, all of it")
    require_finite(weight)
    if not bool(torch.isfinite(cross.sum())):
        raise DataError("the cross moment is not finite: check the samples it was summed over")
    weight = weight.detach().to(torch.float32)
    # Their difference is small beside both: it is taken before it is rounded to float32.
    moved = weight @ (cross.double() - second_moment.double()).to(torch.float32)

    def change(lower: Tensor) -> Tensor:
        return torch.cholesky_solve(moved.T.to(lower.dtype), lower).T

    order = torch.arange(n, device=second_moment.device)
    found = solve(second_moment, damping, order, change)
    return weight + share * found.value.to(torch.float32)
