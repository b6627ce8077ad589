"""A model of which only some weights are in memory: everything outside its blocks, and one block at a time.

Names and layouts differ between disk and memory (experts on disk are merged into stacks), so each part goes through
transformers' own loading; what a parameter is called in memory is asked of it too (`targets`).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from halfbin.errors import ModelError
from halfbin.models.blocks import Block
from halfbin.models.loading import LazyTensor, quietly
from halfbin.models.skeleton import Skeleton, Target, targets


class Source(Protocol):
    """Weights by their names on disk."""

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        ...


class PartialModel:
    """A model whose parameters come and go; its buffers are always there.

    model:   in evaluation mode; parameters that are not loaded are on the meta device.
    targets: for each tensor on disk, the parameter that it is loaded into.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        source: Source,
        *,
        dtype: torch.dtype = torch.float32,
        experts: str | None = "eager",
    ) -> None:
        """Build the model without weights; no tensor is read.

        Args:
          skeleton: the opened model.
          source: its weights.
          dtype: what weights are computed with.
          experts: how transformers runs them: "eager" one by one, so that each can be observed; None: as it would by itself.
        """
        self.dtype = dtype
        self._source, self._path = source, skeleton.path
        self.model = _without_weights(skeleton, experts).to(dtype).eval()
        self.targets: Mapping[str, Target] = targets(skeleton, source.names)
        self._aliases = _aliases(self.model)
        self._meta = dict(self.model.named_parameters())
        self._weight_mapping = get_model_conversion_mapping(self.model) if hasattr(self.model, "config") else []
        self._from_disk: dict[str, list[str]] = {}
        for name, target in self.targets.items():
            self._from_disk.setdefault(self.canonical(target.parameter), []).append(name)
        self._kept: dict[str, Tensor] = {}
        self.on_load: Callable[[set[str]], None] = lambda names: None  # called with the parameters that have come
        self._load_buffers()

    def canonical(self, parameter: str) -> str:
        """The first name of a parameter that is known under several."""
        return self._aliases.get(parameter, (parameter,))[0]

    def names_of(self, parameter: str) -> tuple[str, ...]:
        """All names of a parameter, the first one first."""
        return self._aliases.get(parameter, (parameter,))

    def on_disk(self, parameters: Iterable[str]) -> list[str]:
        """The tensors on disk that these parameters are made of, in the checkpoint's order."""
        wanted = {name for p in parameters for name in self._from_disk.get(self.canonical(p), ())}
        return [name for name in self._source.names if name in wanted]

    def load(self, parameters: Iterable[str]) -> None:
        """Bring parameters into memory; those that are there stay as they are.

        Raises:
          ModelError: the weights do not fill them.
        """
        wanted = [p for p in dict.fromkeys(map(self.canonical, parameters)) if self.get(p).is_meta]
        self.convert(self.model, {name: self._reader(name) for name in self.on_disk(wanted)})
        for name in wanted:
            parameter = self._arrived(name)
            if parameter is None:
                raise ModelError(f"{self._path}: no tensor fills the parameter {name!r}")
            self.put(name, self._kept.get(name, parameter))
        self.on_load(set(wanted))

    def release(self, parameters: Iterable[str]) -> None:
        """Give the memory of parameters back."""
        for name in dict.fromkeys(map(self.canonical, parameters)):
            self._set(name, self._meta[name])

    @contextlib.contextmanager
    def loaded(self, parameters: Iterable[str]) -> Iterator[None]:
        """Inside, these parameters are in memory; afterwards they are given back."""
        names = list(parameters)
        self.load(names)
        try:
            yield
        finally:
            self.release(names)

    def outside(self, blocks: Iterable[Block]) -> list[str]:
        """The parameters that belong to none of `blocks`."""
        inside = {self.canonical(p) for block in blocks for p in block.parameters}
        return [name for name, _ in self.model.named_parameters() if name not in inside]

    def keep(self, parameter: str) -> None:
        """Remember a parameter as it is now, for when it is loaded again: other blocks share it."""
        name = self.canonical(parameter)
        self._kept[name] = self.get(name).detach()

    def get(self, parameter: str) -> nn.Parameter:
        """A parameter, on the meta device where it is not loaded."""
        return self.model.get_parameter(self.canonical(parameter))

    def put(self, parameter: str, value: Tensor) -> None:
        """Replace a parameter's values everywhere it is known."""
        self._set(self.canonical(parameter), nn.Parameter(value.detach().to(self.dtype), requires_grad=False))

    def conversion(self, pattern: str) -> WeightConverter:
        """A copy of transformers' conversion of the tensors that this pattern matches, holding none."""
        made = (c for c in self._weight_mapping if isinstance(c, WeightConverter) and pattern in c.source_patterns)
        return copy.deepcopy(next(made))

    def convert(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Let transformers load tensors, by their names on disk, into `model`, which is this one or a copy."""
        if not state:
            return
        dtype = next((p.dtype for p in model.parameters()), self.dtype)
        options = LoadStateDictConfig(
            dtype=dtype, device_map={"": torch.device("cpu")}, weight_mapping=list(self._weight_mapping)
        )
        with quietly():
            info, _ = convert_and_load_state_dict_in_model(model, dict(state), options)
        if problems := [*info.mismatched_keys, *info.conversion_errors, *info.error_msgs]:
            raise ModelError(f"{self._path}: some weights do not fit the model: {problems[0]!s:.300}")

    def _arrived(self, name: str) -> nn.Parameter | None:
        """A parameter that was loaded under any of its names; transformers fills the one that the tensor on disk has."""
        found = (self.model.get_parameter(alias) for alias in self._aliases[name])
        return next((parameter for parameter in found if not parameter.is_meta), None)

    def _reader(self, name: str) -> LazyTensor:
        return LazyTensor(lambda: self._source.read(name))

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        for alias in self._aliases[name]:
            path, _, last = alias.rpartition(".")
            self.model.get_submodule(path)._parameters[last] = parameter

    def _load_buffers(self) -> None:
        """Buffers that lie on disk; the others were computed when the model was built."""
        buffers = {name for name, _ in self.model.named_buffers()}
        names = [name for name, target in self.targets.items() if target.parameter in buffers]
        self.convert(self.model, {name: self._reader(name) for name in names})


def _without_weights(skeleton: Skeleton, experts: str | None) -> nn.Module:
    """The skeleton's class with real buffers and meta parameters."""
    config = skeleton.config
    if hasattr(skeleton.model, "set_experts_implementation"):
        config._experts_implementation = experts
    build: Callable[[Any], nn.Module] = skeleton.model_class
    with initialization.no_init_weights(), init_empty_weights(include_buffers=False):
        model = build(config)
    if isinstance(model, PreTrainedModel):
        model.tie_weights()
    return model


def _aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For every name of a parameter, all names of it, the first one first."""
    by_object: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_object.setdefault(id(parameter), []).append(name)
    return {name: tuple(names) for names in by_object.values() for name in names}
