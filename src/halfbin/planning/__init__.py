"""Recipes, and what they come to on one model: known before any work."""

from __future__ import annotations

from halfbin.planning.plan import Plan, SitePlan, make_plan
from halfbin.planning.recipe import Recipe, Rule, load_recipe, parse_recipe, preset_names

__all__ = ["Plan", "Recipe", "Rule", "SitePlan", "load_recipe", "make_plan", "parse_recipe", "preset_names"]
