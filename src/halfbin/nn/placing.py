"""Put quantized layers in the place of a model's own where the codes are at hand already, as when a checkpoint is loaded.

The other way to a quantized model is `quantize_module`, which makes the codes from a model's float weights.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from halfbin.nn.conv1d_transposed import QuantConv1D
from halfbin.nn.convert import forward_owner
from halfbin.nn.embedding import QuantEmbedding
from halfbin.nn.linear import QuantLinear
from halfbin.nn.llm_int8 import LLMInt8Linear
from halfbin.nn.module import QuantModule
from halfbin.nn.packed_module import PackedModule
from halfbin.nn.quant_inputs import QuantInputLinear
from halfbin.tensor import InputQuantizer, MixedTensor, QTensor, split
from halfbin.tensor.matrices import scheme_of_matrix

LINEAR = "torch.nn.modules.linear.Linear"
CONV1D = "transformers.pytorch_utils.Conv1D"
EMBEDDING = "torch.nn.modules.sparse.Embedding"


def place_codes(
    model: nn.Module,
    path: str,
    codes: QTensor | MixedTensor,
    inputs: InputQuantizer | None = None,
    *,
    packed: bool = False,
) -> None:
    """Let the layer at `path` compute with codes. `refuses_codes` says beforehand whether it can.

    Args:
      model: changed in place.
      path: of a layer in it; its weight may be on the meta device, its bias is taken over.
      codes: of its weight as it is stored, [out, in], or [in, out] where the layer holds it so.
      inputs: what its inputs are rounded to.
      packed: whether the layer lets go of the codes where its kernel has a layout of its own.
    """
    old: Any = model.get_submodule(path)
    parent, _, attribute = path.rpartition(".")
    new = _made(old, codes, inputs).train(old.training)
    if packed and isinstance(new, PackedModule):
        new.hold_packed()
    model.get_submodule(parent)._modules[attribute] = new


def refuses_codes(
    model: nn.Module, path: str, codes: QTensor | MixedTensor, inputs: InputQuantizer | None = None
) -> str | None:
    """Why the layer at `path` cannot compute with these codes, in words; None: it can."""
    old: Any = model.get_submodule(path)
    owner, kind = forward_owner(old), type(old).__name__
    q, columns = split(codes)
    reasons = {
        f"{kind} has no quantized form that is loaded": owner not in (LINEAR, CONV1D, EMBEDDING),
        "its parent reads its weight past its forward": type(old) is NonDynamicallyQuantizableLinear,
        f"its codes are {list(q.shape)}, no matrix": q.codes.ndim != 2,
        "max_norm rewrites the table while it is read": owner == EMBEDDING and old.max_norm is not None,
        f"{kind} has no form with quantized inputs": owner != LINEAR and inputs is not None,
        "it keeps columns in floating point, which only LLM.int8() multiplies": columns is not None
        and (inputs is None or inputs.inputs.outliers is None),
    }
    return next((reason for reason, here in reasons.items() if here), None)


def _made(old: Any, codes: QTensor | MixedTensor, inputs: InputQuantizer | None) -> QuantModule:
    owner, dtype = forward_owner(old), old.weight.dtype
    q, columns = split(codes)
    if owner == EMBEDDING:
        return QuantEmbedding(q, padding_idx=old.padding_idx, dtype=dtype)
    if owner == CONV1D:
        return QuantConv1D(_transposed(q), old.bias, dtype=dtype)
    if inputs is None:
        return QuantLinear(q, old.bias, dtype=dtype)
    if inputs.inputs.outliers is not None:
        return LLMInt8Linear(q, old.bias, columns=columns, threshold=inputs.inputs.outliers, dtype=dtype)
    return QuantInputLinear(q, inputs, old.bias, dtype=dtype)


def _transposed(q: QTensor) -> QTensor:
    """Codes stored [in, out] as the matrix [out, in]."""
    scheme = scheme_of_matrix(q.scheme, 2, transposed=True)
    zero_point = None if q.zero_point is None else q.zero_point.T.contiguous()
    return replace(q, codes=q.codes.T.contiguous(), scale=q.scale.T.contiguous(), zero_point=zero_point, scheme=scheme)
