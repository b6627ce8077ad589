"""What `evaluate` found, as a table and as JSON."""

from __future__ import annotations

from typing import Any

from rich.console import RenderableType
from rich.table import Table

from halfbin.cli.screen import BLANK, facts, page, plain
from halfbin.evaluation import Comparison, Perplexity
from halfbin.run import jsonable
from halfbin.run.wording import change, count, number, percent

DTYPE = "float32"  # what both models are dequantized to


def judgement_json(found: Comparison | Perplexity, text: str) -> dict[str, Any]:
    """The same keys as a report's: perplexity and nll, alone or under `before` and `after` with `kl` and agreement.

    `text`: what it was measured on, in words.
    """
    evaluation = {"text": text, "num_tokens": found.num_tokens, "dtype": DTYPE}
    if found.definition is not None:
        cut = found.definition
        evaluation |= {"definition": cut.words, "context": cut.context, "stride": cut.stride, "bos": cut.bos}
    if isinstance(found, Perplexity):
        return {**_perplexity_json(found), "evaluation": evaluation}
    return {
        "before": _perplexity_json(found.before),
        "after": _perplexity_json(found.after),
        "kl": jsonable.to_json(found.kl),
        "top1_agreement": jsonable.to_json(found.top1_agreement),
        "num_tokens": found.num_tokens,
        "evaluation": evaluation,
    }


def judgement_table(found: Comparison | Perplexity, text: str, a: str, b: str | None) -> RenderableType:
    """What people read."""
    table = facts()
    if isinstance(found, Perplexity):
        table.add_row("perplexity", plain(number(found.value), "bold"), plain(a, "dim"))
        table.add_row("nll", number(found.nll), plain("nats per token", "dim"))
        if found.bits_per_byte is not None:
            table.add_row(
                "bits per byte", number(found.bits_per_byte), plain("does not depend on the tokenizer", "dim")
            )
    else:
        _add_comparison(table, found, a, b or "")
    return page(table, BLANK, _how(found, text))


def _add_comparison(table: Table, found: Comparison, a: str, b: str) -> None:
    table.add_row("perplexity", number(found.before.value), plain(a, "dim"))
    table.add_row("", plain(number(found.after.value), "bold"), plain(b, "dim"))
    table.add_row("", change(found.before.value, found.after.value))
    kl = found.kl
    spread = (
        f"nats per token, mean; median {number(kl.median, 3)} · p99 {number(kl.p99, 3)} · max {number(kl.maximum, 3)}"
    )
    table.add_row("KL divergence", plain(number(kl.mean, 3), "bold"), plain(spread, "dim"))
    agreement = plain(percent(found.top1_agreement), "bold")
    table.add_row("top-1 agreement", agreement, plain("of tokens keep their first choice", "dim"))


def _how(found: Comparison | Perplexity, text: str) -> Table:
    """Without it the numbers compare with nothing."""
    table = facts()
    table.add_row("measured on", plain(f"{text}, {count(found.num_tokens, 'token')} scored"))
    if found.definition is not None:
        table.add_row("", plain(found.definition.words, "dim"))
    table.add_row("", plain(f"computed in {DTYPE}, from weights that halfbin dequantized", "dim"))
    return table


def _perplexity_json(found: Perplexity) -> dict[str, Any]:
    return {
        "perplexity": jsonable.to_json(found.value),
        "nll": jsonable.to_json(found.nll),
        "bits_per_byte": jsonable.to_json(found.bits_per_byte),
        "num_tokens": found.num_tokens,
    }
