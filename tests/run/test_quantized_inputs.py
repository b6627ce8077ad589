"""Runs whose layers' inputs are quantized too: what is written is what clients compute, and outliers are dealt with."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import halfbin as hb
from halfbin.errors import DataError
from halfbin.evaluation import weight_error
from halfbin.formats.checkpoint import open_checkpoint
from halfbin.formats.read import layout_named, open_quantized
from halfbin.models import load_as_client, load_weights, open_skeleton
from halfbin.nn import llm_int8
from halfbin.planning import Plan, load_recipe, make_plan, parse_recipe
from halfbin.planning.recipe import Recipe
from halfbin.run.execute import Written, execute
from halfbin.tensor import MixedTensor, QTensor, dequantize, parse_inputs, quantize
from models.zoo import directory_of, loaded

FACTOR = 64.0  # a power of two: planting is exact
RULE = 'layout = "{}"\n[[rule]]\nmatch = "*"\nweights = "int8-channel"\n'


def samples(num: int = 4) -> Sequence[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 48, (4, 32), generator=generator) for _ in range(num)]


def written(directory: Path, recipe: Recipe, folder: Path) -> Any:
    """Carry a recipe out; gives the skeleton."""
    skeleton = open_skeleton(directory)
    with open_checkpoint(directory) as checkpoint:
        plan = make_plan(skeleton, checkpoint, recipe, layout_named(recipe.layout, skeleton.dtype))
        execute(plan, checkpoint, folder, batches=samples())
    return skeleton


def logits(model: Any) -> Tensor:
    ids = torch.randint(3, 48, (2, 24), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


@pytest.mark.parametrize("preset", ["w8a8", "fp8-w8a8"])
def test_a_preset_writes_what_transformers_computes(preset: str, tmp_path: Path) -> None:
    skeleton = written(directory_of("llama"), load_recipe(preset), tmp_path)
    client = logits(load_as_client(skeleton, tmp_path, dtype=torch.float32))
    ours = logits(load_weights(skeleton, directory=tmp_path, as_client=True))
    assert torch.equal(client, ours)
    weights_alone = logits(loaded("llama"))
    assert not torch.equal(client, weights_alone)
    assert float((client - weights_alone).norm() / weights_alone.norm()) < 0.1


def test_static_inputs_have_the_range_that_the_samples_had(tmp_path: Path) -> None:
    recipe = parse_recipe(RULE.format("compressed-tensors") + 'inputs = "int8-tensor"\n', source="test")
    skeleton = written(directory_of("llama"), recipe, tmp_path)
    client = logits(load_as_client(skeleton, tmp_path, dtype=torch.float32))
    assert torch.equal(client, logits(load_weights(skeleton, directory=tmp_path, as_client=True)))
    seen: list[float] = []
    model: Any = load_weights(
        skeleton
    )  # the float model: the first layer's inputs are not changed by rounding before it
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda m, args: seen.append(float(args[0].abs().max()))
    )
    with torch.no_grad():
        for batch in samples():
            model(input_ids=batch)
    with open_quantized(tmp_path) as checkpoint:
        quantizer = checkpoint.input_quantizer("model.layers.0.self_attn.q_proj.weight")
    assert quantizer is not None and quantizer.scale is not None
    # Bins of the histogram are 2**-11 of a power of two above the largest value; min-max keeps the value itself.
    assert float(quantizer.scale) * 127 == pytest.approx(max(seen), rel=1e-3)


def test_static_inputs_that_no_sample_reaches_are_refused(tmp_path: Path) -> None:
    recipe = parse_recipe(RULE.format("halfbin") + 'inputs = "int8-tensor"\n', source="test")
    with pytest.raises(DataError, match="its inputs are int8-tensor.*no calibration sample"):
        written(directory_of("llava"), recipe, tmp_path)


def test_llm_int8_is_kept_in_halfbins_layout(tmp_path: Path) -> None:
    skeleton = written(directory_of("llama"), load_recipe("llm-int8"), tmp_path)
    with open_quantized(tmp_path) as checkpoint:
        assert checkpoint.inputs("model.layers.0.mlp.down_proj.weight") == parse_inputs("int8-token-outliers6")
    found, expected = logits(hb.load(tmp_path, torch.float32)), logits(loaded("llama"))
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.05
    assert skeleton.generates


def planted(folder: Path) -> Path:
    """The tiny Llama with three channels of each norm 64 times as large, and what reads them divided by as much."""
    shutil.copytree(directory_of("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    readers: dict[str, tuple[str, ...]] = {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    }
    for layer in range(2):
        for norm, names in readers.items():
            channels = torch.randperm(32, generator=generator)[:3]
            tensors[f"model.layers.{layer}.{norm}.weight"][channels] *= FACTOR
            for name in names:
                tensors[f"model.layers.{layer}.{name}.weight"][:, channels] /= FACTOR
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def loss(directory: Path, rule: str, folder: Path) -> float:
    """How far a recipe moves the logits, relative."""
    folder.mkdir()
    recipe = parse_recipe(RULE.format("halfbin") + rule, source="test")
    skeleton = written(directory, recipe, folder)
    expected = logits(loaded("llama"))
    return float((logits(load_weights(skeleton, directory=folder)) - expected).norm() / expected.norm())


def test_smoothquant_undoes_planted_outliers(tmp_path: Path) -> None:
    directory = planted(tmp_path / "planted")
    assert torch.equal(logits(load_weights(open_skeleton(directory))), logits(loaded("llama")))
    static = 'inputs = "int8-tensor"\n'
    as_it_was = loss(directory_of("llama"), static, tmp_path / "a")
    broken = loss(directory, static, tmp_path / "b")
    smoothed = loss(directory, static + 'transforms = ["smoothquant"]\n', tmp_path / "c")
    assert broken > 5 * as_it_was
    assert smoothed < 2 * as_it_was


def test_a_rule_gives_smoothquants_alpha(tmp_path: Path) -> None:
    def norm(lines: str) -> Tensor:
        recipe = parse_recipe(RULE.format("halfbin") + 'transforms = ["smoothquant"]\n' + lines, source="test")
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        written(directory_of("llama"), recipe, folder)
        with open_quantized(folder) as checkpoint:
            return checkpoint.read_values("model.layers.0.input_layernorm.weight")

    dynamic = 'inputs = "int8-token"\n'
    assert torch.equal(norm(""), norm("alpha = 0.5\n"))
    assert torch.equal(norm("alpha = 0.3\n"), norm(dynamic + "alpha = 0.3\n"))
    assert not torch.equal(norm(dynamic + "alpha = 0.3\n"), norm(dynamic + "alpha = 0.8\n"))


def test_a_plan_and_a_report_say_how_inputs_are_rounded(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(3, 48, (8, 32)))
    plan = hb.plan(directory_of("llama"), recipe="w8a8")
    assert {s["inputs"] for s in plan.to_json()["sites"] if s["quantized"]} == {"int8-token"}
    assert {tuple(s["transforms"]) for s in plan.to_json()["sites"] if s["quantized"]} == {("smoothquant",)}
    report = hb.quantize(
        directory_of("llama"), tmp_path / "out", recipe="w8a8", calibration=tmp_path / "tokens.npy", evaluate=False
    )
    by_name = {site.name: site for site in report.sites}
    assert by_name["model.layers.0.mlp.up_proj"].transforms == ("smoothquant",)


# --- LLM.int8(): columns in 16 bits

LLM_INT8 = 'inputs = "int8-token-outliers6"\n'


def rounded(directory: Path, rule: str, folder: Path, layout: str = "halfbin") -> tuple[Plan, Written]:
    folder.mkdir()
    skeleton = open_skeleton(directory)
    recipe = parse_recipe(RULE.format(layout) + rule, source="test")
    with open_checkpoint(directory) as checkpoint:
        plan = make_plan(skeleton, checkpoint, recipe, layout_named(layout, skeleton.dtype))
        return plan, execute(plan, checkpoint, folder, batches=samples())


def planted_columns(directory: Path) -> dict[str, list[int]]:
    """Which columns differ from the model before planting, by tensor."""
    with open_checkpoint(directory) as after, open_checkpoint(directory_of("llama")) as before:
        names = [name for name in after.names if name.endswith("proj.weight")]
        changed = {n: (after.read(n) != before.read(n)).any(0).nonzero()[:, 0].tolist() for n in names}
    return {name: columns for name, columns in changed.items() if columns}


def test_planted_outliers_keep_their_columns_in_16_bits(tmp_path: Path) -> None:
    directory = planted(tmp_path / "planted")
    plan, found = rounded(directory, LLM_INT8, tmp_path / "out")
    expected = planted_columns(directory)
    assert len(expected) == 10  # q, k, v, gate and up of two layers
    assert {name: spec.count for name, spec in found.columns.items()} == dict.fromkeys(expected, 3)
    with open_quantized(tmp_path / "out") as result, open_checkpoint(directory) as original:
        assert result.num_bytes == plan.with_columns(found.columns).bytes_after
        assert plan.bytes_after < result.num_bytes < plan.bytes_at_most
        for name, columns in expected.items():
            weight, held = original.read(name), result.read(name)
            assert isinstance(held, MixedTensor) and held.columns.ids.tolist() == columns
            assert held.columns.values.dtype == torch.float16  # of a float32 model
            assert torch.equal(held.columns.values, weight[:, columns].half())
            rest = weight.clone()
            rest[:, columns] = 0
            assert torch.equal(held.q.codes, quantize(rest, held.q.scheme).codes)
            quantizer = result.input_quantizer(name)
            assert quantizer is not None and quantizer.columns is not None
            assert quantizer.columns.tolist() == columns
            assert found.errors[name] == weight_error(weight, dequantize(held))


def test_llm_int8_loses_no_more_with_planted_outliers(tmp_path: Path) -> None:
    directory = planted(tmp_path / "planted")
    as_it_was = loss(directory_of("llama"), LLM_INT8, tmp_path / "a")
    assert loss(directory, LLM_INT8, tmp_path / "b") < 2 * as_it_was
    assert loss(directory, 'inputs = "int8-token"\n', tmp_path / "c") > 5 * as_it_was


def test_what_is_simulated_is_what_the_layer_computes(tmp_path: Path) -> None:
    directory = planted(tmp_path / "planted")
    rounded(directory, LLM_INT8, tmp_path / "out")
    skeleton = open_skeleton(directory)
    simulated = logits(load_weights(skeleton, directory=tmp_path / "out"))
    model = load_weights(skeleton)
    with open_quantized(tmp_path / "out") as result:
        codes = {
            name.removesuffix(".weight"): held
            for name in result.names
            if isinstance(held := result.read(name), QTensor | MixedTensor)
        }
    with llm_int8(model, codes) as simulation:
        computed = logits(model)
        assert not simulation.idle
    # Products of the same numbers, summed as integers or as floats; now and then an input rounds the other way.
    assert float((computed - simulated).norm() / simulated.norm()) < 1e-3
    assert not torch.equal(computed, logits(load_weights(skeleton)))


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox"])
def test_columns_of_weights_that_are_stored_transposed_or_fused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["halfbin.calibration.outlier_features"], "STANDS_OUT", 1.0)
    directory = directory_of(name)
    plan, found = rounded(directory, 'inputs = "int8-token-outliers0.5"\n', tmp_path / "out")
    skeleton = open_skeleton(directory)
    with open_quantized(tmp_path / "out") as result, open_checkpoint(directory) as original:
        assert result.num_bytes == plan.with_columns(found.columns).bytes_after
        assert len(found.columns) > 2
        for tensor, spec in found.columns.items():
            held = result.read(tensor)
            assert isinstance(held, MixedTensor) and spec.axis == (0 if name == "gpt2" else 1)
            kept = held.columns.mask(held.shape)
            assert torch.equal(dequantize(held)[kept], original.read(tensor)[kept].half().float())
    expected = logits(load_weights(skeleton))
    found_logits = logits(load_weights(skeleton, directory=tmp_path / "out"))
    assert float((found_logits - expected).norm() / expected.norm()) < 0.05


def test_gptq_rounds_what_is_left_as_if_the_columns_were_not_there(tmp_path: Path) -> None:
    directory = planted(tmp_path / "planted")
    _, found = rounded(directory, LLM_INT8 + 'method = "gptq"\n', tmp_path / "out")
    assert set(found.columns) == set(planted_columns(directory))
    with open_quantized(tmp_path / "out") as result:
        for name in found.columns:
            held = result.read(name)
            assert isinstance(held, MixedTensor)
            assert not held.q.codes[~held.rounded].any()  # no error was moved into them
    assert loss(directory, LLM_INT8 + 'method = "gptq"\n', tmp_path / "b") < 0.01


def test_a_plan_tells_what_columns_may_cost_and_a_report_what_they_did(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(3, 48, (8, 32)))
    directory = planted(tmp_path / "planted")
    plan = hb.plan(directory, recipe="llm-int8").to_json()
    one = next(s for s in plan["sites"] if s["name"] == "model.layers.0.mlp.up_proj")
    rows, width = one["shape"]
    assert one["bytes_at_most"] - one["bytes_after"] == width * (2 * rows + 4)
    assert plan["output_bytes_at_most"] - plan["output_bytes"] == sum(
        s["bytes_at_most"] - s["bytes_after"] for s in plan["sites"]
    )
    report = hb.quantize(
        directory, tmp_path / "out", recipe="llm-int8", calibration=tmp_path / "tokens.npy", evaluate=False
    )
    by_name = {site.name: site for site in report.sites}
    site = by_name["model.layers.0.mlp.up_proj"]
    assert (site.float_columns, site.column_dtype) == (3, "float16")
    assert site.weights == "int8-channel + 3 float16"
    assert site.bytes_after == one["bytes_after"] + 3 * (2 * rows + 4)
    assert by_name["model.layers.0.mlp.down_proj"].float_columns == 0
    assert by_name["model.embed_tokens"].float_columns is None
    assert report.float_columns == "30, in 10 of 14 sites"
    stored = sum(t.bytes for t in hb.inspect(tmp_path / "out").tensors)
    assert (
        report.bytes_after
        == stored
        == plan["output_bytes"] + 30 * 4 + sum(3 * 2 * s.shape[0] for s in report.sites if s.float_columns)
    )
    assert type(report).read(tmp_path / "out" / "report.json") == report
    other = hb.quantize(
        directory_of("llama"), tmp_path / "b", recipe="llm-int8", calibration=tmp_path / "tokens.npy", evaluate=False
    )
    assert other.float_columns.startswith("none")
    plain = hb.quantize(directory_of("llama"), tmp_path / "c", recipe="int8", evaluate=False)
    assert plain.float_columns == ""


def test_only_halfbins_layout_and_single_matrices_keep_columns() -> None:
    skeleton = open_skeleton(directory_of("llama"))
    recipe = parse_recipe(RULE.format("halfbin") + LLM_INT8 + 'method = "autoround"\n', source="test")
    with open_checkpoint(skeleton.path) as checkpoint:
        kept = make_plan(skeleton, checkpoint, load_recipe("llm-int8"), layout_named("halfbin"))
        others = [
            make_plan(skeleton, checkpoint, recipe, layout_named("halfbin")),
            make_plan(skeleton, checkpoint, load_recipe("llm-int8"), layout_named("compressed-tensors")),
            make_plan(skeleton, checkpoint, load_recipe("w8a8"), layout_named("halfbin")),
        ]
    assert {s.columns_from for s in kept.sites if s.quantized} == {6.0}
    assert kept.needs_data
    assert {s.columns_from for plan in others for s in plan.sites} == {None}
    assert all(plan.bytes_at_most == plan.bytes_after for plan in others)
