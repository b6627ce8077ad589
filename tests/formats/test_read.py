from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from halfbin.errors import FormatError, RecipeError
from halfbin.formats import SafetensorsWriter, layout_named, open_quantized


def directory(path: Path, config: object, tensors: dict[str, Tensor] | None = None) -> Path:
    tensors = (
        {"a.weight": torch.ones(2, 3, dtype=torch.bfloat16), "a.steps": torch.ones(1).long()}
        if tensors is None
        else tensors
    )
    specs = {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    with SafetensorsWriter(path / "model.safetensors", specs, {}) as writer:
        for name, value in tensors.items():
            writer.write(name, value)
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_float_checkpoint_is_read_as_it_is(tmp_path: Path) -> None:
    with open_quantized(directory(tmp_path, {"model_type": "llama", "quantization_config": None})) as checkpoint:
        assert checkpoint.layout_name == "safetensors" and checkpoint.path == tmp_path
        assert checkpoint.config["model_type"] == "llama"
        assert (checkpoint.scheme("a.weight"), checkpoint.shape("a.weight")) == (None, (2, 3))
        assert (checkpoint.bytes_of("a.weight"), checkpoint.num_bytes) == (12, 20)
        values = checkpoint.read("a.weight")
        assert isinstance(values, Tensor) and values.dtype == torch.bfloat16
        assert checkpoint.read_values("a.weight").dtype == torch.float32
        assert checkpoint.read_values("a.steps").dtype == torch.int64


@pytest.mark.parametrize(
    ("config", "words"),
    [
        pytest.param(
            {"quantization_config": {"quant_method": "gptq"}}, "'gptq', which is not read yet", id="other method"
        ),
        pytest.param({"quantization_config": {"bits": 4}}, "None", id="no method"),
        pytest.param({"quantization_config": [1]}, "must be a table", id="no table"),
        pytest.param({"compression_config": {"format": "x"}}, "before 0.5", id="older key"),
        pytest.param({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "awq", id="inside text_config"),
        pytest.param([], "object", id="no object"),
    ],
)
def test_a_layout_that_is_not_known_is_refused(tmp_path: Path, config: object, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        open_quantized(directory(tmp_path, config))


def test_codes_without_a_config_are_not_taken_for_weights(tmp_path: Path) -> None:
    tensors = {"a.weight_packed": torch.ones(2, 3, dtype=torch.int32)}
    with pytest.raises(FormatError, match="looks quantized"):
        open_quantized(directory(tmp_path, {}, tensors))


def test_a_name_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with (
        open_quantized(directory(tmp_path, {})) as checkpoint,
        pytest.raises(FormatError, match=r"no tensor 'b\.weight'"),
    ):
        checkpoint.read("b.weight")


def test_a_directory_without_config_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"config\.json does not exist"):
        open_quantized(tmp_path)


def test_layouts_have_the_names_of_the_command_line() -> None:
    for name in ("compressed-tensors", "halfbin", "safetensors"):
        assert layout_named(name).name == name
    with pytest.raises(RecipeError, match="compressed-tensors, halfbin, safetensors"):
        layout_named("gguf")
