"""Pairs of producer and consumers, found by measuring: what is known of these architectures from their papers comes out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from halfbin.models import Structure
from halfbin.models.probe import Pair, Probe, by_input, find_pairs, unseen
from halfbin.models.walk import Stop
from models.walking import walking


def pairs_of(name: str, block: int, length: int = 48) -> tuple[dict[str, set[str]], set[int]]:
    """The producers of a block with the parameters that read them, and what the probe never reached."""
    found: list[Pair] = []
    hidden: set[int] = set()
    with walking(name) as w:
        generator = torch.Generator().manual_seed(0)

        def look(stop: Stop) -> None:
            if stop.block is not w.blocks[block]:
                return
            for parameter in stop.block.parameters:  # as after training: norms are not all 1, biases not all 0
                value = w.partial.get(parameter).detach()
                value.add_(torch.randn(value.shape, generator=generator), alpha=0.1)
            probe = Probe(
                {p.removeprefix(f"{stop.block.name}."): w.partial.get(p) for p in stop.block.parameters},
                stop.handing_on(stop.calls[0]),
            )
            before = {p: w.partial.get(p).detach().clone() for p in stop.block.parameters}
            found.extend(find_pairs(probe, stop.block.module, generator))
            prefix = f"{stop.block.name}."
            experts = {p.removeprefix(prefix) for p in Structure(w.partial.model).experts if p.startswith(prefix)}
            hidden.update(unseen(probe, stop.block.module, experts))
            assert all(torch.equal(before[p], w.partial.get(p)) for p in stop.block.parameters)
            assert all(probe.holds(pair, generator) for pair in found)

        w.stops(w.inputs(1, length=length, size=1), look)
    read = {
        p.producer.parameters[0].removesuffix(".weight")
        + (" 1+w" if p.producer.offset else "")
        + (f" {p.producer.rows[0]}:{p.producer.rows[1]}" if p.producer.rows[0] else ""): {
            c.place.parameter.removesuffix(".weight") for c in p.consumers
        }
        for p in found
    }
    return read, hidden


LLAMA = {
    "input_layernorm": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
    "post_attention_layernorm": {"mlp.gate_proj", "mlp.up_proj"},
    "self_attn.v_proj": {"self_attn.o_proj"},  # two heads of values serve four of queries
    "mlp.up_proj": {"mlp.down_proj"},  # through the gate
}
KNOWN = {
    "llama-tied": LLAMA,
    # Norms after attention and MLP too, all of them 1 + w; those after feed the residual stream and are no producers.
    "gemma2": {
        "input_layernorm 1+w": LLAMA["input_layernorm"],
        "pre_feedforward_layernorm 1+w": LLAMA["post_attention_layernorm"],
        "self_attn.v_proj": {"self_attn.o_proj"},
        "mlp.up_proj": {"mlp.down_proj"},
    },
    "phi3": {
        "input_layernorm": {"self_attn.qkv_proj"},
        "post_attention_layernorm": {"mlp.gate_up_proj"},
        "self_attn.qkv_proj 64:96": {"self_attn.o_proj"},
        "mlp.gate_up_proj 64:128": {"mlp.down_proj"},
    },
    "gpt2": {"ln_1": {"attn.c_attn"}, "ln_2": {"mlp.c_fc"}},
    # Normalised after each residual: only the values' scale can move.
    "bert": {"attention.self.value": {"attention.output.dense"}},
    "mixtral": {
        "input_layernorm": LLAMA["input_layernorm"],
        "self_attn.v_proj": {"self_attn.o_proj"},
        "post_attention_layernorm": {"mlp.gate", "mlp.experts.gate_up_proj"},
    },
    "mamba": {"norm": {"mixer.in_proj"}},
}


@pytest.mark.parametrize("name", list(KNOWN))
def test_the_pairs_of_a_known_architecture_are_found(name: str) -> None:
    assert pairs_of(name, 0)[0] == KNOWN[name]


def test_experts_that_no_token_reached_are_reported_and_those_of_a_stack_are_included() -> None:
    found, hidden = pairs_of("mixtral", 0, length=1)  # one token reaches two of four experts
    assert "mlp.experts.gate_up_proj" in found["post_attention_layernorm"]
    assert not hidden
    _, hidden = pairs_of("switch", 1, length=2)
    assert 32 in hidden  # in_features of experts that are modules of their own


class Residual(nn.Module):
    """A norm whose output goes to a linear and past it."""

    def __init__(self, *, past: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear, self.past = nn.LayerNorm(6), nn.Linear(6, 6), past

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        z: Tensor = self.linear(y) + (y if self.past else x)
        return z


@pytest.mark.parametrize("past", [False, True], ids=["only-the-linear-reads-it", "the-residual-reads-it-too"])
def test_what_something_unknown_reads_is_refused(past: bool) -> None:
    block = Residual(past=past)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    probe = Probe(dict(block.named_parameters()), lambda: block(x))
    pairs = find_pairs(probe, block, torch.Generator().manual_seed(2))
    assert [p.producer.parameters for p in pairs] == ([] if past else [("norm.weight", "norm.bias")])


def test_moving_a_scale_leaves_the_function_as_it_was() -> None:
    block = Residual(past=False)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    parameters = dict(block.named_parameters())
    probe = Probe(parameters, lambda: block(x))
    (pair,) = find_pairs(probe, block, torch.Generator().manual_seed(2))
    before, scale = block(x), torch.tensor([0.01, 100, 3, 1, 0.5, 7])
    with probe.scaled(pair.producer, scale, {c.place: c.channels for c in pair.consumers}):
        # The product of 6 numbers, each off by float32's eps on either side.
        assert torch.allclose(block(x), before, atol=1e-5)
        assert not torch.equal(block.norm(x), nn.functional.layer_norm(x, (6,)))
    assert torch.equal(block(x), before)


def test_inputs_without_a_channel_keep_their_scale() -> None:
    assert by_input(torch.tensor([2.0, 3.0]), torch.tensor([1, -1, 0])).tolist() == [3.0, 1.0, 2.0]
