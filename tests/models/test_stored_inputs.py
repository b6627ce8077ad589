"""A written directory with quantized inputs, loaded by halfbin's own readers, computes what was planned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from formats.written import projections, tiny_llama, tokens, write_model
from halfbin.errors import ModelError
from halfbin.formats import COMPRESSED_TENSORS, HALFBIN, WeightLayout, open_quantized
from halfbin.models import load_weights, open_skeleton, quantize_stored_inputs
from halfbin.models.skeleton import Skeleton, Target
from halfbin.nn import quantize_inputs
from halfbin.tensor import parse_inputs, parse_scheme


@pytest.mark.parametrize("layout", [HALFBIN, COMPRESSED_TENSORS], ids=lambda layout: layout.name)
@torch.no_grad()
def test_what_was_written_is_what_runs(tmp_path: Path, layout: WeightLayout) -> None:
    model = tiny_llama()
    names = projections(model)
    chosen = dict.fromkeys(names, parse_scheme("int8-channel"))
    own = layout is HALFBIN
    inputs = {
        name: parse_inputs("int8-token-outliers2" if own and "up_proj" in name else "int8-token").quantizer()
        if "self_attn" not in name
        else parse_inputs("int8-tensor-asym").calibrated(-2.0, 2.5)
        for name in names
        if "o_proj" not in name
    }
    written = write_model(tmp_path, model, layout, chosen.get, input_quantizers=inputs)
    with quantize_inputs(written.reference, {name.removesuffix(".weight"): how for name, how in inputs.items()}):
        expected = written.reference(tokens()).logits
    weight_only = written.reference(tokens()).logits
    skeleton = open_skeleton(tmp_path)
    assert torch.equal(load_weights(skeleton)(tokens()).logits, expected)
    assert not torch.equal(weight_only, expected)
    with (
        open_quantized(tmp_path) as checkpoint,
        quantize_stored_inputs(written.reference, skeleton, checkpoint) as found,
    ):
        assert torch.equal(written.reference(tokens()).logits, expected)
        assert not found.idle
    assert torch.equal(written.reference(tokens()).logits, weight_only)


def test_a_weight_that_is_merged_on_loading_has_no_inputs_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from halfbin.models import stored_inputs

    def merged(skeleton: Skeleton, names: object) -> dict[str, Target]:
        return {name: Target("model.layers.0.mlp.experts.gate_up_proj", unchanged=False)}

    model = tiny_llama()
    name = projections(model)[0]
    how = {name: parse_inputs("int8-token").quantizer()}
    write_model(tmp_path, model, HALFBIN, {name: parse_scheme("int8-channel")}.get, input_quantizers=how)
    monkeypatch.setattr(stored_inputs, "targets", merged)
    with open_quantized(tmp_path) as checkpoint, pytest.raises(ModelError, match="no layer's weight alone"):
        quantize_stored_inputs(model, open_skeleton(tmp_path), checkpoint)
