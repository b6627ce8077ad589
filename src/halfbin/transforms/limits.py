"""How far a scale may be from 1."""

from __future__ import annotations

import torch
from torch import Tensor

# What gives x is stored divided by s, its readers multiplied by it. bfloat16 keeps its digits at any size; float16 loses them
# below 2^-14, so that a norm's weights down to 1/4 keep theirs, and values up to 15 stay finite.
LARGEST = 2.0**12


def limited(scale: Tensor) -> Tensor:
    """Scales of any size, float > 0, to float32 within [1 / LARGEST, LARGEST]."""
    return scale.clamp(1 / LARGEST, LARGEST).to(torch.float32)
