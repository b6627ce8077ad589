"""Carry a plan out: read, round and write a few rows at a time, so that memory does not grow with the model."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from halfbin.errors import DataError, FormatError, HalfbinError
from halfbin.evaluation.layers import TensorError, rounding_sums
from halfbin.formats.checkpoint import Checkpoint, open_checkpoint
from halfbin.formats.layout import HoldsColumns, HoldsPackedRows
from halfbin.formats.safetensors import SafetensorsWriter, write_hollow
from halfbin.kernels.checksums import crc32
from halfbin.kernels.errors import ErrorSums
from halfbin.kernels.threads import in_order, in_turns
from halfbin.models import targets
from halfbin.planning import Plan, SitePlan
from halfbin.planning.plan import IN_FLIGHT_BYTES, num_bytes
from halfbin.planning.recipe import covers_whole_ranges, rounding
from halfbin.run.blockwise import Rounded, input_quantizer, quantize_blocks
from halfbin.run.laps import Laps
from halfbin.run.slabs import SlabWriter, read_slab, row_step, slabs
from halfbin.tensor.inputs import InputQuantizer
from halfbin.tensor.mixed import ColumnSpec, FloatColumns, split
from halfbin.tensor.packed import quantize_packed
from halfbin.tensor.qtensor import QTensor, require_finite
from halfbin.tensor.scheme import Scheme

SHARD_BYTES_MAX = 5 * 10**9  # what transformers and the hub cut at
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".index.json", ".py")
COLUMNS_SUFFIX = "-columns.safetensors"
CARRIED_BYTES_MAX = 200 * 2**20  # a tokenizer has a few MB

OnStep: TypeAlias = Callable[[int, int], None]
Specs: TypeAlias = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Decided:
    """What is known of a tensor that was decided by data.

    transformed:  its values were changed before it was rounded, so it does not compare with the original's.
    output_error: of the site's outputs on the calibration data; None where none was seen.
    remarks:      in words.
    """

    transformed: bool
    output_error: TensorError | None
    remarks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Written:
    """What was written: each rounded tensor's error by its name on disk, the files, and where the time went.

    columns: how many columns data chose to keep in floating point, by the weight's name on disk; those with none are not there.
    """

    errors: Mapping[str, TensorError]
    files: tuple[str, ...]
    calibrated: Mapping[str, Decided]  # what data decided, by name on disk
    # Reading, rounding (and packing) and comparing go on in several threads at once, and are the sum of theirs;
    # writing and reading back follow the clock.
    seconds: Mapping[str, float]
    remarks: tuple[str, ...] = ()  # about the whole model
    columns: Mapping[str, ColumnSpec] = field(default_factory=dict)

    def transformed(self, name: str) -> bool:
        """Whether a tensor was changed before it was rounded."""
        return name in self.calibrated and self.calibrated[name].transformed


def execute(
    plan: Plan,
    checkpoint: Checkpoint,
    directory: Path,
    *,
    device: str = "cpu",
    batches: Sequence[Tensor] = (),
    shard_bytes: int = SHARD_BYTES_MAX,
    on_step: OnStep | None = None,
    on_block: OnStep | None = None,
) -> Written:
    """Write the quantized checkpoint into `directory`.

    Args:
      plan: made from this checkpoint.
      checkpoint: the float weights.
      directory: an empty directory.
      device: where weights are rounded.
      batches: calibration samples, int64 [num_samples, length] each; needed where the plan needs data.
      shard_bytes: the largest weight file, unless one tensor alone is larger.
      on_step: called with (input bytes done, input bytes in all) after each slab of rows.
      on_block: called with (blocks done, blocks in all), where there are calibration samples.

    Raises:
      DataError: a weight holds NaN or infinity, or overflows a 16-bit cast; names the tensor.
      OutputError: the disk is full.
    """
    pieces = _pieces(plan)
    shards = _shards(pieces, shard_bytes)
    worker = _Worker(plan, checkpoint, device)
    remarks: Sequence[str] = ()
    with _Output(directory, pieces, shards) as output:
        if plan.needs_data:
            in_files = plan.reading is not None and plan.reading.in_files
            outcome = quantize_blocks(
                plan,
                checkpoint,
                batches,
                lambda r: output.take(r, plan),
                activations=directory if in_files else None,
                on_step=on_block,
            )
            remarks = outcome.remarks
            output.note_unreached(plan)
        done = sum(checkpoint.info(name).num_bytes for name in output.complete)
        tasks = (task for name in pieces if name not in output.complete for task in worker.tasks(name, pieces[name]))
        for task, slab in in_order(tasks, worker.work, num_bytes=_Task.num_bytes, in_flight=IN_FLIGHT_BYTES):
            output.append(task.name, slab, last=task.last)
            done += task.input_bytes
            if on_step:
                on_step(min(done, plan.bytes_before), plan.bytes_before)  # copies are read again
    plan = plan.with_columns(output.columns)
    written = {file: [part for name in names for part in pieces[name]] for file, names in shards.items()}
    files = written | output.column_files
    if len(files) > 1:
        _write_index(directory, files, plan.bytes_after)
    _write_config(plan, directory)
    _carry_over(plan.directory, directory)
    with output.laps.lap("reading back"):
        _read_back(directory, output.checksums)
    errors = {name: TensorError.of(sums) for name, sums in output.errors.items()}
    return Written(errors, tuple(files), output.decided, output.laps.seconds, tuple(remarks), output.columns)


class _Output:
    """The weight files, each open from its first tensor to its last; and what is known of what went into them.

    Columns that data keep in floating point are known only when their weights come, too late for the header of an open file.
    They are held until it is complete, a small share of it, and get a file of their own beside it.

    complete:     names of the input's tensors that are all there.
    columns:      what was kept, by the weight's name.
    column_files: names of the files that such columns went into, and of the tensors there.
    """

    def __init__(self, directory: Path, pieces: Mapping[str, Specs], shards: Mapping[str, list[str]]) -> None:
        self._directory, self._pieces = directory, pieces
        self._file_of = {name: file for file, names in shards.items() for name in names}
        self._missing = {file: set(names) for file, names in shards.items()}
        self._open: dict[str, tuple[contextlib.ExitStack, SlabWriter]] = {}
        self.complete: set[str] = set()
        self.errors: dict[str, ErrorSums] = {}
        self.decided: dict[str, Decided] = {}
        self.columns: dict[str, ColumnSpec] = {}
        self.column_files: dict[str, list[str]] = {}
        self._held: dict[str, dict[str, Tensor]] = {
            file: {} for file in shards
        }  # columns, by the file of their weights
        self.checksums: dict[str, int] = {}
        self.laps = Laps()

    def take(self, rounded: Rounded, plan: Plan) -> None:
        """Write a tensor that data decided."""
        name = rounded.name
        parts: Mapping[str, Tensor] = {} if rounded.values is None else {name: rounded.values}
        if rounded.q is not None:
            q, columns = split(rounded.q)
            parts = plan.layout.encode(name, q, rounded.inputs)
            parts = parts | plan.layout.fixed(name, q.shape, q.scheme, rounded.inputs)
            if columns is not None:
                self._hold(name, q.shape, columns, plan)
        self.append(name, _Slab(parts, rounded.sums, Laps()), last=True)
        self.decided[name] = Decided(rounded.transformed, rounded.output_error, rounded.remarks)

    def _hold(self, name: str, shape: tuple[int, ...], columns: FloatColumns, plan: Plan) -> None:
        """Keep a weight's columns until its file is complete."""
        assert isinstance(plan.layout, HoldsColumns)
        self.columns[name] = columns.spec
        self._held[self._file_of[name]] |= plan.layout.column_codec(name, shape, columns.spec).encode(columns)

    def note_unreached(self, plan: Plan) -> None:
        """Say of sites that wanted data, and that no sample came by.

        Raises:
          DataError: one of them cannot do without.
        """
        unreached = Decided(False, None, ("rounded without data: no calibration sample reached it",))
        missing = [s for s in plan.sites if s.needs_data and s.site.tensor not in self.complete]
        for planned in missing:
            input_quantizer(planned, None)
        self.decided |= dict.fromkeys((s.site.tensor for s in missing), unreached)

    def append(self, name: str, slab: _Slab, *, last: bool) -> None:
        """Write the next rows of a tensor."""
        file = self._file_of[name]
        with self.laps.lap("writing"):
            self._writer(file).append(slab.parts)
        self.laps.add(slab.laps)
        if slab.sums is not None:
            self.errors[name] = self.errors.get(name, ErrorSums()) + slab.sums
        if last:
            self.complete.add(name)
            self._missing[file].discard(name)
            if not self._missing[file]:
                with self.laps.lap("writing"):
                    self._close(file)

    def _writer(self, file: str) -> SlabWriter:
        if file not in self._open:
            names = [name for name, owner in self._file_of.items() if owner == file]
            specs = {part: spec for name in names for part, spec in self._pieces[name].items()}
            stack = contextlib.ExitStack()
            writer = stack.enter_context(SafetensorsWriter(self._directory / file, specs, {"format": "pt"}))
            self._open[file] = (stack, SlabWriter(writer))
        return self._open[file][1]

    def _close(self, file: str) -> None:
        stack, writer = self._open.pop(file)
        stack.close()
        self.checksums |= writer.checksums
        if columns := self._held.pop(file):
            self._write_columns(file.removesuffix(".safetensors") + COLUMNS_SUFFIX, columns)

    def _write_columns(self, file: str, columns: Mapping[str, Tensor]) -> None:
        specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in columns.items()}
        with SafetensorsWriter(self._directory / file, specs, {"format": "pt"}) as container:
            writer = SlabWriter(container)
            writer.append(columns)
        self.checksums |= writer.checksums
        self.column_files[file] = list(columns)

    def __enter__(self) -> _Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stack, _ in self._open.values():
            stack.__exit__(kind, error, trace)


def write_hollow_result(plan: Plan, directory: Path) -> None:
    """What `execute` will write, with holes for numbers: enough to see whether a client will load it."""
    pieces = _pieces(plan)
    shards = _shards(pieces, SHARD_BYTES_MAX)
    for file_name, names in shards.items():
        specs = {part: spec for name in names for part, spec in pieces[name].items()}
        write_hollow(directory / file_name, specs, {"format": "pt"})
    if len(shards) > 1:
        files = {file: [part for name in names for part in pieces[name]] for file, names in shards.items()}
        _write_index(directory, files, plan.bytes_after)
    _write_config(plan, directory)


def data_free(planned: SitePlan) -> Callable[[Tensor, Scheme], QTensor]:
    """How a site is rounded that no data reached: by its own method where that needs none, else to nearest."""
    return rounding(planned.method_without_data, planned.estimator)


@dataclass(frozen=True, slots=True)
class _Task:
    """Some rows of one tensor of the input."""

    name: str
    rows: slice
    input_bytes: int
    planned: SitePlan | None  # None: only the type changes, if at all
    dtype: torch.dtype  # what it is cast to when it is not rounded
    last: bool  # no rows come after these

    def num_bytes(self) -> int:
        """Memory while it is worked on and until it is written: the input, codes, what is packed."""
        return 2 * self.input_bytes


@dataclass(frozen=True, slots=True)
class _Slab:
    """What becomes of these rows."""

    parts: Mapping[str, Tensor]
    sums: ErrorSums | None
    laps: Laps


class _Worker:
    """Reads and rounds slabs of rows; several threads may ask at once."""

    def __init__(self, plan: Plan, checkpoint: Checkpoint, device: str) -> None:
        self._layout, self._checkpoint, self._device = plan.layout, checkpoint, device
        self._sites = {s.site.tensor: s for s in plan.sites if s.quantized}

    def tasks(self, name: str, specs: Specs) -> Iterator[_Task]:
        """One tensor, cut into slabs."""
        info, planned = self._checkpoint.info(name), self._sites.get(name)
        step, dtype = 1, info.dtype
        if planned is None:
            dtype = specs[name][0]
        else:
            assert isinstance(planned.weights, Scheme)
            step = row_step(planned.method_without_data, info.shape, planned.weights.granularity)
        row_bytes = info.num_bytes // max(1, info.shape[0]) if info.shape else info.num_bytes
        num_rows = info.shape[0] if info.shape else 1
        for rows in slabs(info.shape, step, info.dtype.itemsize):
            last = rows.stop >= num_rows
            yield _Task(name, rows, row_bytes * (rows.stop - rows.start), planned, dtype, last)

    def work(self, task: _Task) -> _Slab:
        """Read the rows and turn them into what will be written."""
        laps = Laps()
        with self._naming(task.name):
            with laps.lap("reading"):
                weight = read_slab(self._checkpoint, task.name, task.rows)
            if task.planned is not None:
                return self._round(task, task.planned, weight, laps)
            with laps.lap("rounding"):
                cast = weight if weight.dtype == task.dtype else _cast_in_range(weight, task.dtype)
            return _Slab({task.name: cast}, None, laps)

    def _round(self, task: _Task, planned: SitePlan, weight: Tensor, laps: Laps) -> _Slab:
        scheme = planned.weights
        assert isinstance(scheme, Scheme)
        with laps.lap("rounding"):
            inputs = None if planned.inputs is None else planned.inputs.quantizer()
            parts, sums = self._in_one_pass(task.name, planned, weight, inputs) or ({}, None)
        if sums is None:
            with laps.lap("rounding"):
                q = data_free(planned)(weight.to(self._device), scheme).to("cpu")
                parts = self._layout.encode(task.name, q, inputs)
            with laps.lap("comparing"):
                sums = rounding_sums(weight, q)
        fixed = self._layout.fixed(task.name, planned.site.shape, scheme, inputs)
        kept = {part: rows for part, rows in parts.items() if part not in fixed}
        return _Slab(kept | fixed if task.rows.start == 0 else kept, sums, laps)

    def _in_one_pass(
        self, name: str, planned: SitePlan, weight: Tensor, inputs: InputQuantizer | None
    ) -> tuple[dict[str, Tensor], ErrorSums] | None:
        """Rounded, packed and compared at once, where scales cover whole ranges and the layout holds dense rows; else None."""
        scheme, layout = planned.weights, self._layout
        assert isinstance(scheme, Scheme)
        fits = covers_whole_ranges(planned.method_without_data, planned.estimator)
        if not fits or self._device != "cpu" or not isinstance(layout, HoldsPackedRows):
            return None
        multiple = layout.row_multiple(scheme, planned.inputs)
        found = None if multiple is None else quantize_packed(weight, scheme, row_multiple=multiple)
        return None if found is None else (layout.encode_packed(name, found[0], inputs), found[1])

    @contextlib.contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Add the tensor's name and file to an error on its way out."""
        try:
            try:
                yield
            except DataError:
                require_finite(self._checkpoint.read(name))  # counts, and finds the first, in all rows
                raise
        except HalfbinError as error:
            info = self._checkpoint.info(name)
            error.add_note(
                f"at tensor {name!r}, {list(info.shape)} {info.dtype}, in {self._checkpoint.file_of(name).name}"
            )
            raise


def _cast_in_range(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in another float type, unless an element leaves its range."""
    require_finite(weight)
    cast = weight.to(dtype)
    if not bool(torch.isfinite(cast).all()):
        largest = float(weight.abs().max())
        raise DataError(f"{largest:g} is beyond the range of {dtype}; use bf16, which has float32's range")
    return cast


def _pieces(plan: Plan) -> dict[str, Specs]:
    """The tensors that each tensor of the input becomes, in the input's order of sites, then the others."""
    pieces: dict[str, Specs] = {}
    for planned in plan.sites:
        site = planned.site
        if isinstance(planned.weights, Scheme):
            pieces[site.tensor] = plan.layout.tensors(site.tensor, site.shape, planned.weights, planned.inputs)
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


def _write_index(directory: Path, files: Mapping[str, Sequence[str]], total: int) -> None:
    """Which file holds which tensor, and the bytes of all tensors."""
    weight_map = {part: file for file, parts in files.items() for part in parts}
    write_json(
        directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def _write_config(plan: Plan, directory: Path) -> None:
    """The model's own config, with how to read its weights."""
    config: dict[str, Any] = json.loads((plan.directory / "config.json").read_bytes())
    config.pop("quantization_config", None)
    if plan.skeleton.copies:
        _untie(config)
    rounded = {s.site.tensor: (s.weights, s.site.shape) for s in plan.sites if isinstance(s.weights, Scheme)}
    inputs = {s.site.tensor: s.inputs for s in plan.sites if s.quantized and s.inputs}
    if rounded and (how := plan.layout.config(rounded, _left_linears(plan), inputs, _renamed_modules(plan))):
        columns = {s.site.tensor: s.columns for s in plan.sites if s.columns is not None}
        if columns and isinstance(plan.layout, HoldsColumns):
            how = plan.layout.with_columns(how, columns)
        config["quantization_config"] = how
    if plan.recipe.others is not None:
        config["dtype"] = str(plan.recipe.others).removeprefix("torch.")
        config.pop("torch_dtype", None)
    write_json(directory / "config.json", config)


def _untie(config: dict[str, Any]) -> None:
    config["tie_word_embeddings"] = False
    text = config.get("text_config")
    if isinstance(text, dict):
        text["tie_word_embeddings"] = False


def _renamed_modules(plan: Plan) -> dict[str, str]:
    """The framework's names of modules that are called otherwise on disk, by their tensor."""
    parameter_of = targets(plan.skeleton, [s.site.tensor for s in plan.sites])
    whole = {name: target.parameter for name, target in parameter_of.items() if target.unchanged}
    return {name: p.removesuffix(".weight") for name, p in whole.items() if p != name and p.endswith(".weight")}


def _left_linears(plan: Plan) -> list[str]:
    """Every linear of the model that keeps its float weight, also where no tensor on disk is its own, as a tied head.

    Named as the framework names modules, and as on disk where that differs.
    """
    parameter_of = targets(plan.skeleton, [s.site.tensor for s in plan.sites])
    rounded = {parameter_of[s.site.tensor].parameter.removesuffix(".weight") for s in plan.sites if s.quantized}
    modules = [n for n, m in plan.skeleton.model.named_modules() if isinstance(m, nn.Linear) and n not in rounded]
    on_disk = [s.site.name for s in plan.sites if not s.quantized and s.site.module_class in ("Linear", "Expert")]
    return list(dict.fromkeys([*modules, *on_disk]))


def write_json(path: Path, value: object) -> None:
    """Write JSON text for people and programs."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _carry_over(source: Path, directory: Path) -> None:
    """Copy tokenizer, generation config, licence and the like: every small file that holds neither weights nor code.

    One level of folders too, as sentence-transformers keeps the settings of its pooling in one.
    """
    for path in sorted([*source.glob("*"), *source.glob("*/*")]):
        name = path.relative_to(source)
        ours = str(name) in ("config.json", "report.json", "report.html")
        unwanted = path.name.endswith(WEIGHT_FILES) or any(part.startswith(".") for part in name.parts)
        if path.is_file() and not unwanted and not ours and path.stat().st_size <= CARRIED_BYTES_MAX:
            (directory / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, directory / name)


def _read_back(directory: Path, checksums: Mapping[str, int]) -> None:
    """Read every tensor from the disk again and compare.

    Raises:
      FormatError: the disk gives back something else than what was written.
    """
    with open_checkpoint(directory) as written:
        if set(written.names) != set(checksums):
            odd = sorted(set(written.names) ^ set(checksums))
            raise FormatError(f"{directory} read back with other tensors than were written, for example {odd[0]!r}")

        def compare(name: str) -> None:
            found = 0
            info = written.info(name)
            for rows in slabs(info.shape, 1, info.dtype.itemsize):
                found = crc32(read_slab(written, name, rows), found)
            if found != checksums[name]:
                raise FormatError(f"{directory}: tensor {name!r} reads back with other bytes than were written")

        in_turns(sorted(checksums, key=lambda name: -written.info(name).num_bytes), compare)
