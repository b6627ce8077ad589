"""A scheme: what a tensor is rounded to. A small frozen value of four independent facts, with a short spelling.

int4-g128-asym-f16     format, granularity, zero point or not, how a scale is stored
int8-channel           the defaults are symmetric and f32 scales
fp8_e4m3-tensor, nf4-g64, int8-token, int4-b128x128, ternary-channel
mxfp4, mxfp8           fp4_e2m1 and fp8_e4m3 in groups of 32 with e8m0 scales
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass

from halfbin.errors import SchemeError, did_you_mean
from halfbin.numerics.affine import Grid
from halfbin.numerics.formats import FORMATS, FP4_E2M1, FP8_E4M3, Format
from halfbin.numerics.scales import ScaleFormat
from halfbin.tensor.granularity import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, PerToken, scale_shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How a tensor is rounded: format, granularity, with a zero point or not, and how a scale is stored."""

    format: Format
    granularity: Granularity
    symmetric: bool = True
    scale_format: ScaleFormat = ScaleFormat.FLOAT32

    def __post_init__(self) -> None:
        _ = self.grid  # refuses combinations that mean nothing

    @property
    def grid(self) -> Grid:
        """What elements with one scale are rounded to."""
        return Grid(self.format, self.symmetric, self.scale_format)

    @property
    def group_size(self) -> int | None:
        """Weights sharing one scale along in_features; None where groups are no part of the scheme."""
        return self.granularity.size if isinstance(self.granularity, PerGroup) else None

    def num_scales(self, shape: tuple[int, ...]) -> int:
        """How many scales a tensor of `shape` has."""
        return math.prod(scale_shape(shape, self.granularity))

    def num_bits(self, shape: tuple[int, ...]) -> int:
        """Everything stored for a tensor of `shape`: codes, scales, zero points; without padding."""
        per_scale = self.scale_format.bits + (0 if self.symmetric else self.format.bits)
        return math.prod(shape) * self.format.bits + self.num_scales(shape) * per_scale

    def bits_per_weight(self, shape: tuple[int, ...]) -> float:
        """All stored bits over the number of weights; 0 for an empty tensor."""
        return self.num_bits(shape) / max(math.prod(shape), 1)

    def with_scale(self, scale_format: ScaleFormat) -> Scheme:
        """The same scheme with scales stored otherwise."""
        return dataclasses.replace(self, scale_format=scale_format)

    def __str__(self) -> str:
        """The short spelling; `parse` reads it back."""
        for name, scheme in BLOCK_SCALED.items():
            if scheme == self:
                return name
        parts = [self.format.name, str(self.granularity)]
        if not self.symmetric:
            parts.append("asym")
        if self.scale_format is not ScaleFormat.FLOAT32:
            parts.append(self.scale_format.value)
        return "-".join(parts)


BLOCK_SCALED = {
    "mxfp4": Scheme(format=FP4_E2M1, granularity=PerGroup(32), scale_format=ScaleFormat.E8M0),
    "mxfp8": Scheme(format=FP8_E4M3, granularity=PerGroup(32), scale_format=ScaleFormat.E8M0),
}


def parse_scheme(text: str) -> Scheme:
    """Read a short spelling such as `int4-g128-asym-f16`; a bare format name means one scale per row.

    Raises:
      SchemeError: the part that is not understood, and the nearest one that would be.
    """
    if text in BLOCK_SCALED:
        return BLOCK_SCALED[text]
    name, *parts = text.split("-")
    if name not in FORMATS:
        raise SchemeError(f"{name!r} in scheme {text!r} is no format{did_you_mean(name, [*FORMATS, *BLOCK_SCALED])}")
    granularity: Granularity | None = None
    symmetric: bool | None = None
    scale_format: ScaleFormat | None = None
    spellings = {scale.value: scale for scale in ScaleFormat}
    for part in parts:
        if part in spellings:
            _only_once(scale_format, part, text, "how its scales are stored")
            scale_format = spellings[part]
        elif part in ("asym", "sym"):
            _only_once(symmetric, part, text, "whether it has a zero point")
            symmetric = part == "sym"
        elif found := _granularity(part):
            _only_once(granularity, part, text, "which weights share a scale")
            granularity = found
        else:
            known = ["tensor", "channel", "token", "g128", "b128x128", "asym", "sym", *spellings]
            raise SchemeError(f"{part!r} in scheme {text!r} is not understood{did_you_mean(part, known)}")
    return Scheme(
        format=FORMATS[name],
        granularity=granularity or PerChannel(),
        symmetric=symmetric is not False,
        scale_format=scale_format or ScaleFormat.FLOAT32,
    )


def _only_once(earlier: object, part: str, text: str, fact: str) -> None:
    if earlier is not None:
        raise SchemeError(f"{part!r} in scheme {text!r} says a second time {fact}; keep one of them")


def states_scale(text: str) -> bool:
    """Whether a spelling says how its scales are stored, so that nobody may choose for it."""
    return text in BLOCK_SCALED or bool({scale.value for scale in ScaleFormat} & set(text.split("-")))


def _granularity(part: str) -> Granularity | None:
    if match := re.fullmatch(r"g([0-9]{1,9})(@[0-9])?", part):
        return PerGroup(int(match[1]), int(match[2][1:]) if match[2] else -1)
    if match := re.fullmatch(r"b([0-9]{1,9})x([0-9]{1,9})", part):
        return PerBlock(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"channel(@[0-9])?", part):
        return PerChannel(int(match[1][1:]) if match[1] else 0)
    if part == "token":
        return PerToken()
    return PerTensor() if part == "tensor" else None
