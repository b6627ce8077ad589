"""What every observer promises: merging is observing both streams, samples may have any leading dimensions, NaN is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from calibration.streams import samples
from halfbin.calibration import ActivationHistogram, ChannelStatistics, CrossMoment, SecondMoment, TokenMaxima
from halfbin.errors import DataError

FEATURES = 37
State = dict[str, Tensor]


class Case:
    """An observer, and everything that can be asked of it."""

    def __init__(
        self, make: Callable[[int], Any], state: Callable[[Any], State], inexact: tuple[str, ...] = ()
    ) -> None:
        self.make, self.state = make, state
        self.inexact = inexact  # float64 sums, whose order of addition a merge changes

    def observed(self, some: list[Tensor]) -> Any:
        observer = self.make(FEATURES)
        for x in some:
            self.add(observer, x)
        return observer

    @staticmethod
    def add(observer: Any, x: Tensor) -> None:
        if isinstance(observer, CrossMoment):
            observer.add(x, x.flip(-1) * 0.5)
        else:
            observer.add(x)


CASES = {
    "channels": Case(
        ChannelStatistics,
        lambda o: {name: getattr(o, name) for name in ("minimum", "maximum", "absmax", "mean_magnitude")},
        ("mean_magnitude",),
    ),
    "histogram": Case(
        ActivationHistogram,
        lambda o: {
            "counts": o.histogram.counts,
            "rest": torch.tensor([o.histogram.num_zeros, o.bin_width, o.histogram.minimum, o.histogram.maximum]),
        },
    ),
    "tokens": Case(TokenMaxima, lambda o: {"values": o.values}),
    "second moment": Case(SecondMoment, lambda o: {"matrix": o.matrix()}, ("matrix",)),
    "cross moment": Case(CrossMoment, lambda o: {"matrix": o.matrix()}, ("matrix",)),
}
every_observer = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def assert_same(case: Case, one: Any, other: Any, *, to_the_bit: bool) -> None:
    assert one.num_tokens == other.num_tokens
    for name, value in case.state(other).items():
        found = case.state(one)[name]
        if to_the_bit or name not in case.inexact:
            assert torch.equal(found, value), name
        else:
            # At most 6 additions of samples, each off by 2**-53 of what was summed so far. |entries| are up to twice the
            # largest ones of their kind, whose signs do not cancel: the scale is the diagonal's.
            assert float((found - value).abs().max()) <= 12 * 2.0**-53 * float(value.abs().max()), name


@every_observer
def test_two_observers_merged_are_one_that_saw_both_streams(case: Case) -> None:
    some = samples(features=FEATURES)
    whole = case.observed(some)
    for cut in range(len(some) + 1):
        first, second = case.observed(some[:cut]), case.observed(some[cut:])
        first.merge(second)
        assert_same(case, first, whole, to_the_bit=cut in (0, len(some) - 1, len(some)))


@every_observer
def test_adding_one_observed_sample_after_the_other_is_exact(case: Case) -> None:
    some = samples(features=FEATURES)
    merged = case.make(FEATURES)
    for x in some:
        merged.merge(case.observed([x]))
    assert_same(case, merged, case.observed(some), to_the_bit=True)


@every_observer
def test_merging_leaves_the_later_observer_as_it_was(case: Case) -> None:
    some = samples(features=FEATURES)
    first, second = case.observed(some[:2]), case.observed(some[2:])
    first.merge(second)
    case.add(first, 100 * some[0])
    assert_same(case, second, case.observed(some[2:]), to_the_bit=True)


@every_observer
def test_leading_dimensions_are_tokens(case: Case) -> None:
    x = torch.randn(2, 3, FEATURES, generator=torch.Generator().manual_seed(1))
    assert_same(case, case.observed([x]), case.observed([x.view(6, FEATURES)]), to_the_bit=True)


@every_observer
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_what_is_not_finite_is_refused_with_its_channel_and_nothing_is_counted(case: Case, value: float) -> None:
    observer = case.observed(samples(2, FEATURES))
    x = torch.ones(4, FEATURES)
    x[2, 18] = value  # the middle one: the second stream of the cross moment is flipped
    with pytest.raises(DataError, match="in 1 of 37 channels, first in channel 18"):
        case.add(observer, x)
    assert_same(case, observer, case.observed(samples(2, FEATURES)), to_the_bit=True)


@every_observer
def test_a_number_that_only_float64_holds_is_refused(case: Case) -> None:
    with pytest.raises(DataError, match="channel 0"):
        case.add(case.make(FEATURES), torch.full((1, FEATURES), 1e300, dtype=torch.float64))


@every_observer
def test_another_number_of_features_is_refused(case: Case) -> None:
    with pytest.raises(DataError, match=r"\[2, 36\], expected 37 features"):
        case.add(case.make(FEATURES), torch.ones(2, 36))
    with pytest.raises(DataError, match="cannot merge"):
        case.make(FEATURES).merge(case.make(36))


@every_observer
def test_a_sample_without_tokens_changes_nothing(case: Case) -> None:
    observer = case.observed([*samples(2, FEATURES), torch.zeros(0, FEATURES)])
    assert_same(case, observer, case.observed(samples(2, FEATURES)), to_the_bit=True)
    assert all(bool(torch.isfinite(value).all()) for value in case.state(case.make(FEATURES)).values())


@every_observer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_types_are_observed_as_float32(case: Case, dtype: torch.dtype) -> None:
    x = torch.randn(5, FEATURES, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert_same(case, case.observed([x]), case.observed([x.float()]), to_the_bit=True)


@every_observer
def test_no_gradient_is_kept(case: Case) -> None:
    x = torch.ones(2, FEATURES, requires_grad=True)
    assert not any(value.requires_grad for value in case.state(case.observed([x])).values())
