"""Rotating whole models: the function stays, outliers go, and what cannot be turned is left and named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from halfbin.formats.checkpoint import open_checkpoint
from halfbin.formats.read import layout_named
from halfbin.models import Skeleton, load_as_client, load_weights, open_skeleton, untied
from halfbin.planning import make_plan, parse_recipe
from halfbin.run.execute import Written, execute
from models.zoo import ZOO

# One scale for each weight, in float32: rounding changes next to nothing, and what is left is the rotation.
EXACT = (
    'layout = "{}"\n[[rule]]\nmatch = "class:Conv1d"\nweights = "keep"\n'
    '[[rule]]\nmatch = "*"\nweights = "int8-g1-f32"\ntransforms = ["rotate"]\n'
)


def lively(name: str, folder: Path, *, outliers: float = 1.0) -> Path:
    """A model of the zoo whose norms and biases are not all 1 and 0, and some channels of whose stream are large."""
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    model_class, config = ZOO[name][0]()
    model = model_class(config)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.4, 0.4, generator=generator))
        embedding[:, 3] *= outliers
    model.save_pretrained(folder)
    return folder


def rotated(directory: Path, folder: Path, recipe: str, *, untie: bool = False) -> tuple[Written, Skeleton]:
    skeleton, rules = open_skeleton(directory), parse_recipe(recipe, source="test")
    ids = torch.randint(3, 48, (4, 40), generator=torch.Generator().manual_seed(0))
    with open_checkpoint(directory) as checkpoint:
        if untie:
            skeleton = untied(skeleton, checkpoint.names)
            checkpoint.add_copies(skeleton.copies)
        plan = make_plan(skeleton, checkpoint, rules, layout_named(rules.layout, skeleton.dtype))
        folder.mkdir()
        return execute(plan, checkpoint, folder, batches=[ids]), skeleton


def outputs(model: Any, skeleton: Skeleton) -> Tensor:
    ids = torch.randint(3, 48, (2, 24), generator=torch.Generator().manual_seed(9))
    both = {"decoder_input_ids": ids} if skeleton.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, **both)[0]
    return found


def changed(written: Written, tensor: str) -> bool:
    return written.transformed(tensor)


STREAMS = {  # a matrix that writes into the stream
    "llama": "model.layers.1.mlp.down_proj.weight",
    "qwen3": "model.layers.1.mlp.down_proj.weight",
    "opt": "model.decoder.layers.1.fc2.weight",
    "gpt-neox": "gpt_neox.layers.1.mlp.dense_4h_to_h.weight",
    "phi3": "model.layers.1.mlp.down_proj.weight",
    "mixtral": "model.layers.1.block_sparse_moe.experts.3.w2.weight",
    "qwen2-moe": "model.layers.1.mlp.experts.3.down_proj.weight",
    "granite-moe": "model.layers.1.block_sparse_moe.output_linear.weight",  # its forward has no use_cache to turn off
    "gpt-oss": "model.layers.1.mlp.experts.down_proj",
    "llama-tied": "model.layers.1.mlp.down_proj.weight",
    "gpt2": "transformer.h.1.mlp.c_proj.weight",
    "mamba": "backbone.layers.1.mixer.out_proj.weight",
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_is_turned_and_the_function_stays(name: str, tmp_path: Path) -> None:
    directory = lively(name, tmp_path / "float")
    written, skeleton = rotated(directory, tmp_path / "out", EXACT.format("halfbin"), untie=True)
    assert not any("stream" in remark for remark in written.remarks)
    assert changed(written, STREAMS[name])
    expected = outputs(load_weights(open_skeleton(directory)), skeleton)
    found = outputs(load_weights(skeleton, directory=tmp_path / "out"), skeleton)
    # Float32 through two layers, each number rounded a few times more than in the original.
    assert float((found - expected).norm() / expected.norm()) < 2e-5


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gemma2", "does not give turned outputs"),  # norms stand on the way into the stream
        ("bert-masked", "does not give the same"),  # norms stand in the stream
        ("t5", "not turned"),
        ("bart", "does not give the same"),
        ("zamba", "does not give turned outputs"),
        ("albert", "the model calls blocks twice"),
    ],
)
def test_a_stream_that_cannot_be_turned_is_left_and_named(name: str, why: str, tmp_path: Path) -> None:
    directory = lively(name, tmp_path / "float")
    written, skeleton = rotated(directory, tmp_path / "out", EXACT.format("halfbin"), untie=True)
    assert any(why in remark for remark in written.remarks)
    expected = outputs(load_weights(open_skeleton(directory)), skeleton)
    found = outputs(load_weights(skeleton, directory=tmp_path / "out"), skeleton)
    assert float((found - expected).norm() / expected.norm()) < 2e-5


def test_values_are_turned_head_by_head_where_the_stream_cannot_be(tmp_path: Path) -> None:
    directory = lively("gemma2", tmp_path / "float")
    written, _ = rotated(directory, tmp_path / "out", EXACT.format("halfbin"))
    assert changed(written, "model.layers.0.self_attn.v_proj.weight")
    assert changed(written, "model.layers.0.self_attn.o_proj.weight")
    assert not changed(written, "model.layers.0.mlp.down_proj.weight")


def test_a_tied_head_keeps_the_stream_as_it_is_unless_it_may_be_untied(tmp_path: Path) -> None:
    directory = lively("llama-tied", tmp_path / "float")
    written, _ = rotated(directory, tmp_path / "out", EXACT.format("halfbin"))
    assert any("--untie" in remark for remark in written.remarks)
    assert "lm_head.weight" not in written.calibrated


def test_plain_transformers_loads_an_untied_rotated_model(tmp_path: Path) -> None:
    directory = lively("llama-tied", tmp_path / "float")
    recipe = EXACT.format("compressed-tensors").replace("int8-g1-f32", "int8-g8")
    _, skeleton = rotated(directory, tmp_path / "out", recipe, untie=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    with open_checkpoint(tmp_path / "out") as checkpoint:
        first, second = (checkpoint.read(name) for name in ("model.embed_tokens.weight", "lm_head.weight"))
        assert not torch.equal(first, second)
    client = load_as_client(skeleton, tmp_path / "out", dtype=torch.float32)
    ours = load_weights(skeleton, directory=tmp_path / "out")
    assert torch.allclose(outputs(client, skeleton), outputs(ours, skeleton), atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_inputs_of_few_bits_lose_less_after_a_rotation(name: str, tmp_path: Path) -> None:
    directory = lively(name, tmp_path / "float", outliers=30.0)
    readers = {"llama": "*.[gu]*_proj", "opt": "*.fc1"}[name]
    recipe = (
        f'layout = "halfbin"\n[[rule]]\nmatch = "{readers}"\nweights = "int8-channel"\ninputs = "int4-token"\n'
        "transforms = {}\n"
    )
    errors = []
    for number, transforms in enumerate(('["rotate"]', "[]")):
        _, skeleton = rotated(directory, tmp_path / str(number), recipe.format(transforms))
        expected = outputs(load_weights(open_skeleton(directory)), skeleton)
        found = outputs(load_weights(skeleton, directory=tmp_path / str(number)), skeleton)
        errors.append(float((found - expected).norm() / expected.norm()))
    assert errors[0] < 0.7 * errors[1]
