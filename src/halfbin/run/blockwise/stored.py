"""From parameters in memory back to tensors as they lie on disk."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from halfbin.models.partial import PartialModel
from halfbin.models.placement import Places


class Stored:
    """Tells which parameters can be written back after a change, and reads them as they are stored."""

    def __init__(
        self,
        partial: PartialModel,
        places: Mapping[str, Places],
        shapes: Mapping[str, tuple[int, ...]],
        transposed: Collection[str],
    ) -> None:
        """Look nothing up yet.

        Args:
          partial: the model.
          places: of the sites in question, by their names on disk.
          shapes: of all tensors on disk.
          transposed: the sites that are stored [..., in_features, out_features].
        """
        self._partial, self._places, self._shapes, self._transposed = partial, places, shapes, transposed

    def writable(self, parameter: str) -> bool:
        """Whether every tensor that a parameter is made of can be read off it again."""
        return all(self._as_it_is(name) or self._places.get(name) for name in self.names(parameter))

    def names(self, parameter: str) -> Sequence[str]:
        """The tensors on disk that a parameter is made of."""
        return self._partial.on_disk([parameter])

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored, with the values that are in memory now."""
        if self._as_it_is(name):
            return self._partial.get(self._partial.targets[name].parameter).detach()
        found = [place.view(self._partial.get(place.parameter)) for place in self._places[name]]
        matrices = [matrix.T for matrix in found] if name in self._transposed else found
        return matrices[0] if len(self._shapes[name]) == 2 else torch.stack(matrices)

    def _as_it_is(self, name: str) -> bool:
        target = self._partial.targets[name]
        return target.unchanged and tuple(self._partial.get(target.parameter).shape) == self._shapes[name]


def cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in the type that they are stored in, in memory of their own."""
    return values.to(dtype, copy=True).contiguous()
