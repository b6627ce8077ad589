"""What quantized inputs cost any model, simulated in its own types: layers stay, and see fake-quantized inputs.

    with quantize_inputs(model, {"model.layers.0.mlp.up_proj": parse_inputs("int8-token")}):
        logits = model(ids).logits

Modules are reached through their forward, by hooks; `Simulation.idle` tells of those that it never went through.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from halfbin.errors import HalfbinError, SchemeError, did_you_mean
from halfbin.nn.conv import QuantConv
from halfbin.nn.convert import forward_owner
from halfbin.nn.embedding import QuantEmbedding
from halfbin.nn.linear import QuantLinear
from halfbin.nn.llm_int8 import THRESHOLD, LLMInt8Linear
from halfbin.nn.quant_inputs import QuantInputLinear
from halfbin.nn.simulation import Simulation
from halfbin.tensor import InputQuantizer, InputScheme, MixedTensor, PerTensor, QTensor, Scheme, quantize, split

CONVOLUTIONS = (nn.modules.conv._ConvNd, QuantConv)
CONV1D = "transformers.pytorch_utils.Conv1D"


def quantize_inputs(model: nn.Module, sites: Mapping[str, InputScheme | InputQuantizer]) -> Simulation:
    """Let modules see fake-quantized inputs until the result is removed.

    Args:
      model: any module; hooks are put on its submodules, nothing else changes.
      sites: for the path of each module, what its first input is rounded to: [*, in_features], in its own type. A static
        scheme must come as a quantizer, with its scale. A convolution takes one scale a tensor only.

    Raises:
      SchemeError: no such module, or one whose inputs cannot be quantized so; a static scheme without a scale.
    """
    simulation = Simulation(set(sites))
    modules = dict(model.named_modules(remove_duplicate=False))
    hooked: dict[int, str] = {}
    for name, how in sites.items():
        with _undone_on_error(simulation, name):
            module = _named(modules, name)
            if (other := hooked.setdefault(id(module), name)) != name:
                raise SchemeError(f"it is one module with {other!r}; name it once")
            quantizer = how if isinstance(how, InputQuantizer) else how.quantizer()
            _require_fit(module, quantizer.inputs)
            hook = functools.partial(_fake_quantize_first, quantizer, name, simulation.idle)
            simulation.undo_by(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
    return simulation


def llm_int8(
    model: nn.Module, sites: Mapping[str, QTensor | MixedTensor | Scheme], *, threshold: float = THRESHOLD
) -> Simulation:
    """Put `LLMInt8Linear` in the place of linear layers until the result is removed.

    Args:
      model: any module; an nn.Linear, a transformers Conv1D or a `QuantLinear` of it can be replaced.
      sites: for the path of each, codes [out_features, in_features], with columns in floating point or without, or the scheme
        to round its weight to nearest with; one scale a row, such as int8-channel. What a `QuantLinear` holds is used if its
        scheme is the one that is given.
      threshold: |x| from which on a column is an outlier.

    Raises:
      SchemeError: no such module, one that is no linear layer, or a scheme that LLM.int8() does not work with.
    """
    simulation = Simulation(set(sites))
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, codes in sites.items():
        with _undone_on_error(simulation, name):
            old = _named(modules, name)
            q, columns = split(_codes(old, codes))
            new = LLMInt8Linear(q, old.bias, columns=columns, threshold=threshold, dtype=old.weight.dtype)
            new.train(old.training).register_forward_pre_hook(functools.partial(_used, name, simulation.idle))
            parent, _, attribute = name.rpartition(".")
            holder = modules[parent]._modules
            holder[attribute] = new
            simulation.undo_by(functools.partial(holder.__setitem__, attribute, old))
    return simulation


@contextlib.contextmanager
def _undone_on_error(simulation: Simulation, name: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        simulation.remove()
        if isinstance(error, HalfbinError):
            error.add_note(f"at module {name!r}")
        raise


def _named(modules: Mapping[str, nn.Module], name: str) -> Any:
    if name not in modules or not name:
        raise SchemeError(f"the model has no such module below itself{did_you_mean(name, [m for m in modules if m])}")
    return modules[name]


def _require_fit(module: nn.Module, inputs: InputScheme) -> None:
    """Refuse modules whose inputs are no rows of features, are quantized already, or that are not called."""
    if isinstance(module, nn.Embedding | QuantEmbedding):
        raise SchemeError("the inputs of an embedding are integers; there is nothing to round")
    if isinstance(module, QuantInputLinear | LLMInt8Linear):
        raise SchemeError(f"it quantizes its inputs itself ({module})")
    if type(module) is NonDynamicallyQuantizableLinear:
        raise SchemeError("its parent reads its weight past its forward, so that no hook sees its inputs")
    per_tensor = isinstance(inputs.scheme.granularity, PerTensor) and inputs.outliers is None
    if isinstance(module, CONVOLUTIONS) and not per_tensor:
        raise SchemeError(
            f"a convolution sums over its channels and a window, so {inputs} has no one scale for a sum: use tensor"
        )


def _fake_quantize_first(
    quantizer: InputQuantizer,
    name: str,
    idle: set[str],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward pre-hook: the first floating tensor among the arguments is the layer's input."""
    try:
        for i, value in enumerate(args):
            if _is_float(value):
                idle.discard(name)
                return (*args[:i], quantizer.fake_quantize(value), *args[i + 1 :]), kwargs
        for key, value in kwargs.items():
            if _is_float(value):
                idle.discard(name)
                return args, {**kwargs, key: quantizer.fake_quantize(value)}
    except HalfbinError as error:
        error.add_note(f"at the inputs of {name!r}")
        raise
    raise SchemeError(f"module {name!r} was called without a floating tensor; its inputs cannot be quantized")


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _used(name: str, idle: set[str], module: nn.Module, args: tuple[Any, ...]) -> None:
    idle.discard(name)


def _codes(module: nn.Module, codes: QTensor | MixedTensor | Scheme) -> QTensor | MixedTensor:
    """The weight [out_features, in_features] of a linear layer, rounded."""
    if isinstance(module, QuantLinear):
        matrix: Tensor | None = None
        if codes == module.scheme:
            return module.qtensor
        shape = module.qtensor.shape
    else:
        matrix = _matrix(module)
        shape = tuple(matrix.shape)
    if isinstance(codes, QTensor | MixedTensor):
        if codes.shape != shape:
            raise SchemeError(
                f"codes are {list(codes.shape)}, but the weight is {list(shape)} [out_features, in_features]"
            )
        return codes
    if matrix is None:
        raise SchemeError(f"its weight is {module}, not {codes}: give its codes, or start from the float model")
    return quantize(matrix, codes)


def _matrix(module: nn.Module) -> Tensor:
    owner, weight = forward_owner(module), module._parameters.get("weight")
    if weight is not None and type(module) is not NonDynamicallyQuantizableLinear:
        if owner == "torch.nn.modules.linear.Linear":
            return weight.detach()
        if owner == CONV1D:
            return weight.detach().T.contiguous()
    raise SchemeError(f"LLM.int8() replaces linear layers, and this is a {type(module).__name__}")
