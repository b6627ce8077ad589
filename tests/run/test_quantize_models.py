"""From a directory to a directory, on many architectures: what is written loads, and computes what its codes stand for."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import halfbin as hb
from halfbin.errors import FormatError
from halfbin.formats import safetensors
from halfbin.formats.checkpoint import open_checkpoint
from halfbin.formats.safetensors import SafetensorsFile
from halfbin.models import open_skeleton
from halfbin.models.loading import load_state
from halfbin.planning import Plan
from halfbin.run.execute import execute
from halfbin.run.job import Job, planned
from halfbin.tensor import Scheme, dequantize, quantize
from models import zoo
from run.small_models import write_model

pytestmark = pytest.mark.usefixtures("no_page")
EVERY = pytest.mark.parametrize("name", zoo.NAMES)
# Float32 products of at most 64 terms, summed in another order at the most, a few layers deep.
TOLERANCE = 1e-5


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def recipe(folder: Path, weights: str, layout: str, *, match: str = "*", remainder: str = "row") -> Path:
    path = folder / "recipe.toml"
    rule = f'[[rule]]\nmatch = "{match}"\nweights = "{weights}"\n'
    path.write_text(f'layout = "{layout}"\nremainder = "{remainder}"\n{rule}')
    return path


def inputs(model: Any) -> dict[str, Tensor]:
    """What any of the models can be called with."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 48, (2, 12), generator=generator)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    return {"input_ids": ids, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}


@torch.no_grad()
def output(model: Any) -> Tensor:
    found = model(**inputs(model))
    result: Tensor = found.logits if hasattr(found, "logits") else found[0]
    return result


def rounded_by_hand(source: Path, plan: Plan) -> Any:
    """The float model with every planned weight rounded and dequantized, filled by transformers from a state dict."""
    schemes = {s.site.tensor: s.weights for s in plan.sites if isinstance(s.weights, Scheme)}
    with open_checkpoint(source) as checkpoint:
        weights = {name: checkpoint.read(name).float() for name in checkpoint.names}
    for name, scheme in schemes.items():
        weights[name] = dequantize(quantize(weights[name], scheme))
    return load_state(open_skeleton(source), weights, dtype=torch.float32)


@functools.cache
def client_class(name: str) -> Any:
    return zoo.ZOO[name][0]()[0]


def load_as_a_user_would(name: str, directory: Path) -> Any:
    model, info = client_class(name).from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    return model.eval()


def assert_computes_the_rounded_model(found: Any, source: Path, plan: Plan) -> None:
    expected, got = output(rounded_by_hand(source, plan)), output(found)
    assert float((expected - got).abs().max()) <= TOLERANCE * float(expected.abs().max())


@pytest.mark.parametrize("name", [name for name in zoo.NAMES if name != "mamba"])  # see the last test
def test_plain_transformers_loads_int4_and_computes_the_rounded_model(name: str, tmp_path: Path) -> None:
    source, out = zoo.directory_of(name), tmp_path / "out"
    rules = recipe(tmp_path, "int4-g16", "compressed-tensors")
    plan = hb.plan(source, recipe=rules)
    report = hb.quantize(source, out, recipe=rules, evaluate=False)
    assert_computes_the_rounded_model(load_as_a_user_would(name, out), source, plan)
    # Linears and experts that lie as one matrix each are quantized; what this layout cannot hold is told.
    whole = [
        s for s in plan.sites if s.site.module_class in ("Linear", "Expert") and s.site.role in ("linear", "expert")
    ]
    assert all(s.quantized for s in whole)
    left = [s for s in plan.sites if s.site.role in ("linear", "expert", "convolution") and not s.quantized]
    assert bool(left) == any("cannot hold" in warning for warning in report.warnings)


@EVERY
def test_halfbin_loads_what_its_own_layout_holds_of_every_site(name: str, tmp_path: Path) -> None:
    source, out = zoo.directory_of(name), tmp_path / "out"
    rules = recipe(tmp_path, "nf4-g24", "halfbin", remainder="tail")
    plan = hb.plan(source, recipe=rules)
    hb.quantize(source, out, recipe=rules, evaluate=False)
    assert all(s.quantized for s in plan.sites if s.site.role in ("linear", "expert", "convolution"))
    assert_computes_the_rounded_model(hb.load(out, torch.float32, dequantize=True), source, plan)


@pytest.mark.parametrize("layout", ["compressed-tensors", "halfbin", "safetensors"])
@pytest.mark.parametrize("weights", ["int8-channel", "int4-g16-asym", "fp8_e4m3-channel", "int3-g16"])
def test_every_scheme_loads_as_it_was_rounded(weights: str, layout: str, tmp_path: Path) -> None:
    source, out = zoo.directory_of("llama"), tmp_path / "out"
    rules = recipe(tmp_path, weights, layout)
    plan = hb.plan(source, recipe=rules)
    hb.quantize(source, out, recipe=rules, evaluate=False)
    found = hb.load(out, torch.float32, dequantize=True) if layout == "halfbin" else load_as_a_user_would("llama", out)
    assert_computes_the_rounded_model(found, source, plan)
    assert_computes_the_rounded_model(hb.load(out, torch.float32, dequantize=True), source, plan)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "mixtral", "gpt-oss", "mamba", "resnet"])
@pytest.mark.parametrize(("preset", "layout"), [("int4", None), ("nf4", "halfbin"), ("int8", None), ("fp16", None)])
def test_the_plan_tells_the_bytes_to_the_last_one(name: str, preset: str, layout: str | None, tmp_path: Path) -> None:
    source, out = zoo.directory_of(name), tmp_path / "out"
    plan = hb.plan(source, recipe=preset, format=layout)
    report = hb.quantize(source, out, recipe=preset, format=layout, evaluate=False)
    with SafetensorsFile(out / "model.safetensors") as written:
        tensor_bytes = sum(info.num_bytes for info in written.tensors.values())
    assert plan.bytes_after == report.bytes_after == tensor_bytes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_shards_and_types_change_nothing_but_the_type_of_the_rest(dtype: torch.dtype, tmp_path: Path) -> None:
    rules = recipe(tmp_path, "int8-channel-f32", "halfbin")
    whole, sharded = zoo.directory_of("llama", dtype), zoo.directory_of("llama", dtype, "20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    for source, out in ((whole, tmp_path / "a"), (sharded, tmp_path / "b")):
        hb.quantize(source, out, recipe=rules, evaluate=False)
    with open_checkpoint(tmp_path / "a") as a, open_checkpoint(tmp_path / "b") as b:
        assert set(a.names) == set(b.names)
        assert all(torch.equal(a.read(name), b.read(name)) for name in a.names)
        assert a.info("model.norm.weight").dtype == dtype


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "mixtral", "resnet"])
@pytest.mark.parametrize(("preset", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_cast_is_a_cast_of_every_float_and_of_nothing_else(
    name: str, preset: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    source, out = zoo.directory_of(name), tmp_path / "out"
    hb.quantize(source, out, recipe=preset, evaluate=False)
    with open_checkpoint(source) as before, open_checkpoint(out) as after:
        assert set(before.names) == set(after.names)
        for tensor in before.names:
            weight = before.read(tensor)
            expected = weight.to(dtype) if weight.is_floating_point() else weight
            assert after.info(tensor).dtype == expected.dtype and torch.equal(after.read(tensor), expected)
    assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert load_as_a_user_would(name, out).dtype == torch.float32  # as asked for
    assert client_class(name).from_pretrained(out).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("preset", ["int4", "int8", "fp8", "nf4"])
def test_presets_on_sizes_that_no_group_divides_and_every_type(preset: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", dtype=dtype, hidden_size=128, intermediate_size=300)
    plan, out = hb.plan(source, recipe=preset), tmp_path / "out"
    hb.quantize(source, out, recipe=preset, evaluate=False)
    schemes = {s.site.name: str(s.weights) for s in plan.sites if s.quantized}
    assert len(schemes) == 14
    if preset == "int4":  # clients cannot read a last group of 44
        assert "channel" in schemes["model.layers.0.mlp.down_proj"] and "g128" in schemes["model.layers.0.mlp.up_proj"]
    load = hb.load if preset == "nf4" else transformers.AutoModelForCausalLM.from_pretrained
    assert_computes_the_rounded_model(load(out, dtype=torch.float32), source, plan)


def test_transformers_loads_two_schemes_of_a_model_whose_modules_have_other_names_than_its_tensors(
    tmp_path: Path,
) -> None:
    source, out, rules = zoo.directory_of("llava"), tmp_path / "out", tmp_path / "recipe.toml"
    rules.write_text(
        '[[rule]]\nmatch = "*.k_proj"\nweights = "int8-channel"\n[[rule]]\nmatch = "*"\nweights = "int4-g16"\n'
    )
    plan = hb.plan(source, recipe=rules)
    names = {s.site.name for s in plan.sites if s.quantized}
    assert names - {name for name, _ in plan.skeleton.model.named_modules()}
    hb.quantize(source, out, recipe=rules, evaluate=False)
    assert_computes_the_rounded_model(load_as_a_user_would("llava", out), source, plan)
    assert_computes_the_rounded_model(hb.load(out, torch.float32, dequantize=True), source, plan)


@pytest.mark.parametrize("layout", ["compressed-tensors", "halfbin", "safetensors"])
def test_an_output_of_several_files_is_one_model(layout: str, tmp_path: Path) -> None:
    source, rules = zoo.directory_of("llama"), recipe(tmp_path, "int4-g16", layout)
    out = tmp_path / "out"
    out.mkdir()
    with planned(Job(model=str(source), recipe=rules)) as (plan, checkpoint):
        written = execute(plan, checkpoint, out, shard_bytes=8_000)
    assert len(written.files) > 2 and not (out / "model.safetensors").exists()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    with open_checkpoint(out) as result:
        assert index["metadata"]["total_size"] == result.num_bytes == plan.bytes_after
        assert {path.name for path in result.files} == set(written.files)
    found = hb.load(out, torch.float32, dequantize=True) if layout == "halfbin" else load_as_a_user_would("llama", out)
    assert_computes_the_rounded_model(found, source, plan)


def test_a_byte_that_reads_back_as_another_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_all = safetensors._write_all
    writes = iter(range(10**6))

    def damaging(handle: int, rest: memoryview, offset: int) -> None:
        number = next(writes)
        write_all(handle, memoryview(bytes([rest[0] ^ 1]) + bytes(rest[1:])) if number == 5 else rest, offset)

    monkeypatch.setattr(safetensors, "_write_all", damaging)
    with (
        planned(Job(model=str(zoo.directory_of("llama")), recipe="int8")) as (plan, checkpoint),
        pytest.raises(FormatError, match="reads back with other bytes than were written"),
    ):
        execute(plan, checkpoint, tmp_path)
    assert next(writes) > 6


def test_linears_that_stay_are_told_to_clients(tmp_path: Path) -> None:
    for name in ("llama", "llama-tied"):  # the tied head has no tensor of its own, but clients see a Linear
        hb.quantize(zoo.directory_of(name), tmp_path / name, recipe="int8", evaluate=False)
        config = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        assert config["ignore"] == ["lm_head"]


def test_what_a_layout_cannot_hold_is_counted_and_named(tmp_path: Path) -> None:
    source = zoo.directory_of("gpt2")
    report = hb.quantize(source, tmp_path / "out", recipe="int8", evaluate=False)
    assert report.to_json()["left_at_16_bits"]["count"] == 10 and report.quantized == ()
    warning = next(w for w in report.warnings if "cannot hold" in w)
    assert "8 sites" in warning and "transformer.h.0.attn.c_attn" in warning and "--format halfbin" in warning
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    report = hb.quantize(source, tmp_path / "ours", recipe="int8", format="halfbin", evaluate=False)
    assert len(report.quantized) == 8 and not any("cannot hold" in w for w in report.warnings)
    assert report.after.bytes < report.before.bytes / 2


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gpt-oss", "qwen3-moe", "mamba"])
def test_inspection_of_our_layout_finds_what_was_planned(name: str, tmp_path: Path) -> None:
    source, out = zoo.directory_of(name), tmp_path / "out"
    rules = recipe(tmp_path, "int4-g24-asym", "halfbin", remainder="tail")
    plan = hb.plan(source, recipe=rules)
    hb.quantize(source, out, recipe=rules, evaluate=False)
    found = {tensor.name: tensor for tensor in hb.inspect(out).tensors}
    assert found.keys() == {s.site.tensor for s in plan.sites} | plan.others.keys()
    for s in plan.sites:
        tensor = found[s.site.tensor]
        assert (tensor.weights, tensor.shape, tensor.bytes) == (s.spelled, s.site.shape, s.bytes_after)
        assert tensor.codes is None or sum(tensor.codes.counts) == tensor.num_weights


def test_a_second_run_writes_the_same_bytes(tmp_path: Path) -> None:
    source, rules = zoo.directory_of("qwen3"), recipe(tmp_path, "int4-g16", "compressed-tensors")
    for out in ("a", "b"):
        hb.quantize(source, tmp_path / out, recipe=rules, evaluate=False)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_what_stands_beside_the_weights_is_carried_over(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in zoo.directory_of("llama").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    for file in ("tokenizer.json", "LICENSE", "chat_template.jinja"):
        (source / file).write_text(f"the {file}")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    (source / "onnx").mkdir()
    (source / "onnx" / "model.onnx").write_bytes(b"weights")
    (source / "modeling_evil.py").write_text("raise SystemExit")
    hb.quantize(source, tmp_path / "out", recipe="int8", evaluate=False)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "LICENSE", "chat_template.jinja", "generation_config.json"} <= names
    assert not {"modeling_evil.py", "onnx"} & names
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_text() == "{}"
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "the tokenizer.json"


def test_experts_without_a_place_stop_the_run_before_anything_is_written(tmp_path: Path) -> None:
    rules = recipe(tmp_path, "int4-g16-asym", "compressed-tensors")
    with pytest.raises(
        hb.HalfbinError, match="give the experts a symmetric integer scheme too, or use --format halfbin"
    ):
        hb.quantize(zoo.directory_of("mixtral"), tmp_path / "out", recipe=rules, evaluate=False)
    assert not (tmp_path / "out").exists()


def test_a_model_whose_code_wants_float_weights_is_dequantized_on_loading(tmp_path: Path) -> None:
    source = zoo.directory_of("mamba")
    report = hb.quantize(source, tmp_path / "out", recipe="int8", evaluate=False)
    assert_computes_the_rounded_model(
        load_as_a_user_would("mamba", tmp_path / "out"), source, hb.plan(source, recipe="int8")
    )
    assert any("dequantize" in warning for warning in report.warnings)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["dequantize"] is True


def test_such_a_model_with_two_schemes_is_refused_before_the_work(tmp_path: Path) -> None:
    rules = tmp_path / "recipe.toml"
    two = [("*.in_proj", "int4-channel"), ("*", "int8-channel")]
    rules.write_text("".join(f'[[rule]]\nmatch = "{match}"\nweights = "{weights}"\n' for match, weights in two))
    with pytest.raises(
        hb.HalfbinError, match="transformers cannot load the result.*use one scheme for the whole model"
    ):
        hb.plan(zoo.directory_of("mamba"), recipe=rules)
    with pytest.raises(hb.HalfbinError, match="use one scheme for the whole model"):
        hb.quantize(zoo.directory_of("mamba"), tmp_path / "out", recipe=rules, evaluate=False)
    assert not (tmp_path / "out").exists()


def test_in_such_a_model_sites_that_no_group_divides_stay(tmp_path: Path) -> None:
    source, out = zoo.directory_of("mamba"), tmp_path / "out"
    rules = recipe(tmp_path, "int4-g16", "compressed-tensors")  # a linear with 2 inputs would have one scale a row
    plan = hb.plan(source, recipe=rules)
    left = {s.site.name.rpartition(".")[2] for s in plan.sites if s.site.role == "linear" and not s.quantized}
    assert left == {"dt_proj"}
    report = hb.quantize(source, out, recipe=rules, evaluate=False)
    assert any("stay as they were" in warning for warning in report.warnings)
    assert_computes_the_rounded_model(load_as_a_user_would("mamba", out), source, plan)


def test_floats_that_transformers_joins_while_it_loads_stop_the_run_with_their_name(tmp_path: Path) -> None:
    config = transformers.OlmoHybridConfig(
        **zoo.SIZES,
        **zoo.KV,
        layer_types=["linear_attention", "full_attention"],
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
    )
    transformers.OlmoHybridForCausalLM(config).save_pretrained(tmp_path / "model")  # three convolutions become one
    with pytest.raises(hb.HalfbinError, match=r"conv1d.weight stays in floating point.*--format halfbin"):
        hb.plan(tmp_path / "model", recipe="int8")
    assert hb.plan(tmp_path / "model", recipe="int8", format="halfbin")
