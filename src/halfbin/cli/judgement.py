"""What `evaluate` found, as a table and as JSON."""

from __future__ import annotations

from typing import Any

from rich.console import RenderableType

from halfbin.cli.screen import facts, page, plain
from halfbin.evaluation import Perplexity
from halfbin.run import jsonable
from halfbin.run.judge import Judgement
from halfbin.run.wording import change, number, percent


def judgement_json(judgement: Judgement) -> dict[str, Any]:
    """The same keys as a report's: perplexity and nll, alone or under `before` and `after` with `kl` and agreement."""
    found, how = judgement.found, {"definition": judgement.definition, "text": judgement.text}
    if isinstance(found, Perplexity):
        return _perplexity_json(found) | how
    return {
        "before": _perplexity_json(found.before),
        "after": _perplexity_json(found.after),
        "kl": jsonable.to_json(found.kl),
        "top1_agreement": jsonable.to_json(found.top1_agreement),
        "num_tokens": found.num_tokens,
    } | how


def judgement_table(judgement: Judgement, a: str, b: str | None) -> RenderableType:
    """What people read."""
    table, found = facts(), judgement.found
    if isinstance(found, Perplexity):
        table.add_row("perplexity", plain(number(found.value), "bold"), plain(a, "dim"))
        table.add_row("nll", number(found.nll), "nats per token")
    else:
        table.add_row("perplexity", number(found.before.value), plain(a, "dim"))
        table.add_row("", plain(number(found.after.value), "bold"), plain(b or "", "dim"))
        table.add_row("", change(found.before.value, found.after.value))
        kl = found.kl
        spread = f"median {number(kl.median, 3)} · p99 {number(kl.p99, 3)} · max {number(kl.maximum, 3)}"
        table.add_row("KL divergence", plain(number(kl.mean, 3), "bold"), f"nats per token, mean; {spread}")
        table.add_row("top-1 agreement", plain(percent(found.top1_agreement), "bold"), "same first choice")
    table.add_row("measured on", plain(judgement.text), plain(f"{found.num_tokens:,} tokens", "dim"))
    return page(table, plain(judgement.definition, "dim"))


def _perplexity_json(found: Perplexity) -> dict[str, Any]:
    return {
        "perplexity": jsonable.to_json(found.value),
        "nll": jsonable.to_json(found.nll),
        "num_tokens": found.num_tokens,
    }
