"""Where in memory the matrices of a tensor on disk lie, once transformers has loaded it.

Most tensors become a parameter as they are. Some are merged, split or turned on the way (the experts of one layer become a
stack). What such a conversion does is not looked up but seen: it is done once with tensors that number their own elements,
and where the numbers arrive, and in which order, tells the rest.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from halfbin.models.partial import PartialModel
from halfbin.models.products import Place
from halfbin.models.sites import Site

Places = tuple[Place, ...]
EXACT = 2**53  # integers that float64 counts to


def find_places(partial: PartialModel, sites: Sequence[Site]) -> dict[str, Places]:
    """The matrices [out_features, in_features] of each site: one, or one for each expert of a stack that lies on disk.

    Args:
      partial: the model; nothing of it needs to be loaded.
      sites: sites of the same block: conversions that are theirs alone are followed.

    Returns:
      Places by the tensor's name on disk. A site that is split over parameters or shuffled beyond rows and columns is missing.
    """
    found = {}
    converted = []
    for site in sites:
        target = partial.targets[site.tensor]
        name = partial.canonical(target.parameter)
        if target.unchanged and tuple(partial.get(name).shape) == site.shape:
            found[site.tensor] = _matrices(name, site, _strides(site.shape), 0)
        elif not target.unchanged:
            converted.append(site)
    return found | _follow(partial, converted)


def _follow(partial: PartialModel, sites: Sequence[Site]) -> dict[str, Places]:
    """Places of tensors that change on their way into memory, one parameter's sources after the other."""
    by_parameter: dict[str, list[Site]] = {}
    for site in sites:
        by_parameter.setdefault(partial.canonical(partial.targets[site.tensor].parameter), []).append(site)
    found: dict[str, Places] = {}
    model = copy.deepcopy(partial.model).to(device="meta", dtype=torch.float64) if by_parameter else partial.model
    for parameter, group in by_parameter.items():
        numbers, start = {}, 1
        for site in group:
            numbers[site.tensor] = start
            start += site.num_weights
        if start > EXACT:
            continue
        partial.convert(
            model,
            {
                site.tensor: torch.arange(n, n + site.num_weights, dtype=torch.float64).reshape(site.shape)
                for site, n in zip(group, numbers.values(), strict=True)
            },
        )
        arrived = model.get_parameter(parameter).detach()
        if not arrived.is_meta:
            found |= _read_off(arrived, parameter, {site: numbers[site.tensor] for site in group})
    return found


def _read_off(arrived: Tensor, parameter: str, numbers: Mapping[Site, int]) -> dict[str, Places]:
    """Offset and strides of each source from where its first element and the next one along each axis have gone."""
    arrived = arrived.contiguous()
    wanted = {number + step for site, number in numbers.items() for step in (0, *_strides(site.shape))}
    positions = _positions(arrived, wanted)
    found = {}
    for site, first in numbers.items():
        steps = [first + s if n > 1 else first for s, n in zip(_strides(site.shape), site.shape, strict=True)]
        if first not in positions or any(step not in positions for step in steps):
            continue
        offset = positions[first]
        strides = tuple(positions[step] - offset for step in steps)
        last = offset + sum(stride * (n - 1) for stride, n in zip(strides, site.shape, strict=True))
        if min(strides) < 0 or last >= arrived.numel():  # shuffled
            continue
        expected = torch.arange(first, first + site.num_weights, dtype=arrived.dtype).reshape(site.shape)
        if torch.equal(torch.as_strided(arrived, site.shape, strides, offset), expected):
            found[site.tensor] = _matrices(parameter, site, strides, offset)
    return found


def _positions(arrived: Tensor, wanted: Iterable[int]) -> dict[int, int]:
    numbers = torch.tensor(sorted(wanted), dtype=arrived.dtype)
    flat = arrived.flatten()
    nearest = torch.searchsorted(numbers, flat).clamp_(max=len(numbers) - 1)
    where = torch.nonzero(numbers[nearest] == flat).flatten()
    return {int(flat[i]): int(i) for i in where}


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides = [1]
    for n in reversed(shape[1:]):
        strides.append(strides[-1] * n)
    return tuple(reversed(strides))


def _matrices(parameter: str, site: Site, strides: tuple[int, ...], offset: int) -> Places:
    """The site's matrices as [out_features, in_features]."""
    if site.role in ("convolution", "embedding") and len(site.shape) != 2:
        return ()
    *stack, rows, columns = site.shape
    size, steps = (rows, columns), (strides[-2], strides[-1])
    if site.transposed:
        size, steps = (columns, rows), (strides[-1], strides[-2])
    if len(stack) > 1:
        return ()
    count, step = (stack[0], strides[0]) if stack else (1, 0)
    return tuple(Place(parameter, size, steps, offset + i * step) for i in range(count))
