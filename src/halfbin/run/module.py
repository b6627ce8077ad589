"""A recipe applied to a module in memory: its layers are replaced by quantized ones, in place."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from halfbin.models import Site, Structure
from halfbin.nn.convert import Method, Swap, quantize_module
from halfbin.planning import load_recipe
from halfbin.planning.plan import fitted_scheme
from halfbin.planning.recipe import rounding
from halfbin.run.events import Event, OnEvent
from halfbin.tensor.scheme import Scheme


def quantize_in_memory(model: nn.Module, recipe: str | Path, on_event: OnEvent | None = None) -> list[Swap]:
    """Replace every layer that the recipe's rules reach; embeddings, heads and routers only by their role or full name.

    Returns:
      What became of each layer that has a weight.
    """
    rules = load_recipe(recipe)
    structure = Structure(model)

    def decide(name: str, module: nn.Module) -> tuple[Scheme, Method] | None:
        site = _site(name, module, structure)
        rule = rules.rule_for(site)
        if rule is None or not isinstance(rule.weights, Scheme):
            return None
        # The layer holds its weight as a matrix [out_features, in_features], whatever it was before.
        scheme, _ = fitted_scheme(site, rule, rules.remainder)
        return scheme, rounding(rule.method, rule.estimator)

    def on_step(done: int, total: int) -> None:
        if on_event:
            on_event(Event("quantizing", done, total, "layers"))

    return quantize_module(model, decide, on_step=on_step)


def _site(name: str, module: nn.Module, structure: Structure) -> Site:
    weight = module.get_parameter("weight")
    rows = weight.shape[1] if type(module).__name__ == "Conv1D" else weight.shape[0]
    shape = (rows, weight.numel() // max(rows, 1))
    return Site(name, f"{name}.weight", shape, weight.dtype, structure.role(module), type(module).__name__)
