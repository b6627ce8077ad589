"""Recipes: rules that give each site a scheme and a method. The first rule that matches a site decides.

    name = "mine"
    remainder = "row"                  # what a last, shorter group becomes; see below

    [[rule]]
    match = "*.down_proj"              # a glob over site names, or "role:embedding", or "class:Conv2d"
    weights = "int8-channel"           # a scheme, or "bf16", "fp16", "fp32", or "keep"
    [[rule]]
    match = "class:Conv2d"
    weights = "int8-channel"
    estimator = "mse"                  # how rtn chooses a range: "minmax" unless said otherwise
    [[rule]]
    match = "*"
    weights = "int4-g128"
    method = "gptq"                    # "rtn" unless said otherwise; "hqq", and "gptq", which needs calibration data
    inputs = "int8-token"              # what the layer's inputs are rounded to while it runs: w8a8 and the like
    transforms = ["awq"]               # rewrites of the float model before that: "awq", "smoothquant"; data too
    correction = 0.5                   # how far weights make up for what earlier layers lost, 0 to 1; data too
    damping = 0.05                     # and how methods and transforms work: `options.py`

Embeddings, output heads and routers are protected: a glob with a wildcard passes them by, and only their full name or
their role ("role:head") reaches them. What no rule matches stays as it is. A rule for a name that no site of the model has
is an error; "*", roles and classes may find nothing, so that a recipe serves many models.

`remainder` says what happens where group_size does not divide in_features: "tail" gives the last, shorter group a scale of
its own, "row" gives the whole site one scale per row, "refuse" is an error.

A scheme that does not say how scales are stored ("-f16", "-bf16", "-f32") stores them in the model's own type, since that
is what clients cast them to: the codes are chosen with the scale that the client will really use.

`inputs_from` says what calibration data have gone through before they reach a block: "quantized", the blocks before it as
they were rounded, unless said otherwise; or "float", those of the float model.

`all_experts = true` lets every expert see every token while statistics are taken, whatever the router says.

`others` ("keep" unless said otherwise) is what floats that are no sites are cast to: norms, biases, tables. `layout` is how
the result is written unless the user says `--format`: "compressed-tensors", "halfbin" or "safetensors".
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import importlib.resources
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from halfbin.errors import RecipeError, SchemeError, did_you_mean
from halfbin.methods import CALIBRATED, METHODS, rtn
from halfbin.models import Site
from halfbin.numerics import ESTIMATORS
from halfbin.numerics.ranges import MinMax
from halfbin.planning.options import DEFAULTS, OPTION_KEYS, Options, parse_options
from halfbin.tensor.inputs import InputScheme, parse_inputs
from halfbin.tensor.qtensor import QTensor
from halfbin.tensor.scheme import Scheme, parse_scheme, states_scale

PROTECTED_ROLES = ("embedding", "head", "router")
ROLES = ("linear", "expert", "convolution", *PROTECTED_ROLES)
REMAINDERS = ("tail", "row", "refuse")
CASTS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_CAST_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}  # what others call them
LAYOUTS = ("compressed-tensors", "halfbin", "safetensors")
RECIPE_BYTES_MAX = 2**20
TRANSFORMS = ("rotate", "awq", "smoothquant")
CLIP = "clip"  # ranges searched for the least error of the layer's outputs, which needs data
KEYS = ("name", "description", "remainder", "layout", "others", "inputs_from", "untie", "all_experts", "rule")
STREAMS = ("quantized", "float")
RULE_KEYS = (
    *("match", "weights", "method", "estimator", "transforms", "inputs", "input_estimator", "correction"),
    *OPTION_KEYS,
)
RANGED = ("rtn", *CALIBRATED)  # methods whose ranges an estimator chooses

Weights: TypeAlias = Scheme | torch.dtype | None  # a scheme to round to, a type to cast to, or None: keep


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What happens to the sites that `match` fits."""

    match: str
    weights: Weights
    scale_is_stated: bool = True  # False: scales take the model's own type
    method: str = "rtn"
    estimator: str = "minmax"
    transforms: tuple[str, ...] = ()
    inputs: InputScheme | None = None  # what the layer's inputs are rounded to while it runs
    input_estimator: str = "minmax"  # of the range of static ones
    correction: float = 0.0  # the share of what earlier layers lost that weights make up for
    options: Options = DEFAULTS  # how methods and transforms work

    def fits(self, site: Site) -> bool:
        """Whether this rule speaks of `site`; protected roles must be meant, not swept up."""
        kind, _, value = self.match.partition(":")
        if kind == "role":
            return site.role == value
        if site.role in PROTECTED_ROLES:
            return site.name == self.match
        if kind == "class":
            return site.module_class == value
        return fnmatch.fnmatchcase(site.name, self.match)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Rules in order, and what holds for all of them."""

    name: str
    rules: tuple[Rule, ...]
    remainder: str = "tail"
    layout: str = "compressed-tensors"
    others: torch.dtype | None = None
    inputs_from: str = "quantized"
    untie: bool = False
    all_experts: bool = False
    description: str = ""

    def rule_for(self, site: Site) -> Rule | None:
        """The first rule that fits, None where none does."""
        return next((rule for rule in self.rules if rule.fits(site)), None)


@functools.cache  # one function for each, as layers that share a weight are compared by it
def rounding(method: str, estimator: str) -> Callable[[Tensor, Scheme], QTensor]:
    """The function that a rule names: weight and scheme to codes."""
    if method == "rtn":
        return functools.partial(rtn, estimator=ESTIMATORS.get(estimator, MinMax)())
    return METHODS[method]


def covers_whole_ranges(method: str, estimator: str) -> bool:
    """Whether a rule rounds to nearest with scales that let no weight clip: what the fastest loops do."""
    return method == "rtn" and ESTIMATORS.get(estimator, MinMax) is MinMax


def preset_names() -> list[str]:
    """The recipes that come with halfbin."""
    folder = importlib.resources.files("halfbin.planning") / "presets"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name_or_file: str | Path) -> Recipe:
    """A preset by its name, or a recipe file.

    Raises:
      RecipeError: no such preset or file, or something in it is not understood; names the key and the nearest valid one.
    """
    name = str(name_or_file)
    if name in preset_names():
        text = (importlib.resources.files("halfbin.planning") / "presets" / f"{name}.toml").read_text(encoding="utf-8")
        return parse_recipe(text, source=name)
    path = Path(name_or_file)
    if not path.is_file():
        raise RecipeError(f"{name!r} is neither a preset nor a recipe file{did_you_mean(name, preset_names())}")
    if path.stat().st_size > RECIPE_BYTES_MAX:
        raise RecipeError(f"{path} has {path.stat().st_size} bytes; a recipe has a few hundred: is it another file?")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text: {error}") from error
    return parse_recipe(text, source=path.stem)


def parse_recipe(text: str, *, source: str) -> Recipe:
    """Read a recipe's TOML text; `source` names it in errors and gives it its name.

    Raises:
      RecipeError: names the offending key or value, and the nearest valid one.
    """
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"recipe {source}: not valid TOML: {error}") from error
    where = f"recipe {source}"
    _known_keys(raw, KEYS, where)
    rules = raw.get("rule")
    if not isinstance(rules, list) or not rules:
        raise RecipeError(f"recipe {source}: no [[rule]]; a recipe needs at least one, with match and weights")
    inputs_from = _choice(raw, "inputs_from", STREAMS, "quantized", where)
    found = tuple(_rule(rule, f"recipe {source}, rule {i}") for i, rule in enumerate(rules, start=1))
    if inputs_from == "float" and any(rule.correction for rule in found):
        raise RecipeError(
            f"{where}: correction makes up for what earlier blocks have lost, and with inputs_from = 'float' nothing is lost: "
            "leave one of them out"
        )
    return Recipe(
        name=_text(raw, "name", source, where),
        rules=found,
        remainder=_choice(raw, "remainder", REMAINDERS, "tail", where),
        layout=_choice(raw, "layout", LAYOUTS, "compressed-tensors", where),
        others=CASTS.get(_choice(raw, "others", ("keep", *CASTS), "keep", where)),
        inputs_from=inputs_from,
        untie=_flag(raw, "untie", where),
        all_experts=_flag(raw, "all_experts", where),
        description=_text(raw, "description", "", where),
    )


def _rule(raw: object, where: str) -> Rule:
    if not isinstance(raw, dict):
        raise RecipeError(f"{where}: expected a table with match and weights, got {raw!r}")
    _known_keys(raw, RULE_KEYS, where)
    for key in ("match", "weights"):
        if not isinstance(raw.get(key), str):
            raise RecipeError(f"{where}: {key} = {raw.get(key)!r} is missing or no text; see halfbin's presets")
    match, weights = raw["match"], raw["weights"]
    kind, _, value = match.partition(":")
    if kind == "role" and value not in ROLES:
        raise RecipeError(f"{where}: {value!r} is no role{did_you_mean(value, ROLES)}")
    method = _choice(raw, "method", (*METHODS, *CALIBRATED), "rtn", where)
    if method not in RANGED and "estimator" in raw:
        raise RecipeError(
            f"{where}: estimator goes with {', '.join(RANGED)}; {method} chooses its ranges itself: leave it out"
        )
    target = _weights(weights, where)
    idle = next((key for key in RULE_KEYS[2:] if key in raw), None)
    if idle and not isinstance(target, Scheme):
        raise RecipeError(
            f"{where}: {idle} = {raw[idle]!r} says how to round, but weights = {weights!r} rounds nothing"
        )
    estimator = _choice(raw, "estimator", (*ESTIMATORS, CLIP), "minmax", where)
    transforms, correction = _transforms(raw, where), _share(raw, "correction", where)
    return Rule(
        match=match,
        weights=target,
        scale_is_stated=states_scale(weights),
        method=method,
        estimator=estimator,
        transforms=transforms,
        inputs=_inputs(raw, where),
        input_estimator=_choice(raw, "input_estimator", tuple(ESTIMATORS), "minmax", where),
        correction=correction,
        options=parse_options(
            raw, where, method=method, transforms=transforms, estimator=estimator, correction=correction
        ),
    )


def _inputs(raw: Mapping[str, Any], where: str) -> InputScheme | None:
    text = raw.get("inputs")
    if text is None:
        if "input_estimator" in raw:
            raise RecipeError(f"{where}: input_estimator chooses the range of static inputs, and there are no inputs")
        return None
    if not isinstance(text, str):
        raise RecipeError(f"{where}: inputs = {text!r} must be text, such as 'int8-token'")
    try:
        found = parse_inputs(text)
    except SchemeError as error:
        raise RecipeError(f"{where}: inputs = {text!r}: {error}") from error
    if found.dynamic and "input_estimator" in raw:
        raise RecipeError(f"{where}: input_estimator chooses the range of static inputs, and {text!r} are dynamic")
    return found


def _transforms(raw: Mapping[str, Any], where: str) -> tuple[str, ...]:
    given = raw.get("transforms", [])
    if not isinstance(given, list):
        raise RecipeError(f"{where}: transforms = {given!r} must be a list, such as [{TRANSFORMS[0]!r}]")
    for name in given:
        if name not in TRANSFORMS:
            raise RecipeError(f"{where}: {name!r} is no transform{did_you_mean(str(name), TRANSFORMS)}")
    return tuple(dict.fromkeys(given))


def _weights(text: str, where: str) -> Weights:
    if text == "keep":
        return None
    if text in CASTS:
        return CASTS[text]
    try:
        return parse_scheme(text)
    except SchemeError as error:
        near = difflib.get_close_matches(text, ["keep", *CASTS, *_CAST_NAMES], n=1)
        hint = f"; for a cast write {_CAST_NAMES.get(near[0], near[0])!r}" if near else ""
        raise RecipeError(f"{where}: weights = {text!r}: {error}{hint}") from error


def _flag(raw: Mapping[str, Any], key: str, where: str) -> bool:
    value = raw.get(key, False)
    if not isinstance(value, bool):
        raise RecipeError(f"{where}: {key} = {value!r} must be true or false")
    return value


def _share(raw: Mapping[str, Any], key: str, where: str) -> float:
    value = raw.get(key, 0.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise RecipeError(f"{where}: {key} = {value!r} must be a number from 0, none, to 1, all of it")
    return float(value)


def _text(raw: Mapping[str, Any], key: str, default: str, where: str) -> str:
    value = raw.get(key, default)
    if not isinstance(value, str):
        raise RecipeError(f"{where}: {key} = {value!r} must be text")
    return value


def _choice(raw: Mapping[str, Any], key: str, allowed: tuple[str, ...], default: str, where: str) -> str:
    value = raw.get(key, default)
    if value not in allowed:
        raise RecipeError(f"{where}: {key} = {value!r} is not understood{did_you_mean(str(value), allowed)}")
    return str(value)


def _known_keys(raw: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in raw:
        if key not in known:
            raise RecipeError(f"{where}: unknown key {key!r}{did_you_mean(key, known)}")
