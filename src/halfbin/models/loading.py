"""Checkpoints to running models: the float one, halfbin's reading of a quantized one, and what a plain client makes of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import loguru
import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from halfbin.errors import ModelError
from halfbin.formats.read import open_quantized
from halfbin.models.sites import Weights
from halfbin.models.skeleton import Skeleton
from halfbin.models.stored_inputs import quantize_stored_inputs


class LazyTensor:
    """Stands for a tensor in a state dict; indexing reads it, as transformers does with one after the other."""

    def __init__(self, read: Callable[[], Tensor]) -> None:
        self._read = read

    def __getitem__(self, index: Any) -> Tensor:
        return self._read()[index]


# Wrong shapes too are told in the loading info, by name, instead of being raised without one.
TELL: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}


def load_weights(
    skeleton: Skeleton,
    *,
    dtype: torch.dtype = torch.float32,
    directory: Path | None = None,
    as_client: bool = False,
) -> nn.Module:
    """The model with the weights of `directory`, dequantized where they are quantized, by halfbin's own readers.

    Args:
      skeleton: the opened model.
      dtype: the type of the loaded parameters.
      directory: where the weights lie; the skeleton's own directory by default.
      as_client: quantize inputs as transformers does, to compare with it.

    Returns:
      The model in evaluation mode. Only one tensor is held twice at a time. Layers whose inputs the checkpoint quantizes see
      fake-quantized inputs.

    Raises:
      FormatError: a file that is not what it claims to be.
      ModelError: a parameter that no weight fills, or a weight that nothing takes.
    """
    with open_quantized(directory or skeleton.path) as checkpoint:

        def lazily(name: str) -> LazyTensor:
            return LazyTensor(lambda: checkpoint.read_values(name, dtype))

        copies = skeleton.copies if directory is None else {}
        weights = {name: lazily(copies.get(name, name)) for name in (*checkpoint.names, *copies)}
        model = load_state(skeleton, weights, dtype=dtype)
        quantize_stored_inputs(model, skeleton, checkpoint, as_client=as_client)
        return model


def load_state(skeleton: Skeleton, weights: Mapping[str, Any], *, dtype: torch.dtype) -> nn.Module:
    """Fill the skeleton's class with `weights`, named as on disk, through transformers' own loading.

    Raises:
      ModelError: a parameter that no weight fills, or a weight that nothing takes.
    """
    return _filled(skeleton, weights, {"dtype": dtype}).eval()


def require_fit(skeleton: Skeleton, weights: Weights) -> None:
    """The tensors of a checkpoint must fill the model that its config describes. Told by the headers; no weight is read.

    Raises:
      ModelError: a tensor is missing, left over or of the wrong shape; names it.
    """
    infos = {name: weights.info(name) for name in weights.names}
    described = {name: torch.empty(info.shape, dtype=info.dtype, device="meta") for name, info in infos.items()}
    _filled(skeleton, described, {"device_map": "meta"})


def _filled(skeleton: Skeleton, weights: Mapping[str, Any], options: Mapping[str, Any]) -> nn.Module:
    with quietly():
        loaded, info = skeleton.model_class.from_pretrained(
            None, config=skeleton.config, state_dict=dict(weights), **TELL, **options
        )
    require_complete(info, loaded, skeleton.path)
    model: nn.Module = loaded
    return model


def check_as_client(skeleton: Skeleton, directory: Path) -> None:
    """Let plain transformers go through the loading of a directory on no memory: every tensor must find its place.

    Shapes are not looked at: without data, compressed-tensors guesses those of unpacked weights.

    Raises:
      ModelError: it does not load, or a tensor is missing or left over.
    """
    loaded, info = _load_as_client(skeleton, directory, {"device_map": "meta"})
    require_complete(dict(info) | {"mismatched_keys": ()}, loaded, directory)


def load_as_client(skeleton: Skeleton, directory: Path, *, dtype: torch.dtype | None = None) -> nn.Module:
    """What plain transformers makes of a directory: its own readers, nothing of halfbin's.

    Args:
      skeleton: tells the class.
      directory: the checkpoint.
      dtype: the type to load in; None: what transformers takes when nobody says.

    Raises:
      ModelError: it does not load, or not all of its weights fit.
    """
    loaded, info = _load_as_client(skeleton, directory, {} if dtype is None else {"dtype": dtype})
    require_complete(info, loaded, directory)
    return loaded.eval()


def _load_as_client(
    skeleton: Skeleton, directory: Path, options: Mapping[str, Any]
) -> tuple[nn.Module, Mapping[str, Any]]:
    try:
        with quietly():
            found: tuple[nn.Module, Mapping[str, Any]] = skeleton.model_class.from_pretrained(
                str(directory), local_files_only=True, **TELL, **options
            )
    except Exception as error:  # whatever a client raises, the file did not load
        raise ModelError(f"transformers cannot load {directory}: {type(error).__name__}: {error}") from error
    return found


def require_complete(loading_info: Mapping[str, Any], model: nn.Module, directory: Path) -> None:
    """Refuse a model that did not find all its weights, or left some over that belong to it.

    What belongs to no part of the model may be left over: the head of another task, as in the original BERT, or a constant
    that the model computes itself, as old files hold them. A tensor for a module that is there, or for a layer more than the
    configuration counts, may not.

    Raises:
      ModelError: names what is missing, unexpected or of the wrong shape.
    """
    problems = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        found = sorted(map(_spelled, loading_info.get(kind) or ()))
        if kind == "unexpected_keys":
            found = [key for key in found if _belongs(model, key)]
        if found:
            more = f" and {len(found) - 5} more" if len(found) > 5 else ""
            problems.append(f"{kind.replace('_', ' ')}: {', '.join(found[:5])}{more}")
    if problems:
        raise ModelError(
            f"{directory} does not fill its model ({type(model).__name__}): {'; '.join(problems)}; "
            "its config.json and its weights may come from different models, copy both from one place"
        )


def _spelled(key: object) -> str:
    """A name as transformers tells it, alone or with the two shapes that should be one."""
    match key:
        case (name, torch.Size() as found, torch.Size() as expected):
            return f"{name} is {list(found)} and should be {list(expected)}"
        case _:
            return str(key)


def _belongs(model: nn.Module, key: str) -> bool:
    """Whether a leftover tensor speaks of a part that `model` has, or should have one more of."""
    *path, last = key.split(".")
    module = model
    for part in path:
        inside = dict(module.named_children())
        if part not in inside:
            return isinstance(module, nn.ModuleList) or not inside
        module = inside[part]
    return last not in module._buffers


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the libraries' own progress bars and remarks; progress is the caller's to show, and outcomes are checked."""
    shown, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    loguru.logger.disable("compressed_tensors")
    try:
        yield
    finally:
        loguru.logger.enable("compressed_tensors")
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()
