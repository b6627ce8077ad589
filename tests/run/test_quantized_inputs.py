"""Runs whose layers' inputs are quantized too: what is written is what clients compute, and outliers are dealt with."""

from __future__ import annotations

import shutil
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
from halfbin.formats.checkpoint import open_checkpoint
from halfbin.formats.read import layout_named, open_quantized
from halfbin.models import load_as_client, load_weights, open_skeleton
from halfbin.planning import load_recipe, make_plan, parse_recipe
from halfbin.planning.recipe import Recipe
from halfbin.run.execute import execute
from halfbin.tensor import parse_inputs
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
