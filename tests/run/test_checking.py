"""Checking calibration data: what is wrong with a set is said, and nothing is said of a good one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import halfbin as hb
from halfbin.errors import HalfbinError
from halfbin.models import open_skeleton
from halfbin.run.calibration import Calibration, samples_for
from halfbin.run.checking import FEW_SAMPLES, CalibrationCheck, _warnings
from halfbin.samples import Samples
from halfbin.samples.overview import RUN, likeness, overview
from models.zoo import directory_of


def checked(folder: Path, tokens: np.ndarray, model: str = "llama") -> CalibrationCheck:
    np.save(folder / "tokens.npy", tokens)
    return hb.check_calibration(directory_of(model), folder / "tokens.npy", num_samples=1000)


def random_tokens(num: int, length: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 48, (num, length))


def test_a_good_set_has_no_warnings_and_every_input_of_the_model(tmp_path: Path) -> None:
    found = checked(tmp_path, random_tokens(256))
    assert found.warnings == ()
    assert len(found.layers) == 2 * 4  # q, k, v read one input, o another, gate and up one, down one
    assert all(layer.num_tokens == 256 * 32 and layer.dead_channels == 0 for layer in found.layers)
    assert found.tokens.num_kinds == 45
    assert found.to_json()["tokens"]["vocabulary"] == 48


def test_few_and_repeated_samples_are_told(tmp_path: Path) -> None:
    found = checked(tmp_path, np.repeat(random_tokens(5), 2, axis=0))
    assert any("10 samples are few" in w and str(FEW_SAMPLES) in w for w in found.warnings)
    assert any("5 samples repeat" in w for w in found.warnings)


def test_an_expert_without_tokens_is_named(tmp_path: Path) -> None:
    found = checked(tmp_path, random_tokens(2, length=8), model="qwen3-moe")
    assert any("fewer than" in w and "experts" in w for w in found.warnings)


def test_channels_that_are_always_zero_are_counted(tmp_path: Path) -> None:
    # One token, always the same one: ReLU leaves many units at zero on all of them.
    found = checked(tmp_path, np.full((40, 8), 7), model="opt")
    dead = [layer for layer in found.layers if layer.dead_channels]
    assert any("fc2" in layer.name for layer in dead)
    assert any("always zero" in w for w in found.warnings)


def test_half_of_the_samples_that_miss_a_range_are_told() -> None:
    from halfbin.run.checking import _Halves

    halves = _Halves(3)
    for scale in (1.0, 10.0, 1.0, 10.0):
        halves.add(torch.ones(4, 3) * scale)
    assert halves.check("x").range_change == pytest.approx(0.9)


def samples_of(*ids: list[int]) -> Samples:
    return Samples(tuple(torch.tensor(i) for i in ids), "text", "by hand")


def test_likeness_is_0_bits_for_the_same_text_and_1_for_disjoint_ones() -> None:
    samples = samples_of([1, 2, 2, 3])
    assert likeness(samples, torch.tensor([3, 2, 1, 2])).divergence == pytest.approx(0, abs=1e-12)
    apart = likeness(samples, torch.tensor([7, 8]))
    assert apart.divergence == pytest.approx(1)
    assert apart.covered == 0
    assert likeness(samples, torch.tensor([1, 9])).covered == 0.5


def test_counts_are_of_kinds_and_of_samples() -> None:
    found = overview(samples_of([1, 2], [1, 2], [3, 3]), vocabulary=10)
    assert (found.num_samples, found.num_tokens, found.num_repeated, found.num_kinds) == (3, 6, 1, 3)


def test_what_halves_of_the_samples_differ_by_is_told_beside() -> None:
    found = likeness(samples_of([1, 2], [3, 4], [2, 1], [4, 3]), torch.tensor([1, 2, 3, 4]))
    assert found.divergence == pytest.approx(0, abs=1e-12)
    assert found.own == pytest.approx(1)


def test_copied_runs_are_counted_and_told() -> None:
    text = torch.randint(0, 50, (RUN + 99,), generator=torch.Generator().manual_seed(0))  # 100 runs
    assert likeness(samples_of(list(range(100))), text).shared == 0
    copied = likeness(samples_of([99, *text[10 : 10 + RUN + 3].tolist(), 99], [1, 2]), text)
    assert copied.shared == pytest.approx(0.04)
    assert any("4.0% of the other text" in w for w in _warnings(overview(samples_of([1]), None), copied, ()))


def test_samples_longer_than_the_model_reads_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", random_tokens(4))
    skeleton = open_skeleton(directory_of("llama"))
    context = skeleton.config.max_position_embeddings
    samples_for(skeleton, Calibration(path=tmp_path / "tokens.npy", length=context))
    with pytest.raises(HalfbinError, match=f"--sample-length {context} or less"):
        samples_for(skeleton, Calibration(path=tmp_path / "tokens.npy", length=context + 1))
