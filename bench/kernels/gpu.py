"""Claim to be settled: on a GPU a quantized linear beats torch's bfloat16, and the best peer, at every number of tokens.

    python bench/kernels/gpu.py [--rounds 7] [--tokens 1 4 16 64 512] [--shapes 4096x4096 11008x4096] [--json]

Needs CUDA and Triton; it has not run yet, for want of a GPU. Each round times all contenders, one after the other, and a copy
of memory beside them; Triton's timer clears the L2 cache before each call. Reported are medians over the rounds, with the
quartiles; the share of the measured bandwidth that reading the weight alone takes; and the largest error over the largest
output, against float64, so that a peer that is called wrongly shows.

Peers are what torch brings: its int4 product (tinygemm's layout), `_int_mm` and `_scaled_mm`. One that refuses is listed with
its words.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from halfbin.kernels.triton import machine
from halfbin.nn import QuantInputLinear, QuantLinear
from halfbin.tensor import parse_inputs, parse_scheme, quantize

COPIED = 2**30  # bytes of the probe
Product = Callable[[], Tensor]


@dataclass(frozen=True)
class Contender:
    """A product and the bytes of its weight; or, instead of a product, why there is none."""

    name: str
    weight_bytes: float
    product: Product | str


def ours(weight: Tensor, x: Tensor, text: str, inputs: str | None = None) -> Contender:
    """A layer of halfbin, prepared."""
    q = quantize(weight, parse_scheme(text))
    layer = QuantLinear(q) if inputs is None else QuantInputLinear(q, parse_inputs(inputs).quantizer())
    why = layer.slow if isinstance(layer, QuantInputLinear) else layer.refusals.get("triton")
    if why is None:
        layer.prepare()
    name = f"halfbin {text}" + (f" x {inputs}" if inputs else "")
    return Contender(name, q.scheme.num_bits(q.shape) / 8, why or (lambda: layer(x)))


def torch_int4(weight: Tensor, x: Tensor) -> Product:
    """torch's own int4 product: unsigned codes with a scale and a real offset for each 128 columns, in tiles of 8."""
    q = quantize(weight, parse_scheme("uint4-g128-asym-bf16"))
    assert q.zero_point is not None
    bytes_of_two = (q.codes[:, ::2] << 4 | q.codes[:, 1::2]).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack(bytes_of_two, 8)
    # Its numbers are (code - 8) * scale + offset.
    offset = (8 - q.zero_point) * q.scale.float()
    both = torch.stack([q.scale, offset.to(torch.bfloat16)], 2).transpose(0, 1).contiguous()
    return lambda: torch.ops.aten._weight_int4pack_mm(x, packed, 128, both)


def torch_int8(weight: Tensor, x: Tensor) -> Product:
    """torch's INT8 product of inputs that are rounded by its own operations."""
    q = quantize(weight, parse_scheme("int8-channel"))
    codes, scale = q.codes.T, q.scale.T

    def product() -> Tensor:
        step = x.abs().amax(1, keepdim=True).float() / 127
        s = (x / step).round().to(torch.int8)
        return (torch._int_mm(s, codes).float() * scale * step).to(x.dtype)

    return product


def torch_float8(weight: Tensor, x: Tensor) -> Product:
    """torch's FP8 product of inputs that are rounded by its own operations."""
    q = quantize(weight, parse_scheme("fp8_e4m3-channel"))
    codes, scale = q.codes.view(torch.float8_e4m3fn).T, q.scale.T.contiguous()

    def product() -> Tensor:
        step = x.abs().amax(1, keepdim=True).float() / 448
        s = (x / step).to(torch.float8_e4m3fn)
        return torch._scaled_mm(s, codes, scale_a=step, scale_b=scale, out_dtype=x.dtype)

    return product


def peer(
    name: str, weight_bytes: float, make: Callable[[Tensor, Tensor], Product], weight: Tensor, x: Tensor
) -> Contender:
    """One of the above, tried once."""
    try:
        product = make(weight, x)
        product()
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return Contender(name, weight_bytes, str(error).splitlines()[0])
    return Contender(name, weight_bytes, product)


def contenders(weight: Tensor, x: Tensor) -> list[Contender]:
    """All that multiply x [tokens, columns] by this weight [rows, columns]."""
    size = weight.numel()
    return [
        Contender("torch bfloat16", 2.0 * size, lambda: functional.linear(x, weight)),
        ours(weight, x, "int4-g128-f16"),
        ours(weight, x, "int4-g32-f16"),
        ours(weight, x, "int8-channel"),
        ours(weight, x, "fp8_e4m3-channel"),
        ours(weight, x, "int8-channel", "int8-token"),
        ours(weight, x, "fp8_e4m3-channel", "fp8_e4m3-token"),
        peer("torch int4 g128", 0.5 * size + size / 128 * 4, torch_int4, weight, x),
        peer("torch int8 x int8", size + 4.0 * len(weight), torch_int8, weight, x),
        peer("torch fp8 x fp8", size + 4.0 * len(weight), torch_float8, weight, x),
    ]


def milliseconds(call: Callable[[], Any]) -> float:
    """The median of some 20 ms of calls, each with a cold L2 cache."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=5, rep=20, return_mode="median"))


def measured(rows: int, columns: int, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """One line for each contender."""
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator, device="cuda").bfloat16()
    x = torch.randn(tokens, columns, generator=generator, device="cuda").bfloat16()
    probe, target = (torch.empty(COPIED, dtype=torch.uint8, device="cuda") for _ in range(2))
    exact = x.double() @ weight.double().T
    all_of_them = contenders(weight, x)
    times: dict[str, list[float]] = {c.name: [] for c in all_of_them}
    copies = []
    for _ in range(rounds):
        copies.append(milliseconds(lambda: target.copy_(probe)))
        for contender in all_of_them:
            if not isinstance(contender.product, str):
                times[contender.name].append(milliseconds(contender.product))
    bandwidth = 2 * COPIED / statistics.median(copies)  # bytes a millisecond, read and written
    lines = []
    for contender in all_of_them:
        line: dict[str, Any] = {"name": contender.name, "rows": rows, "columns": columns, "tokens": tokens}
        if isinstance(contender.product, str):
            lines.append(line | {"refused": contender.product})
            continue
        found = sorted(times[contender.name])
        median = statistics.median(found)
        line |= {"ms": median, "ms_quartiles": [found[len(found) // 4], found[-1 - len(found) // 4]]}
        line["bandwidth_share"] = contender.weight_bytes / bandwidth / median
        line["error"] = float((contender.product().double() - exact).abs().max() / exact.abs().max())
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 512])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "11008x4096"], help="rows x columns")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here, and this bench measures one")
    if reason := machine.refuses(torch.device("cuda")):
        sys.exit(reason)
    lines = []
    with torch.inference_mode():
        for shape in options.shapes:
            rows, columns = (int(n) for n in shape.split("x"))
            for tokens in options.tokens:
                lines += measured(rows, columns, tokens, options.rounds)
    if options.json:
        print(
            json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "lines": lines}, indent=1)
        )
        return
    base = {(i["rows"], i["columns"], i["tokens"]): i["ms"] for i in lines if i["name"] == "torch bfloat16"}
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"{'':42} {'tokens':>6} {'ms':>8} {'bf16 /':>7} {'read':>6} {'error':>8}")
    for i in lines:
        name = f"{i['rows']}x{i['columns']} {i['name']}"
        if "refused" in i:
            print(f"{name:42} {i['tokens']:6} {i['refused']}")
            continue
        ratio = base[i["rows"], i["columns"], i["tokens"]] / i["ms"]
        print(f"{name:42} {i['tokens']:6} {i['ms']:8.4f} {ratio:7.2f} {i['bandwidth_share']:6.0%} {i['error']:8.1e}")


if __name__ == "__main__":
    main()
