"""Rounded keys and values on tiny models of several kinds, against attention written out by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)
from transformers.cache_utils import DynamicCache

from halfbin.errors import ModelError, SchemeError
from halfbin.nn import quantize_kv_cache
from halfbin.tensor import Scheme, fake_quantize, parse_scheme

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))


def gemma() -> Any:  # sliding windows, and heads wider than hidden / heads
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, num_key_value_heads=2, head_dim=16, sliding_window=8))


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4))


def bart() -> Any:
    layers = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 64}
    return BartForConditionalGeneration(BartConfig(**layers, **sizes))


models = pytest.mark.parametrize("make", [llama, gemma, gpt2, bart])


def tiny(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():  # as initialised, tiny models attend almost evenly
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.25)
    return model


def ids() -> Tensor:
    return torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any, **kwargs: Any) -> Tensor:
    out: Tensor = model(ids(), **kwargs).logits
    return out


INT8, INT4 = parse_scheme("int8-token"), parse_scheme("int4-token")


@models
def test_int8_moves_logits_a_little_int4_more_and_none_not_at_all(make: Callable[[], Any]) -> None:
    model = tiny(make)
    before = logits(model, use_cache=False)
    moved = {}
    for name, scheme in (("none", None), ("int8", INT8), ("int4", INT4)):
        with quantize_kv_cache(model, scheme, scheme) as simulation:
            moved[name] = float((logits(model, use_cache=False) - before).norm() / before.norm())
            assert not simulation.idle
    assert moved["none"] == 0.0
    assert 0.0 < moved["int8"] < 0.02
    assert 4 * moved["int8"] < moved["int4"] < 0.5
    assert torch.equal(logits(model, use_cache=False), before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("keys", "values"), [(INT4, None), (None, INT4), (parse_scheme("int4-g4-asym"), INT8)], ids=str
)
def test_each_token_and_head_of_keys_and_values_is_rounded_by_itself(
    monkeypatch: pytest.MonkeyPatch, keys: Scheme | None, values: Scheme | None
) -> None:
    """The independent way: round what eager attention is called with."""
    from transformers.models.llama import modeling_llama

    model = tiny(llama)
    model.set_attn_implementation("eager")
    attend = modeling_llama.eager_attention_forward

    def rounded(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        key = key if keys is None else fake_quantize(key, keys)
        return attend(module, query, key, value if values is None else fake_quantize(value, values), *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(modeling_llama, "eager_attention_forward", rounded)
        expected = logits(model, use_cache=False)
    with quantize_kv_cache(model, keys, values):
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("make", [llama, gemma, gpt2])
def test_tokens_one_by_one_read_what_was_cached_before(make: Callable[[], Any]) -> None:
    model = tiny(make)
    with quantize_kv_cache(model, INT4, INT4):
        whole = logits(model)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            steps = [model(token, past_key_values=cache).logits for token in torch.split(ids(), 1, 1)]
    assert type(cache).__name__ == "RoundingDynamicCache" and isinstance(cache, DynamicCache)
    # The same rounded keys up to float32 noise, which may push a key over a tie: a few steps of int4 at most.
    different = (torch.cat(steps, 1) - whole).abs().amax(-1) > 1e-3 * whole.abs().max()
    assert float(different.float().mean()) < 0.1


def test_a_cache_can_be_copied_while_it_rounds() -> None:
    model = tiny(llama)
    with quantize_kv_cache(model, INT4, INT4), torch.no_grad():
        cache = model(ids()[:, :10]).past_key_values
        fork = copy.deepcopy(cache)
        one, other = (model(ids()[:, 10:], past_key_values=c).logits for c in (cache, fork))
    assert torch.equal(one, other)
    assert fork.layers[0].keys.data_ptr() != cache.layers[0].keys.data_ptr()


def test_generation_runs_on_rounded_keys_and_values() -> None:
    model = tiny(llama)
    plain = model.generate(ids(), max_new_tokens=12, do_sample=False)
    with quantize_kv_cache(model, parse_scheme("int2-token"), parse_scheme("int2-token")) as simulation:
        rough = model.generate(ids(), max_new_tokens=12, do_sample=False)
        assert not simulation.idle
    assert not torch.equal(plain, rough)
    assert torch.equal(plain, model.generate(ids(), max_new_tokens=12, do_sample=False))


def test_a_model_without_a_cache_is_refused_instead_of_found_perfect() -> None:
    sizes = {**SIZES, "max_position_embeddings": 32}
    bert = BertForMaskedLM(BertConfig(**sizes)).eval()
    with pytest.raises(ModelError, match="Bert"), quantize_kv_cache(bert, INT8, INT8):
        logits(bert)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)).eval()
    with quantize_kv_cache(mamba, INT8, INT8), pytest.raises(ModelError, match="wrote no keys and values"):
        logits(mamba)


@pytest.mark.parametrize("text", ["int8-tensor", "int8-channel", "int8-g4@0", "int8-b2x4"])
def test_scales_that_belong_to_no_token_are_refused(text: str) -> None:
    with pytest.raises(SchemeError, match="come token by token"):
        quantize_kv_cache(nn.Linear(2, 2), parse_scheme(text), None)
