"""The llama.cpp side of `decode.py`, run by a Python that has llama-cpp-python and gguf; it needs nothing of halfbin's.

    python bench/decode_llama_cpp.py MODEL FILE.gguf THREADS PROMPT NEW ROUNDS

Writes FILE.gguf from MODEL's safetensors if it is not there, linears in Q4_0 and the head in F16, and prints one line of JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def bf16_tensors(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors of a safetensors file of bfloat16 values, as float32."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = file.read()
    found = {}
    for name, info in header.items():
        if name != "__metadata__":
            begin, end = info["data_offsets"]
            bits = np.frombuffer(data[begin:end], dtype="<u2").astype(np.uint32) << 16
            found[name] = bits.view(np.float32).reshape(info["shape"])
    return found


def write_gguf(model: Path, target: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(2048)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    words = ["<unk>", "<s>", "</s>", *(f"word{i}" for i in range(3, config["vocab_size"]))]  # a vocabulary of that size
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types(
        [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.NORMAL] * (len(words) - 3)]
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    q4, f16 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.F16
    for file in sorted(model.glob("*.safetensors")):
        for name, values in bf16_tensors(file).items():
            path, _, _ = name.rpartition(".")
            layer, _, rest = path.removeprefix("model.layers.").partition(".")
            stored = f"blk.{layer}.{NAMES[rest]}.weight" if rest in NAMES else f"{ENDS[path]}.weight"
            if values.ndim == 1:
                writer.add_tensor(stored, values)
            else:
                kind = q4 if rest in NAMES else f16
                writer.add_tensor(stored, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def open_context(path: Path, tokens: int, batch: int, threads: int) -> Any:
    """By llama.cpp's own functions, without what the wrapper's class does around them."""
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = tokens, batch, batch
    options.n_threads = options.n_threads_batch = threads
    return llama_cpp.llama_init_from_model(model, options)


def seconds(context: Any, ids: list[int]) -> float:
    """Of these tokens, read at once, to the logits of the last one."""
    array = (llama_cpp.llama_token * len(ids))(*ids)
    begin = time.perf_counter()
    failed = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(ids)))
    llama_cpp.llama_get_logits_ith(context, -1)
    taken = time.perf_counter() - begin
    assert not failed
    return taken


def main() -> None:
    model, target = Path(sys.argv[1]), Path(sys.argv[2])
    threads, prompt, new_tokens, rounds = map(int, sys.argv[3:7])
    if not target.exists():
        write_gguf(model, target)
    context = open_context(target, prompt + new_tokens, prompt, threads)
    ids = np.random.default_rng(0).integers(0, 32000, prompt).tolist()
    prefills, steps = [], []
    for done in range(rounds + 1):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        prefill = seconds(context, ids)
        taken = [seconds(context, [5]) for _ in range(new_tokens)]
        if done:
            prefills.append(prefill)
            steps += taken
    print(
        json.dumps(
            {
                "decode_tokens_per_second": 1 / statistics.median(steps),
                "prefill_tokens_per_second": prompt / statistics.median(prefills),
            }
        )
    )


if __name__ == "__main__":
    main()
