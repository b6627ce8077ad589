"""The layout "safetensors": plain weights, rounded and dequantized again. No smaller than before; every program reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from halfbin.errors import DataError, FormatError, SchemeError
from halfbin.formats.layout import Infos, Parts, Read, Shape, Stored
from halfbin.tensor import InputQuantizer, InputScheme, QTensor, Scheme, dequantize, scale_shape

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
MARKS = (".weight_packed", ".qweight", ".codes")  # stored beside codes by the layouts we know of


@dataclass(frozen=True, slots=True)
class PlainLayout:
    """Weights of one float type; what they were rounded to is not stored."""

    dtype: torch.dtype = torch.float32

    name: ClassVar[str] = "safetensors"

    def refuses(self, module_class: str, shape: Shape, scheme: Scheme, inputs: InputScheme | None = None) -> str | None:
        """A float type that has no place here, and quantized inputs, which no client of plain weights would quantize."""
        if inputs is not None:
            return f"plain weights cannot say that inputs are {inputs}: use --format compressed-tensors or halfbin"
        if self.dtype not in FLOATS:
            return f"weights cannot be written as {self.dtype}: use --recipe fp16 or bf16"
        try:
            scale_shape(shape, scheme.granularity)
        except SchemeError as error:
            return str(error)
        return None

    def tensors(self, name: str, shape: Shape, scheme: Scheme, inputs: InputScheme | None = None) -> Parts:
        """The tensor itself."""
        return {name: (self.dtype, shape)}

    def encode(self, name: str, q: QTensor, inputs: InputQuantizer | None = None) -> dict[str, Tensor]:
        """The reconstruction, in this layout's type."""
        w_hat = dequantize(q, self.dtype)
        if not bool(torch.isfinite(w_hat).all()):
            raise DataError(
                f"tensor {name!r} does not fit into {self.dtype} once dequantized: write bfloat16 or float32"
            )
        return {name: w_hat.contiguous()}

    def fixed(self, name: str, shape: Shape, scheme: Scheme, inputs: InputQuantizer | None = None) -> dict[str, Tensor]:
        """None."""
        return {}

    def decode(self, name: str, scheme: Scheme, shape: Shape, read: Read) -> QTensor:
        """Not possible: the codes are gone."""
        raise FormatError(f"tensor {name!r} is stored dequantized; its codes cannot be read: read it as a plain tensor")

    def config(
        self,
        tensors: Mapping[str, tuple[Scheme, Shape]],
        ignored: Sequence[str],
        inputs: Mapping[str, InputScheme] | None = None,
        modules: Mapping[str, str] | None = None,
    ) -> dict[str, object]:
        """None: to every client this is an ordinary checkpoint."""
        return {}

    def schemes(self, config: Mapping[str, object], infos: Infos, read: Read) -> dict[str, Stored]:
        """None, but a checkpoint that visibly holds codes is no plain one."""
        for name, info in infos.items():
            if name.endswith(MARKS) and not info.dtype.is_floating_point:
                raise FormatError(
                    f"tensor {name!r} looks quantized, but config.json has no quantization_config that says how; "
                    "take config.json from where the weights came from"
                )
        return {}
