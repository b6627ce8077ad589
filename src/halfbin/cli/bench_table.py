"""What `bench` found, as people see it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping

from rich.console import RenderableType
from rich.table import Table

from halfbin.cli.screen import BLANK, facts, page, plain, rows
from halfbin.run.benchmark import Benchmark, Runner
from halfbin.run.wording import count, duration, number, percent, size


def bench_table(found: Benchmark, *, explain: bool = False) -> RenderableType:
    """Speeds, how they were measured, and with `explain` the kernels."""
    title = plain(found.model, "bold") + plain(f"   {found.dtype}, {count(found.threads, 'thread')}", "dim")
    parts: list[RenderableType] = [title, BLANK, _speeds(found), BLANK, _how(found)]
    if explain:
        parts += [BLANK, _kernels(found)]
    return page(*parts)


def _speeds(found: Benchmark) -> Table:
    table = rows()
    table.add_column("")
    runners = [found.codes, *([found.floats] if found.floats else [])]
    for runner in runners:
        table.add_column(f"as {runner.name}" if len(runners) > 1 or found.layers else "floats", justify="right")
    if found.floats:
        table.add_column("gain", justify="right")
    lines: dict[str, tuple[Callable[[Runner], str], Callable[[Runner], float | None]]] = {
        "decode, tokens/s": (lambda r: number(r.speed.decode_rate, 3), lambda r: r.speed.decode_rate),
        "prefill, tokens/s": (lambda r: number(r.speed.prefill_rate, 3), lambda r: r.speed.prefill_rate),
        "first token after": (lambda r: duration(r.speed.prefill.median), lambda r: 1 / r.speed.prefill.median),
        "weights read a token": (lambda r: size(r.bytes_per_token), lambda r: 1 / r.bytes_per_token),
        "share of reading": (lambda r: percent(r.share_of_reading(found.bytes_per_second)), lambda r: None),
        "peak memory": (lambda r: size(r.peak_memory_bytes), lambda r: 1 / (r.peak_memory_bytes or 1)),
    }
    for label, (shown, worth) in lines.items():
        cells = [shown(runner) for runner in runners]
        if found.floats:
            ours, theirs = worth(found.codes), worth(found.floats)
            cells.append(f"{ours / theirs:.2f}×" if ours and theirs else "")
        table.add_row(label, *cells)
    return table


def _how(found: Benchmark) -> Table:
    table, speed = facts(), found.codes.speed
    table.add_row("measured", plain(f"{count(speed.rounds, 'round')} after one that is thrown away; medians"))
    table.add_row(
        "",
        plain(f"a prompt of {count(speed.prompt_tokens, 'token')}, then {speed.new_tokens} decoded one by one", "dim"),
    )
    spread = f"{duration(speed.step.least)} to {duration(speed.step.greatest)}"
    table.add_row("", plain(f"a decoded token took {spread}", "dim"))
    rate = f"{found.bytes_per_second / 1e9:.1f} GB/s"
    table.add_row("memory", plain(f"{rate} read in the same run; the share is what reading the weights once takes"))
    kernels = Counter(layer.kernel for layer in found.layers)
    if kernels:
        told = ", ".join(f"{kernel} in {count(n, 'layer')}" for kernel, n in kernels.most_common())
        table.add_row("multiplied by", plain(told))
    if found.dequantized:
        table.add_row("as floats", plain(f"{count(len(found.dequantized), 'tensor')} that no layer reads as codes"))
    return table


def _kernels(found: Benchmark) -> Table:
    """One row for layers that are alike; reasons that all of them share are told once, at the end."""
    table = rows()
    for heading in ("layers", "weights", "shape", "kernel", "why not"):
        table.add_column(heading, overflow="fold")
    shared = _shared(found)
    groups: Counter[tuple[str, str, str, str, str]] = Counter()
    for layer in found.layers:
        told = _told({name: reason for name, reason in layer.refusals.items() if (name, reason) not in shared})
        shape = "×".join(map(str, layer.shape))
        groups[re.sub(r"\.\d+\.", ".*.", layer.name), layer.weights, shape, layer.kernel, told] += 1
    for (name, *cells), times in groups.items():
        table.add_row(plain(f"{name} ×{times}" if times > 1 else name), *map(plain, cells))
    for tensor, reason in found.dequantized.items():
        table.add_row(plain(tensor), "", "", "floats", plain(reason))
    if shared:
        table.add_row(plain("all of them", "dim"), "", "", "", plain(_told(dict(shared)), "dim"))
    return table


def _told(refusals: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in refusals.items())


def _shared(found: Benchmark) -> list[tuple[str, str]]:
    """Refusals, by kernel and reason, that every one of several layers has: what the machine lacks, as a rule."""
    if len(found.layers) < 2:
        return []
    first, *others = found.layers
    return [item for item in first.refusals.items() if all(item in layer.refusals.items() for layer in others)]
