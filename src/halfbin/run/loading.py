"""How to load what was written: the few lines that a user copies."""

from __future__ import annotations

HALFBIN = """\
import halfbin as hb
from transformers import AutoTokenizer

model = hb.load({path})
tokenizer = AutoTokenizer.from_pretrained({path})"""

TRANSFORMERS = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({path})
tokenizer = AutoTokenizer.from_pretrained({path})"""

NEEDS = {
    "compressed-tensors": "needs the compressed-tensors package: pip install compressed-tensors",
    "safetensors": "plain weights: any program that reads the original reads this",
    "halfbin": "halfbin's own layout: only halfbin reads it",
}


def snippet(layout: str, output: str | None) -> str:
    """Python that loads the checkpoint at `output`, written in `layout`."""
    template = HALFBIN if layout == "halfbin" else TRANSFORMERS
    return template.format(path=repr(output or "OUT"))


def needs(layout: str) -> str:
    """What has to be installed for it, in one line; empty when nothing is known about the layout."""
    return NEEDS.get(layout, "")
