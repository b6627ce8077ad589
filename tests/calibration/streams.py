"""Streams of samples that the tests of this room share."""

from __future__ import annotations

import torch
from torch import Tensor

DEAD = 3  # a channel that is 0 on every token


def samples(num: int = 6, features: int = 37, *, seed: int = 0) -> list[Tensor]:
    """Samples of different lengths, with channels from 1e-4 to 1e4 and, where there are enough, one that is never active."""
    generator = torch.Generator().manual_seed(seed)
    sizes: Tensor = torch.logspace(-4, 4, features)[torch.randperm(features, generator=generator)]
    if features > DEAD:
        sizes[DEAD] = 0.0
    return [torch.randn(5 + i, features, generator=generator) * sizes for i in range(num)]
