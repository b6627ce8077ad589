"""Llama checkpoints of random bf16 weights, for benchmarks that look at sizes and speed alone."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from halfbin.formats.safetensors import SafetensorsWriter


@dataclass(frozen=True)
class Shape:
    """Of a Llama; untied head."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int
    vocabulary: int = 32000

    @property
    def layer(self) -> dict[str, tuple[int, ...]]:
        """Tensors of one layer."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj.weight": (self.hidden, self.hidden),
            "self_attn.k_proj.weight": (kv, self.hidden),
            "self_attn.v_proj.weight": (kv, self.hidden),
            "self_attn.o_proj.weight": (self.hidden, self.hidden),
            "mlp.gate_proj.weight": (self.intermediate, self.hidden),
            "mlp.up_proj.weight": (self.intermediate, self.hidden),
            "mlp.down_proj.weight": (self.hidden, self.intermediate),
            "input_layernorm.weight": (self.hidden,),
            "post_attention_layernorm.weight": (self.hidden,),
        }

    @property
    def layer_bytes(self) -> int:
        """Of one layer in bf16."""
        return 2 * sum(math.prod(shape) for shape in self.layer.values())

    @property
    def end_bytes(self) -> int:
        """Of the table and the head in bf16."""
        return 4 * self.vocabulary * self.hidden


TINYLLAMA = Shape(hidden=2048, intermediate=5632, heads=32, kv_heads=4, layers=22)


def make_model(folder: Path, shape: Shape) -> None:
    """Write a checkpoint, a shard for each layer, with its config."""
    folder.mkdir(parents=True, exist_ok=True)
    ends = {
        "model.embed_tokens.weight": (shape.vocabulary, shape.hidden),
        "model.norm.weight": (shape.hidden,),
        "lm_head.weight": (shape.vocabulary, shape.hidden),
    }
    shards: list[dict[str, tuple[int, ...]]] = [ends]
    shards += [{f"model.layers.{i}.{name}": size for name, size in shape.layer.items()} for i in range(shape.layers)]
    weight_map = {}
    generator = torch.Generator().manual_seed(0)
    for i, shapes in enumerate(shards, start=1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shapes, name)
        with SafetensorsWriter(folder / name, {n: (torch.bfloat16, s) for n, s in shapes.items()}) as writer:
            for tensor, size in shapes.items():
                values = torch.randn(size, generator=generator).mul_(0.02)
                writer.write(tensor, (values + 1 if len(size) == 1 else values).bfloat16())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
