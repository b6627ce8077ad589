"""Codes for the sites of one block, from their weights in memory and what was seen of their inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from halfbin.calibration import InputStatistics, SecondMoment, outlier_features
from halfbin.errors import DataError
from halfbin.evaluation.layers import TensorError
from halfbin.kernels.errors import ErrorSums
from halfbin.methods import METHODS, Factor, clipped, corrected, factorise, gptq
from halfbin.methods.clip import after_correction
from halfbin.models.inputs import Group
from halfbin.models.products import Place
from halfbin.numerics import ESTIMATORS
from halfbin.numerics.low_rank import LowRank, low_rank
from halfbin.planning import SitePlan
from halfbin.planning.options import DEFAULTS, Options
from halfbin.planning.recipe import CLIP, rounding
from halfbin.tensor import MixedTensor, QTensor, Scheme, dequantize, quantize, take_columns
from halfbin.tensor.matrices import as_stored, matrices, scheme_of_matrix

WHOLE_FEATURES = 512
ENOUGH_TOKENS = 64  # below that an input's second moment says more about the sample than about the input


@dataclass(slots=True, eq=False)
class Factors:
    """Factorised second moments, each made once for all the sites that read it."""

    _made: dict[int, dict[tuple[object, ...], Factor]] = field(default_factory=dict)

    def moment(self, group: Group[InputStatistics], without: Tensor) -> Tensor | LowRank:
        """The second moment of a group's inputs; approximated where the whole one would make a search take minutes."""
        matrix = group.observer.matrix(torch.float32)
        _clear(matrix, without)
        return low_rank(matrix) if len(matrix) > WHOLE_FEATURES else matrix

    def of(
        self,
        group: Group[InputStatistics],
        without: Tensor | None = None,
        options: Options = DEFAULTS,
        order_group: int | None = None,
    ) -> Factor:
        """The factor of a group's inputs, as if some features (int64 [k]) were always zero: no error moves to or from them.

        `order_group` columns stay together in the order of rounding; None: each goes by itself.

        Raises:
          DataError: it cannot be factorised.
        """
        made = self._made.setdefault(id(group), {})
        features = () if without is None else tuple(without.tolist())
        key = (features, options.damping, options.act_order, order_group)
        if key not in made:
            moment: Tensor | SecondMoment = group.observer.moment
            if without is not None and features:
                moment = _clear(group.observer.matrix(), without)
            made[key] = factorise(moment, damping=options.damping, act_order=options.act_order, group_size=order_group)
        return made[key]

    def forget(self, group: Group[InputStatistics]) -> None:
        """Give the memory of a group's factor and statistics back: the last site that reads it is rounded."""
        self._made.pop(id(group), None)
        group.observer.forget()


def _clear(matrix: Tensor, features: Tensor) -> Tensor:
    matrix[features] = 0
    matrix[:, features] = 0
    return matrix


@dataclass(frozen=True, slots=True, eq=False)
class SiteCodes:
    """What a site became.

    q:            as it is stored.
    output_error: of its outputs on the calibration data, where those were seen.
    remarks:      what a user should know, in words.
    """

    q: QTensor | MixedTensor
    output_error: TensorError | None
    remarks: tuple[str, ...]


def round_site(
    planned: SitePlan,
    places: Sequence[Place],
    parameter: Tensor,
    groups: Mapping[Place, Group[InputStatistics] | None],
    factors: Factors,
) -> SiteCodes:
    """Choose the codes of every matrix of a site, and the columns of a single one that are kept from rounding.

    Args:
      planned: the site, with scheme and method.
      places: where its matrices lie in `parameter`.
      parameter: float32, in memory.
      groups: for each place what was seen of its inputs, None where it was not called.
      factors: for GPTQ.
    """
    stored = planned.weights
    assert isinstance(stored, Scheme)
    site = planned.site
    scheme = scheme_of_matrix(stored, len(site.shape), transposed=site.transposed)
    parts, columns = [], None
    remarks: list[str] = []
    for place in places:
        group = groups[place]
        order_group = planned.options.order_group(_tile_width(scheme, place))
        weight, uncorrected = _corrected(planned, place.view(parameter), group, factors, order_group)
        outliers = _outliers(planned, group)
        if outliers.numel():  # planned for sites of one matrix only
            weight, columns = take_columns(weight, outliers, site.dtype)
        q, remark = _round(planned, weight, scheme, group, factors, outliers, order_group)
        remarks += filter(None, (uncorrected, remark))
        parts.append(q)
    codes = as_stored(parts, stored, site.shape, transposed=site.transposed)
    whole = codes if columns is None else MixedTensor(codes, columns.as_stored(transposed=site.transposed))
    weight = torch.stack([place.view(parameter) for place in places])
    error = output_error(places, weight.mT if site.transposed else weight, whole, groups, transposed=site.transposed)
    return SiteCodes(whole, error, tuple(dict.fromkeys(remarks)))


def output_error(
    places: Sequence[Place],
    values: Tensor,
    q: QTensor | MixedTensor,
    groups: Mapping[Place, Group[InputStatistics] | None],
    *,
    transposed: bool,
) -> TensorError | None:
    """How far a site's outputs move on the calibration data; None where none reached it.

    Args:
      places: of its matrices.
      values: the weight before it was rounded, as it is stored.
      q: what it was rounded to.
      groups: for each place what was seen of its inputs.
      transposed: stored [in, out].
    """
    sums = ErrorSums()
    rounded = matrices(dequantize(q), transposed=transposed)
    for place, weight, w_hat in zip(places, matrices(values, transposed=transposed), rounded, strict=True):
        group = groups[place]
        if group is not None and group.observer.num_tokens:
            sums += _output_sums(weight.to(torch.float32), w_hat, group.observer)
    return TensorError.of(sums) if sums.signal else None


def _outliers(planned: SitePlan, group: Group[InputStatistics] | None) -> Tensor:
    """The input features that were outliers on the samples, where their columns are to be kept: int64 [k], rising."""
    if planned.columns_from is None or group is None:
        return torch.zeros(0, dtype=torch.int64)
    return outlier_features(group.observer, planned.columns_from)


def _corrected(
    planned: SitePlan,
    weight: Tensor,
    group: Group[InputStatistics] | None,
    factors: Factors,
    order_group: int | None,
) -> tuple[Tensor, str | None]:
    """The weight that makes up for what earlier layers have lost, where that is asked for and enough is known; or why not."""
    if not planned.correction or group is None or group.observer.num_tokens < ENOUGH_TOKENS:
        return weight, None
    moved = group.observer.moved()
    if moved is None:
        return weight, None
    try:
        factor = factors.of(group, options=planned.options, order_group=order_group)
        return corrected(weight, moved, factor, share=planned.correction), None
    except DataError as error:
        return weight, f"what earlier layers lost was not made up for: {error}"


def _round(
    planned: SitePlan,
    weight: Tensor,
    scheme: Scheme,
    group: Group[InputStatistics] | None,
    factors: Factors,
    without: Tensor,
    order_group: int | None,
) -> tuple[QTensor, str | None]:
    """Codes of one matrix, and what should be known about them; AutoRound begins at those that are given here.

    Features `without` (int64 [k]) have columns of zeros in `weight`, and take no part.
    """
    first = planned.method.partition("+")[0]
    first = "rtn" if first == "autoround" else first
    plain = rounding(planned.method_without_data, planned.estimator)
    if first in METHODS and planned.estimator != CLIP and not planned.correction:
        return plain(weight, scheme), None
    seen = 0 if group is None else group.observer.num_tokens
    if group is None or seen < ENOUGH_TOKENS:
        return plain(weight, scheme), f"rounded without data: {seen} calibration tokens reached it"
    if first in METHODS:
        if planned.estimator != CLIP:
            return plain(weight, scheme), None
        scale, zero_point = clipped(weight, scheme, factors.moment(group, without))
        return quantize(weight, scheme, scale=scale, zero_point=zero_point), None
    try:
        factor = factors.of(group, without, planned.options, order_group)
    except DataError as error:
        return plain(weight, scheme), f"rounded without data: {error}"
    return _gptq(planned, weight, scheme, factor), _repairs(factor, planned.options.damping)


def _gptq(planned: SitePlan, weight: Tensor, scheme: Scheme, factor: Factor) -> QTensor:
    if planned.estimator == CLIP:
        params = clipped(weight, scheme, after_correction(factor.upper, factor.order))
        return gptq(weight, scheme, factor, params=params)
    recompute = planned.options.group_scales == "recomputed"
    return gptq(weight, scheme, factor, estimator=ESTIMATORS[planned.estimator](), recompute_scales=recompute)


def _tile_width(scheme: Scheme, place: Place) -> int | None:
    """Neighbouring columns that share a scale; None where all of them do."""
    rows, columns = place.size
    width = scheme.granularity.tile((rows, columns))[1]
    return width if 0 < width < columns else None


def _repairs(factor: Factor, damping: float) -> str | None:
    if factor.dtype == torch.float32 and factor.damping <= damping:
        return None
    return f"its second moment was factorised in {factor.dtype} with damping {factor.damping:g}"


def _output_sums(weight: Tensor, w_hat: Tensor, statistics: InputStatistics) -> ErrorSums:
    """The sums behind ||X (w_hat - w)^T|| / ||X w^T||, from X^T X."""
    moment = statistics.moment
    return ErrorSums(signal=moment.energy(weight), noise=max(0.0, moment.energy(w_hat - weight)), max_abs=0.0)
