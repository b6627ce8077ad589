from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbin.errors import FormatError, ModelError
from halfbin.formats.checkpoint import open_checkpoint
from halfbin.models import open_skeleton, read_config, targets
from models import zoo

EVERY = pytest.mark.parametrize("name", zoo.NAMES)


def written(directory: Path, config: Any) -> Path:
    (directory / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return directory


@EVERY
def test_a_skeleton_is_the_saved_class_without_memory_and_needs_no_weights(name: str, tmp_path: Path) -> None:
    shutil.copyfile(zoo.directory_of(name) / "config.json", tmp_path / "config.json")
    skeleton = open_skeleton(tmp_path)
    assert skeleton.model_class is zoo.ZOO[name][0]()[0]
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


@EVERY
def test_every_stored_tensor_has_a_parameter_and_every_parameter_a_tensor(name: str) -> None:
    skeleton = open_skeleton(zoo.directory_of(name))
    with open_checkpoint(skeleton.path) as checkpoint:
        reached = {target.parameter for target in targets(skeleton, checkpoint.names).values()}
    state = skeleton.model.state_dict()
    assert reached <= set(state)
    tied: Any = skeleton.model.all_tied_weights_keys
    assert set(state) - reached <= set(tied)


def test_targets_come_in_the_order_asked_for() -> None:
    skeleton = open_skeleton(zoo.directory_of("llama"))
    names = ["model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"]
    assert list(targets(skeleton, names)) == names


def test_a_merged_tensor_is_told_from_one_that_arrives_as_it_is() -> None:
    skeleton = open_skeleton(zoo.directory_of("mixtral"))
    merged, renamed = (
        "model.layers.0.block_sparse_moe.experts.0.w1.weight",
        "model.layers.0.block_sparse_moe.gate.weight",
    )
    found = targets(skeleton, [merged, renamed])
    assert not found[merged].unchanged
    assert found[renamed].unchanged
    assert found[renamed].parameter == "model.layers.0.mlp.gate.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_the_type_is_the_configs(dtype: torch.dtype) -> None:
    assert open_skeleton(zoo.directory_of("llama", dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("name", "generates", "reads_text"),
    [
        ("llama", True, True),
        ("mamba", True, True),
        ("bert", False, True),
        ("bert-masked", False, True),
        ("t5", False, False),
        ("bart", False, False),
        ("vit", False, False),
    ],
)
def test_only_a_model_of_the_next_token_has_a_perplexity(name: str, generates: bool, reads_text: bool) -> None:
    skeleton = open_skeleton(zoo.directory_of(name))
    assert (skeleton.generates, skeleton.reads_text) == (generates, reads_text)


def test_a_directory_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no config.json; expected a Hugging Face model directory"):
        open_skeleton(tmp_path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        pytest.param("{", "is not valid JSON", id="cut"),
        pytest.param("\x00\xff", "is not valid JSON", id="binary"),
        pytest.param("[" * 100_000, "is not valid JSON", id="deep"),
        pytest.param("[]", "holds a list", id="list"),
        pytest.param("{}", "does not describe a model", id="empty"),
        pytest.param('{"model_type": "no-such-model"}', "does not describe a model.*no-such-model", id="unknown"),
        pytest.param('{"model_type": 5}', "does not describe a model", id="number"),
        pytest.param('{"model_type": "llama", "hidden_size": "wide"}', "does not describe a model", id="wrong type"),
        pytest.param('{"architectures": {"a": 1}}', "does not describe a model", id="architectures an object"),
        pytest.param('{"architectures": [7]}', "does not describe a model", id="architectures a number"),
        pytest.param('{"architectures": ["set_seed"]}', "does not describe a model", id="architectures a function"),
    ],
)
def test_a_broken_config_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ModelError, match=f"config.json.*{complaint}"):
        open_skeleton(written(tmp_path, text))


def test_a_config_as_large_as_weights_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(17 * 2**20)
    with pytest.raises(ModelError, match="is it another file"):
        read_config(tmp_path)


def test_an_architecture_that_is_no_model_falls_back_to_the_configs_own(tmp_path: Path) -> None:
    config = json.loads((zoo.directory_of("llama") / "config.json").read_bytes())
    for named in ("set_seed", "AutoConfig", "LlamaForEverything", {"a": 1}):
        found = open_skeleton(written(tmp_path, config | {"architectures": [named]}))
        assert found.model_class.__name__ == "LlamaForCausalLM"


CODE = """
from pathlib import Path
Path(r"{mark}").touch()
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A model that brings its own code, and the file that the code leaves when it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    directory, mark = tmp_path / "model", tmp_path / "it-ran"
    directory.mkdir()
    (directory / "own.py").write_text(CODE.format(mark=mark))
    config = json.loads((zoo.directory_of("llama") / "config.json").read_bytes())
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    written(directory, config | {"model_type": "own", "architectures": ["OwnModel"], "auto_map": auto_map})
    return directory, mark


def test_code_that_a_model_brings_is_not_run_unasked(with_code: tuple[Path, Path]) -> None:
    directory, mark = with_code
    with pytest.raises(ModelError, match=r"own.OwnConfig.*pass --trust-remote-code"):
        open_skeleton(directory)
    assert not mark.exists()


def test_code_that_a_model_brings_runs_when_trusted(with_code: tuple[Path, Path]) -> None:
    directory, mark = with_code
    skeleton = open_skeleton(directory, trust_remote_code=True)
    assert skeleton.model_class.__name__ == "OwnModel"
    assert mark.exists()


def test_a_known_architecture_does_not_open_the_door_to_code(with_code: tuple[Path, Path]) -> None:
    directory, mark = with_code
    config = read_config(directory)
    with pytest.raises(ModelError):
        open_skeleton(written(directory, config | {"architectures": ["LlamaForCausalLM"]}))
    assert not mark.exists()


def test_an_auto_map_of_another_kind_is_refused_all_the_same(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="needs its own Python code"):
        open_skeleton(written(tmp_path, {"model_type": "llama", "auto_map": ["own.OwnModel"]}))


def test_a_directory_without_weights_says_what_lies_there(tmp_path: Path) -> None:
    shutil.copyfile(zoo.directory_of("llama") / "config.json", tmp_path / "config.json")
    with pytest.raises(FormatError, match=r"no weights; expected model.safetensors, found config.json"):
        open_checkpoint(tmp_path)


def test_the_config_of_a_quantized_model_opens_as_the_float_model(tmp_path: Path) -> None:
    config = json.loads((zoo.directory_of("llama") / "config.json").read_bytes())
    skeleton = open_skeleton(written(tmp_path, config | {"quantization_config": {"quant_method": "halfbin"}}))
    assert not hasattr(skeleton.config, "quantization_config")
