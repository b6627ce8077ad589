"""A tiny model that is run block by block, and what to feed it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from halfbin.formats.checkpoint import Checkpoint, open_checkpoint
from halfbin.models import Skeleton, open_skeleton
from halfbin.models.blocks import Block, find_blocks
from halfbin.models.partial import PartialModel
from halfbin.models.walk import Stop, walk
from models.zoo import directory_of

TEXT = (
    "llama-tied", "gemma2", "gpt2", "opt", "gpt-neox", "phi3", "bert", "mixtral", "qwen2-moe", "gpt-oss", "granite-moe",
    "switch", "mamba", "t5", "bart", "llava",
)  # fmt: skip


class Walking:
    """A model of the zoo, its rest in memory, its blocks on disk."""

    def __init__(self, name: str, checkpoint: Checkpoint) -> None:
        self.skeleton: Skeleton = open_skeleton(directory_of(name))
        self.checkpoint = checkpoint
        self.partial = PartialModel(self.skeleton, checkpoint)
        self.blocks: Sequence[Block] = find_blocks(self.partial.model)
        self.partial.load(self.partial.outside(self.blocks))

    def inputs(self, num_batches: int = 2, length: int = 12, size: int = 2) -> list[dict[str, Any]]:
        """Random tokens as the model's arguments."""
        generator = torch.Generator().manual_seed(0)
        found = []
        always = {"use_cache": False} if "use_cache" in inspect.signature(self.partial.model.forward).parameters else {}
        for _ in range(num_batches):
            ids = torch.randint(3, 48, (size, length), generator=generator)
            both = {"decoder_input_ids": ids} if self.skeleton.config.is_encoder_decoder else {}
            found.append({"input_ids": ids} | both | always)
        return found

    def stops(self, inputs: Sequence[dict[str, Any]], at: Callable[[Stop], None] = lambda stop: None) -> None:
        """Walk through, looking `at` each stop while its block is in memory."""
        for stop in walk(self.partial.model, self.blocks, inputs):
            self.partial.load(stop.block.parameters)
            with torch.no_grad():
                stop.find_mutation()
                at(stop)
                for call in stop.calls:
                    call.output = stop.run(call, final=True)
            self.partial.release(stop.block.parameters)


@contextlib.contextmanager
def walking(name: str) -> Iterator[Walking]:
    with open_checkpoint(directory_of(name)) as checkpoint:
        yield Walking(name, checkpoint)
