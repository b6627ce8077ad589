"""Rotations folded into weights: the model computes the same, in a basis in which no channel stands out.

An RMSNorm without a scale gives the same for rotated inputs, rotated: norm(x Q) = norm(x) Q, as Q keeps lengths. So where all
that writes into the residual stream writes x Q, and all that reads it multiplies by Q^T first, nothing changes:

    fold_norm       the norm's scale (and shift) into the linears that read it, so that it commutes with Q
    centred         LayerNorm takes the mean away: every writer does that itself, and an RMSNorm remains
    rotate_outputs  of writers, y Q:         Q^T W, Q^T b
    rotate_inputs   of readers, x Q given:   W Q;  an embedding [tokens, features] writes rows: E Q as well
    per_head        the rotation of each head's values, which attention mixes only over tokens: on v's outputs and o's inputs

Weights are [out_features, in_features]. Everything is computed in float64 and rounded once to the weight's own type.

Source: Ashkboos et al. 2024, "QuaRot", https://arxiv.org/abs/2404.00456, section 4; the step from LayerNorm to RMSNorm from
Ashkboos et al. 2024, "SliceGPT", https://arxiv.org/abs/2401.15024, section 3.2.
"""

from __future__ import annotations

from torch import Tensor

from halfbin.errors import SchemeError
from halfbin.transforms.rotation import Rotation


def fold_scale(weight: Tensor, scale: Tensor) -> Tensor:
    """The weight that reads x and gives what `weight` gives for x * scale.

    Args:
      weight: float [out, in].
      scale: float [in], of a norm; zeros and negative ones are as good as others.
    """
    _same_width(weight, scale, "scale")
    return (weight.double() * scale.double()).to(weight.dtype)


def fold_norm(weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias that read x and give what the given ones give for x * scale + shift.

    Args:
      weight: float [out, in].
      bias: float [out], or None for 0.
      scale: float [in], of a LayerNorm.
      shift: float [in], its bias.

    Returns:
      weight [out, in] and bias [out], both of the weight's type: a bias is needed from now on.
    """
    _same_width(weight, shift, "shift")
    moved = weight.double() @ shift.double()
    if bias is not None:
        moved = moved + bias.double()
    return fold_scale(weight, scale), moved.to(weight.dtype)


def centred(weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """What writes into a residual stream, without the mean of what it writes: a LayerNorm that reads it becomes an RMSNorm.

    Args:
      weight: float [out, in]; an embedding [tokens, features] writes rows and is given transposed.
      bias: float [out] or None.
    """
    wide = weight.double()
    without = (wide - wide.mean(0, keepdim=True)).to(weight.dtype)
    return without, None if bias is None else (bias.double() - bias.double().mean()).to(bias.dtype)


def rotate_inputs(weight: Tensor, rotation: Rotation) -> Tensor:
    """W Q, [out, in]: reads x Q and gives what `weight` gives for x. Also for rows that are written: embeddings, biases.

    Raises:
      SchemeError: the rotation has another size.
    """
    return rotation(weight)


def rotate_outputs(weight: Tensor, bias: Tensor | None, rotation: Rotation) -> tuple[Tensor, Tensor | None]:
    """Q^T W and Q^T b: gives y Q where the given ones give y.

    Args:
      weight: float [out, in].
      bias: float [out] or None.
      rotation: of size out.

    Raises:
      SchemeError: the rotation has another size.
    """
    return rotation(weight.T).T.contiguous(), None if bias is None else rotation(bias)


def per_head(rotation: Rotation, num_heads: int) -> Rotation:
    """The same rotation for each of several heads, [num_heads * size].

    With grouped queries v has fewer heads than o reads: both take the same `rotation`, each for its own number of heads.
    """
    if num_heads < 1:
        raise SchemeError(f"num_heads={num_heads} must be at least 1")
    return Rotation(rotation.signs.repeat(num_heads), rotation.factors)


def _same_width(weight: Tensor, vector: Tensor, name: str) -> None:
    if weight.ndim != 2 or vector.shape != weight.shape[1:]:
        raise SchemeError(f"weight {list(weight.shape)} needs one {name} for each column, got {list(vector.shape)}")
