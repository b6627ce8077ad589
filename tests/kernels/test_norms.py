"""RMS norm, compiled: against float64, in every form, and as torch's plain formula rounds."""

import pytest
import torch
from torch import Tensor

from halfbin.kernels import instruction_sets, norms

SIZES = (1, 2, 15, 16, 17, 31, 33, 64, 100, 257, 2048)


def inputs(m: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(m * 1000 + n)
    return torch.randn(m, n, generator=generator).to(dtype) * 3, torch.randn(n, generator=generator).to(dtype)


def exact(x: Tensor, weight: Tensor, eps: float, *, one_plus: bool) -> Tensor:
    x, weight = x.double(), weight.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * (weight + one_plus)


@pytest.mark.parametrize("one_plus", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", SIZES)
def test_within_the_roundings_of_the_formula(n: int, dtype: torch.dtype, *, one_plus: bool) -> None:
    x, weight = inputs(5, n, dtype)
    y = norms.rms_norm(x, weight, 1e-5, one_plus=one_plus).double()
    expected = exact(x, weight, 1e-5, one_plus=one_plus)
    # In float32: the mean, + eps, the root, 1 / root, * x, * weight, and 1 + weight, each half an eps of what it gives; the
    # root halves what came before it. Then two roundings to the type, or one.
    single = torch.finfo(torch.float32).eps / 2
    own = 0.0 if dtype is torch.float32 else torch.finfo(dtype).eps / 2
    magnitude = exact(x, weight.abs(), 1e-5, one_plus=one_plus).abs()  # 1 + weight may cancel
    assert ((y - expected).abs() <= (7 * single + 2.02 * own) * magnitude).all()


@pytest.mark.parametrize("instruction_set", instruction_sets.usable())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", SIZES)
def test_every_form_gives_the_same_bits(n: int, dtype: torch.dtype, instruction_set: str) -> None:
    x, weight = inputs(3, n, dtype)
    for one_plus in (False, True):
        one = norms.rms_norm(x, weight, 1e-6, one_plus=one_plus, instruction_set="portable")
        assert torch.equal(norms.rms_norm(x, weight, 1e-6, one_plus=one_plus, instruction_set=instruction_set), one)


def test_bfloat16_is_what_llamas_formula_gives() -> None:
    x, weight = inputs(64, 512, torch.bfloat16)
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    expected, got = weight * scaled.to(torch.bfloat16), norms.rms_norm(x, weight, 1e-5)
    # torch sums in another order: where that moves x * r across a tie, one step. It is rare.
    assert (expected != got).float().mean() < 0.01
    assert (
        (expected.float() - got.float()).abs() <= 2 * torch.finfo(torch.bfloat16).eps * expected.float().abs()
    ).all()


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_threads_change_nothing(num_threads: int) -> None:
    x, weight = inputs(300, 1000, torch.bfloat16)
    one = norms.rms_norm(x, weight, 1e-6, instruction_set="portable")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        assert torch.equal(norms.rms_norm(x, weight, 1e-6), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_that_is_not_finite_spoils_itself_alone(dtype: torch.dtype) -> None:
    x, weight = inputs(4, 33, dtype)
    clean = norms.rms_norm(x, weight, 1e-6)
    x[1, 7], x[2, 32] = float("nan"), float("inf")
    y = norms.rms_norm(x, weight, 1e-6)
    assert y[1].isnan().all()
    assert y[2, 32].isnan()
    assert (y[2, :32] == 0).all()
    assert torch.equal(y[[0, 3]], clean[[0, 3]])


def test_strides_and_shapes() -> None:
    x, weight = inputs(12, 40, torch.float32)
    folded = norms.rms_norm(x, weight, 1e-6)
    assert torch.equal(norms.rms_norm(x.view(3, 4, 40), weight, 1e-6), folded.view(3, 4, 40))
    assert torch.equal(norms.rms_norm(x.t().contiguous().t(), weight, 1e-6), folded)
    assert norms.rms_norm(x[:0], weight, 1e-6).shape == (0, 40)


@pytest.mark.parametrize(
    ("x", "weight", "says"),
    [
        (torch.ones(2, 4), torch.ones(5), "does not fit"),
        (torch.ones(2, 4), torch.ones(4, dtype=torch.bfloat16), "not both"),
        (torch.ones(2, 4).half(), torch.ones(4).half(), "not both"),
        (torch.tensor(1.0), torch.tensor(1.0), "does not fit"),
        (torch.ones(2, 4, device="meta"), torch.ones(4), "meta"),
    ],
)
def test_what_does_not_fit_is_refused(x: Tensor, weight: Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        norms.rms_norm(x, weight, 1e-6)
