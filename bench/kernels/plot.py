"""Plot what products.py measured: time against tokens, share of the memory's rate, ratio to the best other library.

    python bench/kernels/plot.py FILE.json FILE.svg [--threads 1]

One row of plots for each shape. Other libraries' times are divided by ours of as many bits.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

OURS = {4: "halfbin int4 g128", 8: "halfbin int8"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path)
    parser.add_argument("plot", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    rows = [r for r in json.loads(options.measured.read_text("utf-8")) if r["threads"] == options.threads]
    shapes = list(dict.fromkeys((r["n"], r["k"]) for r in rows))
    peers = list(dict.fromkeys(r["peer"] for r in rows))
    colours = {peer: plt.get_cmap("tab20")(i % 20) for i, peer in enumerate(peers)}
    figure, axes = plt.subplots(len(shapes), 3, figsize=(15, 4 * len(shapes)), squeeze=False, layout="constrained")
    for (n, k), line in zip(shapes, axes, strict=True):
        of_shape = [r for r in rows if (r["n"], r["k"]) == (n, k)]
        for axis, peer in [(axis, peer) for axis in line for peer in peers]:
            draw(axis, line, [r for r in of_shape if r["peer"] == peer], of_shape, colours[peer])
        for axis, title in zip(line, ("milliseconds", "share of the memory's rate", "time / halfbin's"), strict=True):
            axis.set(xscale="log", yscale="log", title=f"{n} x {k}: {title}", xlabel="tokens")
            axis.grid(alpha=0.3)
        line[2].axhline(1, color="black", linewidth=0.8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.savefig(options.plot)


def draw(axis: Any, line: Any, rows: list[dict[str, Any]], of_shape: list[dict[str, Any]], colour: Any) -> None:
    """One library's line in one of a shape's three plots."""
    if not rows:
        return
    tokens = [r["tokens"] for r in rows]
    style = {"color": colour, "marker": "o", "label": rows[0]["peer"]}
    if axis is line[0]:
        axis.plot(tokens, [r["seconds"] * 1e3 for r in rows], **style)
    elif axis is line[1]:
        axis.plot(tokens, [r["share"] for r in rows], **style)
    else:
        best = {r["tokens"]: r["seconds"] for r in of_shape if r["peer"] == OURS[rows[0]["bits"]]}
        axis.plot(tokens, [r["seconds"] / best[r["tokens"]] for r in rows if r["tokens"] in best], **style)


if __name__ == "__main__":
    main()
