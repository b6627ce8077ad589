"""The order in which the sites of a block are rounded, where each is to live with what rounding those before it has lost.

Sites that read the same input make a stage, and so do the same layers of many experts: the inputs of each stage are observed
when all stages before it are rounded. Which comes first is seen while the block runs.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from halfbin.models.inputs import Inputs
from halfbin.models.placement import Places
from halfbin.models.products import Place, Product, Watch
from halfbin.planning import SitePlan

Site = tuple[SitePlan, Places]


class Enough(BaseException):
    """Everything that was to be seen of a block has been seen: the rest of it need not be computed. No model may catch it."""


class _Nothing:
    """An observer that keeps nothing."""

    def add(self, x: Tensor) -> None:
        """See it go by."""


@dataclass(slots=True)
class Order:
    """What one run of a block showed.

    group: by place, the number of the input that its product reads, in the order in which inputs came.
    times: how often each place was multiplied.
    """

    group: dict[Place, int] = field(default_factory=dict)
    times: Counter[Place] = field(default_factory=Counter)

    @classmethod
    def of(cls, run: Callable[[], object], parameters: Mapping[str, nn.Parameter]) -> Order:
        """Run a block, and see."""
        inputs, order = Inputs(lambda num_features: _Nothing()), cls()

        def see(product: Product) -> None:
            inputs.see(product)
            order.times[product.place] += 1

        with Watch(parameters, see):
            run()
        order.group = {place: number for number, group in enumerate(inputs.groups()) for place in group.places}
        return order

    def stages(self, sites: Sequence[Site]) -> list[list[Site]]:
        """The sites in stages; those that the run did not come by are in the last one."""
        first: dict[str, int] = {}
        for whole, number in self.group.items():
            for planned, places in sites:
                if any(place.inside(whole) for place in places):
                    kind = _kind(planned)
                    first[kind] = min(first.get(kind, number), number)
        last = max(first.values(), default=0)
        numbers = sorted({first.get(_kind(planned), last) for planned, _ in sites})
        return [[site for site in sites if first.get(_kind(site[0]), last) == number] for number in numbers]


class Countdown:
    """Knows when all products with some places have come by, as often as they did in another run."""

    def __init__(self, order: Order, wanted: Collection[Place]) -> None:
        self._due = Counter({p: n for p, n in order.times.items() if any(place.inside(p) for place in wanted)})

    def see(self, product: Product) -> None:
        """Count a product; raises `Enough` with the last one."""
        if product.place in self._due:
            self._due[product.place] -= 1
            if not any(self._due.values()):
                raise Enough


@contextlib.contextmanager
def glance(
    parameters: Mapping[str, Tensor], on_product: Callable[[Product], None], countdown: Countdown | None
) -> Iterator[None]:
    """A `Watch` that leaves the block early where a countdown says that everything has been seen."""

    def see(product: Product) -> None:
        on_product(product)
        if countdown is not None:
            countdown.see(product)

    with contextlib.suppress(Enough), Watch(parameters, see):
        yield


def read_by(sites: Sequence[Site]) -> list[Place]:
    """The matrices that multiply something."""
    return [place for planned, places in sites for place in places if planned.site.role != "embedding"]


def _kind(planned: SitePlan) -> str:
    """What experts of one layer have in common."""
    return re.sub(r"\.\d+(?=\.)", ".#", planned.site.tensor)
