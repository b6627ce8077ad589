"""How the inputs of a layer are quantized, and what does it: an `InputScheme`, and an `InputQuantizer` that has its scale.

int8-token               one scale a token, from the token itself: always dynamic
int8-tensor              static: one scale for all inputs there will ever be, from calibration
int8-tensor-dynamic      one scale for all tokens of a batch, from the batch
fp8_e4m3-token, int4-token-asym
int8-token-outliers6     LLM.int8(): columns in which any |x| is 6 or more stay as they are, and so do those named beforehand

A layer's inputs are [*, in_features]; everything before the last axis counts as tokens. No other granularity makes sense here:
a scale for each column or group of columns cannot be taken out of a sum over columns.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from decimal import Decimal

import torch
from torch import Tensor

from halfbin.errors import DataError, SchemeError, did_you_mean
from halfbin.numerics.formats import IntegerFormat
from halfbin.tensor.fake_quantize import fake_quantize
from halfbin.tensor.granularity import PerChannel, PerTensor, PerToken, scale_shape
from halfbin.tensor.qtensor import QTensor, quantize, require_finite
from halfbin.tensor.scheme import Scheme, parse_scheme

WORDS = ("token", "tensor", "dynamic", "static", "outliers6", "asym", "sym", "f32", "f16", "bf16")


@dataclass(frozen=True, slots=True, kw_only=True)
class InputScheme:
    """What the inputs of a layer are rounded to, and when their scales are found.

    scheme:   format, zero point or not, how a scale is stored; per token or per tensor.
    dynamic:  True: scales come from the inputs at hand. False: one scale, from calibration, is given at use.
    outliers: columns (features) of a batch in which any |x| is this large or larger are left out, as LLM.int8() does; None: all
              columns are rounded.
    """

    scheme: Scheme
    dynamic: bool
    outliers: float | None = None

    def __post_init__(self) -> None:
        granularity = self.scheme.granularity
        if not isinstance(granularity, PerToken | PerTensor):
            name = f"{self.scheme.format.name}-token"
            raise SchemeError(
                f"inputs cannot be quantized per {granularity}: their scales must come out of sums over columns; "
                f"use one a token ({name}) or one for all ({self.scheme.format.name}-tensor)"
            )
        if isinstance(granularity, PerToken) and not self.dynamic:
            raise SchemeError(
                f"{self.scheme} cannot be static: nobody knows the tokens to come; use -tensor for one scale"
            )
        if self.outliers is not None and not (self.dynamic and 0 < self.outliers < math.inf):
            raise SchemeError(
                f"outliers={self.outliers:g} must be above 0 and finite, and the rest dynamic, such as int8-token-outliers6"
            )

    @property
    def needs_scale(self) -> bool:
        """Whether a scale from calibration must be given."""
        return not self.dynamic

    def quantizer(self, scale: Tensor | None = None, zero_point: Tensor | None = None) -> InputQuantizer:
        """With the scale (and zero point) that a static one needs, of one element each."""
        return InputQuantizer(self, scale, zero_point)

    def calibrated(self, minimum: float | Tensor, maximum: float | Tensor) -> InputQuantizer:
        """A static one whose scale covers [minimum, maximum] and 0; a dynamic one finds its own scales."""
        if self.dynamic:
            return InputQuantizer(self)
        low, high = (torch.as_tensor(end, dtype=torch.float32).reshape(1) for end in (minimum, maximum))
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise DataError(
                f"the inputs' range is {low.item()} to {high.item()}; check the model on the calibration texts"
            )
        return InputQuantizer(self, *self.scheme.grid.params(low, high))

    def __str__(self) -> str:
        """The short spelling; `parse_inputs` reads it back."""
        parts = [str(self.scheme)]
        if self.dynamic and isinstance(self.scheme.granularity, PerTensor):
            parts.append("dynamic")
        if self.outliers is not None:
            parts.append(f"outliers{Decimal(repr(self.outliers)).normalize():f}")
        return "-".join(parts)


@dataclass(frozen=True, slots=True, eq=False)
class InputQuantizer:
    """An `InputScheme` with all that it needs.

    scale:      static schemes only: [1], of the scheme's scale type, finite and > 0.
    zero_point: static asymmetric schemes only: int32 [1].
    columns:    schemes with outliers only: int32 [k], features that always stay as they are, whatever they hold: those whose
                columns the layer's weight keeps in floating point (`FloatColumns.ids`). None: no such.
    """

    inputs: InputScheme
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    columns: Tensor | None = None

    def __post_init__(self) -> None:
        if self.columns is not None and self.inputs.outliers is None:
            raise SchemeError(f"{self.inputs} leaves no columns out: name none, or add -outliers6")
        if self.inputs.dynamic:
            if self.scale is not None or self.zero_point is not None:
                raise SchemeError(f"{self.inputs} finds its scales itself; give none")
            return
        if self.scale is None or (self.zero_point is None) != self.inputs.scheme.symmetric:
            wanted = "a scale" if self.inputs.scheme.symmetric else "a scale and a zero point"
            raise SchemeError(
                f"{self.inputs} is static and needs {wanted} from calibration; or use {self.inputs}-dynamic"
            )
        _require_one(self.inputs, self.scale, self.zero_point)
        stored = self.inputs.scheme.scale_format
        object.__setattr__(self, "scale", stored.round(self.scale.detach().reshape(1).to(torch.float32)))
        if self.zero_point is not None:
            object.__setattr__(self, "zero_point", self.zero_point.detach().reshape(1).to(torch.int32))

    def keeping(self, columns: Tensor) -> InputQuantizer:
        """The same, with features int32 [k] that always stay as they are, if the scheme leaves outliers out at all."""
        return self if self.inputs.outliers is None else dataclasses.replace(self, columns=columns)

    def quantize(self, x: Tensor) -> QTensor:
        """Float [*, in_features] to codes [tokens, in_features], without regard to outliers.

        Raises:
          DataError: NaN or infinity.
        """
        rows = _rows(x)
        scale, zero_point = self._params(rows)
        return quantize(rows, self.inputs.scheme, scale=scale, zero_point=zero_point)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """What the layer sees instead of `x`: float [*, in_features], the same shape and type; differentiable.

        Raises:
          DataError: NaN or infinity.
        """
        rows = _rows(x)
        scale, zero_point = self._params(rows)
        if self.inputs.outliers is None:
            return fake_quantize(rows, self.inputs.scheme, scale=scale, zero_point=zero_point).reshape(x.shape)
        require_finite(rows)  # an infinite column would count as an outlier and pass
        kept = outlier_columns(rows, self.inputs.outliers)
        if self.columns is not None:
            if self.columns.numel() and not int(self.columns.max()) < kept.numel():
                raise SchemeError(f"there is no input feature {int(self.columns.max())}, there are {kept.numel()}")
            kept[self.columns.to(kept.device, torch.int64)] = True
        rounded = fake_quantize(torch.where(kept, 0.0, rows), self.inputs.scheme, scale=scale, zero_point=zero_point)
        return torch.where(kept, rows, rounded).reshape(x.shape)

    def _params(self, rows: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Scale and zero point as a `QTensor` of `rows` holds them; None where they are found from the inputs."""
        if self.scale is None:
            return None, None
        wanted = scale_shape(tuple(rows.shape), self.inputs.scheme.granularity)
        zero_point = None if self.zero_point is None else _spread(self.zero_point, wanted, rows)
        return _spread(self.scale, wanted, rows), zero_point


def outlier_columns(rows: Tensor, threshold: float) -> Tensor:
    """Which columns of float [tokens, in_features] hold an |x| of `threshold` or more: bool [in_features].

    Source: Dettmers et al. 2022, https://arxiv.org/abs/2208.07339, section 3.2, the set O.
    """
    return (rows.abs() >= threshold).any(0)


def parse_inputs(text: str) -> InputScheme:
    """Read a short spelling such as `int8-token`; see the top of this file.

    Raises:
      SchemeError: the part that is not understood, and the nearest one that would be.
    """
    parts, dynamic, outliers = [], None, None
    for part in text.split("-"):
        if part in ("dynamic", "static"):
            _only_once(dynamic, part, text)
            dynamic = part == "dynamic"
        elif match := re.fullmatch(r"outliers([0-9]+(?:\.[0-9]+)?)", part):
            _only_once(outliers, part, text)
            outliers = float(match[1])
        else:
            parts.append(part)
    scheme = _scheme("-".join(parts), text)
    per_token = isinstance(scheme.granularity, PerToken)
    return InputScheme(scheme=scheme, dynamic=per_token if dynamic is None else dynamic, outliers=outliers)


def _scheme(rest: str, text: str) -> Scheme:
    try:
        scheme = parse_scheme(rest)
    except SchemeError as error:
        odd = next((part for part in text.split("-")[1:] if part not in WORDS), None)
        if odd is None or repr(odd) not in str(error):
            raise
        raise SchemeError(f"{odd!r} in inputs {text!r} is not understood{did_you_mean(odd, WORDS)}") from error
    if scheme.granularity == PerChannel() and "channel" not in rest:
        name = scheme.format.name
        raise SchemeError(
            f"inputs {text!r} do not say which share a scale; did you mean '{name}-token' or '{name}-tensor'?"
        )
    return scheme


def _only_once(earlier: object, part: str, text: str) -> None:
    if earlier is not None:
        raise SchemeError(f"{part!r} in inputs {text!r} says a second time what an earlier part says; keep one of them")


def _require_one(inputs: InputScheme, scale: Tensor, zero_point: Tensor | None) -> None:
    if scale.numel() != 1 or (zero_point is not None and zero_point.numel() != 1):
        raise SchemeError(f"{inputs} has one scale and one zero point, got a scale of shape {list(scale.shape)}")
    value = float(scale)
    if not 0 < value < math.inf:
        raise DataError(f"the inputs' scale is {value}; it must be positive and finite: calibrate on more text")
    fmt = inputs.scheme.format
    if zero_point is not None and isinstance(fmt, IntegerFormat) and not fmt.qmin <= int(zero_point) <= fmt.qmax:
        raise SchemeError(f"zero point {int(zero_point)} is no code of {fmt.name}, {fmt.qmin} to {fmt.qmax}")


def _spread(param: Tensor, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """One value, [1], to the shape that scales have, [1, 1] or, without tokens, [0, 1]."""
    return param.to(like.device).reshape(1, 1).expand(shape)


def _rows(x: Tensor) -> Tensor:
    if x.ndim == 0:
        raise SchemeError("inputs are [*, in_features], got a single number")
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
