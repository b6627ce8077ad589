"""`config_groups` of compressed-tensors: written from schemes, and read into schemes with the tensors as witnesses.

Which group a module belongs to is decided by what is stored for it, not by running the file's regular expressions: those
come from strangers, and some take forever. An exact module name among the targets decides first; otherwise the groups
whose bits, group size, zero points and types agree with the module's tensors must all mean one scheme.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from halfbin.errors import FormatError, SchemeError
from halfbin.formats.checks import require_parts
from halfbin.formats.compressed_tensors_codecs import CODECS, PACKED_INTEGERS, input_codec
from halfbin.formats.inputs import InputCodec
from halfbin.formats.layout import Infos, Read, Shape, Stored, WeightCodec
from halfbin.numerics import FORMATS, Format, IntegerFormat, ScaleFormat
from halfbin.tensor import Granularity, InputScheme, PerBlock, PerChannel, PerGroup, PerTensor, PerToken, Scheme

MOST_GROUPS = 4096
BESIDE = (
    "input_scale",
    "input_zero_point",
    "input_global_scale",
    "output_scale",
    "output_zero_point",
    "k_scale",
    "v_scale",
)


def arguments_of(scheme: Scheme) -> dict[str, object]:
    """The `weights` of a config group."""
    arguments: dict[str, object] = {
        "num_bits": scheme.format.bits,
        "type": "int" if isinstance(scheme.format, IntegerFormat) else "float",
        "symmetric": scheme.symmetric,
        "strategy": _strategy(scheme.granularity),
        "group_size": scheme.group_size,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    if isinstance(scheme.granularity, PerBlock):
        arguments["block_structure"] = [scheme.granularity.rows, scheme.granularity.columns]
    if scheme.scale_format is ScaleFormat.E8M0:
        arguments["scale_dtype"] = "torch.uint8"
    return arguments


def input_arguments_of(inputs: InputScheme) -> dict[str, object]:
    """The `input_activations` of a config group."""
    return {
        "num_bits": inputs.scheme.format.bits,
        "type": "int" if isinstance(inputs.scheme.format, IntegerFormat) else "float",
        "symmetric": inputs.scheme.symmetric,
        "strategy": str(inputs.scheme.granularity),
        "group_size": None,
        "block_structure": None,
        "dynamic": inputs.dynamic,
        "actorder": None,
        "observer": None if inputs.dynamic else "minmax",
        "observer_kwargs": {},
    }


def _strategy(granularity: Granularity) -> str:
    names = {PerTensor: "tensor", PerChannel: "channel", PerGroup: "group", PerBlock: "block"}
    return names[type(granularity)]


@dataclass(frozen=True, slots=True)
class Group:
    """What a config group says; the types of scales are not among it."""

    format: str
    number_format: Format
    granularity: Granularity
    symmetric: bool
    inputs: InputScheme | None = None
    unclear_inputs: str = ""  # what it says of them that is not read

    def scheme(self, scale_dtype: torch.dtype) -> Scheme:
        """The scheme, with scales of the type they are stored in."""
        power_of_two = self.format.startswith("mx")
        if power_of_two and scale_dtype != torch.uint8:
            raise FormatError(f"{self.format} stores scales as torch.uint8, not as {scale_dtype}")
        return Scheme(
            format=self.number_format,
            granularity=self.granularity,
            symmetric=self.symmetric,
            scale_format=ScaleFormat.E8M0 if power_of_two else ScaleFormat.of(scale_dtype),
        )


def found_in(config: Mapping[str, object], infos: Infos, read: Read) -> dict[str, Stored]:
    """Every quantized weight of a checkpoint, by its original name."""
    _require_plain(config)
    groups, exact = _groups(config)
    old = _is_older(config.get("version"), (0, 18))
    found = {}
    for name in infos:
        if name.endswith(".weight_g_idx"):
            raise FormatError(
                f"tensor {name!r}: reordered activations (actorder=group) are not read; use actorder=weight"
            )
        if name.endswith(".weight_packed") and name.removesuffix("packed") + "scale" not in infos:
            raise FormatError(f"tensor {name.removesuffix('packed') + 'scale'!r} is missing, but {name!r} is there")
        if name.endswith(".weight_scale"):
            module = name.removesuffix(".weight_scale")
            found[f"{module}.weight"] = _stored(
                module, [exact[module]] if module in exact else groups, infos, read, old
            )
    return found


def _stored(module: str, groups: list[Group], infos: Infos, read: Read, old: bool) -> Stored:
    shape = _original_shape(module, infos, read)
    matches: dict[tuple[Scheme, WeightCodec], list[Group]] = {}
    reasons = []
    for group in groups:
        try:
            matches.setdefault((_agreed(module, group, shape, infos, old), CODECS[group.format]), []).append(group)
        except (FormatError, SchemeError) as error:
            reasons.append(error)
    if f"{module}.weight_zero_point" in infos and any(not scheme.symmetric for scheme, _ in matches):
        # Zero points beside symmetric weights are a habit of older writers; where a group asks for them, they are its.
        matches = {match: its for match, its in matches.items() if not match[0].symmetric}
    if len(matches) == 1:
        (((scheme, codec), agreed),) = matches.items()
        zero = _dropped_zero_point(module, scheme, infos, read)
        beside = tuple(f"{module}.{part}" for part in BESIDE if f"{module}.{part}" in infos)
        inputs, unclear = _inputs_of(module, agreed, infos)
        return Stored(scheme, shape, codec, (*zero, *beside), inputs, unclear)
    if matches:
        spellings = ", ".join(str(scheme) for scheme, _ in matches)
        raise FormatError(f"module {module!r} could be {spellings} by config_groups; name it among one group's targets")
    detail = f": {reasons[0].args[0]}" if reasons else ""
    raise FormatError(f"module {module!r} has scales, but no config group fits its tensors{detail}")


def _inputs_of(module: str, groups: list[Group], infos: Infos) -> tuple[InputCodec | None, str]:
    """How the inputs of a module are quantized, or why that cannot be told; weights are read all the same."""
    said = list(dict.fromkeys((group.inputs, group.unclear_inputs) for group in groups))
    if len(said) > 1:
        return None, f"the inputs of {module!r} are said differently by {len(said)} config groups that fit its weight"
    inputs, unclear = said[0]
    if inputs is None or inputs.dynamic:
        return None if inputs is None else input_codec(module, inputs), unclear
    scale, zero_point = (infos.get(f"{module}.input_{part}") for part in ("scale", "zero_point"))
    if scale is None or (zero_point is None and not inputs.scheme.symmetric):
        return None, f"the inputs of {module!r} are static, and their scale is not in the file"
    try:
        scheme = inputs.scheme.with_scale(ScaleFormat.of(scale.dtype))
    except SchemeError as error:
        return None, f"the inputs of {module!r}: {error}"
    return input_codec(module, dataclasses.replace(inputs, scheme=scheme)), unclear


def _agreed(module: str, group: Group, shape: Shape, infos: Infos, old: bool) -> Scheme:
    """The scheme of `group` if the module's tensors are those that it asks for."""
    bits = group.number_format.bits
    if old and CODECS[group.format] is PACKED_INTEGERS and 32 % bits:
        raise FormatError(
            f"{bits}-bit codes in the packing of compressed-tensors before 0.18 are not read; quantize the original model again"
        )
    scheme = group.scheme(infos[f"{module}.weight_scale"].dtype)
    if isinstance(scheme.granularity, PerGroup) and shape[1] % scheme.granularity.size:
        raise FormatError(f"groups of {scheme.granularity.size} do not divide {shape[1]} columns")
    require_parts(infos, CODECS[group.format].tensors(f"{module}.weight", shape, scheme))
    return scheme


def _original_shape(module: str, infos: Infos, read: Read) -> Shape:
    """[out, in], from the weight itself, from weight_shape, or from two fp4 codes a byte."""
    if f"{module}.weight" in infos:
        shape = tuple(infos[f"{module}.weight"].shape)
    elif f"{module}.weight_shape" in infos:
        shape = _stated_shape(f"{module}.weight_shape", infos, read)
    elif f"{module}.weight_packed" in infos:
        packed = tuple(infos[f"{module}.weight_packed"].shape)
        shape = (*packed[:-1], packed[-1] * 2) if packed else ()
    else:
        raise FormatError(f"module {module!r} has a weight_scale and no weight; download the file again")
    if len(shape) != 2:
        raise FormatError(f"the weight of {module!r} has shape {list(shape)}; compressed-tensors weights are [out, in]")
    return shape


def _stated_shape(name: str, infos: Infos, read: Read) -> Shape:
    """The numbers in a weight_shape; whether they fit the packed codes is checked with the parts."""
    info = infos[name]
    if info.dtype not in (torch.int64, torch.int32) or tuple(info.shape) != (2,):
        raise FormatError(f"tensor {name!r} must be int64 [2], got {info.dtype} {list(info.shape)}")
    shape = tuple(int(n) for n in read(name).tolist())
    if not all(0 < n < 2**31 for n in shape):
        raise FormatError(f"tensor {name!r} says {list(shape)}, which is no shape of a weight; the file is damaged")
    return shape


def _dropped_zero_point(module: str, scheme: Scheme, infos: Infos, read: Read) -> tuple[str, ...]:
    """Older writers keep the zero points of symmetric weights; they must be 0."""
    name = f"{module}.weight_zero_point"
    if not scheme.symmetric or name not in infos:
        return ()
    if bool(read(name).to(torch.float32).ne(0).any()):
        raise FormatError(f"tensor {name!r} holds zero points other than 0, but the config says symmetric")
    return (name,)


def _require_plain(config: Mapping[str, object]) -> None:
    """Nothing that changes weights in a way that config_groups do not say."""
    status = config.get("quantization_status", "compressed")
    if status != "compressed":
        raise FormatError(f"config.json: quantization_status is {status!r}; only compressed checkpoints hold codes")
    sparsity = config.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise FormatError(
            f"config.json: sparsity format {sparsity.get('format')!r} is not read; use a dense checkpoint"
        )
    if config.get("transform_config"):
        transforms = config["transform_config"]
        if not (isinstance(transforms, dict) and not transforms.get("config_groups")):
            raise FormatError("config.json: weights behind a transform_config (rotations while running) are not read")


def _groups(config: Mapping[str, object]) -> tuple[list[Group], dict[str, Group]]:
    """The distinct groups in order, and the group of every module that is named exactly."""
    written = config.get("config_groups")
    if not isinstance(written, dict) or not 0 < len(written) <= MOST_GROUPS:
        raise FormatError("config.json: config_groups must map 1 to 4096 names to groups")
    groups: dict[Group, None] = {}
    exact: dict[str, Group] = {}
    for name, entry in written.items():
        if not isinstance(entry, dict):
            raise FormatError(f"config.json: group {name!r} is not written out; presets by name are not read")
        if entry.get("weights") is None:
            continue
        group = _group(name, entry, config.get("format"))
        groups.setdefault(group)
        targets = entry.get("targets")
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise FormatError(f"config.json: targets of group {name!r} must be a list of names")
        for target in targets:
            exact.setdefault(target, group)
    return list(groups), exact


def _group(name: str, entry: Mapping[str, object], default: object) -> Group:
    written, weights = entry.get("format") or default, entry["weights"]
    if not isinstance(weights, dict):
        raise FormatError(f"config.json: weights of group {name!r} must be a table")
    if not isinstance(written, str) or written not in CODECS:
        raise FormatError(
            f"config.json: group {name!r} has format {str(written)[:80]!r}, which is not read; known are {', '.join(CODECS)}"
        )
    symmetric = weights.get("symmetric", True)
    if not isinstance(symmetric, bool):
        raise FormatError(f"config.json: symmetric of group {name!r} must be true or false")
    if weights.get("actorder") in ("group", "dynamic"):
        raise FormatError(f"config.json: group {name!r} has actorder=group, which is not read; use actorder=weight")
    inputs, unclear = _read_inputs(name, entry.get("input_activations"))
    group = Group(written, _number_format(name, weights), _granularity(name, weights), symmetric, inputs, unclear)
    if not _fits(group):
        raise FormatError(
            f"config.json: group {name!r} claims {group.number_format.name} weights per {group.granularity} in format "
            f"{group.format}, which holds none such"
        )
    return group


def _read_inputs(name: str, arguments: object) -> tuple[InputScheme | None, str]:
    """The inputs' scheme, its scale's type left open, or what is not read of it."""
    if arguments is None:
        return None, ""
    unread = f"config.json: input_activations of group {name!r} are not read: {str(arguments)[:200]}"
    if not isinstance(arguments, dict):
        return None, unread
    symmetric, dynamic = arguments.get("symmetric", True), arguments.get("dynamic", False)
    if not isinstance(symmetric, bool) or not isinstance(dynamic, bool):
        return None, unread
    per_token = arguments.get("strategy") == "token"
    try:
        granularity = PerToken() if per_token else _granularity(name, arguments)
        scheme = Scheme(format=_number_format(name, arguments), granularity=granularity, symmetric=symmetric)
        return InputScheme(scheme=scheme, dynamic=dynamic), ""
    except (FormatError, SchemeError):
        return None, unread


def _fits(group: Group) -> bool:
    """Whether a format holds such numbers at all."""
    integers = isinstance(group.number_format, IntegerFormat)
    if group.format.startswith("mx"):
        held = FORMATS["fp4_e2m1" if group.format.startswith("mxfp4") else "fp8_e4m3"]
        return group.number_format == held and group.granularity == PerGroup(32) and group.symmetric
    if not integers and (group.number_format.bits != 8 or not group.symmetric):
        return False
    return {"pack-quantized": integers, "int-quantized": integers, "float-quantized": not integers}.get(
        group.format, True
    )


def _number_format(name: str, weights: Mapping[str, object]) -> Format:
    kind, bits = weights.get("type", "int"), weights.get("num_bits", 8)
    names = {("float", 8): "fp8_e4m3", ("float", 4): "fp4_e2m1", **{("int", n): f"int{n}" for n in range(2, 9)}}
    if type(bits) is not int or not isinstance(kind, str) or (kind, bits) not in names:
        raise FormatError(
            f"config.json: group {name!r} has {str(kind)[:20]!r} weights of {str(bits)[:20]} bits, not read"
        )
    return FORMATS[names[kind, bits]]


def _granularity(name: str, weights: Mapping[str, object]) -> Granularity:
    size, block, strategy = weights.get("group_size"), weights.get("block_structure"), weights.get("strategy")
    if strategy is None:  # as the library fills it in
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy == "tensor":
        return PerTensor()
    if strategy == "channel":
        return PerChannel()
    if strategy == "group" and type(size) is int and 0 < size < 2**31:
        return PerGroup(size)
    if strategy == "block" and isinstance(block, list) and len(block) == 2:
        rows, columns = block
        if type(rows) is int and type(columns) is int and min(rows, columns) > 0:
            return PerBlock(rows, columns)
    raise FormatError(f"config.json: group {name!r} has strategy {str(strategy)[:40]!r} with sizes that are not read")


def _is_older(version: object, than: tuple[int, int]) -> bool:
    if not isinstance(version, str) or not (match := re.match(r"([0-9]{1,6})\.([0-9]{1,6})", version)):
        return False
    return (int(match[1]), int(match[2])) < than
