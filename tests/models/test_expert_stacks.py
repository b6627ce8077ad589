"""Experts of a quantized checkpoint compute with its codes, and whatever cannot says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import halfbin as hb
from halfbin.models import load_weights
from halfbin.models.running import Running, load_running
from halfbin.nn import EXACT, CpuFeatures, ExpertStack, QuantExperts, QuantLinear
from halfbin.nn.experts import refuses_experts
from halfbin.run.benchmark import bytes_per_token, experts_chosen
from models.test_running import outputs, written
from models.zoo import directory_of

pytestmark = pytest.mark.skipif("avx2" not in CpuFeatures.detect().instructions, reason="plain loops are not chosen")
FAMILIES = ["mixtral", "qwen3-moe", "qwen2-moe", "gpt-oss", "granite-moe"]


def experts_as(weights: str, *more: str) -> str:
    rules = "".join(
        f'[[rule]]\nmatch = "{match}"\nweights = "{scheme}"\n'
        for match, scheme in zip(more[::2], more[1::2], strict=True)
    )
    return f'layout = "halfbin"\n{rules}[[rule]]\nmatch = "role:expert"\nweights = "{weights}"\n'


def stacks(running: Running) -> list[ExpertStack]:
    return [m for m in running.model.modules() if isinstance(m, ExpertStack)]


@pytest.mark.parametrize("scheme", ["int4-g32", "uint4-g32-asym", "int8-channel"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_expert_gets_its_own_codes_whatever_the_layout_on_disk(name: str, scheme: str, tmp_path: Path) -> None:
    """With float inputs, the reference multiplies the very weights that transformers merges: only sums may differ."""
    skeleton = written(name, experts_as(scheme), tmp_path)
    running = load_running(skeleton, tmp_path, dtype=torch.float32)
    assert running.dequantized == {}
    assert len(stacks(running)) == 4
    assert not any(p.is_meta for p in (*running.model.parameters(), *running.model.buffers()))
    for stack in stacks(running):
        assert stack._together() is not None
        stack.choose(EXACT)
    expected = outputs(load_weights(skeleton, directory=tmp_path), skeleton)
    torch.testing.assert_close(outputs(running.model, skeleton), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_module_gives_what_the_single_products_of_its_experts_give(name: str, tmp_path: Path) -> None:
    """Products have the same bits, and the sum of two outputs has one order; an activation may round its last bit."""
    running = load_running(written(name, experts_as("int8-channel"), tmp_path), tmp_path, dtype=torch.float32)
    modules = [m for m in running.model.modules() if isinstance(m, QuantExperts)]
    assert len(modules) == 2
    for module in modules:
        generator = torch.Generator().manual_seed(1)
        x, scores = torch.randn(23, 32, generator=generator), torch.rand(23, 4, generator=generator)
        weights, chosen = scores.topk(2)
        with torch.no_grad():
            expected = torch.stack([one_token(module, *its) for its in zip(x, chosen, weights, strict=True)])
            found = module(x, chosen, weights)
        torch.testing.assert_close(found, expected, rtol=2**-20, atol=2**-20 * float(expected.abs().max()))


def one_token(module: Any, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    def product(stack: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = stack.layers[expert](x)
        return y if stack.bias is None else y + stack.bias[expert]

    y = torch.zeros_like(x)
    for expert, weight in zip(chosen.tolist(), weights, strict=True):
        inner = module.rest._apply_gate(product(module.gate_up_proj, expert, x[None]))
        y = y + product(module.down_proj, expert, inner)[0] * weight
    return y


def test_packed_experts_are_all_that_is_held(tmp_path: Path) -> None:
    skeleton = written("mixtral", experts_as("int4-g32"), tmp_path)
    running = load_running(skeleton, tmp_path)
    for stack in stacks(running):
        num, rows, columns = stack.shape
        whole = stack._together()
        assert whole is not None
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(stack)}
        assert sum(held.values()) == whole.numel()  # and no codes of a byte, no float copy, no second stack
        # A header, codes of half a byte and a float32 scale for 32 of them, in panels of 64 rows.
        panels = -(-rows // 64)
        assert whole.numel() == num * (64 + panels * 64 * columns * (0.5 + 4 / 32))
    assert not any(p.ndim == 3 for p in running.model.parameters())


def _tensors(stack: ExpertStack) -> list[torch.Tensor]:
    found = [*stack.parameters(), *stack.buffers()]
    found += [layer.memory for layer in stack.layers]  # type: ignore[misc]
    return [t for t in found if t.numel()]


def test_a_model_of_experts_runs_in_bfloat16_and_caches(tmp_path: Path) -> None:
    skeleton = written("qwen3-moe", experts_as("int4-g32", "role:linear", "int4-g32"), tmp_path)
    model: Any = load_running(skeleton, tmp_path, dtype=torch.bfloat16).model
    ids = torch.tensor([[1, 5, 9, 12]])
    found = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert found.shape[1] > 4


def test_the_table_of_kernels_tells_stacks_once(tmp_path: Path) -> None:
    recipe, output = tmp_path / "r.toml", tmp_path / "out"
    recipe.write_text(experts_as("int4-g32", "role:linear", "int4-g32"))
    hb.quantize(directory_of("mixtral"), output, recipe=recipe, evaluate=False)
    found = hb.bench(output, prompt_tokens=4, new_tokens=1, rounds=1, alone=True)
    told = {layer.name: layer for layer in found.layers}
    layer = told["model.layers.0.mlp.experts.gate_up_proj"]
    assert layer.kernel == "int8-inputs, experts together" and layer.shape == (4, 128, 32)
    assert len(found.layers) == 8 + 4 and found.dequantized == {}


def test_a_token_reads_the_experts_that_its_router_chooses(tmp_path: Path) -> None:
    skeleton = written("mixtral", experts_as("int4-g32"), tmp_path)
    for model, bits in ((load_running(skeleton, tmp_path).model, 5), (load_weights(skeleton, directory=tmp_path), 32)):
        chosen = experts_chosen(model, torch.tensor([[3]]))
        assert list(chosen.values()) == [2, 2]
        # Of 4 experts in 2 layers, 2 are not read: three matrices of 32 x 64, int4 with a float32 scale for 32, or float32.
        assert bytes_per_token(model) - bytes_per_token(model, chosen) == 2 * 2 * 3 * 32 * 64 * bits / 8


@pytest.mark.parametrize(
    ("name", "recipe", "words"),
    [
        ("mixtral", experts_as("int4-g16"), "groups of 16 columns are no multiple of 32"),
        ("mixtral", experts_as("fp8_e4m3-channel"), "its codes are fp8_e4m3, no integers"),
        ("mixtral", experts_as("int4-g32", "*.w1", "int8-g32"), "it is merged with a matrix of another scheme"),
        ("mixtral", experts_as("int4-g32", "*.0.w2", "int8-g32"), "experts are not alike"),
        ("mixtral", experts_as("int4-tensor"), "int4-tensor has scales that rows share"),
        ("mixtral", experts_as("int4-g32", "*.w2", "keep"), "down_proj of the same experts is held as floats"),
    ],
    ids=lambda value: value if " " in str(value) and "[[" not in str(value) else "",
)
def test_what_cannot_compute_with_codes_says_why_and_computes_with_floats(
    name: str, recipe: str, words: str, tmp_path: Path
) -> None:
    skeleton = written(name, recipe, tmp_path)
    running = load_running(skeleton, tmp_path, dtype=torch.float32)
    assert running.dequantized and stacks(running) == []
    assert all(words in reason and "merged" in reason for reason in running.dequantized.values())
    expected = outputs(load_weights(skeleton, directory=tmp_path), skeleton)
    torch.testing.assert_close(outputs(running.model, skeleton), expected, rtol=1e-5, atol=1e-5)


def test_experts_that_are_modules_are_a_layer_each(tmp_path: Path) -> None:
    skeleton = written("switch", experts_as("int4-g32", "*experts*", "int4-g32"), tmp_path)
    running = load_running(skeleton, tmp_path)
    kinds = [type(m) for n, m in running.model.named_modules() if ".expert_" in n and n.endswith(("wi", "wo"))]
    assert kinds and set(kinds) == {QuantLinear}


def test_a_module_that_runs_its_own_way_is_refused_in_words() -> None:
    assert "is not declared to be one of experts" in str(refuses_experts(nn.Linear(2, 2)))
