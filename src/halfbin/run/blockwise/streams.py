"""Which batches of a walk are what: the probe's, the calibration samples, and those beside them that nothing rounds.

Methods that ask what the float model would have given let every sample go through the walk twice: once through the blocks as
they were rounded, once as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from halfbin.models.walk import Call, Stop


class Streams:
    """Numbers of batches: 0 is the probe's, then come the samples, then the same samples in float.

    num_tokens: of the batch whose calls are being run.
    """

    def __init__(self, batches: Sequence[Tensor], *, float_beside: bool) -> None:
        self._batches, self.float_beside = batches, float_beside
        self.num_tokens = 0

    def of(self, probe: Tensor) -> list[Tensor]:
        """All batches of the walk in their order, token ids int64 [num_samples, length]."""
        return [probe, *self._batches, *(self._batches if self.float_beside else ())]

    def observed(self, batch: int) -> bool:
        """Whether statistics are taken of this batch."""
        return 0 < batch <= len(self._batches)

    def pairs(self, stop: Stop) -> Iterator[tuple[Call, Call | None]]:
        """The samples' calls, each with that of the same sample in float, if there is one."""
        calls = {call.batch: call for call in stop.calls}
        for batch, tokens in enumerate(self._batches, 1):
            if batch in calls:
                self.num_tokens = tokens.numel()
                yield calls[batch], calls.get(batch + len(self._batches))
