"""A rotation is orthogonal, is what its matrix is, and spreads what stands out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halfbin.errors import SchemeError
from halfbin.transforms import Rotation, mean_keeping_hadamard, random_hadamard

EPS = torch.finfo(torch.float64).eps


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(1))


@pytest.mark.parametrize("n", [1, 2, 7, 12, 50, 64, 172, 384, 1280])
def test_it_is_orthogonal_and_its_matrix_is_what_it_does(n: int) -> None:
    rotation = random_hadamard(n, seeded())
    q, x = rotation.matrix(), numbers(3, n)
    # n products of numbers whose sizes add up to 1, each off by a few eps of itself, summed one after the other.
    assert float((q @ q.T - torch.eye(n, dtype=torch.float64)).abs().max()) <= (n + 8) * EPS
    assert float((rotation(x) - x @ q).abs().max()) <= (n + 8) * EPS * float(x.abs().sum(1).max())


def test_factors_need_not_be_symmetric() -> None:
    factors = tuple(torch.linalg.qr(numbers(f, f)).Q for f in (3, 5, 2))
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(30)
    rotation, x = Rotation(signs, factors), numbers(4, 60)
    assert rotation.block_size == 30
    assert float((rotation(x) - x @ rotation.matrix()).abs().max()) <= 68 * EPS * float(x.abs().sum(1).max())


@pytest.mark.parametrize("n", [4096, 5120, 11008, 14336])
def test_wide_ones_keep_angles_and_come_back(n: int) -> None:
    rotation, x = random_hadamard(n, seeded()), numbers(4, n)
    turned = rotation(x)
    assert torch.allclose(turned @ turned.T, x @ x.T, rtol=0, atol=n * 8 * EPS * 4)
    assert rotation.block_size == n
    unit = torch.zeros(1, n, dtype=torch.float64)
    unit[0, n // 3] = 1
    assert torch.allclose(rotation(unit).abs(), torch.full((1, n), n**-0.5, dtype=torch.float64), rtol=16 * EPS)


@pytest.mark.parametrize(("n", "block"), [(50, 2), (7, 1), (116, 4), (1500, 500)])
def test_blocks_stand_in_where_no_order_is_known_and_are_told(n: int, block: int) -> None:
    rotation = random_hadamard(n, seeded())
    assert rotation.block_size == block
    assert int((rotation.matrix()[0] != 0).sum()) == block


def test_signs_come_from_the_generator_alone() -> None:
    first, again, other = (random_hadamard(64, seeded(s)).matrix() for s in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_outlier_and_a_constant_are_both_spread() -> None:
    x = torch.stack([torch.ones(256), torch.eye(256)[3] * 256]).double()
    peak = random_hadamard(256, seeded())(x).abs().amax(1)
    assert float(peak[0]) < 5  # without random signs it were 16: the whole row in one number
    assert float(peak[1]) == pytest.approx(16)


def test_types_stay_and_are_rounded_once() -> None:
    rotation, x = random_hadamard(96, seeded()), numbers(5, 2, 96)
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(rotation(x.to(dtype)), rotation(x.to(dtype).double()).to(dtype))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rotation, x = random_hadamard(96, seeded()), numbers(50, 96)
    whole = rotation(x)
    monkeypatch.setattr("halfbin.transforms.rotation._CHUNK", 7 * 96)
    # BLAS may sum in another order for another number of rows.
    assert float((rotation(x) - whole).abs().max()) <= 96 * EPS * float(x.abs().max())


def test_another_width_is_refused() -> None:
    with pytest.raises(SchemeError, match="blocks of 4 do not fill a rotation of 6"):
        Rotation(torch.ones(6), (torch.eye(4),))
    with pytest.raises(SchemeError, match=r"rotation of 8 cannot turn a tensor of shape \[2, 7\]"):
        random_hadamard(8)(torch.ones(2, 7))


@pytest.mark.parametrize("n", [1, 2, 7, 12, 50, 64, 172, 384, 1280])
def test_one_that_keeps_means_is_orthogonal_and_commutes_with_centring(n: int) -> None:
    rotation = mean_keeping_hadamard(n, seeded())
    x, q = numbers(3, n), rotation(torch.eye(n, dtype=torch.float64))
    bound = 4 * (n + 8) * EPS
    assert float((q @ q.T - torch.eye(n, dtype=torch.float64)).abs().max()) <= bound
    size = float(x.abs().sum(1).max())
    assert float((rotation(x) - x @ q).abs().max()) <= bound * size
    centred = x - x.mean(-1, keepdim=True)
    turned = rotation(x)
    assert float((rotation(centred) - (turned - turned.mean(-1, keepdim=True))).abs().max()) <= bound * size


def test_one_that_keeps_means_spreads_what_stands_out() -> None:
    x = torch.zeros(1, 1024)
    x[0, 5] = 32.0
    # A thousand sums of random signs: beyond 5 standard deviations, 5 times what an even spread would be, there are none.
    assert float(mean_keeping_hadamard(1024, seeded())(x).abs().max()) < 5.0
