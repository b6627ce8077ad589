"""How to load what was written: the few lines that a user copies."""

from __future__ import annotations

HALFBIN = """\
import halfbin as hb
from transformers import AutoTokenizer

model = hb.load({path})
tokenizer = AutoTokenizer.from_pretrained({path})"""

TRANSFORMERS = """\
from transformers import {imports}

model = {model_class}.from_pretrained({path})
tokenizer = AutoTokenizer.from_pretrained({path})"""

NEEDS = {
    "compressed-tensors": "needs the compressed-tensors package: pip install compressed-tensors",
    "safetensors": "plain weights: any program that reads the original reads this",
    "halfbin": "halfbin's own layout: only halfbin reads it",
}


def snippet(layout: str, output: str | None, model_class: str) -> str:
    """Python that loads the checkpoint at `output`, written in `layout`, of a transformers class."""
    template = HALFBIN if layout == "halfbin" else TRANSFORMERS
    known = "AutoModelForCausalLM" if model_class.endswith("ForCausalLM") else model_class or "AutoModel"
    imports = ", ".join(sorted({known, "AutoTokenizer"}))
    return template.format(path=repr(output or "OUT"), model_class=known, imports=imports)


def needs(layout: str) -> str:
    """What has to be installed for it, in one line; empty when nothing is known about the layout."""
    return NEEDS.get(layout, "")
