"""A recipe resolved on a model: every decision has its reason, and no weight is read for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from halfbin.errors import HalfbinError, ModelError, RecipeError, SchemeError
from halfbin.formats.checkpoint import Checkpoint, open_checkpoint
from halfbin.formats.read import layout_named
from halfbin.models import open_skeleton
from halfbin.planning import Plan, SitePlan, make_plan, parse_recipe
from halfbin.tensor import PerChannel, PerGroup, PerToken, Scheme
from models import zoo

EVERY = pytest.mark.parametrize("name", zoo.NAMES)


def plan(
    name: str,
    weights: str = "int4-g16",
    *,
    match: str = "*",
    remainder: str = "row",
    layout: str = "halfbin",
    source: Path | None = None,
    more: str = "",
) -> Plan:
    text = f'remainder = "{remainder}"\n{more}[[rule]]\nmatch = "{match}"\nweights = "{weights}"\n'
    directory = source or zoo.directory_of(name)
    with open_checkpoint(directory) as checkpoint:
        skeleton = open_skeleton(directory)
        return make_plan(skeleton, checkpoint, parse_recipe(text, source="mine"), layout_named(layout, skeleton.dtype))


def at(found: Plan, name: str) -> SitePlan:
    return next(s for s in found.sites if s.site.name == name)


def scheme(found: SitePlan) -> Scheme:
    assert isinstance(found.weights, Scheme)
    return found.weights


@EVERY
def test_no_weight_is_read_and_every_tensor_is_counted_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Checkpoint, "read", read)
    monkeypatch.setattr(Checkpoint, "read_rows", read)
    found = plan(name)
    with open_checkpoint(zoo.directory_of(name)) as checkpoint:
        assert {s.site.tensor for s in found.sites} | set(found.others) == set(checkpoint.names)
        assert not {s.site.tensor for s in found.sites} & set(found.others)
        assert found.bytes_before == sum(checkpoint.info(n).num_bytes for n in checkpoint.names)
    assert found.bytes_after < found.bytes_before
    assert all(s.reason for s in found.sites)


@EVERY
def test_embeddings_heads_and_routers_stay_and_say_why(name: str) -> None:
    for planned in plan(name).sites:
        protected = planned.site.role in ("embedding", "head", "router")
        assert planned.quantized != protected
        assert not protected or "kept unless a rule names it" in planned.reason


def test_a_last_group_that_would_be_short_becomes_what_the_recipe_says() -> None:
    name = "model.layers.0.mlp.down_proj"  # in_features=64
    tail, row = plan("llama", "int4-g24", remainder="tail"), plan("llama", "int4-g24", remainder="row")
    assert scheme(at(tail, name)).granularity == PerGroup(24)
    assert scheme(at(row, name)).granularity == PerChannel(0)
    for found in (tail, row):
        assert "in_features=64 leaves 16 columns after groups of 24" in at(found, name).reason
    with pytest.raises(SchemeError, match="try g16") as caught:
        plan("llama", "int4-g24", remainder="refuse")
    assert "model.layers.0" in str(caught.value)


def test_transposed_weights_have_their_groups_along_their_inputs() -> None:
    found = scheme(at(plan("gpt2"), "transformer.h.0.attn.c_attn"))
    assert found.granularity == PerGroup(16, axis=0)
    assert scheme(at(plan("gpt2", "int8-channel"), "transformer.h.0.attn.c_attn")).granularity == PerChannel(1)


def test_a_stack_of_experts_has_a_scale_for_every_row_of_each() -> None:
    stored = scheme(at(plan("granite-moe", "int8-channel"), "model.layers.0.block_sparse_moe.input_linear"))
    assert stored.granularity == PerToken()
    transposed = at(plan("gpt-oss", "int8-channel"), "model.layers.0.mlp.experts.down_proj")
    assert scheme(transposed).granularity == PerGroup(transposed.site.shape[1], axis=1)


@pytest.mark.parametrize(
    ("name", "site", "words"),
    [
        pytest.param("gpt2", "transformer.h.0.attn.c_attn", "transposed", id="Conv1D"),
        pytest.param("mamba", "backbone.layers.0.mixer.conv1d", "Linear modules only", id="convolution"),
        pytest.param("gpt-oss", "model.layers.0.mlp.experts.down_proj", "not as a stack", id="stack of experts"),
    ],
)
def test_what_the_layout_cannot_hold_stays_with_the_reason_and_the_way_out(name: str, site: str, words: str) -> None:
    left = at(plan(name, layout="compressed-tensors"), site)
    assert left.weights is None
    assert words in left.reason
    assert "--format halfbin" in left.reason
    assert at(plan(name), site).quantized


def test_a_tied_head_stays_with_clients_and_is_counted_once() -> None:
    for layout, quantized in (("compressed-tensors", False), ("halfbin", True)):
        found = plan("llama-tied", "int8-channel", match="role:embedding", layout=layout)
        (embedding,) = (s for s in found.sites if s.site.role == "embedding")
        assert embedding.quantized == quantized
        assert [s.site.tensor for s in found.sites].count(embedding.site.tensor) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_scales_are_stored_in_the_models_type_unless_stated(dtype: torch.dtype) -> None:
    source = zoo.directory_of("llama", dtype)
    name = "model.layers.0.mlp.up_proj"
    assert scheme(at(plan("llama", source=source), name)).scale_format.dtype == dtype
    assert scheme(at(plan("llama", "int4-g16-f16", source=source), name)).scale_format.dtype == torch.float16


def test_others_are_cast_when_asked() -> None:
    found = plan("llama", more='others = "bf16"\n')
    assert {dtype for dtype, _ in found.others.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("match", "words"),
    [
        pytest.param("*.up_prj", "matches no site", id="misspelt"),
        pytest.param("lm_hea*", "lm_head is protected", id="protected"),
    ],
)
def test_a_rule_for_nothing_is_refused(match: str, words: str) -> None:
    with pytest.raises(RecipeError, match="matches no site") as caught:
        plan("llama", match=match)
    assert words in str(caught.value)


def test_schemes_that_no_client_reads_side_by_side_are_refused_beforehand() -> None:
    text = '[[rule]]\nmatch = "*.up_proj"\nweights = "int4-g16-asym"\n[[rule]]\nmatch = "*"\nweights = "int8-channel"\n'
    directory = zoo.directory_of("llama")
    with open_checkpoint(directory) as checkpoint, pytest.raises(HalfbinError, match="beside"):
        make_plan(
            open_skeleton(directory),
            checkpoint,
            parse_recipe(text, source="mine"),
            layout_named("compressed-tensors", torch.float32),
        )


def test_a_model_that_is_quantized_already_is_refused(tmp_path: Path) -> None:
    for path in zoo.directory_of("llama").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = (tmp_path / "config.json").read_text().rstrip().removesuffix("}")
    (tmp_path / "config.json").write_text(config + ', "quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(ModelError, match="quantized already .gptq."):
        plan("llama", source=tmp_path)


def test_the_json_of_a_plan_has_what_programs_ask_for() -> None:
    found = plan("llama")
    told = found.to_json()
    assert told["output_bytes"] == found.bytes_after
    assert told["peak_memory_bytes"] > 0
    assert len(told["sites"]) == len(found.sites)
    assert {"name", "weights", "bytes_before", "bytes_after", "reason"} <= set(told["sites"][0])
