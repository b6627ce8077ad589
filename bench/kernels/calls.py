"""What a call of a product costs in Python: a layer of 64 x 64 for one token, beside the bare native call, in one run.

    python bench/kernels/calls.py [--rounds 51] [--calls 500]

int4 in groups of 32, bfloat16 inputs [1, 1, 64], one thread, in inference mode. In each round every way is called `--calls`
times in a row; medians over rounds, in microseconds. torch's own layer and an empty one are there for scale.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from halfbin.kernels import _native, experts
from halfbin.nn import ExpertStack, QuantLinear
from halfbin.nn.experts import expert_layer
from halfbin.tensor import parse_scheme, quantize

SIZE, TYPE = 64, torch.bfloat16


def ways() -> dict[str, Callable[[], Any]]:
    scheme = parse_scheme("int4-g32")
    x = torch.randn(1, 1, SIZE).to(TYPE)
    y = x.new_empty(1, 1, SIZE)
    bias = nn.Parameter(torch.zeros(SIZE, dtype=TYPE), requires_grad=False)
    layers = [QuantLinear(quantize(torch.randn(SIZE, SIZE), scheme), b, dtype=TYPE) for b in (None, bias)]
    for layer in layers:
        layer.hold_packed()
    packed = layers[0].prepare().memory
    bare = (
        packed.data_ptr(),
        x.data_ptr(),
        True,
        1,
        SIZE,
        True,
        True,
        -128,
        127,
        0,
        0,
        0,
        False,
        y.data_ptr(),
        None,
        1,
    )
    stack = ExpertStack([expert_layer(quantize(torch.randn(SIZE, SIZE), scheme), TYPE) for _ in range(8)])
    token, chosen = x[0], torch.tensor([[2, 5]])
    plain, nothing = nn.Linear(SIZE, SIZE, bias=False, dtype=TYPE), nn.Identity()
    whole = stack._together()
    assert whole is not None
    return {
        "native call": lambda y=y: _native.matmul(*bare),  # which writes into y
        "layer": lambda: layers[0](x),
        "layer with bias": lambda: layers[1](x),
        "experts.linear, 2 of 8": lambda: experts.linear(token, whole, chosen, None, SIZE),
        "stack, 2 of 8": lambda: stack(token, chosen),
        "torch's nn.Linear": lambda: plain(x),
        "torch's nn.Identity": lambda: nothing(x),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=51)
    parser.add_argument("--calls", type=int, default=500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        found = ways()
        times: dict[str, list[float]] = {name: [] for name in found}
        for _ in range(options.rounds):
            for name, call in found.items():
                start = time.perf_counter()
                for _ in range(options.calls):
                    call()
                times[name].append((time.perf_counter() - start) / options.calls * 1e6)
    for name, its in times.items():
        print(f"{name:24} {statistics.median(its):6.2f} us  (least {min(its):.2f})")


if __name__ == "__main__":
    main()
