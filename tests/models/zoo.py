"""Tiny random models of many architectures, made once a session: hidden 32, two layers, a few KB each."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as t

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SEQ2SEQ = {"d_model": 32, "vocab_size": 48, "pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 2}
KV = {"num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
IDS = {"bos_token_id": 1, "eos_token_id": 2}
PICTURES = {k: SIZES[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
PICTURES |= {"image_size": 16, "patch_size": 4}

Made = tuple[Any, Any]


@dataclass(frozen=True)
class Expected:
    """How many sites of each role a model has on disk. tied: how many tensors the output head shares."""

    linear: int = 0
    expert: int = 0
    router: int = 0
    head: int = 0
    embedding: int = 0
    convolution: int = 0
    tied: int = 0


# Counted by hand from the architectures' papers and the layer count of 2: attention has 4 linears, a gated MLP 3.
ZOO: dict[str, tuple[Callable[[], Made], Expected]] = {
    "llama-tied": (
        lambda: (t.LlamaForCausalLM, t.LlamaConfig(**SIZES, **KV, tie_word_embeddings=True)),
        Expected(linear=14, embedding=1, tied=1),
    ),
    "llama": (
        lambda: (t.LlamaForCausalLM, t.LlamaConfig(**SIZES, **KV, tie_word_embeddings=False)),
        Expected(linear=14, embedding=1, head=1),
    ),
    "qwen3": (
        lambda: (t.Qwen3ForCausalLM, t.Qwen3Config(**SIZES, **KV, head_dim=8)),
        Expected(linear=14, embedding=1, head=1),
    ),
    "gemma2": (
        lambda: (t.Gemma2ForCausalLM, t.Gemma2Config(**SIZES, **KV, head_dim=8)),
        Expected(linear=14, embedding=1, tied=1),
    ),
    # Fused qkv, and positions as a second embedding that nothing is tied to.
    "gpt2": (
        lambda: (t.GPT2LMHeadModel, t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=48, n_positions=64, **IDS)),
        Expected(linear=8, embedding=2, tied=1),
    ),
    # A narrower embedding, projected in and out.
    "opt": (
        lambda: (
            t.OPTForCausalLM,
            t.OPTConfig(
                **{k: v for k, v in SIZES.items() if k != "intermediate_size"}, ffn_dim=64, word_embed_proj_dim=16
            ),
        ),
        Expected(linear=14, embedding=2, tied=1),
    ),
    "gpt-neox": (lambda: (t.GPTNeoXForCausalLM, t.GPTNeoXConfig(**SIZES)), Expected(linear=8, embedding=1, head=1)),
    "phi3": (lambda: (t.Phi3ForCausalLM, t.Phi3Config(**SIZES)), Expected(linear=8, embedding=1, head=1)),
    # Words, positions and types; the pooler is one linear more.
    "bert": (lambda: (t.BertModel, t.BertConfig(**SIZES)), Expected(linear=13, embedding=3)),
    "bert-masked": (lambda: (t.BertForMaskedLM, t.BertConfig(**SIZES)), Expected(linear=13, embedding=3, tied=1)),
    "bert-classifier": (
        lambda: (t.BertForSequenceClassification, t.BertConfig(**SIZES, num_labels=3)),
        Expected(linear=13, embedding=3, head=1),
    ),
    # The tied head stands before the embedding that is on disk.
    "camembert": (
        lambda: (t.CamembertForCausalLM, t.CamembertConfig(**SIZES, is_decoder=True)),
        Expected(linear=13, embedding=3, tied=1),
    ),
    # One layer that is called twice, and a narrower embedding with its projection.
    "albert": (
        lambda: (t.AlbertModel, t.AlbertConfig(**SIZES, embedding_size=16)),
        Expected(linear=8, embedding=3),
    ),
    # Two layers with four experts of three matrices each, stored one by one.
    "mixtral": (
        lambda: (t.MixtralForCausalLM, t.MixtralConfig(**SIZES, **KV, num_local_experts=4)),
        Expected(linear=8, expert=24, router=2, embedding=1, head=1),
    ),
    "qwen3-moe": (
        lambda: (t.Qwen3MoeForCausalLM, t.Qwen3MoeConfig(**SIZES, **KV, **EXPERTS, head_dim=8)),
        Expected(linear=8, expert=24, router=2, embedding=1, head=1),
    ),
    # A shared expert of three linears beside the others, with a gate of one output.
    "qwen2-moe": (
        lambda: (t.Qwen2MoeForCausalLM, t.Qwen2MoeConfig(**SIZES, **KV, **EXPERTS, shared_expert_intermediate_size=32)),
        Expected(linear=14, expert=24, router=4, embedding=1, head=1),
    ),
    # Stored as two stacks [experts, in, out] a layer.
    "gpt-oss": (
        lambda: (
            t.GptOssForCausalLM,
            t.GptOssConfig(**SIZES, **KV, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
        ),
        Expected(linear=8, expert=4, router=2, embedding=1, head=1),
    ),
    # Stored as two stacks [experts, out, in] a layer; the router is a module inside a module.
    "granite-moe": (
        lambda: (
            t.GraniteMoeForCausalLM,
            t.GraniteMoeConfig(**SIZES, **KV, num_local_experts=4, num_experts_per_tok=2),
        ),
        Expected(linear=8, expert=4, router=2, embedding=1, head=1),
    ),
    # Experts are a ModuleDict of ordinary modules: linears of their own. One layer in two has them.
    "switch": (
        lambda: (
            t.SwitchTransformersForConditionalGeneration,
            t.SwitchTransformersConfig(
                **SEQ2SEQ,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_decoder_layers=2,
                num_heads=4,
                num_experts=4,
                num_sparse_encoder_layers=1,
                num_sparse_decoder_layers=1,
            ),
        ),
        Expected(linear=2 * 4 + 4 * 4 + 2 * 2 + 2 * 4 * 2, router=2, embedding=3, tied=1),
    ),
    # in_proj, x_proj, dt_proj, out_proj and a convolution; A_log is a matrix but no site.
    "mamba": (
        lambda: (
            t.MambaForCausalLM,
            t.MambaConfig(hidden_size=32, state_size=8, num_hidden_layers=2, vocab_size=48, **IDS),
        ),
        Expected(linear=8, convolution=2, embedding=1, tied=1),
    ),
    # Layers 1 and 3 share a block of 4 linears of attention and 3 of an MLP; each has a linear beside it, and each of the four
    # an in_proj, an out_proj and a convolution. A_log, x_proj and dt_proj are stacks, one matrix a head, and no sites.
    "zamba": (
        lambda: (
            t.ZambaForCausalLM,
            t.ZambaConfig(
                **(SIZES | {"num_hidden_layers": 4}),
                **KV,
                layers_block_type=["linear_attention", "hybrid"] * 2,
                n_mamba_heads=2,
                mamba_d_state=8,
                mamba_dt_rank=4,
            ),
        ),
        Expected(linear=7 + 2 + 8, convolution=4, embedding=1, tied=1),
    ),
    # 6 linears an encoder layer, 10 a decoder layer; two tables of relative distances beside the shared embedding.
    "t5": (
        lambda: (t.T5ForConditionalGeneration, t.T5Config(**SEQ2SEQ, d_kv=8, d_ff=64, num_layers=2, num_heads=4)),
        Expected(linear=32, embedding=3, tied=1),
    ),
    "bart": (
        lambda: (
            t.BartForConditionalGeneration,
            t.BartConfig(
                **SEQ2SEQ,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                max_position_embeddings=64,
                bos_token_id=1,
                forced_eos_token_id=None,
            ),
        ),
        Expected(linear=32, embedding=3, tied=1),
    ),
    # As many labels as layers: a classifier beside a list of two layers is no router.
    "vit": (
        lambda: (t.ViTForImageClassification, t.ViTConfig(**PICTURES, num_labels=2)),
        Expected(linear=12, convolution=1, head=1),
    ),
    # Stem, then two stages of one bottleneck (3 convolutions) with a shortcut each.
    "resnet": (
        lambda: (
            t.ResNetForImageClassification,
            t.ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1]),
        ),
        Expected(convolution=9, head=1),
    ),
    # A text model inside another; its tensors have other names on disk than in the model.
    "llava": (
        lambda: (
            t.LlavaForConditionalGeneration,
            t.LlavaConfig(text_config=t.LlamaConfig(**SIZES, **KV), vision_config=t.CLIPVisionConfig(**PICTURES)),
        ),
        Expected(linear=14 + 12 + 2, convolution=1, embedding=2, head=1),
    ),
}
NAMES = tuple(ZOO)


@functools.cache
def _root() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="zoo-")  # removed when the interpreter ends


@functools.cache
def directory_of(name: str, dtype: torch.dtype = torch.float32, shard: str | None = None) -> Path:
    """The model's directory, as `save_pretrained` wrote it; `shard` is the largest file, such as "20KB"."""
    path = Path(_root().name) / f"{name}-{str(dtype).removeprefix('torch.')}-{shard or 'whole'}"
    model_class, config = ZOO[name][0]()
    t.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = model_class(config).to(dtype)
    model.save_pretrained(path, **({} if shard is None else {"max_shard_size": shard}))
    return path


@functools.cache
def loaded(name: str) -> Any:
    """The float32 model as transformers itself loads it."""
    return ZOO[name][0]()[0].from_pretrained(directory_of(name), dtype=torch.float32).eval()
