"""What a calibrated run holds at most, counted from shapes before it begins.

    outside + block + activations + max(statistics + batch, statistics of the widest + workspace)

outside:     parameters in no block, float32.
block:       the largest block's parameters, float32.
activations: what stands before the blocks, float32, and as much again, for the model itself keeps what it embedded; nothing
             where they lie in files.
statistics:  of each tensor that a site reads, the upper half of a float64 matrix, in strips.
batch:       what a block computes of the tokens that go through it together; with a second stream its inputs, too.
workspace:   two float32 matrices of a site's in_features to factorise; or their factor, the weight four times and its codes.

Sites below one module that have the same in_features are taken to read one tensor. On Llamas of hidden 512, 1024 and 2048
the sum was within 10 % of what was measured; see docs/performance.md.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from halfbin.calibration.second_moment import sum_bytes
from halfbin.models import Site, Skeleton, targets
from halfbin.models.blocks import Block, find_blocks

if TYPE_CHECKING:
    from halfbin.planning.plan import SitePlan

FLOAT32 = 4
TIMES_WIDEST, TIMES_HIDDEN = 4, 3  # of a token: what a block holds at once of its widest inputs, and of its own
TIMES_LEARNED = (
    9  # of a block's weights: values, offsets, bounds, their gradients and best, and what leads back to them
)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a calibrated run reads.

    num_samples, length: samples at most, and tokens in each.
    at_once:  tokens that go through a block together, at most, unless one sample has more.
    in_files: activations between blocks lie in mapped files.
    """

    num_samples: int
    length: int
    at_once: int
    in_files: bool = False

    @property
    def num_tokens(self) -> int:
        """All tokens."""
        return self.num_samples * self.length

    @property
    def batch_tokens(self) -> int:
        """Those of a batch."""
        return min(max(self.at_once // self.length, 1) * self.length, self.num_tokens)


def activation_bytes(skeleton: Skeleton, reading: Reading, *, num_streams: int = 1) -> int:
    """What stands between two blocks: before the next one, and what the model embedded at the start."""
    return 2 * FLOAT32 * reading.num_tokens * _hidden(skeleton) * num_streams


def calibrated_bytes(skeleton: Skeleton, sites: Sequence[SitePlan], reading: Reading, *, num_streams: int = 1) -> int:
    """The peak of a calibrated run, above the interpreter with its imports."""
    blocks = find_blocks(skeleton.model)
    owner = {p: block for block in blocks for p in block.parameters}
    parameter = {name: t.parameter for name, t in targets(skeleton, [s.site.tensor for s in sites]).items()}
    inside: dict[str, list[SitePlan]] = {block.name: [] for block in blocks}
    outside: list[SitePlan] = []
    for planned in sites:
        if planned.quantized and _matrix(planned.site) is not None:
            block = owner.get(parameter[planned.site.tensor])
            if block is not None:
                inside[block.name].append(planned)
            elif planned.needs_data:
                outside.append(planned)
    in_blocks = sum(_parameter_bytes(block) for block in blocks)
    rest = max(FLOAT32 * sum(p.numel() for p in skeleton.model.parameters()) - in_blocks, 0)
    held = rest + _statistics(outside)
    if not reading.in_files:
        held += activation_bytes(skeleton, reading, num_streams=num_streams)
    peaks = [_in_block(skeleton, block, inside[block.name], reading) for block in blocks]
    head = FLOAT32 * reading.batch_tokens * max((_matrix_of(s)[1] for s in outside), default=0)
    return held + max(max(peaks, default=0), head + _rounding(outside))


def _in_block(skeleton: Skeleton, block: Block, sites: Sequence[SitePlan], reading: Reading) -> int:
    widths = [_matrix_of(s)[2] for s in sites]
    hidden = _hidden(skeleton)
    batch = FLOAT32 * reading.batch_tokens * (TIMES_WIDEST * max(widths, default=hidden) + TIMES_HIDDEN * hidden)
    weights = _parameter_bytes(block)
    widest = [s for s in sites if _matrix_of(s)[2] == max(widths)]
    peak = max(_statistics(sites) + batch, _statistics(widest) + _rounding(sites))
    if any(s.correction for s in sites):  # float weights beside the rounded, both streams' inputs and their product
        peak += weights + FLOAT32 * (2 * reading.batch_tokens * max(widths) + max(widths) ** 2)
    if any("autoround" in s.method for s in sites):
        peak += TIMES_LEARNED * weights + 2 * batch
    return weights + peak


def _statistics(sites: Sequence[SitePlan]) -> int:
    """What is held of all inputs; with corrections, of those of one stage: sites with one name and width, but for numbers."""
    seen: dict[tuple[str, int], int] = {}
    for planned in sites:
        count, _, width = _matrix_of(planned)
        moved = 8 * width**2 if planned.correction else 0
        seen[planned.site.name.rpartition(".")[0], width] = count * (sum_bytes(width) + moved)
    if not any(s.correction for s in sites):
        return sum(seen.values())
    stages: Counter[tuple[str, int]] = Counter()
    for (path, width), size in seen.items():
        stages[re.sub(r"\.\d+(?=\.|$)", ".#", path), width] += size
    return max(stages.values())


def _rounding(sites: Sequence[SitePlan]) -> int:
    """The workspace of the site that takes most."""
    found = [0]
    for planned in sites:
        count, rows, width = _matrix_of(planned)
        weight = FLOAT32 * rows * width
        stored = (count - 1) * weight * 3  # a stack's other matrices, as they are, rounded, and their difference
        factorise = 2 * FLOAT32 * width**2
        found.append(max(factorise, FLOAT32 * width**2 + 5 * weight + stored))
    return max(found)


def _matrix_of(planned: SitePlan) -> tuple[int, int, int]:
    found = _matrix(planned.site)
    assert found is not None
    return found


def _matrix(site: Site) -> tuple[int, int, int] | None:
    """How many matrices a site holds, their out_features and in_features; None where it multiplies nothing."""
    if site.role in ("embedding", "convolution") or len(site.shape) not in (2, 3):
        return None
    count, rows, columns = (1, *site.shape) if len(site.shape) == 2 else site.shape
    return (count, columns, rows) if site.transposed else (count, rows, columns)


def _parameter_bytes(block: Block) -> int:
    return FLOAT32 * sum(p.numel() for p in block.module.parameters())


def _hidden(skeleton: Skeleton) -> int:
    """The width of what goes from block to block: as the config states it, or as wide as embeddings are."""
    config: Any = skeleton.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    stated = getattr(text, "hidden_size", None)
    if isinstance(stated, int):
        return stated
    matrices = (p.shape[-1] for p in skeleton.model.parameters() if p.ndim >= 2)
    return int(next(matrices, 1))
