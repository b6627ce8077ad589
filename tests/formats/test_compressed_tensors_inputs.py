"""Quantized inputs in compressed-tensors: what we write, and what the real client makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from formats.written import Written, projections, tiny_llama, tokens, write_model
from halfbin.errors import FormatError, SchemeError
from halfbin.formats import COMPRESSED_TENSORS, ClientQuantizer, open_quantized
from halfbin.formats.layout import PartInfo
from halfbin.nn import quantize_inputs
from halfbin.tensor import InputQuantizer, dequantize, parse_inputs, parse_scheme, quantize

NAME = "m.weight"

HELD = [
    ("int8-channel", "int8-token"),
    ("int8-channel", "int8-tensor"),
    ("int8-channel", "int8-tensor-asym"),
    ("int8-channel", "int8-token-asym"),
    ("int8-channel", "int8-tensor-dynamic"),
    ("int8-channel-asym", "int8-token"),
    ("int8-tensor", "int8-tensor"),
    ("int4-g32", "int8-token"),
    ("int4-g128-asym", "int8-tensor"),
    ("int4-channel", "int4-token"),
    ("fp8_e4m3-channel", "fp8_e4m3-token"),
    ("fp8_e4m3-tensor", "fp8_e4m3-tensor"),
    ("fp8_e4m3-b128x128", "fp8_e4m3-token"),
]
held = pytest.mark.parametrize(("weights", "inputs"), HELD)


def quantizer(text: str) -> InputQuantizer:
    return parse_inputs(text).calibrated(-3.0, 3.3)


def as_client(q: InputQuantizer) -> InputQuantizer:
    return ClientQuantizer(q.inputs, q.scale, q.zero_point)


# --- what lies on disk


@held
def test_weights_and_inputs_are_held_without_loss(weights: str, inputs: str) -> None:
    q = quantize(torch.randn(128, 256, generator=torch.Generator().manual_seed(0)), parse_scheme(weights))
    how = quantizer(inputs)
    assert COMPRESSED_TENSORS.refuses("Linear", q.shape, q.scheme, how.inputs) is None
    parts = COMPRESSED_TENSORS.encode(NAME, q, how)
    announced = COMPRESSED_TENSORS.tensors(NAME, q.shape, q.scheme, how.inputs)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in parts.items()} == announced
    fixed = COMPRESSED_TENSORS.fixed(NAME, q.shape, q.scheme, how)
    assert set(fixed) == {name for name in parts if "input" in name}
    config = json.loads(json.dumps(COMPRESSED_TENSORS.config({NAME: (q.scheme, q.shape)}, [], {NAME: how.inputs})))
    infos: dict[str, PartInfo] = dict(parts.items())
    stored = COMPRESSED_TENSORS.schemes(config, infos, parts.__getitem__)[NAME]
    back = stored.codec.decode(NAME, stored.scheme, stored.shape, parts.__getitem__)
    assert stored.scheme == q.scheme and torch.equal(back.codes, q.codes) and torch.equal(back.scale, q.scale)
    assert stored.inputs is not None and stored.inputs.inputs == how.inputs
    found = stored.inputs.decode(parts.__getitem__)
    assert found.scale is None if how.scale is None else found.scale is not None and torch.equal(found.scale, how.scale)
    if how.zero_point is not None:
        assert found.zero_point is not None and torch.equal(found.zero_point, how.zero_point)


def test_integers_are_a_byte_each_beside_quantized_inputs_and_packed_without() -> None:
    scheme = parse_scheme("int4-g32")
    with_inputs = COMPRESSED_TENSORS.tensors(NAME, (8, 64), scheme, parse_inputs("int8-tensor-asym-f16"))
    assert with_inputs == {
        "m.weight": (torch.int8, (8, 64)),
        "m.weight_scale": (torch.float32, (8, 2)),
        "m.input_scale": (torch.float16, (1,)),
        "m.input_zero_point": (torch.int8, (1,)),
    }
    assert "m.weight_packed" in COMPRESSED_TENSORS.tensors(NAME, (8, 64), scheme)


@pytest.mark.parametrize(
    ("module_class", "weights", "inputs", "reason"),
    [
        ("Expert", "int8-channel", "int8-token", "would leave their inputs as they are"),
        ("Linear", "int8-channel", "int8-token-outliers6", "columns with outliers stay"),
        ("Linear", "int8-channel", "uint8-token-asym", "not uint8"),
        ("Linear", "int8-channel", "nf4-token", "not nf4"),
        ("Linear", "fp8_e4m3-channel", "fp8_e5m2-token", "not fp8_e5m2"),
        ("Linear", "int4-g32", "fp8_e4m3-token", "no format for int4 weights with fp8_e4m3 inputs"),
        ("Linear", "fp8_e4m3-channel", "int8-token", "no format for fp8_e4m3 weights with int8 inputs"),
        ("Linear", "mxfp8", "fp8_e4m3-token", "power-of-two scales"),
        ("Linear", "fp8_e4m3-channel", "fp8_e4m3-tensor-e8m0", "power-of-two scales"),
        ("Linear", "int8-channel", "int8-token-f16", "leave f16 out of int8-token-f16"),
        ("Conv1D", "int8-channel", "int8-token", "Conv1D"),
    ],
)
def test_inputs_that_its_clients_do_not_know_are_refused(
    module_class: str, weights: str, inputs: str, reason: str
) -> None:
    scheme, how = parse_scheme(weights), parse_inputs(inputs)
    found = COMPRESSED_TENSORS.refuses(module_class, (8, 64), scheme, how)
    assert found is not None and reason in found and "--format halfbin" in found


def test_zero_points_of_weights_stand_beside_others_when_they_are_not_packed() -> None:
    shape, inputs = (128, 128), parse_inputs("int8-token")
    asymmetric, symmetric = parse_scheme("int4-g32-asym"), parse_scheme("int4-g32")
    tensors = {"a.weight": (asymmetric, shape), "b.weight": (symmetric, shape)}
    config = COMPRESSED_TENSORS.config(tensors, [], {"a.weight": inputs})
    assert config["format"] == "mixed-precision" and "dequantize" not in config
    with pytest.raises(SchemeError, match=r"int4-g32-asym beside 1 other"):
        COMPRESSED_TENSORS.config(tensors, [], {"b.weight": inputs})
    # The key that unpacks zero points while loading would also switch off the rounding of inputs.
    assert "dequantize" not in COMPRESSED_TENSORS.config({"a.weight": (asymmetric, shape)}, [], {"a.weight": inputs})
    assert COMPRESSED_TENSORS.config({"a.weight": (asymmetric, shape)}, [])["dequantize"] is True


# --- what the client does


def load(directory: Path, dtype: torch.dtype = torch.float32, **options: object) -> Any:
    loaded, info = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True, **options)
    assert not any(info.values()), info
    return loaded


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model(tokens()).logits
    return out


def write(directory: Path, weights: str, inputs: str, dtype: torch.dtype = torch.float32) -> Written:
    model = tiny_llama(dtype=dtype)
    scheme, how = parse_scheme(weights), quantizer(inputs)
    chosen = dict.fromkeys(projections(model), scheme)
    return write_model(directory, model, COMPRESSED_TENSORS, chosen.get, input_quantizers=dict.fromkeys(chosen, how))


def simulated(written: Written, client: bool) -> Tensor:
    sites = {
        name.removesuffix(".weight"): as_client(how) if client else how
        for name, how in written.input_quantizers.items()
    }
    with quantize_inputs(written.reference, sites) as simulation:
        out = logits(written.reference)
        assert not simulation.idle
    return out


@held
def test_the_client_rounds_inputs_just_as_we_say_it_does(tmp_path: Path, weights: str, inputs: str) -> None:
    written = write(tmp_path, weights, inputs)
    loaded = logits(load(tmp_path))
    weight_only = logits(written.reference)
    moved = float((loaded - weight_only).norm() / weight_only.norm())
    assert moved > 0.005  # rounding inputs is no small thing: a client that skips it is seen
    assert torch.equal(loaded, simulated(written, client=True))
    ours = simulated(written, client=False)
    # Other steps, or a code that fell the other way and moves all later ones, make an error of the same size.
    assert 0.8 < float((ours - weight_only).norm() / weight_only.norm()) / moved < 1.25
    if "asym" not in inputs and not (parse_inputs(inputs).dynamic and inputs.startswith("int")):
        assert torch.equal(ours, loaded)


@pytest.mark.parametrize("inputs", sorted({inputs for _, inputs in HELD}))
def test_how_far_its_rounding_is_from_ours(inputs: str) -> None:
    x, how = torch.randn(2, 64, 256, generator=torch.Generator().manual_seed(0)), quantizer(inputs)
    theirs, ours = as_client(how).fake_quantize(x), how.fake_quantize(x)
    scale = how.quantize(x).scale.double().reshape(1 if "tensor" in inputs else 2, -1, 1)
    if "asym" in inputs:
        # x / scale + zero_point is rounded to float32 before it is rounded to a code: 2**-17 of a step, near ties.
        different = (theirs - ours).abs() > 0.5 * scale
        assert float(different.double().mean()) < 2e-4
        assert bool(((theirs - ours).abs() <= 1.001 * scale).all())
    elif how.inputs.dynamic and inputs.startswith("int"):
        levels = 2.0**how.inputs.scheme.format.bits - 1
        found = theirs.double() / (scale * (levels // 2) / (levels / 2))
        assert bool(((found - found.round()).abs() < 1e-4).all()), "multiples of max|x| / 127.5"
        assert not torch.equal(theirs, ours)
    else:
        assert torch.equal(theirs, ours)


@pytest.mark.parametrize(
    ("weights", "inputs"),
    [
        ("int8-channel-bf16", "int8-token"),
        ("int8-channel-bf16", "int8-tensor-asym-bf16"),
        ("fp8_e4m3-channel-bf16", "fp8_e4m3-token"),
        ("fp8_e4m3-tensor-bf16", "fp8_e4m3-tensor-bf16"),
    ],
)
def test_in_bfloat16_it_computes_scales_and_steps_in_bfloat16(tmp_path: Path, weights: str, inputs: str) -> None:
    written = write(tmp_path, weights, inputs, torch.bfloat16)
    model = load(tmp_path, torch.bfloat16)
    for (
        name,
        buffer,
    ) in model.named_buffers():  # rotary frequencies stay float32 when a model is loaded, not when it is cast
        written.reference.get_buffer(name).data = buffer
    loaded = logits(model)
    assert torch.equal(loaded, simulated(written, client=True))
    assert not torch.equal(loaded, simulated(written, client=False))


def test_dequantizing_while_loading_switches_the_rounding_of_inputs_off(tmp_path: Path) -> None:
    from transformers import CompressedTensorsConfig

    written = write(tmp_path, "int8-channel", "int8-token")
    loaded = load(tmp_path, quantization_config=CompressedTensorsConfig(dequantize=True))
    assert torch.equal(logits(loaded), logits(written.reference))


def test_the_client_reads_sites_with_different_inputs_and_with_none(tmp_path: Path) -> None:
    model = tiny_llama()
    names = projections(model)
    chosen = dict.fromkeys(names, parse_scheme("int8-channel"))
    chosen |= {name: parse_scheme("fp8_e4m3-channel") for name in names if "down_proj" in name}
    inputs = {name: quantizer("int8-token") for name in names if "self_attn" in name}
    inputs |= {name: quantizer("fp8_e4m3-tensor") for name in names if "down_proj" in name}
    inputs |= {name: quantizer("int8-tensor") for name in names if "gate_proj" in name}
    written = write_model(tmp_path, model, COMPRESSED_TENSORS, chosen.get, input_quantizers=inputs)
    assert torch.equal(logits(load(tmp_path)), simulated(written, client=True))
    with open_quantized(tmp_path) as checkpoint:
        for name in checkpoint.names:
            how = inputs.get(name)
            assert checkpoint.scheme(name) == chosen.get(name)
            assert checkpoint.inputs(name) == (None if how is None else how.inputs)
            found = checkpoint.input_quantizer(name)
            assert (found is None) == (how is None)
            if found is not None and found.scale is not None and how is not None and how.scale is not None:
                assert torch.equal(found.scale, how.scale)
        assert sum(map(checkpoint.bytes_of, checkpoint.names)) == checkpoint.num_bytes


@pytest.mark.parametrize("inputs", ["int8-token", "int8-token-asym", "fp8_e4m3-token", "int8-tensor-dynamic"])
@pytest.mark.parametrize("shape", [(2, 5, 32), (10, 32), (2, 5, 3, 32), (1, 0, 32)], ids=str)
def test_what_the_client_takes_for_a_token(shape: tuple[int, ...], inputs: str) -> None:
    """Tokens of [tokens, features] share one scale there; the day they do not, this fails and the docstring is old."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStatus
    from compressed_tensors.quantization.lifecycle.initialize import initialize_module_for_quantization

    from halfbin.formats.compressed_tensors_config import input_arguments_of

    layer = nn.Linear(32, 8, bias=False)
    arguments = QuantizationArgs.model_validate(input_arguments_of(parse_inputs(inputs)))
    scheme = QuantizationScheme(targets=["Linear"], input_activations=arguments)
    initialize_module_for_quantization(layer, scheme)
    layer.quantization_status = QuantizationStatus.COMPRESSED
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    x[..., :2, :] *= 0.01
    x_hat = as_client(quantizer(inputs)).fake_quantize(x)
    assert torch.equal(layer(x), nn.functional.linear(x_hat, layer.weight))
    if shape == (10, 32) and inputs == "int8-token":
        assert (
            len(torch.unique(x_hat[:2].abs()).tolist()) <= 4
        )  # a few of 128 steps that were made for tokens a hundred times as large


# --- files of others


def read(config: dict[str, Any], parts: dict[str, Tensor]) -> Any:
    infos: dict[str, PartInfo] = dict(parts.items())
    return COMPRESSED_TENSORS.schemes(config, infos, parts.__getitem__)[NAME]


def stranger(inputs: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    q, how = quantize(torch.ones(8, 64), parse_scheme("int8-channel")), quantizer(inputs)
    config: Any = COMPRESSED_TENSORS.config({NAME: (q.scheme, q.shape)}, [], {NAME: how.inputs})
    return config, COMPRESSED_TENSORS.encode(NAME, q, how)


@pytest.mark.parametrize(
    "arguments",
    [
        {"strategy": "group", "group_size": 128},
        {"strategy": "tensor_group", "dynamic": "local", "group_size": 16, "num_bits": 4, "type": "float"},
        {"strategy": "token", "dynamic": False},
        {"strategy": "channel"},
        {"symmetric": False, "type": "float"},
        {"num_bits": 16},
        {"symmetric": 1},
        {"strategy": []},
        "fp8",
    ],
    ids=str,
)
def test_inputs_that_are_not_understood_leave_the_weights_readable(tmp_path: Path, arguments: Any) -> None:
    config, parts = stranger("int8-token")
    group = config["config_groups"]["group_0"]
    known = group["input_activations"]
    group["input_activations"] = known | arguments if isinstance(arguments, dict) else arguments
    stored = read(config, parts)
    assert stored.scheme == parse_scheme("int8-channel")
    assert stored.inputs is None and "input_activations of group 'group_0' are not read" in stored.unclear_inputs


def test_static_inputs_without_a_scale_are_unclear() -> None:
    config, parts = stranger("int8-tensor-asym")
    del parts["m.input_zero_point"]
    assert "their scale is not in the file" in read(config, parts).unclear_inputs
    config, parts = stranger("int8-tensor")
    parts["m.input_scale"] = torch.ones(1, dtype=torch.float64)
    assert "float64" in read(config, parts).unclear_inputs


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.tensor([0.0]), "holds the scale 0.0"),
        (torch.tensor([float("nan")]), "holds the scale nan"),
        (torch.ones(2), r"has shape \[2\], expected \[1\]"),
    ],
    ids=str,
)
def test_a_static_scale_that_is_none_is_refused(scale: Tensor, message: str) -> None:
    config, parts = stranger("int8-tensor")
    stored = read(config, parts | {"m.input_scale": scale})
    with pytest.raises(FormatError, match=message):
        stored.inputs.decode((parts | {"m.input_scale": scale}).__getitem__)


def test_groups_that_say_different_things_of_inputs_are_told_apart_by_exact_names() -> None:
    config, parts = stranger("int8-token")
    groups = config["config_groups"]
    groups["group_1"] = {**groups["group_0"], "input_activations": None, "targets": ["re:.*"]}
    groups["group_0"]["targets"] = ["re:.*m"]
    assert "said differently by 2 config groups" in read(config, parts).unclear_inputs
    groups["group_0"]["targets"] = ["m"]
    assert read(config, parts).inputs.inputs == parse_inputs("int8-token")


def test_a_checkpoint_that_says_too_much_is_read_until_its_inputs_are_asked_for(tmp_path: Path) -> None:
    written = write(tmp_path, "int8-channel", "int8-token")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"]["num_bits"] = 16
    (tmp_path / "config.json").write_text(json.dumps(config))
    name = next(iter(written.quantized))
    with open_quantized(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.read_values(name), dequantize(written.quantized[name]))
        with pytest.raises(FormatError, match="input_activations of group 'group_0' are not read"):
            checkpoint.inputs(name)
