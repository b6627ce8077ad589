"""The layout "compressed-tensors": what vLLM, SGLang and transformers read. How the bytes lie: compressed_tensors_codecs.

Checked with transformers 5.23 and compressed-tensors 0.20, which load every scheme that is not refused here:

- symmetric integers and fp8 load as they are, and their logits equal those of the dequantized weights;
- zero points: with its default setting this client expects them unpacked, while its own compressor packs them. The key
  "dequantize": true in `quantization_config` makes a plain `from_pretrained` load them right; it is transformers' own
  setting and the files stay as specified, so we write it. vLLM's reader picks the keys it knows (read in its source, not
  run). Passing CompressedTensorsConfig() without dequantize=True overrides the key, and the load then fails loudly;
- mxfp4 and mxfp8 become bfloat16 in memory (no loss: a power of two times few bits) and then fail beside float32
  activations; the same key mends that;
- experts that are merged into one stack when they are loaded: transformers then takes every one of them for quantized with
  integers as soon as anything is, so all must be, without zero points; it holds them in the type of their scales, whatever
  dtype was asked for;
- inputs are fake-quantized in each Linear's forward, also on a CPU, and multiplied by the dequantized weight in floats, from
  the first call on; dynamic and static, integers and fp8, symmetric or not: `compressed_tensors_client` says exactly how, and
  its rounding gives the client's logits bit for bit. A static scale is `input_scale` [1]; nothing else is asked for.
  The key "dequantize" switches all that off without a word, so it is never written beside quantized inputs; nor is it needed,
  since weights are then a byte each and their zero points are not packed;
- that key reads every weight by the *first* group's scheme. Hence it is written only when there is one group, and zero
  points in a mix of schemes are refused. Never pass dequantize=True for a mix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor

from halfbin.errors import SchemeError
from halfbin.formats.compressed_tensors_codecs import (
    CODECS,
    PackedFp4,
    PackedIntegers,
    format_of,
    input_codec,
    module_of,
)
from halfbin.formats.compressed_tensors_config import arguments_of, found_in, input_arguments_of
from halfbin.formats.layout import Infos, Parts, Read, Shape, Stored
from halfbin.numerics import FloatFormat, Format, IntegerFormat, ScaleFormat
from halfbin.tensor import (
    InputQuantizer,
    InputScheme,
    PackedTensor,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    QTensor,
    Scheme,
)

VERSION = "0.20.0"  # of the compressed-tensors whose packers and loader these bytes were checked against
ELSEWHERE = "use --format halfbin"


class CompressedTensorsLayout:
    """Weights and inputs of Linear modules; see the module's docstring."""

    name = "compressed-tensors"

    def refuses(self, module_class: str, shape: Shape, scheme: Scheme, inputs: InputScheme | None = None) -> str | None:
        """Why the clients of compressed-tensors cannot hold such a tensor, and what to do instead."""
        return (
            _refuses_module(module_class, shape)
            or _refuses_format(scheme)
            or _refuses_granularity(shape, scheme, packed=inputs is None)
            or (_refuses_expert(scheme) if module_class == "Expert" else None)
            or (None if inputs is None else _refuses_inputs(module_class, scheme, inputs))
        )

    def tensors(self, name: str, shape: Shape, scheme: Scheme, inputs: InputScheme | None = None) -> Parts:
        """Codes, scale and what else the scheme's format has, and the scale of static inputs."""
        parts = CODECS[format_of(scheme, inputs)].tensors(name, shape, scheme)
        return parts if inputs is None else parts | input_codec(module_of(name), inputs).parts()

    def encode(self, name: str, q: QTensor, inputs: InputQuantizer | None = None) -> dict[str, Tensor]:
        """The parts of `q`."""
        codec = CODECS[format_of(q.scheme, None if inputs is None else inputs.inputs)]
        return codec.encode(name, q) | _encoded_inputs(name, inputs)

    def row_multiple(self, scheme: Scheme, inputs: InputScheme | None = None) -> int | None:
        """Whole words of integers, bytes of fp4; other codes are a byte each."""
        codec = CODECS[format_of(scheme, inputs)]
        return codec.row_multiple if isinstance(codec, PackedIntegers | PackedFp4) else None

    def encode_packed(self, name: str, q: PackedTensor, inputs: InputQuantizer | None = None) -> dict[str, Tensor]:
        """The parts of `q`, of a scheme that has a `row_multiple`."""
        codec = CODECS[format_of(q.scheme, None if inputs is None else inputs.inputs)]
        assert isinstance(codec, PackedIntegers | PackedFp4)
        return codec.encode_packed(name, q) | _encoded_inputs(name, inputs)

    def fixed(self, name: str, shape: Shape, scheme: Scheme, inputs: InputQuantizer | None = None) -> dict[str, Tensor]:
        """The shape, where the format stores it, and the scale of static inputs."""
        codec = CODECS[format_of(scheme, None if inputs is None else inputs.inputs)]
        return codec.fixed(name, shape, scheme) | _encoded_inputs(name, inputs)

    def decode(self, name: str, scheme: Scheme, shape: Shape, read: Read) -> QTensor:
        """Read back what `encode` made; what others wrote is read by the codec that `schemes` names."""
        return CODECS[format_of(scheme)].decode(name, scheme, shape, read)

    def config(
        self,
        tensors: Mapping[str, tuple[Scheme, Shape]],
        ignored: Sequence[str],
        inputs: Mapping[str, InputScheme] | None = None,
        modules: Mapping[str, str] | None = None,
    ) -> dict[str, object]:
        """One group for each distinct scheme and inputs.

        Its target is "Linear" when it is the only one, else exact names: those on disk, which readers of files go by, and
        those of the modules, which transformers goes by.
        """
        groups: dict[tuple[Scheme, InputScheme | None], list[str]] = {}
        for name, (scheme, _) in tensors.items():
            seen = _as_clients_see(scheme), _inputs_as_clients_see((inputs or {}).get(name))
            groups.setdefault(seen, []).extend(
                dict.fromkeys((module_of(name), (modules or {}).get(name, module_of(name))))
            )
        packed = [scheme for scheme, its_inputs in groups if its_inputs is None]
        _require_readable(packed, len(groups) - 1)
        formats = sorted({format_of(*group) for group in groups})
        config: dict[str, object] = {
            "quant_method": self.name,
            "version": VERSION,
            "format": formats[0] if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{i}": _group(*group, ["Linear"] if len(groups) == 1 else modules)
                for i, (group, modules) in enumerate(groups.items())
            },
            "ignore": list(ignored),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }
        if len(groups) == 1 and any(map(_needs_dequantize, packed)):
            config["dequantize"] = True
        return config if groups else {}

    def schemes(self, config: Mapping[str, object], infos: Infos, read: Read) -> dict[str, Stored]:
        """The modules that have scales, with the scheme that config groups and tensors agree on."""
        return found_in(config, infos, read)


def _refuses_module(module_class: str, shape: Shape) -> str | None:
    if module_class in ("Linear", "Expert"):
        return (
            None if len(shape) == 2 else f"a Linear weight of shape {list(shape)} is not [out, in]: keep it in 16 bits"
        )
    if len(shape) > 2 and module_class == "":
        return f"its clients keep weights of experts as one matrix each, not as a stack {list(shape)}: {ELSEWHERE}"
    reasons = {
        "": "a tensor without a Linear module of its own has no name that its clients would look for",
        "Conv1D": "a transformers Conv1D stores its weight transposed, and its clients replace Linear modules only",
        "Embedding": "embeddings stay in 16 bits there: most of its clients look rows up and have no scales for them",
    }
    default = f"its clients replace Linear modules only, and this is a {module_class}"
    return f"{reasons.get(module_class, default)}: {ELSEWHERE}, or keep it in 16 bits"


def _refuses_format(scheme: Scheme) -> str | None:
    fmt = scheme.format
    if _is_signed(fmt) or fmt.name in ("fp8_e4m3", "fp4_e2m1"):
        return _refuses_scale(scheme)
    if fmt.name.startswith("uint"):
        same = f"int{fmt.bits}-...-asym"
        return f"codes are signed there, so {fmt.name} cannot be told apart when read: use {same}, whose values are the same"
    reasons = {
        "nf4": "there is no table of values in compressed-tensors, so nf4 has no place",
        "ternary": "compressed-tensors has no ternary: as int2 it would read back as another scheme",
        "fp8_e5m2": "its 8-bit floats are e4m3, and e5m2 codes would be read as those",
    }
    return f"{reasons.get(fmt.name, f'{fmt.name} is no format of compressed-tensors')}: {ELSEWHERE}"


def _is_signed(fmt: Format) -> bool:
    """Two's complement of 2 to 8 bits."""
    signed = isinstance(fmt, IntegerFormat) and fmt.qmin == -(2 ** (fmt.bits - 1)) and fmt.qmax == -fmt.qmin - 1
    return signed and 2 <= fmt.bits <= 8


def _refuses_expert(scheme: Scheme) -> str | None:
    if not scheme.symmetric:
        return f"transformers merges experts without their zero points: use a symmetric scheme, or {ELSEWHERE}"
    if isinstance(scheme.format, FloatFormat) and scheme.granularity not in (PerChannel(0), PerTensor()):
        return f"transformers merges floating-point experts with one scale a row or tensor only: use channel, or {ELSEWHERE}"
    return None


def _refuses_scale(scheme: Scheme) -> str | None:
    mx = scheme.scale_format is ScaleFormat.E8M0
    if isinstance(scheme.format, FloatFormat):
        if mx and scheme.granularity != PerGroup(32):
            return "power-of-two scales belong to groups of 32 there: use mxfp4 or mxfp8"
        if scheme.format.bits == 4 and not mx:
            return f"its 4-bit floats have power-of-two scales (mxfp4) or two levels (nvfp4): use mxfp4, or {ELSEWHERE}"
        return None
    return f"integers have no power-of-two scales there: use f16, bf16 or f32 scales, or {ELSEWHERE}" if mx else None


def _refuses_inputs(module_class: str, weights: Scheme, inputs: InputScheme) -> str | None:
    fmt, stored = inputs.scheme.format, inputs.scheme.scale_format
    mixed = isinstance(fmt, IntegerFormat) != isinstance(weights.format, IntegerFormat)
    reasons = {
        "transformers merges experts when it loads them, and would leave their inputs as they are": module_class
        == "Expert",
        f"no key there says that columns with outliers stay ({inputs})": inputs.outliers is not None,
        f"inputs are signed integers or fp8_e4m3 there, not {fmt.name}": not (
            _is_signed(fmt) or fmt.name == "fp8_e4m3"
        ),
        f"its clients agree on no format for {weights.format.name} weights with {fmt.name} inputs": mixed,
        "power-of-two scales go with inputs in groups there, which are not written": ScaleFormat.E8M0
        in (stored, weights.scale_format),
        f"its clients choose how scales that are found while running are kept: leave {stored.value} out of {inputs}": (
            inputs.dynamic and stored is not ScaleFormat.FLOAT32
        ),
    }
    return next((f"{reason}; or {ELSEWHERE}" for reason, holds in reasons.items() if holds), None)


def _refuses_granularity(shape: Shape, scheme: Scheme, *, packed: bool) -> str | None:
    granularity, integers = scheme.granularity, isinstance(scheme.format, IntegerFormat)
    if granularity == PerChannel(0):
        return None
    if isinstance(granularity, PerTensor):
        return (
            "its packed integers have a scale a row or a group, none for the whole tensor: use channel"
            if integers and packed
            else None
        )
    if isinstance(granularity, PerGroup) and granularity.axis == -1:
        if not integers and scheme.scale_format is not ScaleFormat.E8M0:
            return f"fp8 weights in groups have no client there: use channel, tensor or b128x128, or {ELSEWHERE}"
        return _refuses_tail(granularity.size, shape[1])
    if isinstance(granularity, PerBlock) and not integers:
        return _refuses_tail(granularity.columns, shape[1])
    return (
        f"there are no scales per {granularity} of a weight there: use channel or groups such as g128, or {ELSEWHERE}"
    )


def _refuses_tail(size: int, columns: int) -> str | None:
    if columns % size == 0:
        return None
    return (
        f"its clients want groups of {size} to divide in_features={columns}, and the last would be shorter "
        f"({columns % size}): use channel, or {ELSEWHERE}"
    )


def _as_clients_see(scheme: Scheme) -> Scheme:
    """Without the scale's type, which no configuration states: clients take it from the tensor."""
    return scheme if scheme.scale_format is ScaleFormat.E8M0 else scheme.with_scale(ScaleFormat.FLOAT32)


def _inputs_as_clients_see(inputs: InputScheme | None) -> InputScheme | None:
    return inputs and dataclasses.replace(inputs, scheme=inputs.scheme.with_scale(ScaleFormat.FLOAT32))


def _encoded_inputs(name: str, inputs: InputQuantizer | None) -> dict[str, Tensor]:
    return {} if inputs is None else input_codec(module_of(name), inputs.inputs).encode(inputs)


def _needs_dequantize(scheme: Scheme) -> bool:
    return not scheme.symmetric or scheme.scale_format is ScaleFormat.E8M0


def _require_readable(packed: list[Scheme], num_others: int) -> None:
    asymmetric = next((scheme for scheme in packed if not scheme.symmetric), None)
    if asymmetric is not None and num_others:
        raise SchemeError(
            f"{asymmetric} beside {num_others} other scheme(s): transformers reads packed zero points only where one "
            f"scheme covers the whole model; use symmetric schemes, one scheme for all, or {ELSEWHERE.removeprefix('use ')}"
        )


def _group(scheme: Scheme, inputs: InputScheme | None, targets: list[str]) -> dict[str, object]:
    return {
        "targets": targets,
        "format": format_of(scheme, inputs),
        "weights": arguments_of(scheme),
        "input_activations": None if inputs is None else input_arguments_of(inputs),
        "output_activations": None,
    }


COMPRESSED_TENSORS = CompressedTensorsLayout()
