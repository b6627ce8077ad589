"""A recipe applied to a module in memory: its layers are replaced by quantized ones, in place."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from halfbin.errors import RecipeError, SchemeError
from halfbin.models import Site, Structure
from halfbin.nn.convert import Method, Swap, quantize_module
from halfbin.planning import load_recipe
from halfbin.planning.plan import fitted_scheme, require_met
from halfbin.planning.recipe import Recipe, rounding
from halfbin.run.events import Event, OnEvent
from halfbin.tensor.scheme import Scheme


def quantize_in_memory(model: nn.Module, recipe: str | Path, on_event: OnEvent | None = None) -> list[Swap]:
    """Replace every layer that the recipe's rules reach; embeddings, heads and routers only by their role or full name.

    Returns:
      What became of each layer that has a weight.

    Raises:
      RecipeError: a rule names layers that the module does not have, or casts.
    """
    rules = load_recipe(recipe)
    structure = Structure(model)
    _require_no_cast(rules)
    require_met(
        rules, [_site(name, module, structure) for name, module in model.named_modules() if _has_matrix(module)]
    )

    def decide(name: str, module: nn.Module) -> tuple[Scheme, Method] | None:
        site = _site(name, module, structure)
        rule = rules.rule_for(site)
        if rule is None or not isinstance(rule.weights, Scheme):
            return None
        # The layer holds its weight as a matrix [out_features, in_features], whatever it was before.
        try:
            scheme, _ = fitted_scheme(site, rule, rules.remainder)
        except SchemeError as error:
            error.add_note(f"at layer {name!r}, weight {list(site.shape)} {site.dtype}")
            raise
        return scheme, rounding(rule.method, rule.estimator)

    def on_step(done: int, total: int) -> None:
        if on_event:
            on_event(Event("quantizing", done, total, "layers"))

    return quantize_module(model, decide, on_step=on_step)


def _require_no_cast(recipe: Recipe) -> None:
    """A layer cast alone would no longer fit the types of what comes before and after it."""
    for rule in recipe.rules:
        if isinstance(rule.weights, torch.dtype):
            raise RecipeError(
                f"recipe {recipe.name}: the rule {rule.match!r} casts to {rule.weights}, which is for files; cast a module in "
                f"memory yourself, as a whole: model.to({rule.weights})"
            )


def _has_matrix(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim >= 2


def _site(name: str, module: nn.Module, structure: Structure) -> Site:
    weight = module.get_parameter("weight")
    rows = weight.shape[1] if type(module).__name__ == "Conv1D" else weight.shape[0]
    shape = (rows, weight.numel() // max(rows, 1))
    return Site(name, f"{name}.weight", shape, weight.dtype, structure.role(module), type(module).__name__)
