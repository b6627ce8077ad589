"""Carry a plan out: read, round, write, one tensor at a time, so that memory does not grow with the model."""

from __future__ import annotations

import contextlib
import json
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfbin.errors import DataError, FormatError, HalfbinError
from halfbin.evaluate.layers import TensorError, weight_error
from halfbin.formats.checkpoint import Checkpoint, open_checkpoint
from halfbin.formats.safetensors import SafetensorsWriter
from halfbin.models import targets
from halfbin.plan import Plan, SitePlan
from halfbin.plan.plan import num_bytes
from halfbin.plan.recipe import rounding
from halfbin.tensor.qtensor import dequantize, require_finite
from halfbin.tensor.scheme import Scheme

SHARD_BYTES_MAX = 5 * 10**9  # what transformers and the hub cut at
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".index.json", ".py")
CARRIED_BYTES_MAX = 200 * 2**20  # a tokenizer has a few MB

Specs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Written:
    """What was written: each rounded tensor's error by its name on disk, and the files."""

    errors: Mapping[str, TensorError]
    files: tuple[str, ...]


def execute(
    plan: Plan,
    checkpoint: Checkpoint,
    directory: Path,
    *,
    device: str = "cpu",
    shard_bytes: int = SHARD_BYTES_MAX,
    on_step: Callable[[int, int], None] | None = None,
) -> Written:
    """Write the quantized checkpoint into `directory`.

    Args:
      plan: made from this checkpoint.
      checkpoint: the float weights.
      directory: an empty directory.
      device: where weights are rounded.
      shard_bytes: the largest weight file, unless one tensor alone is larger.
      on_step: called with (input bytes done, input bytes in all) after each tensor.

    Raises:
      DataError: a weight holds NaN or infinity, or overflows a 16-bit cast; names the tensor.
      OutputError: the disk is full.
    """
    pieces = _pieces(plan)
    shards = _shards(pieces, shard_bytes)
    sites = {s.site.tensor: s for s in plan.sites}
    errors: dict[str, TensorError] = {}
    checksums: dict[str, int] = {}
    done = 0
    for file_name, names in shards.items():
        specs = {part: spec for name in names for part, spec in pieces[name].items()}
        with SafetensorsWriter(directory / file_name, specs, {"format": "pt"}) as writer:
            for name in names:
                planned = sites.get(name)
                if planned is not None and planned.quantized:
                    parts, errors[name] = _rounded(planned, plan, checkpoint, device)
                else:
                    parts = {name: _cast(name, pieces[name][name][0], checkpoint)}
                for part, tensor in parts.items():
                    writer.write(part, tensor)
                    checksums[part] = checksum(tensor)
                done += checkpoint.info(name).num_bytes
                if on_step:
                    on_step(done, plan.bytes_before)
    if len(shards) > 1:
        _write_index(directory, shards, pieces)
    _write_config(plan, directory)
    _carry_over(plan.directory, directory)
    _read_back(directory, checksums)
    return Written(errors, tuple(shards))


def checksum(tensor: Tensor) -> int:
    """A checksum of a tensor's bytes, to compare what was meant with what the disk gives back."""
    return zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data) if tensor.numel() else 0


def _rounded(
    planned: SitePlan, plan: Plan, checkpoint: Checkpoint, device: str
) -> tuple[dict[str, Tensor], TensorError]:
    """What is written for one quantized site, and how far its weight moved."""
    assert isinstance(planned.weights, Scheme)
    name = planned.site.tensor
    weight = checkpoint.read(name)
    with _naming(name, weight, checkpoint):
        q = rounding(planned.method, planned.estimator)(weight.to(device), planned.weights).to("cpu")
        return plan.layout.encode(name, q), weight_error(weight, dequantize(q))


def _cast(name: str, dtype: torch.dtype, checkpoint: Checkpoint) -> Tensor:
    """A tensor that is not quantized, in the type it is written in."""
    weight = checkpoint.read(name)
    if weight.dtype == dtype:
        return weight
    with _naming(name, weight, checkpoint):
        require_finite(weight)
        cast = weight.to(dtype)
        if not bool(torch.isfinite(cast).all()):
            largest = float(weight.abs().max())
            raise DataError(f"{largest:g} is beyond the range of {dtype}; use bf16, which has float32's range")
    return cast


@contextlib.contextmanager
def _naming(name: str, weight: Tensor, checkpoint: Checkpoint) -> Iterator[None]:
    """Add the tensor's name and file to an error on its way out."""
    try:
        yield
    except HalfbinError as error:
        error.add_note(f"at tensor {name!r}, {list(weight.shape)} {weight.dtype}, in {checkpoint.file_of(name).name}")
        raise


def _pieces(plan: Plan) -> dict[str, Specs]:
    """The tensors that each tensor of the input becomes, in the input's order of sites, then the others."""
    pieces: dict[str, Specs] = {}
    for planned in plan.sites:
        site = planned.site
        if isinstance(planned.weights, Scheme):
            pieces[site.tensor] = plan.layout.tensors(site.tensor, site.shape, planned.weights)
        else:
            pieces[site.tensor] = {site.tensor: (planned.weights or site.dtype, site.shape)}
    return pieces | {name: {name: spec} for name, spec in plan.others.items()}


def _shards(pieces: Mapping[str, Specs], shard_bytes: int) -> dict[str, list[str]]:
    """File names, and the input tensors whose parts go into each."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, specs in pieces.items():
        size = sum(num_bytes(*spec) for spec in specs.values())
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def _write_index(directory: Path, shards: Mapping[str, list[str]], pieces: Mapping[str, Specs]) -> None:
    weight_map = {part: file for file, names in shards.items() for name in names for part in pieces[name]}
    total = sum(num_bytes(*spec) for specs in pieces.values() for spec in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)


def _write_config(plan: Plan, directory: Path) -> None:
    """The model's own config, with how to read its weights."""
    config: dict[str, Any] = json.loads((plan.directory / "config.json").read_bytes())
    config.pop("quantization_config", None)
    rounded = {s.site.tensor: (s.weights, s.site.shape) for s in plan.sites if isinstance(s.weights, Scheme)}
    if rounded and (how := plan.layout.config(rounded, _left_linears(plan))):
        config["quantization_config"] = how
    if plan.recipe.others is not None:
        config["dtype"] = str(plan.recipe.others).removeprefix("torch.")
        config.pop("torch_dtype", None)
    write_json(directory / "config.json", config)


def _left_linears(plan: Plan) -> list[str]:
    """Every linear of the model that keeps its float weight, also where no tensor on disk is its own, as a tied head.

    Named as the framework names modules, and as on disk where that differs.
    """
    parameter_of = targets(plan.skeleton, [s.site.tensor for s in plan.sites])
    rounded = {parameter_of[s.site.tensor].parameter.removesuffix(".weight") for s in plan.sites if s.quantized}
    modules = [n for n, m in plan.skeleton.model.named_modules() if isinstance(m, nn.Linear) and n not in rounded]
    on_disk = [s.site.name for s in plan.sites if not s.quantized and s.site.module_class == "Linear"]
    return list(dict.fromkeys([*modules, *on_disk]))


def write_json(path: Path, value: object) -> None:
    """Write JSON text for people and programs."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _carry_over(source: Path, directory: Path) -> None:
    """Copy tokenizer, generation config, licence and the like: every small file that holds neither weights nor code."""
    for entry in sorted(source.iterdir()):
        unwanted = entry.name == "config.json" or entry.name.endswith(WEIGHT_FILES) or entry.name.startswith(".")
        ours = entry.name in ("report.json", "report.html")
        if entry.is_file() and not unwanted and not ours and entry.stat().st_size <= CARRIED_BYTES_MAX:
            shutil.copyfile(entry, directory / entry.name)


def _read_back(directory: Path, checksums: Mapping[str, int]) -> None:
    """Read every tensor from the disk again and compare.

    Raises:
      FormatError: the disk gives back something else than what was written.
    """
    with open_checkpoint(directory) as written:
        if set(written.names) != set(checksums):
            odd = sorted(set(written.names) ^ set(checksums))
            raise FormatError(f"{directory} read back with other tensors than were written, for example {odd[0]!r}")
        for name, expected in checksums.items():
            if checksum(written.read(name)) != expected:
                raise FormatError(f"{directory}: tensor {name!r} reads back with other bytes than were written")
