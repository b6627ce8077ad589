from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from formats.written import projections, tiny_llama, tokens, write_model
from halfbin.errors import DataError, FormatError
from halfbin.formats import PlainLayout, open_quantized
from halfbin.tensor import QTensor, parse_inputs, parse_scheme


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dequantized_weights_load_as_an_ordinary_model(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_llama(dtype=dtype)
    scheme = parse_scheme("nf4-g64")
    chosen = dict.fromkeys(projections(model), scheme)
    written = write_model(tmp_path, model, PlainLayout(dtype), chosen.get)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(info.values())
    for name, value in written.reference.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    if dtype == torch.float32:
        with torch.no_grad():
            assert torch.equal(loaded(tokens()).logits, written.reference(tokens()).logits)
    with open_quantized(tmp_path) as checkpoint:
        assert checkpoint.layout_name == "safetensors"
        assert sorted(checkpoint.names) == sorted(written.parts)
        assert all(checkpoint.scheme(name) is None for name in checkpoint.names)
        assert sum(map(checkpoint.bytes_of, checkpoint.names)) == checkpoint.num_bytes


def test_values_beyond_the_type_are_refused() -> None:
    scheme = parse_scheme("int4-channel")
    q = QTensor(torch.full((1, 2), 7, dtype=torch.int8), torch.full((1, 1), 1e5), None, scheme)
    with pytest.raises(DataError, match="bfloat16"):
        PlainLayout(torch.float16).encode("a.weight", q)


def test_codes_cannot_be_read_back() -> None:
    parts: dict[str, torch.Tensor] = {}
    with pytest.raises(FormatError, match="dequantized"):
        PlainLayout().decode("a.weight", parse_scheme("int4"), (1, 1), parts.__getitem__)


def test_types_that_are_no_float_are_refused() -> None:
    assert PlainLayout(torch.int8).refuses("Linear", (4, 4), parse_scheme("int4")) is not None
    assert PlainLayout(torch.float16).refuses("Linear", (4, 4), parse_scheme("int4")) is None


def test_plain_weights_cannot_say_that_inputs_are_quantized() -> None:
    refusal = PlainLayout().refuses("Linear", (4, 4), parse_scheme("int8-channel"), parse_inputs("int8-token"))
    assert refusal is not None and "use --format compressed-tensors or halfbin" in refusal
