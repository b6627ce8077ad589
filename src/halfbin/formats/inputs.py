"""How the inputs of a weight's layer are quantized, beside the weight: a static scale and zero point are tensors of their own.

    {prefix}input_scale        of the scheme's scale type, [1]
    {prefix}input_zero_point   asymmetric schemes only: integers, [1]

A dynamic scheme stores nothing; that it is there is said by the layout's configuration.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbin.errors import DataError, FormatError, SchemeError
from halfbin.formats.checks import checked_scale, read_as, stored_scale, stored_scale_dtype
from halfbin.formats.layout import Parts, Read
from halfbin.tensor import InputQuantizer, InputScheme


@dataclass(frozen=True, slots=True)
class InputCodec:
    """One layer's inputs <-> the parts that they are stored as."""

    inputs: InputScheme
    prefix: str  # of the parts' names
    zero_dtype: torch.dtype  # of a zero point on disk

    def parts(self) -> Parts:
        """Types and shapes; empty for dynamic inputs."""
        if self.inputs.dynamic:
            return {}
        scale = stored_scale_dtype(self.inputs.scheme.scale_format)
        parts: Parts = {f"{self.prefix}input_scale": (scale, (1,))}
        if not self.inputs.scheme.symmetric:
            parts[f"{self.prefix}input_zero_point"] = (self.zero_dtype, (1,))
        return parts

    def encode(self, quantizer: InputQuantizer) -> dict[str, Tensor]:
        """The parts, as announced.

        Raises:
          SchemeError: a quantizer of another scheme.
        """
        if quantizer.inputs != self.inputs:
            raise SchemeError(f"inputs were announced as {self.inputs}, and are {quantizer.inputs}")
        values = []
        if quantizer.scale is not None:
            values.append(stored_scale(quantizer.scale.cpu()))
        if quantizer.zero_point is not None:
            values.append(quantizer.zero_point.cpu().to(self.zero_dtype))
        return dict(zip(self.parts(), values, strict=True))

    def decode(self, read: Read) -> InputQuantizer:
        """Read the parts back. The file may be a stranger's: everything is checked.

        Raises:
          FormatError: a part that is not what it must be.
        """
        values: list[Tensor] = []
        for name, (dtype, shape) in self.parts().items():
            value = read_as(read, name, dtype, shape)
            values.append(checked_scale(name, value, self.inputs.scheme.scale_format) if not values else value)
        try:
            return InputQuantizer(self.inputs, *values)
        except (SchemeError, DataError) as error:
            raise FormatError(f"the inputs stored as {self.prefix + 'input_scale'!r}: {error}") from error
