"""What a calibrated run will hold: blocks one at a time, activations of all samples, statistics of one block."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from halfbin.calibration import SecondMoment
from halfbin.calibration.second_moment import sum_bytes
from halfbin.formats.checkpoint import open_checkpoint
from halfbin.formats.read import layout_named
from halfbin.models import open_skeleton
from halfbin.planning import Plan, make_plan, parse_recipe
from halfbin.planning.footprint import Reading, activation_bytes, calibrated_bytes
from models.zoo import NAMES, directory_of

HIDDEN, WIDE = 64, 160


def of(directory: Path, method: str = "gptq", more: str = "") -> Plan:
    text = f'remainder = "row"\n[[rule]]\nmatch = "*"\nweights = "int4-g32"\nmethod = "{method}"\n{more}'
    with open_checkpoint(directory) as checkpoint:
        skeleton = open_skeleton(directory)
        return make_plan(skeleton, checkpoint, parse_recipe(text, source="t"), layout_named("halfbin", skeleton.dtype))


def llama(folder: Path, layers: int) -> Path:
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=WIDE, num_hidden_layers=layers, num_attention_heads=4, vocab_size=50
    )
    LlamaForCausalLM(config).save_pretrained(folder / str(layers))
    return folder / str(layers)


def peak(plan: Plan, num_samples: int = 8, *, in_files: bool = False) -> int:
    reading = Reading(num_samples, 32, 64, in_files)
    return calibrated_bytes(plan.skeleton, plan.sites, reading, num_streams=plan.num_streams)


def test_layers_do_not_count(tmp_path: Path) -> None:
    assert peak(of(llama(tmp_path, 2))) == peak(of(llama(tmp_path, 5)))


def test_each_sample_counts_twice_in_memory_and_not_in_files(tmp_path: Path) -> None:
    plan = of(llama(tmp_path, 2))
    assert peak(plan, 9) - peak(plan, 8) == 2 * 4 * 32 * HIDDEN
    assert peak(plan, 9, in_files=True) == peak(plan, 8, in_files=True)
    assert peak(plan, 8) - peak(plan, 8, in_files=True) == activation_bytes(plan.skeleton, Reading(8, 32, 64))


def test_the_sum_is_that_of_a_llama_written_out(tmp_path: Path) -> None:
    plan = of(llama(tmp_path, 3))
    parameters = dict(plan.skeleton.model.named_parameters())
    block = 4 * sum(p.numel() for name, p in parameters.items() if ".layers.0." in name)
    rest = 4 * sum(p.numel() for name, p in parameters.items() if ".layers." not in name)
    activations = 2 * 4 * 8 * 32 * HIDDEN
    # q, k, v and o; gate and up; down.
    statistics = 2 * sum_bytes(HIDDEN) + sum_bytes(WIDE)
    batch = 4 * 64 * (4 * WIDE + 3 * HIDDEN)
    rounding = sum_bytes(WIDE) + max(2 * 4 * WIDE**2, 4 * WIDE**2 + 5 * 4 * HIDDEN * WIDE)
    assert peak(plan) == rest + block + activations + max(statistics + batch, rounding)


@pytest.mark.parametrize("features", [1, 384, 1000])
def test_statistics_are_as_large_as_they_are_said_to_be(features: int) -> None:
    held = SecondMoment(features)._strips
    assert sum_bytes(features) == sum(strip.numel() * strip.element_size() for strip in held)


def test_learning_and_correcting_cost_more_than_rounding(tmp_path: Path) -> None:
    directory = llama(tmp_path, 2)
    plain = peak(of(directory))
    assert peak(of(directory, "gptq+autoround")) > plain
    assert peak(of(directory, more="correction = 0.5\n")) > plain


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_model_is_counted(name: str) -> None:
    plan = of(directory_of(name))
    largest = max((p.numel() for p in plan.skeleton.model.parameters() if p.ndim > 1), default=0)
    assert peak(plan) > 4 * largest
    with torch.device("meta"):
        assert peak(plan) == peak(of(directory_of(name)))
