"""A Hugging Face directory opened without its weights: the model's class and modules, on no memory.

halfbin keeps no table of architectures. The class comes from the directory's own `config.json`, its modules are built on
the meta device, and which checkpoint tensor becomes which parameter is asked of transformers' own loading rules.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from halfbin.errors import ModelError

CONFIG_BYTES_MAX = 16 * 2**20  # a config.json is a few KB; one of more than this is no config


@dataclass(frozen=True, slots=True, eq=False)
class Skeleton:
    """A model without weights.

    path:   the directory it came from.
    config: transformers' configuration object.
    model:  the model on the meta device: modules, names and shapes, no numbers.
    copies: tensors that the directory does not hold, by name, each with the one that it is read from; see `untied`.
    """

    path: Path
    config: Any
    model: nn.Module
    copies: Mapping[str, str] = field(default_factory=dict)

    @property
    def model_class(self) -> type[Any]:
        """The transformers class that the checkpoint is loaded into."""
        return type(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """The type that clients load the weights in by default."""
        dtype = getattr(self.config, "dtype", None)
        return dtype if isinstance(dtype, torch.dtype) else torch.float32

    @property
    def reads_text(self) -> bool:
        """Whether token ids are all that the model needs: no picture, no sound, no second text for a decoder."""
        main = getattr(self.model, "main_input_name", "input_ids")
        return main == "input_ids" and not getattr(self.config, "is_encoder_decoder", False)

    @property
    def generates(self) -> bool:
        """Whether the model predicts the next token from those before, so that perplexity means something."""
        predicts = "ForCausalLM" in self.model_class.__name__ or bool(getattr(self.model, "can_generate", bool)())
        return predicts and self.reads_text


def read_config(directory: Path) -> dict[str, Any]:
    """The directory's `config.json` as plain values.

    Raises:
      ModelError: it is missing, too large, or no JSON object.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ModelError(f"{directory} has no config.json; expected a Hugging Face model directory")
    if path.stat().st_size > CONFIG_BYTES_MAX:
        raise ModelError(f"{path} has {path.stat().st_size} bytes; a config has a few thousand: is it another file?")
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}; check its permissions and the disk") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds a {type(config).__name__}; expected an object with the model's configuration")
    return config


def open_skeleton(directory: Path, *, trust_remote_code: bool = False) -> Skeleton:
    """Build the model that `directory` describes on the meta device; no weight is read.

    Args:
      directory: a Hugging Face model directory.
      trust_remote_code: run Python code that the directory brings along. Never set unless the user said so.

    Raises:
      ModelError: no such model class, or the model needs its own code.
    """
    raw = read_config(directory)
    named = _named_class(raw)
    brought = raw.get("auto_map")
    if brought and named is None and not trust_remote_code:
        files = ", ".join(map(str, brought.values() if isinstance(brought, dict) else [brought]))
        raise ModelError(
            f"{directory.name} needs its own Python code ({files}), which halfbin "
            "does not run unasked; read that code, then pass --trust-remote-code if you trust it"
        )
    use_remote = trust_remote_code and named is None
    try:
        config = transformers.AutoConfig.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=use_remote
        )
        config = _without_quantization(config)
        with torch.device("meta"):
            model = _build(config, named, use_remote)
    except Exception as error:  # transformers raises whatever a config's values lead to
        raise ModelError(
            f"{directory / 'config.json'} does not describe a model that transformers {transformers.__version__} can "
            f"build: {type(error).__name__}: {error}; take the file from where the weights came from, or another transformers"
        ) from error
    return Skeleton(directory, config, model)


def build_like(skeleton: Skeleton, config: Any) -> nn.Module:
    """A model of the skeleton's class from another configuration, on torch's default device."""
    make: Callable[[Any], nn.Module] = skeleton.model_class
    return make(config)


def _without_quantization(config: Any) -> Any:
    """The config of the float model; a quantized checkpoint's tensors are joined back by `formats`, not by transformers."""
    for part in (config, getattr(config, "text_config", None)):
        if part is not None and hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def _named_class(raw: dict[str, Any]) -> type[nn.Module] | None:
    """The transformers class that a config names first; None where transformers has no model of that name."""
    named = raw.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    found = getattr(transformers, first, None) if isinstance(first, str) else None
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def _build(config: Any, named: type[nn.Module] | None, trust_remote_code: bool) -> nn.Module:
    if named is not None:
        return named(config)
    remote = getattr(config, "auto_map", None) or {}
    mapping = transformers.AutoModelForCausalLM._model_mapping
    causal = type(config) in mapping or "AutoModelForCausalLM" in remote
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    built: nn.Module = auto.from_config(config, trust_remote_code=trust_remote_code)
    return built


@dataclass(frozen=True, slots=True)
class Target:
    """Where a checkpoint tensor goes: the parameter's name, and whether it arrives there as it is, not merged or split.

    pattern: of transformers' conversion that changes it on the way; None: none does.
    """

    parameter: str
    unchanged: bool
    pattern: str | None = None


def targets(skeleton: Skeleton, names: Iterable[str]) -> dict[str, Target]:
    """For each checkpoint tensor, the parameter it is loaded into; by transformers' own renamings and conversions."""
    model: Any = skeleton.model
    transforms = get_model_conversion_mapping(model) if isinstance(model, transformers.PreTrainedModel) else []
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    prefix = getattr(model, "base_model_prefix", None)
    state = model.state_dict()
    names = list(names)
    found = {}
    for name in sorted(
        names, key=dot_natural_key
    ):  # as transformers does: some renamings wait for a name that tells them
        parameter, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if parameter not in state and name in state:  # renamed in vain: transformers then takes the name as it is
            parameter, pattern = rename_source_key(name, [], [], prefix, state)
        found[name] = Target(parameter, pattern is None, pattern)
    return {name: found[name] for name in names}
