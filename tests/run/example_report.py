"""Reports to print: a small one with real rounding in it, and a large one such as a 32-layer model leaves."""

from __future__ import annotations

import dataclasses
import functools
import math

import torch

from halfbin.run.histogram import weight_histogram
from halfbin.run.report import (
    DefaultLoad,
    Divergence,
    ErrorSize,
    Evaluation,
    Quality,
    Report,
    SiteReport,
)
from halfbin.tensor.qtensor import dequantize, quantize
from halfbin.tensor.scheme import parse_scheme

SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (172, 64),
    "mlp.up_proj": (172, 64),
    "mlp.down_proj": (64, 172),
}


def example_site(name: str, shape: tuple[int, ...], spelling: str, seed: int) -> SiteReport:
    """A site whose errors and histogram come from rounding a heavy-tailed random weight."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    weight = 0.05 * weight * (1 + torch.rand(shape, generator=generator) ** 8 * (1 + seed % 5))
    scheme = parse_scheme(spelling)
    q = quantize(weight, scheme)
    move = weight - dequantize(q)
    relative = float(move.norm() / weight.norm())
    return SiteReport(
        name=name,
        shape=shape,
        scheme=spelling,
        method="rtn",
        bytes_before=4 * weight.numel(),
        bytes_after=math.ceil(scheme.num_bits(shape) / 8),
        reason="rule 2 of int4: '*'"
        if shape[1] % 32 == 0
        else "in_features 172 is no multiple of 32: one scale per row",
        weight_error=ErrorSize(relative=relative, snr_db=-20 * math.log10(relative), max_abs=float(move.abs().max())),
        output_error=ErrorSize(relative=0.9 * relative, snr_db=-20 * math.log10(0.9 * relative), max_abs=0.3),
        histogram=weight_histogram(weight, q),
    )


@functools.cache
def example_report(num_layers: int = 5) -> Report:
    """A finished run of int4 on a Llama of that many small layers."""
    head = SiteReport(
        name="model.embed_tokens",
        shape=(512, 64),
        dtype="bfloat16",
        bytes_before=131072,
        bytes_after=65536,
        reason="embeddings stay in 16 bits unless a rule names them; the output head shares this tensor",
    )
    sites = [head]
    for layer in range(num_layers):
        for i, (name, shape) in enumerate(SHAPES.items()):
            spelling = "int4-g32-f16" if shape[1] % 32 == 0 else "int4-channel-f16"
            sites.append(example_site(f"model.layers.{layer}.{name}", shape, spelling, seed=10 * layer + i))
    return Report(
        halfbin_version="0.1.0",
        model="stories260K",
        output="stories-int4",
        recipe="int4",
        layout="compressed-tensors",
        model_class="LlamaForCausalLM",
        before=Quality(bytes=sum(s.bytes_before for s in sites) + 4000, perplexity=3.9631, nll=1.37703),
        after=Quality(bytes=sum(s.bytes_after for s in sites) + 4000, perplexity=4.5690, nll=1.51929),
        after_default_load=DefaultLoad(dtype="bfloat16", perplexity=4.5712, nll=1.51977),
        kl=Divergence(mean=0.1432, median=0.0871, p99=0.9024, maximum=4.217),
        top1_agreement=0.84213,
        num_parameters=sum(s.num_weights for s in sites) + 704,
        sites=tuple(sites),
        evaluation=Evaluation(
            text="tinystories-valid.txt",
            definition="context 512, windows of 511 tokens without overlap, <s> before each, every token scored once",
            num_tokens=61230,
        ),
        timings={"reading": 0.31, "quantizing": 1.82, "writing": 0.24, "verifying": 0.4, "evaluating": 38.2},
        peak_memory_bytes=412_000_000,
        warnings=("5 sites have in_features 172, which 32 does not divide: one scale per row instead",),
    )


def hostile_report(name: str) -> Report:
    """The example with `name` wherever a stranger's file could put text."""
    report = example_report(1)
    sites = tuple(dataclasses.replace(site, name=f"{name}{i}", reason=name) for i, site in enumerate(report.sites))
    return dataclasses.replace(
        report,
        model=name,
        recipe=name,
        layout=name,
        output=name,
        sites=sites,
        warnings=(name,),
        evaluation=Evaluation(text=name, definition=name, num_tokens=1),
        timings={name: 1.0},
    )
