"""Norms are replaced by what computes the same, and only then."""

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from halfbin.nn.norms import RmsNorm, fuse_norms


class Doubled(LlamaRMSNorm):  # type: ignore[misc]
    """Named and shaped like a norm, and twice as much."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        twice: Tensor = 2 * super().forward(hidden_states)
        return twice


class WithoutEps(LlamaRMSNorm):  # type: ignore[misc]
    """Has an eps that it does not use."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        y: Tensor = self.weight * hidden_states * torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True))
        return y


def random_norm(kind: type[nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    norm = kind(48)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(48, generator=torch.Generator().manual_seed(1)))  # type: ignore[operator]
    return norm.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, GemmaRMSNorm])
def test_known_norms_are_replaced_under_their_names(kind: type[nn.Module], dtype: torch.dtype) -> None:
    norm = random_norm(kind, dtype)
    model = nn.Sequential(norm, nn.Linear(48, 48, dtype=dtype))
    state, x = dict(model.state_dict()), torch.randn(2, 7, 48).to(dtype)
    expected = norm(x)
    assert fuse_norms(model) == 1
    assert isinstance(model[0], RmsNorm)
    assert model.state_dict().keys() == state.keys()
    bound = 4 * torch.finfo(dtype).eps
    assert ((model[0](x).float() - expected.float()).abs() <= bound * expected.float().abs()).all()
    assert fuse_norms(model) == 0


@pytest.mark.parametrize("kind", [Doubled, WithoutEps, nn.LayerNorm, nn.BatchNorm1d])
def test_what_computes_something_else_stays(kind: type[nn.Module]) -> None:
    model = nn.Sequential(random_norm(kind))
    before = model[0]
    assert fuse_norms(model) == 0
    assert model[0] is before


def test_a_norm_that_somebody_listens_to_stays() -> None:
    model = nn.Sequential(random_norm(LlamaRMSNorm))
    model[0].register_forward_hook(lambda *_: None)
    assert fuse_norms(model) == 0


def test_gradients_and_other_types_take_the_models_own_way() -> None:
    model = nn.Sequential(random_norm(LlamaRMSNorm))
    own = model[0]
    fuse_norms(model)
    x = torch.randn(3, 48, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(model.to(torch.float16)(x.detach().half()), own(x.detach().half()))
    loaded = {"0.weight": torch.full((48,), 2.0)}
    model.float().load_state_dict(loaded)
    assert torch.equal(model(x), own(x))


def test_compilers_see_the_models_own_operations() -> None:
    model = nn.Sequential(random_norm(LlamaRMSNorm))
    x = torch.randn(2, 48)
    expected = model(x)
    fuse_norms(model)
    exported = torch.export.export(model, (x,)).module()
    assert torch.equal(exported(x), expected)
