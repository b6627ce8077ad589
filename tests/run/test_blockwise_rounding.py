"""Codes of a site beside columns that are kept from rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halfbin.calibration import InputStatistics
from halfbin.methods import factorise, gptq
from halfbin.models import Site
from halfbin.models.inputs import Group
from halfbin.models.products import Place
from halfbin.planning import SitePlan
from halfbin.planning.options import Options
from halfbin.run.blockwise.rounding import Factors, round_site
from halfbin.tensor import PerChannel, QTensor, Scheme, dequantize, parse_scheme, quantize


def correlated(tokens: int, features: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(features, features, generator=generator) + torch.eye(features)
    return torch.randn(tokens, features, generator=generator) @ mixing


def group_of(x: Tensor) -> Group[InputStatistics]:
    observer = InputStatistics(x.shape[1])
    observer.add(x)
    return Group(observer)


SCHEME: Scheme = parse_scheme("int4-channel")
WITHOUT = torch.tensor([3, 20])


def test_gptq_moves_no_error_to_features_that_take_no_part() -> None:
    assert SCHEME.granularity == PerChannel()
    x, weight = correlated(256, 32), torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    weight[:, WITHOUT] = 0
    factors, group = Factors(), group_of(x)
    q = gptq(weight, SCHEME, factors.of(group, WITHOUT))
    assert not q.codes[:, WITHOUT].any()
    assert gptq(weight, SCHEME, factors.of(group, WITHOUT[:0])).codes[:, WITHOUT].any()  # if they took part
    kept = [i for i in range(32) if i not in WITHOUT.tolist()]
    alone = gptq(weight[:, kept], SCHEME, factorise(group_of(x[:, kept]).observer.matrix()))
    errors = {
        name: float((x[:, kept].double() @ (w_hat - weight[:, kept]).double().T).norm())
        for name, w_hat in (
            ("beside", dequantize(q)[:, kept]),
            ("alone", dequantize(alone)),
            ("nearest", dequantize(quantize(weight, SCHEME))[:, kept]),
        )
    }
    # What is added to the diagonal is a share of the mean of all features' squares, and so a little less.
    assert abs(errors["beside"] - errors["alone"]) < 0.05 * errors["alone"]
    assert errors["beside"] < 0.8 * errors["nearest"]


def test_a_factor_is_made_once_for_the_same_features() -> None:
    factors, group = Factors(), group_of(correlated(64, 32))
    assert factors.of(group, WITHOUT) is factors.of(group, WITHOUT.clone())
    assert factors.of(group, WITHOUT) is not factors.of(group, WITHOUT[:1])
    moment = factors.moment(group, WITHOUT)
    assert isinstance(moment, Tensor) and not moment[WITHOUT].any() and not moment[:, WITHOUT].any()
    assert group.observer.matrix()[WITHOUT].all()  # the statistics are not ours


def codes(weight: Tensor, x: Tensor, options: Options, scheme: Scheme) -> Tensor:
    """Of a linear layer's weight, by GPTQ as a rule's options say."""
    site = Site("up", "up.weight", (16, 32), torch.float32, "linear", "Linear")
    planned = SitePlan(site, scheme, "gptq", "minmax", "", 0, 0, options=options)
    place = Place("up.weight", (16, 32), (32, 1), 0)
    q = round_site(planned, [place], weight.clone(), {place: group_of(x)}, Factors()).q
    assert isinstance(q, QTensor)
    return q.codes


@pytest.mark.parametrize(
    ("options", "factor", "recompute"),
    [
        pytest.param(Options(), {}, False, id="none"),
        pytest.param(Options(act_order=False), {"act_order": False}, False, id="act_order"),
        pytest.param(Options(damping=0.5), {"damping": 0.5}, False, id="damping"),
        pytest.param(Options(group_scales="recomputed"), {"group_size": 8}, True, id="group_scales"),
    ],
)
def test_a_rules_options_reach_gptq(options: Options, factor: dict[str, object], recompute: bool) -> None:
    x, weight = correlated(256, 32), torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    x *= torch.linspace(1, 4, 32)  # columns that differ, so that their order matters
    scheme = parse_scheme("int3-g8")
    found = codes(weight, x, options, scheme)
    made = factorise(group_of(x).observer.moment, **factor)  # type: ignore[arg-type]
    assert torch.equal(found, gptq(weight, scheme, made, recompute_scales=recompute).codes)
    assert torch.equal(found, codes(weight, x, Options(), scheme)) == (options == Options())


def test_scales_of_whole_rows_are_not_chosen_again() -> None:
    x, weight = correlated(256, 32), torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    again = codes(weight, x, Options(group_scales="recomputed"), SCHEME)
    assert torch.equal(again, codes(weight, x, Options(), SCHEME))
