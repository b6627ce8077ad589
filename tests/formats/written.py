"""A tiny language model, quantized by a table of schemes and written by hand: what the tests of layouts load again."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from halfbin.formats import SafetensorsWriter, WeightLayout
from halfbin.tensor import InputQuantizer, QTensor, Scheme, dequantize, quantize

NUM_TOKENS = 24


def tiny_llama(*, tied: bool = False, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Hidden 256, 2 layers, 512 tokens, random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=512,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def projections(model: LlamaForCausalLM) -> list[str]:
    """Tensor names of every Linear but the head."""
    return [name for name in model.state_dict() if name.endswith("proj.weight")]


@dataclass
class Written:
    """What was written, and the model that it must behave like."""

    directory: Path
    quantized: dict[str, QTensor]
    reference: LlamaForCausalLM
    parts: dict[str, Tensor] = field(default_factory=dict)
    input_quantizers: Mapping[str, InputQuantizer] = field(default_factory=dict)


def write_model(
    directory: Path,
    model: LlamaForCausalLM,
    layout: WeightLayout,
    scheme_of: Callable[[str], Scheme | None],
    ignored: tuple[str, ...] = ("lm_head",),
    input_quantizers: Mapping[str, InputQuantizer] | None = None,
) -> Written:
    """Quantize each tensor that `scheme_of` gives a scheme, and write a directory that a client can load."""
    hows = input_quantizers or {}
    inputs = {name: how.inputs for name, how in hows.items()}
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    quantized = {name: quantize(w, scheme) for name, w in weights.items() if (scheme := scheme_of(name)) is not None}
    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    parts: dict[str, Tensor] = {}
    for name, value in weights.items():
        q = quantized.get(name)
        if q is None:
            specs[name], parts[name] = (value.dtype, tuple(value.shape)), value.contiguous()
        else:
            specs |= layout.tensors(name, q.shape, q.scheme, inputs.get(name))
            parts |= layout.encode(name, q, hows.get(name))
    with SafetensorsWriter(directory / "model.safetensors", specs, {"format": "pt"}) as writer:
        for name, value in parts.items():
            writer.write(name, value)
    config = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    written = layout.config({name: (q.scheme, q.shape) for name, q in quantized.items()}, ignored, inputs or None)
    if written:
        config["quantization_config"] = written
    (directory / "config.json").write_text(json.dumps(config))
    return Written(directory, quantized, _with_values(model, quantized), parts, hows)


def _with_values(model: LlamaForCausalLM, quantized: dict[str, QTensor]) -> LlamaForCausalLM:
    reference = copy.deepcopy(model)
    for name, q in quantized.items():
        parameter = reference.get_parameter(name)
        parameter.data = dequantize(q, parameter.dtype)
    return reference


def tokens() -> Tensor:
    """Input ids [1, 24]."""
    return (torch.arange(NUM_TOKENS) * 37 % 512)[None]
