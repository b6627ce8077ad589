"""Evaluate checkpoints as they lie on disk: one alone, or two side by side."""

from __future__ import annotations

import contextlib
from pathlib import Path

from halfbin.errors import ModelError
from halfbin.evaluation import Comparison, Perplexity, compare, perplexity
from halfbin.formats.read import open_quantized
from halfbin.models import load_weights, open_skeleton
from halfbin.nn import quantize_kv_cache
from halfbin.run.device import require_device
from halfbin.run.events import Event, OnEvent
from halfbin.run.measure import evaluation_text, windows_of
from halfbin.tensor import parse_scheme


def judge(
    a: Path,
    b: Path | None,
    *,
    text: Path | None = None,
    context: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    kv_cache: str | None = None,
    trust_remote_code: bool = False,
    device: str = "cpu",
    on_event: OnEvent | None = None,
) -> Judgement:
    """Perplexity of `a`, or what `b` lost against it; both dequantized to float32 by halfbin's own readers.

    With `kv_cache`, a scheme such as "int8-token", the second model keeps its keys and values rounded; it is `a` itself where
    there is no `b`.

    Raises:
      ModelError: a model that does not predict tokens, or that keeps no keys and values.
      SchemeError: a scheme that keys and values cannot have.
    """
    require_device(device)
    skeleton = open_skeleton(a, trust_remote_code=trust_remote_code)
    if not skeleton.generates:
        raise ModelError(f"{a}: {skeleton.model_class.__name__} does not predict tokens, so it has no perplexity")
    chosen = evaluation_text(text, max_tokens)
    windows = windows_of(skeleton, chosen, context=context, stride=stride)

    def on_step(done: int, total: int) -> None:
        if on_event:
            on_event(Event("evaluating", done, total, "windows"))

    cache = None if kv_cache is None else parse_scheme(kv_cache)
    first = load_weights(skeleton).to(device)
    if b is None and cache is not None:
        b = a
    if b is None:
        return perplexity(first, windows, known_causal=_quantizes_inputs(a), on_step=on_step)
    second = load_weights(open_skeleton(b, trust_remote_code=trust_remote_code)).to(device)
    with contextlib.nullcontext() if cache is None else quantize_kv_cache(second, cache, cache):
        return compare(first, second, windows, on_step=on_step)


def _quantizes_inputs(directory: Path) -> bool:
    with open_quantized(directory) as checkpoint:
        return any(checkpoint.inputs(name) is not None for name in checkpoint.names)


Judgement = Comparison | Perplexity
