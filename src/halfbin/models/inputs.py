"""What flows into the products of a block, gathered by the tensor that they read.

q, k and v multiply one tensor, and so do gate and up: they form a group, and statistics of their input are kept once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from halfbin.models.products import Place, Product


class Observer(Protocol):
    """Takes in the rows of an input, one call of the block after the other."""

    def add(self, x: Tensor) -> None:
        """Observe float [..., in_features]."""
        ...


class _Watched:
    """True as long as the memory of a tensor is somebody's, without holding it."""

    def __init__(self, x: Tensor) -> None:
        self._storage: Any = StorageWeakRef(x.untyped_storage())  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def __bool__(self) -> bool:
        return not self._storage.expired()


O = TypeVar("O", bound=Observer)  # noqa: E741


@dataclass(slots=True, eq=False)
class Group(Generic[O]):
    """Products that read the same tensor.

    places:   their weights, in the order in which they came.
    observer: what was seen of the tensor.
    """

    observer: O
    places: list[Place] = field(default_factory=list)


class Inputs(Generic[O]):
    """Gathers groups from the products of many calls; give `see` to a `Watch`, and say when a call begins."""

    def __init__(
        self,
        make: Callable[[int], O],
        wanted: Callable[[Place], bool] = lambda place: True,
        take: Callable[[O, Product], None] = lambda observer, product: observer.add(product.x.detach()),
    ) -> None:
        """Observe nothing yet.

        Args:
          make: a new observer for inputs of so many features.
          wanted: asked once for each weight; products with others are passed over.
          take: gives an observer the rows of a product.
        """
        self._make, self._wanted, self._take = make, wanted, take
        self._group_of: dict[Place, Group[O] | None] = {}
        self._groups: list[Group[O]] = []
        # By the input's memory, which is watched and not held: once it is given back, others may get it.
        self._fed: dict[object, tuple[_Watched, Group[O]]] = {}

    def begin_call(self) -> None:
        """The next products belong to another call of the block."""
        self._fed.clear()

    def see(self, product: Product) -> None:
        """Take one product in."""
        place, x = product.place, product.x
        if not x.numel():
            return
        key = (x.data_ptr(), tuple(x.shape), x.stride())
        fed = self._fed.get(key)
        if fed and not fed[0]:
            fed = None
        if place not in self._group_of:
            self._group_of[place] = self._join(place, fed[1] if fed else None) if self._wanted(place) else None
        group = self._group_of[place]
        if group is not None and (fed is None or fed[1] is not group):
            self._fed[key] = (_Watched(x), group)
            self._take(group.observer, product)

    def groups(self) -> Iterator[Group[O]]:
        """All groups, in the order in which they were first seen."""
        yield from self._groups

    def feeding(self, place: Place) -> Group[O] | None:
        """The first group with a product whose weight holds `place`; None where there was none."""
        return next((g for g in self._groups if any(place.inside(whole) for whole in g.places)), None)

    def _join(self, place: Place, group: Group[O] | None) -> Group[O]:
        if group is None:
            group = Group(self._make(place.size[1]))
            self._groups.append(group)
        group.places.append(place)
        return group
