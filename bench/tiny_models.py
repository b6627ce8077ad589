"""A tiny random model of any causal-LM class that transformers knows, from its own configuration class.

No architecture is named: fields of a configuration, and of configurations inside it, are made small by what their names say
(hidden_size, num_heads, ...), lists with an entry a layer are cut, and a few variants are tried until one runs.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig

NUM_LAYERS = 2
VOCABULARY = 96
LARGEST = 12_000_000  # parameters
# What a field's name matches first decides. Sizes fit together: 4 heads of 16 are 64.
SIZES: tuple[tuple[str, int | None], ...] = (
    (r"attention_hidden_size|attention_head_dim|num_labels|multipl", None),  # follows from others
    (r"(^|_)vocab(_size)?(_|$)|^num_embeddings$|^n_words$", VOCABULARY),
    (r"^num_codebooks$", 1),
    (r"kv_shared_layers|layers_kv_shared", 0),
    (r"hidden_size_per_layer_input", 16),
    (r"d_ssm$", 128),
    (r"mamba_n_heads|mamba_num_heads|ssm_num_heads|linear_num_value_heads", 8),
    (r"mamba_d_head|mamba_head_dim|ssm_head_dim", 16),
    (r"(^|_)n_groups$|mamba_ngroups|^n_group$|^topk_group$|num_expert_group|ssm_groups", 1),
    (r"d_state$|state_size$|ssm_state", 16),
    (r"time_step_rank|dt_rank", 8),
    (r"zero_expert_num|num_shared_experts|n_shared_experts|shared_expert_num|num_shared_expert", 1),
    (r"experts?_per_tok|top_?k(_experts)?$|moe_top_?k|num_(selected|active)_experts|experts_top_k|router_top_k|moe_k$", 2),
    (r"(^|_)(num|n)_(local_|routed_|moe_)?experts$|^moe_num_experts$|num_experts_total", 4),
    (r"(moe|expert|shared).*(intermediate|ffn|hidden|dim)", 64),
    (r"(^|_)(intermediate|inner|ffn|mlp|feed_?forward|d_ff|n_inner)(_|$)|d_inner|^ffn_dim$|^d_?ff$|^dim_ff$|ffn_hidden", 128),
    (r"kv_lora_rank|q_lora_rank|lora_rank|_rank$|index_.*dim", 32),
    (r"^qk_head_dim$", 24),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"qk_nope_head_dim|v_head_dim|head_dim|d_kv|head_size|attention_head_size|kv_channels|value_dim$|key_dim$", 16),
    (r"(num_)?key_value_heads|num_kv_heads|n_kv_heads|kv_heads|num_key_heads|linear_num_key_heads|n_head_kv", 2),
    (r"(num|n)_(attention_|query_|decoder_attention_|encoder_attention_)?heads?$|attention_heads$|^n_head$", 4),
    (r"(num|n)_([a-z]+_)?layers?$|^(encoder|decoder)_layers$|num_.*_layers$|depth$", NUM_LAYERS),
    (r"max_position|n_positions|n_ctx|max_seq|context_length|max_sequence|seq_length", 128),
    (r"hidden_size|d_model|n_embd|embed_dim|^dim$|model_dim|embedding_(size|dim)|emb_dim|hidden_dim|proj_dim|width$", 64),
    (r"window|chunk_size|block_size|local_attn", 32),
)  # fmt: skip
ROTATED = ("full_attention", "sliding_attention")
FILL = "_fill"  # a variant that sets sizes, too, that are None by default
VARIANTS: tuple[Mapping[str, Any], ...] = (
    {},
    {"hidden_size_per_layer_input": 0},
    {"num_heads": 8, "head_dim": 16, "n_heads": 8},
    {"num_key_value_heads": 4, "n_kv_heads": 4, "num_kv_heads": 4},
    {"head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 2},
    {"rope_scaling": None, "rope_parameters": None},
    {"layer_types": None},
    {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32, "num_attention_heads": 4},
    {"num_hidden_layers": 4, "n_layer": 4, "num_layers": 4},
    {"head_dim": 8},
    {"head_dim": 24, "num_key_value_heads": 4},
    {"num_experts_per_tok": 1},
    {"attn_layer_indices": [1], "attn_layer_period": 2, "attn_layer_offset": 1},
    {FILL: True},
    {FILL: True, "num_key_value_heads": 4},
    {FILL: True, "layer_types": ["conv", "full_attention"]},
    {"layer_types": ["linear_attention", "full_attention"]},
    {"layer_types": ["sliding_attention", "sliding_attention"]},
    {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ROTATED}},
    {"axial_pos_embds": False, "default_language": "en_XX"},
)
IN_PLACE = "_in_place"  # a variant that sets fields of the default configuration, instead of building one anew


def causal_classes() -> dict[str, tuple[type[PretrainedConfig], type[nn.Module]]]:
    """Every causal-LM class by its name, with its configuration class."""
    mapping = transformers.AutoModelForCausalLM._model_mapping
    found = {}
    for config_class in mapping:
        model_class = mapping[config_class]
        found[model_class.__name__] = (config_class, model_class)
    return dict(sorted(found.items()))


def tiny_model(config_class: type[PretrainedConfig], model_class: type[nn.Module], *, seed: int = 0) -> Any:
    """A model with random weights, none of them zero, that runs in float32.

    Raises:
      RuntimeError: no variant runs; says why the first did not.
    """
    first: Exception | None = None
    for variant in (*VARIANTS, *({**v, IN_PLACE: True} for v in VARIANTS)):
        try:
            torch.manual_seed(seed)
            config = _small(_own_config(config_class, model_class), variant)
            getattr(config, "validate", lambda: None)()
            _require_small(config, model_class)
            model = model_class(config).eval().float()
            _randomize(model, seed)
            with torch.no_grad():
                logits = run(model, torch.arange(3, 19)[None])
            if not bool(torch.isfinite(logits).all()):
                raise FloatingPointError("logits are not finite")
            return model
        except Exception as error:  # whatever a configuration leads to
            first = first or error
    raise RuntimeError(f"{type(first).__name__}: {first}".replace("\n", " ")[:200])


def run(model: nn.Module, ids: Tensor) -> Tensor:
    """The model's logits for int64 [batch, length]."""
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, **options).logits
    return found


def _own_config(config_class: type[PretrainedConfig], model_class: type[nn.Module]) -> PretrainedConfig:
    """The configuration that a class is built from: of a part of a model, where the mapping names that of the whole."""
    own = getattr(model_class, "config_class", None)
    return (own or config_class)()


def _require_small(config: PretrainedConfig, model_class: type[nn.Module]) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in model_class(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{count} parameters: some size is not known by its name")


def _small(config: PretrainedConfig, variant: Mapping[str, Any]) -> PretrainedConfig:
    """The same configuration with small sizes; built anew, so that what follows from sizes follows."""
    values = dict(_smaller(config, variant))
    try:
        if variant.get(IN_PLACE):
            raise ValueError(IN_PLACE)
        return type(config)(**values)
    except Exception:  # a field that the class computes itself, or checks against others: set what can be set
        for name, value in values.items():
            try:
                setattr(config, name, value)
            except Exception:  # a property
                continue
        return config


def _smaller(config: PretrainedConfig, variant: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    layers = max((v for k, v in vars(config).items() if re.search(r"layers?$", k) and isinstance(v, int)), default=0)
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield name, _small(value, variant)
        elif name in variant:
            yield name, variant[name]
        elif name == "is_decoder":
            yield name, True
        elif name == "head_dim" and hasattr(config, "qk_rope_head_dim"):
            yield name, 8
        elif name.endswith("token_id") and isinstance(value, int):
            yield name, min(value, 2) if value >= 0 else value
        elif isinstance(value, int) and not isinstance(value, bool):
            small = _size(name)
            if small is not None and value > 0:
                yield name, min(value, small) if "layers" in name else small
        elif value is None and variant.get(FILL) and _size(name):
            yield name, _size(name)
        elif isinstance(value, list | tuple) and layers > NUM_LAYERS and len(value) >= layers:
            yield name, [_smaller_entry(name, entry) for entry in _two(list(value), variant)]
        elif value is None and name == "head_dim":
            yield name, 16


def _size(name: str) -> int | None:
    return next((size for pattern, size in SIZES if re.search(pattern, name)), None)


def _smaller_entry(name: str, entry: Any) -> Any:
    """A layer's entry in a list, which may be a size of its own."""
    return (_size(name) or entry) if isinstance(entry, int) and not isinstance(entry, bool) else entry


def _two(values: list[Any], variant: Mapping[str, Any]) -> list[Any]:
    """An entry for each of the layers that are left: the kinds that there are, in their order."""
    count = variant.get("num_hidden_layers", NUM_LAYERS)
    kinds = list(dict.fromkeys(map(str, values)))
    chosen = [next(v for v in values if str(v) == kind) for kind in kinds[:count]]
    return (chosen * count)[:count] if chosen else []


def _randomize(model: nn.Module, seed: int) -> None:
    """Weights as after training: vectors around what they were, matrices of a size that keeps activations in range."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            parameter.data = noise * max(parameter.shape[-1], 1) ** -0.5
        else:
            parameter.data = parameter.data.nan_to_num() + 0.1 * noise
