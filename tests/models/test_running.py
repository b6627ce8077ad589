"""A checkpoint that is run with its codes gives what its dequantized weights give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from halfbin.formats.checkpoint import open_checkpoint
from halfbin.formats.read import layout_named
from halfbin.models import load_weights, open_skeleton
from halfbin.models.running import Running, load_running
from halfbin.nn import LLMInt8Linear, QuantConv1D, QuantEmbedding, QuantInputLinear, QuantLinear
from halfbin.planning import make_plan, parse_recipe
from halfbin.run.execute import execute
from models.zoo import directory_of

INT4 = 'weights = "int4-g16"\n'
EVERYTHING = f'layout = "halfbin"\n[[rule]]\nmatch = "*"\n{INT4}'


def written(name: str, recipe: str, folder: Path) -> Any:
    """Carry a recipe out on a model of the zoo; gives its skeleton."""
    skeleton, rules = open_skeleton(directory_of(name)), parse_recipe(recipe, source="test")
    batches = [torch.randint(3, 48, (4, 32), generator=torch.Generator().manual_seed(0))]
    with open_checkpoint(skeleton.path) as checkpoint:
        plan = make_plan(skeleton, checkpoint, rules, layout_named(rules.layout, skeleton.dtype))
        execute(plan, checkpoint, folder, batches=batches)
    return skeleton


def outputs(model: Any, skeleton: Any) -> Tensor:
    ids = torch.randint(3, 48, (2, 24), generator=torch.Generator().manual_seed(9))
    both = {"decoder_input_ids": ids} if skeleton.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, **both)[0]
    return found


def kinds(running: Running) -> set[type]:
    return {type(m) for m in running.model.modules()} & {
        LLMInt8Linear,
        QuantConv1D,
        QuantEmbedding,
        QuantInputLinear,
        QuantLinear,
    }


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "bert-masked", "t5", "mixtral", "gpt-oss", "mamba"])
def test_codes_compute_what_dequantized_weights_compute(name: str, tmp_path: Path) -> None:
    skeleton = written(name, EVERYTHING + f'[[rule]]\nmatch = "role:embedding"\n{INT4}', tmp_path)
    running = load_running(skeleton, tmp_path, dtype=torch.float32)
    expected = outputs(load_weights(skeleton, directory=tmp_path), skeleton)
    assert not running.model.training
    # The reference multiplies the same floats; experts are run together here and one by one there.
    torch.testing.assert_close(outputs(running.model, skeleton), expected, rtol=1e-4, atol=1e-4)
    assert not any(p.is_meta for p in (*running.model.parameters(), *running.model.buffers()))
    assert kinds(running)


def test_layers_hold_their_kernels_layout_alone(tmp_path: Path) -> None:
    skeleton = written("llama", EVERYTHING.replace("int4-g16", "int4-channel"), tmp_path)
    running = load_running(skeleton, tmp_path)
    layers = [m for m in running.model.modules() if isinstance(m, QuantLinear)]
    assert layers
    for layer in layers:
        assert (layer._buffers.get("codes") is None) == (layer.kernel.name != "reference")
    assert running.model.state_dict().keys() >= {"model.layers.0.mlp.up_proj.codes", "model.layers.0.mlp.up_proj.scale"}


def test_a_tied_table_is_held_once_as_codes(tmp_path: Path) -> None:
    skeleton = written("llama-tied", EVERYTHING + f'[[rule]]\nmatch = "role:embedding"\n{INT4}', tmp_path)
    running = load_running(skeleton, tmp_path)
    model: Any = running.model
    assert isinstance(model.lm_head, QuantLinear) and isinstance(model.model.embed_tokens, QuantEmbedding)
    assert model.lm_head.codes.data_ptr() == model.model.embed_tokens.codes.data_ptr()
    assert running.dequantized == {}


def test_what_is_merged_when_it_is_loaded_is_dequantized_and_named(tmp_path: Path) -> None:
    skeleton = written("mixtral", EVERYTHING, tmp_path)
    running = load_running(skeleton, tmp_path)
    assert len(running.dequantized) == 24
    assert all("experts" in name and "merged" in reason for name, reason in running.dequantized.items())
    assert kinds(running) == {QuantLinear}


@pytest.mark.parametrize(
    ("inputs", "kind"),
    [
        ("int8-token", QuantInputLinear),
        ("int8-tensor", QuantInputLinear),
        ("int8-token-outliers6", LLMInt8Linear),
    ],
)
def test_inputs_are_rounded_as_the_checkpoint_says(inputs: str, kind: type, tmp_path: Path) -> None:
    rule = f'layout = "halfbin"\n[[rule]]\nmatch = "*"\nweights = "int8-channel"\ninputs = "{inputs}"\n'
    skeleton = written("llama", rule, tmp_path)
    running = load_running(skeleton, tmp_path)
    assert kinds(running) == {kind}
    expected = outputs(load_weights(skeleton, directory=tmp_path), skeleton)
    torch.testing.assert_close(outputs(running.model, skeleton), expected, rtol=1e-3, atol=1e-3)


def test_a_float_model_runs_as_it_is() -> None:
    skeleton = open_skeleton(directory_of("llama"))
    running = load_running(skeleton)
    assert torch.equal(outputs(running.model, skeleton), outputs(load_weights(skeleton), skeleton))
    assert kinds(running) == set()
