"""A plan: a recipe resolved on one model. Pure data, made from headers alone; no weight is read for it."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfbin.errors import ModelError, RecipeError, SchemeError, did_you_mean
from halfbin.formats.checkpoint import Checkpoint
from halfbin.formats.layout import HoldsColumns, WeightLayout
from halfbin.methods import CALIBRATED
from halfbin.models import Site, Skeleton, find_sites, read_config
from halfbin.numerics.formats import IntegerFormat
from halfbin.numerics.scales import ScaleFormat
from halfbin.planning.footprint import Reading, calibrated_bytes
from halfbin.planning.options import DEFAULTS, Options
from halfbin.planning.recipe import CLIP, PROTECTED_ROLES, Recipe, Rule, Weights
from halfbin.tensor.granularity import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, PerToken, transposed
from halfbin.tensor.inputs import InputScheme
from halfbin.tensor.mixed import ColumnSpec
from halfbin.tensor.scheme import Scheme

IN_FLIGHT_BYTES = 128 * 2**20  # rows that are read, rounded or wait to be written, and what they become

TensorShapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class SitePlan:
    """What becomes of one site, and why."""

    site: Site
    weights: Weights  # a scheme to round to, a type to cast to, or None: kept as it is
    method: str
    estimator: str
    reason: str  # the rule that decided, or why the site stays as it is
    bytes_before: int
    bytes_after: int
    transforms: tuple[str, ...] = ()
    inputs: InputScheme | None = None
    input_estimator: str = "minmax"
    correction: float = 0.0
    # |x| on calibration data from which on an input feature is an outlier, whose column stays in 16 bits; None: all are rounded
    columns_from: float | None = None
    columns: ColumnSpec | None = None  # those that data chose; None: none, or nobody has looked yet
    options: Options = DEFAULTS  # how methods and transforms work

    @property
    def needs_data(self) -> bool:
        """Whether calibration data decide about its codes."""
        static = self.inputs is not None and self.inputs.needs_scale
        asks = self.method in CALIBRATED or self.estimator == CLIP or bool(self.transforms) or static
        return self.quantized and (asks or self.correction > 0 or self.columns_from is not None)

    @property
    def bytes_at_most(self) -> int:
        """What it takes when data keep every column in 16 bits that they may."""
        if self.columns_from is None or self.columns is not None:
            return self.bytes_after
        return self.bytes_after + self._columns(self.site.shape[self._column_axis], torch.bfloat16).num_bytes(
            self.site.shape
        )

    @property
    def _column_axis(self) -> int:
        return 0 if self.site.transposed else 1

    def _columns(self, count: int, dtype: torch.dtype) -> ColumnSpec:
        return ColumnSpec(count=count, dtype=dtype, axis=self._column_axis)

    def with_columns(self, columns: ColumnSpec) -> SitePlan:
        """The same, with the columns that data chose to keep."""
        after = self.bytes_after + columns.num_bytes(self.site.shape)
        return dataclasses.replace(self, columns=columns, bytes_after=after)

    @property
    def method_without_data(self) -> str:
        """How codes are chosen where no data reached the site: its own method if that needs none, else round-to-nearest."""
        return "rtn" if self.method in CALIBRATED else self.method

    @property
    def quantized(self) -> bool:
        """Whether the site's weights are rounded to a scheme."""
        return isinstance(self.weights, Scheme)

    @property
    def spelled(self) -> str:
        """The scheme or type as a person writes it."""
        return str(self.weights or self.site.dtype).removeprefix("torch.")

    def to_json(self) -> dict[str, Any]:
        """The site's row in `--dry-run --json`."""
        return {
            "name": self.site.name,
            "role": self.site.role,
            "shape": list(self.site.shape),
            "weights": self.spelled,
            "quantized": self.quantized,
            "method": self.method if self.quantized else None,
            "inputs": str(self.inputs) if self.quantized and self.inputs else None,
            "transforms": list(self.transforms) if self.quantized else [],
            "correction": self.correction if self.quantized else 0.0,
            "reason": self.reason,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bytes_at_most": self.bytes_at_most,
        }


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A recipe resolved on one model.

    sites:  one entry per site, in the checkpoint's order.
    others: tensors that are no sites, by name, with the type they are written in.
    reading: what a calibrated run will read; None where nobody has said so yet.
    """

    directory: Path
    skeleton: Skeleton
    recipe: Recipe
    layout: WeightLayout
    sites: tuple[SitePlan, ...]
    others: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    bytes_before: int
    reading: Reading | None = None

    @property
    def bytes_after(self) -> int:
        """All tensors of the output, without file headers."""
        return sum(s.bytes_after for s in self.sites) + sum(num_bytes(*spec) for spec in self.others.values())

    @property
    def bytes_at_most(self) -> int:
        """The same if data keep all columns in 16 bits that they may; how many it will be, nobody knows before."""
        return self.bytes_after + sum(s.bytes_at_most - s.bytes_after for s in self.sites)

    @property
    def peak_memory_bytes(self) -> int:
        """What the run needs above the interpreter with its imports; quality is measured beside that.

        Rows of tensors on their way from file to file, and at the end the largest rounded tensor whole, for its picture; before
        that what calibrating holds, where there are data.
        """
        largest = max((_working_bytes(s) for s in self.sites if s.quantized), default=0)
        streaming = largest + min(IN_FLIGHT_BYTES, self.bytes_before + self.bytes_after)
        if self.reading is None or not self.needs_data:
            return streaming
        return max(streaming, calibrated_bytes(self.skeleton, self.sites, self.reading, num_streams=self.num_streams))

    @property
    def num_streams(self) -> int:
        """How often every sample goes through the blocks at once: rounded, and as in float where a method asks for that."""
        return 2 if self.needs_float_stream and self.recipe.inputs_from == "quantized" else 1

    @property
    def needs_data(self) -> bool:
        """Whether calibration data are needed."""
        return any(site.needs_data for site in self.sites)

    @property
    def needs_float_stream(self) -> bool:
        """Whether some method asks what the float model would have given in the same place."""
        return any(s.quantized and (s.correction > 0 or "autoround" in s.method) for s in self.sites)

    @property
    def schemes(self) -> dict[str, Scheme]:
        """The scheme of each quantized tensor, by its name on disk."""
        return {s.site.tensor: s.weights for s in self.sites if isinstance(s.weights, Scheme)}

    def with_columns(self, columns: Mapping[str, ColumnSpec]) -> Plan:
        """The plan as it came out, with the columns that data chose to keep in floating point, by their weight's name."""
        sites = tuple(s.with_columns(columns[s.site.tensor]) if s.site.tensor in columns else s for s in self.sites)
        return dataclasses.replace(self, sites=sites)

    @property
    def _activations(self) -> str | None:
        if self.reading is None or not self.needs_data:
            return None
        return "disk" if self.reading.in_files else "memory"

    def to_json(self) -> dict[str, Any]:
        """The value that `--dry-run --json` prints."""
        return {
            "model": self.directory.name,
            "recipe": self.recipe.name,
            "layout": self.layout.name,
            "input_bytes": self.bytes_before,
            "output_bytes": self.bytes_after,
            "output_bytes_at_most": self.bytes_at_most,
            "peak_memory_bytes": self.peak_memory_bytes,
            "activations": self._activations,
            "sites": [site.to_json() for site in self.sites],
        }


def make_plan(skeleton: Skeleton, checkpoint: Checkpoint, recipe: Recipe, layout: WeightLayout) -> Plan:
    """Resolve `recipe` on a model; every decision comes with its reason.

    Raises:
      ModelError: the model is quantized already.
      RecipeError: a rule names sites that the model does not have, or leaves experts as the layout's clients cannot read them.
      SchemeError: a group size does not divide a site and the recipe's remainder is "refuse", or the layout cannot hold the
        recipe's schemes side by side.
    """
    _require_float(skeleton)
    found = find_sites(skeleton, checkpoint)
    require_met(recipe, found)
    sites = tuple(_plan_site(site, recipe, layout) for site in found)
    _require_readable_experts(sites, layout)
    rounded = {s.site.tensor: (s.weights, s.site.shape) for s in sites if isinstance(s.weights, Scheme)}
    layout.config(rounded, (), {s.site.tensor: s.inputs for s in sites if s.quantized and s.inputs})
    at_sites = {s.site.tensor for s in sites}
    others = {}
    for name in checkpoint.names:
        if name not in at_sites:
            info = checkpoint.info(name)
            cast = recipe.others if info.dtype.is_floating_point else None
            others[name] = (cast or info.dtype, tuple(info.shape))
    return Plan(checkpoint.path, skeleton, recipe, layout, sites, others, checkpoint.num_bytes)


def without_remainders(plan: Plan) -> Plan | None:
    """The plan with every site left as it is that got a scheme of its own for its remainder; None where there is none.

    Clients that dequantize while they load know one scheme for the whole model.
    """
    odd = {s.site.tensor for s in plan.sites if _is_remainder(s, plan.recipe)}
    reason = (
        f"{plan.layout.name} cannot hold it: its in_features need a scheme of their own, and transformers reads one only for "
        "this model, whose code wants float weights: use --format halfbin, or a scheme with one scale per row"
    )
    sites = tuple(_left(s, reason) if s.site.tensor in odd else s for s in plan.sites)
    return dataclasses.replace(plan, sites=sites) if odd else None


def _is_remainder(planned: SitePlan, recipe: Recipe) -> bool:
    rule = recipe.rule_for(planned.site)
    if rule is None or not isinstance(rule.weights, Scheme) or not isinstance(planned.weights, Scheme):
        return False
    return isinstance(rule.weights.granularity, PerGroup) and not isinstance(planned.weights.granularity, PerGroup)


def _left(planned: SitePlan, reason: str) -> SitePlan:
    return dataclasses.replace(
        planned,
        weights=None,
        reason=reason,
        bytes_after=planned.bytes_before,
        transforms=(),
        inputs=None,
        columns_from=None,
    )


def num_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of a dense tensor."""
    return dtype.itemsize * math.prod(shape)


def _require_float(skeleton: Skeleton) -> None:
    """Codes are no weights to round: what is quantized already would be copied as it is, and its config thrown away."""
    config = read_config(skeleton.path)
    text = config.get("text_config")
    how = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    if how:
        method = how.get("quant_method") if isinstance(how, dict) else how
        raise ModelError(
            f"{skeleton.path} is quantized already ({method!s:.80}); start from the float model that it was made from"
        )


def _require_readable_experts(sites: tuple[SitePlan, ...], layout: WeightLayout) -> None:
    """transformers takes experts that it merges for quantized with integers as soon as anything is; see the layout."""
    integers = any(isinstance(s.weights, Scheme) and isinstance(s.weights.format, IntegerFormat) for s in sites)
    floating = next((s for s in sites if s.site.module_class == "Expert" and not s.quantized), None)
    if layout.name == "compressed-tensors" and integers and floating is not None:
        raise RecipeError(
            f"{floating.site.name} would stay in floating point ({floating.reason}) while other sites become integers, and "
            "transformers cannot load such experts from compressed-tensors: give the experts a symmetric integer scheme too, "
            "or use --format halfbin"
        )


def require_met(recipe: Recipe, sites: Sequence[Site]) -> None:
    """A rule for sites of some name must find one; rules for a role, a class or everything are written for any model.

    Raises:
      RecipeError: it finds none; names the nearest.
    """
    names = [site.name for site in sites]
    for rule in recipe.rules:
        if rule.match == "*" or rule.match.startswith(("role:", "class:")) or any(map(rule.fits, sites)):
            continue
        passed_by = [name for name in names if fnmatch.fnmatchcase(name, rule.match)]
        hint = did_you_mean(rule.match, names) if names else "; it has none"
        if passed_by:
            role = next(site.role for site in sites if site.name == passed_by[0])
            hint = f": {passed_by[0]} is protected, name it in full or by role:{role}"
        raise RecipeError(f"recipe {recipe.name}: the rule {rule.match!r} matches no site of this model{hint:.400}")


def _plan_site(site: Site, recipe: Recipe, layout: WeightLayout) -> SitePlan:
    before = num_bytes(site.dtype, site.shape)
    rule = recipe.rule_for(site)
    weights, reason = _decide(site, rule, recipe, layout)
    inputs = rule.inputs if rule is not None else None
    if isinstance(weights, Scheme):
        after = sum(num_bytes(*spec) for spec in layout.tensors(site.tensor, site.shape, weights, inputs).values())
    else:
        after = num_bytes(weights or site.dtype, site.shape)
    if rule is None:
        return SitePlan(site, weights, "rtn", "minmax", reason, before, after)
    return SitePlan(
        site,
        weights,
        rule.method,
        rule.estimator,
        reason,
        before,
        after,
        rule.transforms,
        inputs,
        rule.input_estimator,
        rule.correction,
        _columns_from(site, weights, rule, layout),
        options=rule.options,
    )


def _columns_from(site: Site, weights: Weights, rule: Rule, layout: WeightLayout) -> float | None:
    """From which |x| on columns of a site stay in 16 bits: of a matrix that is one layer's alone, where inputs' outliers do.

    AutoRound learns all columns together, with those of outliers; it keeps none.
    """
    alone = site.role in ("linear", "head") and not site.tied and len(site.shape) == 2
    if rule.inputs is None or not isinstance(weights, Scheme) or not isinstance(layout, HoldsColumns):
        return None
    return rule.inputs.outliers if alone and "autoround" not in rule.method else None


def _decide(site: Site, rule: Rule | None, recipe: Recipe, layout: WeightLayout) -> tuple[Weights, str]:
    if rule is None:
        protected = site.role in PROTECTED_ROLES
        return None, f"{site.role}: kept unless a rule names it" if protected else "no rule matches it"
    because = f"rule {rule.match!r}"
    if not isinstance(rule.weights, Scheme):
        return rule.weights, because if rule.weights else f"{because} keeps it"
    try:
        scheme, remark = fitted_scheme(site, rule, recipe.remainder)
    except SchemeError as error:
        error.add_note(f"at site {site.name!r}, weight {list(site.shape)} {site.dtype}")
        raise
    refusal = layout.refuses(site.module_class, site.shape, scheme, rule.inputs)
    if refusal is None and site.tied and layout.name == "compressed-tensors":
        refusal = "the embedding and the output head share this tensor"
    if refusal is not None:
        return None, f"{layout.name} cannot hold it: {refusal}"
    return scheme, because + remark


def fitted_scheme(site: Site, rule: Rule, remainder: str) -> tuple[Scheme, str]:
    """The rule's scheme, fitted to how this site's weight is stored, and a remark on what was changed about it.

    Raises:
      SchemeError: the group size does not divide in_features and `remainder` is "refuse".
    """
    assert isinstance(rule.weights, Scheme)
    scheme = rule.weights
    if not rule.scale_is_stated:
        stored = site.dtype if site.dtype in (torch.float16, torch.bfloat16) else torch.float32
        scheme = scheme.with_scale(ScaleFormat.of(stored))
    granularity, remark = _as_stored(scheme.granularity, site), ""
    if site.role == "convolution" and scheme.granularity not in (PerChannel(0), PerTensor()):
        remark = "; a convolution has one scale per output channel"
    if isinstance(granularity, PerGroup) and site.shape[granularity.axis] % granularity.size:
        granularity, remark = _short_group(granularity, site.shape, remainder)
    return dataclasses.replace(scheme, granularity=granularity), remark


def _as_stored(granularity: Granularity, site: Site) -> Granularity:
    """The granularity of a matrix [out_features, in_features] for the shape that this site is stored in."""
    if site.role == "convolution":  # [out, in, ...], or [in, out, ...] where it is transposed
        return granularity if isinstance(granularity, PerTensor) else PerChannel(int(site.transposed))
    if len(site.shape) == 3:
        return _in_stack(granularity, site)
    return transposed(granularity) if site.transposed else granularity


def _in_stack(granularity: Granularity, site: Site) -> Granularity:
    """The granularity of each matrix of a stack [experts, out, in], or [experts, in, out] where it is transposed."""
    match granularity:
        case PerChannel() | PerToken():  # a row of every expert's matrix
            return PerGroup(site.shape[1], axis=1) if site.transposed else PerToken()
        case PerGroup(size, -1) if site.transposed:
            return PerGroup(size, axis=1)
        case PerBlock(rows, columns) if site.transposed:
            return PerBlock(columns, rows)
        case _:
            return granularity


def _short_group(group: PerGroup, shape: tuple[int, ...], remainder: str) -> tuple[Granularity, str]:
    """What becomes of a site whose in_features the group size does not divide."""
    length, size = shape[group.axis], group.size
    short = f"in_features={length} leaves {length % size} columns after groups of {size}"
    if remainder == "tail":
        return group, f"; {short}, which get a scale of their own"
    if remainder == "row":
        return _whole_row(group, shape), f"; {short}, so one scale per row"
    divisor = max(d for d in range(1, min(size, length) + 1) if length % d == 0)
    raise SchemeError(f'{short}; try g{divisor}, or remainder = "row" or "tail" in the recipe')


def _whole_row(group: PerGroup, shape: tuple[int, ...]) -> Granularity:
    if len(shape) > 2:
        return PerToken() if group.axis == -1 else PerGroup(shape[group.axis], axis=group.axis)
    return PerChannel(1) if group.axis == 0 else PerChannel(0)


def _working_bytes(planned: SitePlan) -> int:
    """The weight as stored, its codes (a byte each) and what is written."""
    return planned.bytes_before + planned.site.num_weights + planned.bytes_after
