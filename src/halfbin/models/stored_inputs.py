"""A checkpoint that says how the inputs of its layers are quantized: let a model that was loaded from it do so."""

from __future__ import annotations

from torch import nn

from halfbin.errors import ModelError
from halfbin.formats import ClientQuantizer, QuantizedCheckpoint
from halfbin.models.skeleton import Skeleton, targets
from halfbin.nn import Simulation, quantize_inputs
from halfbin.tensor import InputQuantizer, InputScheme


def quantize_stored_inputs(
    model: nn.Module, skeleton: Skeleton, checkpoint: QuantizedCheckpoint, *, as_client: bool = False
) -> Simulation:
    """Fake-quantize the inputs of every layer whose weight is stored with an input scheme, with the scale of a static one.

    Args:
      model: of the skeleton's class, with the checkpoint's weights, dequantized.
      skeleton: tells which parameter a stored tensor went into.
      checkpoint: where the weights came from.
      as_client: round as transformers with compressed-tensors does, to compare with it, instead of as integer hardware does.

    Returns:
      What can be undone; it is about no layer where the checkpoint quantizes no inputs.

    Raises:
      FormatError: an input scheme or scale that is not understood.
      ModelError: a weight that was merged with others when it was loaded, such as an expert's: no layer has its inputs alone.
    """
    found = {name: how for name in checkpoint.names if (how := checkpoint.input_quantizer(name)) is not None}
    sites: dict[str, InputScheme | InputQuantizer] = {}
    for name, target in targets(skeleton, found).items():
        if not target.unchanged or not target.parameter.endswith(".weight"):
            raise ModelError(
                f"the inputs of {name!r} are {found[name].inputs}, but it is loaded into {target.parameter!r}, which is no "
                "layer's weight alone: its inputs cannot be quantized; quantize the original with a weight-only rule for it"
            )
        q = found[name]
        if as_client:
            q = ClientQuantizer(q.inputs, q.scale, q.zero_point)
        sites[target.parameter.removesuffix(".weight")] = q
    return quantize_inputs(model, sites)
