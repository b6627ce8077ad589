"""Calibrated runs on tiny models of many kinds: what is written is what the data decided, and it is better for it."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import halfbin as hb
from halfbin.calibration import SecondMoment
from halfbin.errors import HalfbinError, ModelError
from halfbin.formats.checkpoint import open_checkpoint
from halfbin.formats.read import layout_named, open_quantized
from halfbin.methods import AutoRounded, autoround
from halfbin.models import load_as_client, load_weights, open_skeleton
from halfbin.models.partial import PartialModel
from halfbin.planning import make_plan, parse_recipe
from halfbin.run.client import settle_client
from halfbin.run.execute import Written, execute
from halfbin.run.report import Report
from halfbin.tensor import QTensor
from models.zoo import directory_of, loaded

GPTQ = 'remainder = "row"\n[[rule]]\nmatch = "*"\nweights = "int4-g32"\nmethod = "gptq"\n'
FINE = 'layout = "halfbin"\n[[rule]]\nmatch = "*"\nweights = "int8-g8"\ntransforms = ["{}"]\n'
MODELS = (
    "llama-tied",
    "gemma2",
    "opt",
    "gpt-neox",
    "phi3",
    "bert-masked",
    "mixtral",
    "qwen2-moe",
    "gpt-oss",
    "switch",
    "t5",
    "camembert",
    "zamba",
)
ALL = (*MODELS, "bart", "gpt2", "granite-moe", "mamba")


def samples(num: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 48, (4, 32), generator=generator) for _ in range(num)]


def written(name: str, recipe: str, folder: Path, batches: Sequence[Tensor] = ()) -> tuple[Written, Any]:
    """Carry a recipe out on a model of the zoo; also gives its skeleton."""
    directory = directory_of(name)
    skeleton, rules = open_skeleton(directory), parse_recipe(recipe, source="test")
    with open_checkpoint(directory) as checkpoint:
        plan = make_plan(skeleton, checkpoint, rules, layout_named(rules.layout, skeleton.dtype))
        result = execute(plan, checkpoint, folder, batches=batches or samples())
        settle_client(plan, folder)
        return result, skeleton


def outputs(model: Any, skeleton: Any) -> Tensor:
    """On fresh tokens: logits, or hidden states."""
    ids = torch.randint(3, 48, (2, 24), generator=torch.Generator().manual_seed(9))
    both = {"decoder_input_ids": ids} if skeleton.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, **both)[0]
    return found


@pytest.mark.parametrize("name", MODELS)
def test_what_gptq_wrote_is_what_clients_load(name: str, tmp_path: Path) -> None:
    result, skeleton = written(name, GPTQ, tmp_path)
    ours = load_weights(skeleton, directory=tmp_path)
    client = load_as_client(skeleton, tmp_path, dtype=torch.float32)
    expected, got = outputs(ours, skeleton), outputs(client, skeleton)
    assert torch.allclose(got, expected, atol=1e-5 * float(expected.abs().max()))
    assert result.calibrated
    assert not [d for d in result.calibrated.values() if d.remarks]
    assert all(0 < d.output_error.relative < 0.5 for d in result.calibrated.values() if d.output_error)


@pytest.mark.parametrize("transform", ["awq", "smoothquant"])
@pytest.mark.parametrize("name", ALL)
def test_transforms_leave_the_function_as_it_was(name: str, transform: str, tmp_path: Path) -> None:
    result, skeleton = written(name, FINE.format(transform), tmp_path)
    assert any(d.transformed for d in result.calibrated.values())
    expected = outputs(loaded(name), skeleton)
    got = outputs(load_weights(skeleton, directory=tmp_path), skeleton)
    # Two layers of weights that are each off by up to 1/254 of the largest of 8; a wrong scale would show in the first digit.
    assert float((got - expected).norm() / expected.norm()) < 0.05


def test_gptq_loses_less_than_rounding_to_nearest(tmp_path: Path) -> None:
    errors = {}
    for method in ("rtn", "gptq"):
        rules = GPTQ.replace("gptq", method).replace("int4", "int3")
        folder = tmp_path / method
        folder.mkdir()
        _, skeleton = written("llama", rules, folder, samples(16))
        expected = outputs(loaded("llama"), skeleton)
        errors[method] = float((outputs(load_weights(skeleton, directory=folder), skeleton) - expected).norm())
    assert errors["gptq"] < 0.9 * errors["rtn"]


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_making_up_for_what_earlier_layers_lost_loses_less(name: str, tmp_path: Path) -> None:
    errors = {}
    for correction in (0, 1):
        rules = GPTQ.replace("gptq", "rtn").replace("int4", "int3") + f"correction = {correction}\n"
        folder = tmp_path / str(correction)
        folder.mkdir()
        _, skeleton = written(name, rules, folder, samples(32))
        expected = outputs(loaded(name), skeleton)
        errors[correction] = float((outputs(load_weights(skeleton, directory=folder), skeleton) - expected).norm())
    assert errors[1] < errors[0]


@pytest.mark.parametrize("method", ["autoround", "gptq+autoround"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "t5", "zamba"])
def test_learned_codes_lose_less_than_nearest_ones(name: str, method: str, tmp_path: Path) -> None:
    errors = {}
    for each, steps in (("rtn", ""), (method, "steps = 25\n")):
        rules = f'layout = "halfbin"\n[[rule]]\nmatch = "*"\nweights = "int3-g16"\nmethod = "{each}"\n{steps}'
        folder = tmp_path / each
        folder.mkdir()
        _, skeleton = written(name, rules, folder, samples(16))
        expected = outputs(loaded(name), skeleton)
        errors[each] = float((outputs(load_weights(skeleton, directory=folder), skeleton) - expected).norm())
    assert errors[method] < errors["rtn"]


def test_a_rule_says_how_many_steps_are_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def learn(*args: Any, steps: int, **kwargs: Any) -> AutoRounded:
        asked.append(steps)
        return autoround(*args, steps=steps, **kwargs)

    monkeypatch.setattr("halfbin.run.blockwise.learning.autoround", learn)
    rules = 'layout = "halfbin"\n[[rule]]\nmatch = "*"\nweights = "int4-g32"\nmethod = "autoround"\nsteps = 2\n'
    written("llama", rules, tmp_path)
    assert asked == [2, 2]  # once for each block


def test_what_comes_first_has_nothing_to_make_up_for(tmp_path: Path) -> None:
    found = []
    for correction in (0, 1):
        folder = tmp_path / str(correction)
        folder.mkdir()
        written("llama", GPTQ + f"correction = {correction}\n", folder)
        with open_quantized(folder) as checkpoint:
            names = [name for name in checkpoint.names if "_proj" in name]
            read = {name: checkpoint.read(name) for name in names}
            found.append({name: q.codes for name, q in read.items() if isinstance(q, QTensor)})
    same = {name for name in found[0] if torch.equal(found[0][name], found[1][name])}
    assert same == {f"model.layers.0.self_attn.{kind}_proj.weight" for kind in "qkv"}


def test_inputs_from_the_float_model_do_not_depend_on_earlier_blocks(tmp_path: Path) -> None:
    second = '[[rule]]\nmatch = "*.layers.1.*"\nweights = "int3-g32"\nmethod = "gptq"\n'
    first = '[[rule]]\nmatch = "*"\nweights = "int2-g32"\n'
    for inputs_from in ("float", "quantized"):
        found = []
        for rules in (second, second + first):
            folder = tmp_path / f"{inputs_from}-{len(rules)}"
            folder.mkdir()
            text = f'layout = "halfbin"\ninputs_from = "{inputs_from}"\n{rules}'
            written("llama", text, folder)
            with open_quantized(folder) as checkpoint:
                q = checkpoint.read("model.layers.1.mlp.down_proj.weight")
                assert isinstance(q, QTensor)
                found.append(q.codes)
        assert torch.equal(*found) == (inputs_from == "float")


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        written("mixtral", GPTQ + 'transforms = ["awq"]\n', tmp_path / folder)
    first, second = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("a", "b"))
    assert first == second


@pytest.mark.parametrize("method", ["gptq", "gptq+autoround"])
def test_statistics_are_given_back_with_their_last_site_without_the_garbage_collector(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[int] = []

    def loaded_block(self: PartialModel, parameters: Iterable[str]) -> None:
        moments = [o for o in gc.get_objects() if isinstance(o, SecondMoment)]
        alive.append(sum(len(m._strips) for m in moments))
        load(self, parameters)

    load = PartialModel.load
    monkeypatch.setattr(PartialModel, "load", loaded_block)
    gc.collect()
    gc.disable()
    try:
        written("llama", GPTQ.replace('"gptq"', f'"{method}"'), tmp_path)
    finally:
        gc.enable()
    assert len(alive) > 3
    assert set(alive) == {0}


def test_an_expert_that_too_few_tokens_reach_is_rounded_without_data_and_named(tmp_path: Path) -> None:
    few = [torch.randint(3, 48, (1, 20), generator=torch.Generator().manual_seed(1))]
    result, _ = written("qwen3-moe", GPTQ, tmp_path, few)
    named = [name for name, d in result.calibrated.items() if any("rounded without data" in r for r in d.remarks)]
    assert any("experts" in name for name in named)
    with open_quantized(tmp_path) as checkpoint:
        assert all(isinstance(checkpoint.read(name), QTensor) for name in named)


def test_with_all_experts_none_is_left_without_data_and_what_the_model_does_stays(tmp_path: Path) -> None:
    few = [torch.randint(3, 48, (4, 20), generator=torch.Generator().manual_seed(1))]
    for folder in ("routed", "all"):
        (tmp_path / folder).mkdir()
    routed, _ = written("qwen3-moe", GPTQ, tmp_path / "routed", few)
    found, _ = written("qwen3-moe", "all_experts = true\n" + GPTQ, tmp_path / "all", few)
    without = [n for n, d in routed.calibrated.items() if any("without data" in r for r in d.remarks)]
    assert any("experts" in name for name in without)
    assert not [d.remarks for d in found.calibrated.values() if d.remarks]
    assert not found.remarks
    with open_quantized(tmp_path / "routed") as first, open_quantized(tmp_path / "all") as second:
        for name in first.names:  # what comes before the first experts has seen the same
            if "layers.0.self_attn" in name:
                one, other = first.read(name), second.read(name)
                same = torch.equal(one.codes, other.codes) if isinstance(one, QTensor) else torch.equal(one, other)  # type: ignore[union-attr, arg-type]  # both are what the first is
                assert same, name


@pytest.mark.parametrize("name", ["gpt-oss", "switch"])
@pytest.mark.parametrize(
    "more", ["correction = 0.5\n", 'inputs = "int8-tensor"\n'], ids=["correction", "static inputs"]
)
def test_all_experts_combine_with_corrections_and_static_inputs(name: str, more: str, tmp_path: Path) -> None:
    recipe = 'all_experts = true\nlayout = "halfbin"\n' + GPTQ.replace("int4-g32", "int8-channel") + more
    result, _ = written(name, recipe, tmp_path)
    assert any("expert" in tensor for tensor in result.calibrated)
    assert not [d.remarks for d in result.calibrated.values() if d.remarks]


def test_sites_that_no_text_reaches_are_rounded_without_data_and_named(tmp_path: Path) -> None:
    result, _ = written("llava", GPTQ.replace('remainder = "row"', 'layout = "halfbin"'), tmp_path)
    without = {name for name, d in result.calibrated.items() if d.remarks}
    assert any("vision_tower" in name for name in without)
    assert not any("language_model" in name for name in without)


def test_a_head_is_calibrated_too_when_a_rule_names_it(tmp_path: Path) -> None:
    rules = GPTQ + '[[rule]]\nmatch = "role:head"\nweights = "int4-g32"\nmethod = "gptq"\n'
    result, _ = written("llama", rules, tmp_path)
    assert result.calibrated["lm_head.weight"].output_error is not None


def quantized(folder: Path) -> Report:
    """By GPTQ, with the tokens in `folder`."""
    (folder / "mine.toml").write_text(GPTQ)
    tokens = folder / "tokens.npy"
    return hb.quantize(
        directory_of("llama"), folder / "out", recipe=folder / "mine.toml", calibration=tokens, evaluate=False
    )


def test_a_directory_run_reads_calibration_from_a_file_and_reports_it(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(3, 48, (8, 32)))
    report = quantized(tmp_path)
    assert report.calibration is not None
    assert report.calibration.num_tokens == 8 * 32
    assert json.loads((tmp_path / "out" / "report.json").read_text())["calibration"]["text"] == "tokens.npy"
    assert all(site.output_error is not None for site in report.quantized)


def test_tokens_of_another_model_are_refused_before_the_work(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.full((2, 8), 48))
    with pytest.raises(ModelError, match="token 48, but the model knows 48"):
        quantized(tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_model_that_reads_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HalfbinError, match="calibrates on text"):
        written("vit", GPTQ, tmp_path)


def test_a_block_that_is_called_twice_is_rounded_once_and_keeps_its_scales(tmp_path: Path) -> None:
    result, skeleton = written("albert", GPTQ + 'transforms = ["awq"]\n', tmp_path)
    assert not any(d.transformed for d in result.calibrated.values())
    ours = load_weights(skeleton, directory=tmp_path)
    expected = outputs(loaded("albert"), skeleton)
    assert float((outputs(ours, skeleton) - expected).norm() / expected.norm()) < 0.2


def test_a_model_that_calls_a_block_twice_corrects_nothing_and_says_so(tmp_path: Path) -> None:
    result, _ = written("albert", GPTQ + "correction = 0.5\n", tmp_path)
    assert [r for r in result.remarks if "not made up for" in r and "more than once" in r]
