"""Checks that turn what is wrong with a stranger's tensor into a `FormatError` that names it."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbin.errors import FormatError
from halfbin.formats.layout import Infos, Parts, Read, Shape
from halfbin.numerics import FloatFormat, Format, IntegerFormat, ScaleFormat

E8M0_NAN = 255


def read_as(read: Read, name: str, dtype: torch.dtype, shape: Shape) -> Tensor:
    """Read `name`, which must have this type and shape."""
    tensor = read(name)
    require_part(name, tensor.dtype, tuple(tensor.shape), dtype, shape)
    return tensor


def require_part(name: str, dtype: torch.dtype, shape: Shape, wanted: torch.dtype, wanted_shape: Shape) -> None:
    """A stored tensor's type and shape are those that its scheme asks for."""
    if dtype != wanted:
        raise FormatError(
            f"tensor {name!r} is stored as {dtype}, expected {wanted}; the file does not match its config"
        )
    if shape != wanted_shape:
        raise FormatError(
            f"tensor {name!r} has shape {list(shape)}, expected {list(wanted_shape)}; the file does not match its config"
        )


def require_parts(infos: Infos, parts: Parts) -> None:
    """Every part is in the checkpoint, with the right type and shape; only the header is looked at."""
    for name, (dtype, shape) in parts.items():
        if name not in infos:
            raise FormatError(
                f"tensor {name!r} is missing; its weight cannot be read without it: download the file again"
            )
        require_part(name, infos[name].dtype, tuple(infos[name].shape), dtype, shape)


def require_codes(name: str, codes: Tensor, fmt: Format) -> None:
    """Unpacked codes, uint8 of any shape counted from the lowest code, stand for finite values of the format."""
    if codes.numel() == 0:
        return
    largest = int(codes.max())
    if isinstance(fmt, FloatFormat):
        if bool(((codes & (2 ** (fmt.bits - 1) - 1)) > fmt.largest_code).any()):
            raise FormatError(f"tensor {name!r} holds NaN or infinity as a {fmt.name} code; the file is damaged")
        return
    count = fmt.qmax - fmt.qmin + 1 if isinstance(fmt, IntegerFormat) else len(fmt.table)
    if largest >= count:
        raise FormatError(f"tensor {name!r} holds code {largest}, but {fmt.name} has codes 0 to {count - 1}")


def require_positive(name: str, scale: Tensor) -> None:
    """Scales of a float type are finite and > 0."""
    good = torch.isfinite(scale) & (scale > 0)
    if bool(good.all()):
        return
    first = [int(i) for i in torch.nonzero(~good)[0]]
    raise FormatError(
        f"tensor {name!r} holds the scale {scale[tuple(first)].item()} at {first}; a scale must be finite and above 0"
    )


def stored_scale_dtype(scale_format: ScaleFormat) -> torch.dtype:
    """How a scale lies on disk: e8m0 as its uint8 exponent, which every reader of safetensors knows."""
    return torch.uint8 if scale_format is ScaleFormat.E8M0 else scale_format.dtype


def stored_scale(scale: Tensor) -> Tensor:
    """A scale as it lies on disk, contiguous."""
    return (scale.view(torch.uint8) if scale.dtype == torch.float8_e8m0fnu else scale).contiguous()


def checked_scale(name: str, stored: Tensor, scale_format: ScaleFormat) -> Tensor:
    """A scale as a `QTensor` holds it, from how it lies on disk; the type was checked before."""
    if scale_format is not ScaleFormat.E8M0:
        require_positive(name, stored)
        return stored
    if bool((stored == E8M0_NAN).any()):
        raise FormatError(
            f"tensor {name!r} holds a scale of NaN (e8m0 exponent 255); a scale must be finite and above 0"
        )
    return stored.contiguous().view(torch.float8_e8m0fnu)
