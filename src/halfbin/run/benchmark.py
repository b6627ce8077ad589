"""How fast a checkpoint runs here, beside the same weights as floats, and beside what this machine's memory allows."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfbin.errors import HalfbinError, ModelError
from halfbin.evaluation.speed import Speed, measure_speed
from halfbin.kernels.streaming import read_rate
from halfbin.models import Skeleton, load_weights, open_skeleton
from halfbin.models.running import Running, load_running
from halfbin.nn import ExpertStack, QuantEmbedding, QuantExperts, QuantModule
from halfbin.run import jsonable
from halfbin.run.events import Event, OnEvent
from halfbin.run.memory import MemoryPeak, anonymous_bytes, give_back

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PROMPT_SEED = 0


@dataclass(frozen=True, slots=True)
class LayerKernel:
    """What multiplies in one layer, or in all experts of a stack.

    shape: of the weight; of a stack [experts, out_features, in_features].
    refusals: why faster kernels would not, by their names.
    """

    name: str
    shape: tuple[int, ...]
    weights: str
    kernel: str
    refusals: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Runner:
    """One way to run the model.

    name:   as people read it.
    speed:  measured.
    bytes_per_token: weights that one decoded token reads: all but tables of which it reads a row, and stacked experts that
      nobody chose.
    peak_memory_bytes: anonymous memory above what there was before the model was loaded; None where it cannot be known.
    """

    name: str
    speed: Speed
    bytes_per_token: int
    peak_memory_bytes: int | None

    def share_of_reading(self, bytes_per_second: float) -> float:
        """Of the time of a decoded token, what reading its weights once would take at this rate."""
        return self.bytes_per_token / bytes_per_second / self.speed.step.median


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What `halfbin bench` found.

    codes:   the model computing with the checkpoint's codes.
    floats:  the same weights, dequantized; None where that was not asked for, or the checkpoint holds floats.
    bytes_per_second: this machine's streaming read, in the same run.
    layers:  the quantized layers.
    dequantized: tensors that the checkpoint holds as codes and the model as floats, with the reason.
    """

    model: str
    dtype: str
    threads: int
    codes: Runner
    floats: Runner | None
    bytes_per_second: float
    layers: tuple[LayerKernel, ...]
    dequantized: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """The value that `--json` prints."""
        runners = {r.name: self._runner(r) for r in (self.codes, self.floats) if r is not None}
        return {
            "model": self.model,
            "dtype": self.dtype,
            "threads": self.threads,
            "streaming_bytes_per_second": self.bytes_per_second,
            **runners,
            "layers": [jsonable.to_json(layer) for layer in self.layers],
            "dequantized": dict(self.dequantized),
        }

    def _runner(self, runner: Runner) -> dict[str, Any]:
        speed = runner.speed
        return {
            "prompt_tokens": speed.prompt_tokens,
            "new_tokens": speed.new_tokens,
            "rounds": speed.rounds,
            "decode_tokens_per_second": speed.decode_rate,
            "prefill_tokens_per_second": speed.prefill_rate,
            "seconds_to_first_token": jsonable.to_json(speed.prefill),
            "seconds_per_token": jsonable.to_json(speed.step),
            "bytes_per_token": runner.bytes_per_token,
            "share_of_streaming_read": runner.share_of_reading(self.bytes_per_second),
            "peak_memory_bytes": runner.peak_memory_bytes,
        }


def benchmark(
    directory: Path,
    *,
    dtype: str | None,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    threads: int | None,
    alone: bool,
    trust_remote_code: bool,
    on_event: OnEvent | None,
) -> Benchmark:
    """Time a checkpoint of any layout; see `evaluation/speed.py` for what is timed.

    Args:
      directory: the checkpoint.
      dtype: of activations and of weights that are no codes: "bf16", "fp16", "fp32"; the config's own by default.
      prompt_tokens, new_tokens, rounds: how much is timed.
      threads: of every product; as many as torch has by default.
      alone: leave out the same weights as floats.
      trust_remote_code: run Python code that the directory brings along.
      on_event: told of progress.

    Raises:
      ModelError: the model does not predict tokens, reads fewer than these, or keeps no cache.
    """
    skeleton = open_skeleton(directory, trust_remote_code=trust_remote_code)
    if not skeleton.generates:
        raise ModelError(f"{directory}: {skeleton.model_class.__name__} does not predict tokens, so nothing is decoded")
    most = getattr(skeleton.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and prompt_tokens + new_tokens > most:
        raise ModelError(
            f"{directory} was made for {most} tokens; {prompt_tokens} and {new_tokens} new ones are too many: ask for fewer"
        )
    chosen = _dtype(dtype, skeleton)
    tell = on_event or (lambda event: None)

    def timed(name: str, load: Callable[[], Running]) -> tuple[Runner, tuple[LayerKernel, ...], Mapping[str, str]]:
        with _memory() as held:
            tell(Event(f"loading {name}", 0, 0, "tensors"))
            loaded = load()
            vocabulary = skeleton.config.get_text_config().vocab_size
            generator = torch.Generator().manual_seed(PROMPT_SEED)
            prompt = torch.randint(vocabulary, (1, prompt_tokens), generator=generator)
            speed = measure_speed(
                loaded.model,
                prompt,
                new_tokens=new_tokens,
                rounds=rounds,
                on_step=lambda done, total: tell(Event(f"timing {name}", done, total, "rounds")),
            )
            read = bytes_per_token(loaded.model, experts_chosen(loaded.model, prompt[:, :1]))
            kernels, dequantized = _kernels(loaded.model), loaded.dequantized
            del loaded  # its memory is to be given back at the end of the block
        return Runner(name, speed, read, held.bytes), kernels, dequantized

    with _threads(threads) as count:
        rate = read_rate()
        codes, layers, dequantized = timed(
            "codes", lambda: load_running(skeleton, dtype=chosen, on_step=lambda done, total: give_back())
        )
        floats = None
        if layers and not alone:
            floats, _, _ = timed("floats", lambda: Running(load_weights(skeleton, dtype=chosen), {}))
    name = next(name for name, known in DTYPES.items() if known == chosen)
    return Benchmark(str(directory), name, count, codes, floats, rate, layers, dequantized)


def bytes_per_token(model: nn.Module, chosen: Mapping[nn.Module, int] | None = None) -> int:
    """Bytes of weights that one token reads: codes with their scales, packed, and floats; no tables; each tensor once.

    Args:
      model: the model.
      chosen: of modules of stacked experts, how many of them a token goes through; all of them where it is not told.
    """
    read: dict[int, float] = {}
    shares = dict(_shares(chosen or {}))
    for module in model.modules():
        share = shares.get(module, 1.0)
        if isinstance(module, QuantModule):
            if not isinstance(module, QuantEmbedding):
                read[module.memory.data_ptr()] = share * module.scheme.num_bits(module.codes_shape) / 8
        elif isinstance(module, nn.Embedding):
            continue
        for parameter in module.parameters(recurse=False):
            read[parameter.data_ptr()] = share * parameter.numel() * parameter.element_size()
    return round(sum(read.values()))


def experts_chosen(model: nn.Module, token: Tensor) -> dict[nn.Module, int]:
    """How many experts of each module that holds them as stacks a token goes through, seen in a run with int64 [1, 1]."""
    found: dict[nn.Module, int] = {}

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64) and value.ndim == 2:
                found[module] = value.shape[1]

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for module in model.modules():
            if _num_experts(module):
                hooks.callback(module.register_forward_pre_hook(see, with_kwargs=True).remove)
        model(input_ids=token)
    return found


def _num_experts(module: nn.Module) -> int:
    """Of a module that holds them as stacks; 0: it does not."""
    if isinstance(module, QuantExperts):
        return module.num_stacked
    stacks = {len(p) for p in module._parameters.values() if p is not None and p.ndim == 3}
    return stacks.pop() if len(stacks) == 1 else 0


def _shares(chosen: Mapping[nn.Module, int]) -> Iterator[tuple[nn.Module, float]]:
    """The share of its experts that each module reads for a token, and each layer inside it."""
    for module, count in chosen.items():
        share = min(1.0, count / _num_experts(module))
        yield module, share
        for stack in module.children():
            if isinstance(stack, ExpertStack):
                yield from ((part, share) for part in stack.modules())


def _kernels(model: nn.Module) -> tuple[LayerKernel, ...]:
    """Of each quantized layer, after it has run."""
    found = []
    of_stacks: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, ExpertStack):
            of_stacks.update(module.layers)
            kernel, refusals = module.multiplied
            found.append(LayerKernel(name, module.shape, str(module.scheme), kernel, dict(refusals)))
        elif isinstance(module, QuantModule) and module not in of_stacks:
            kernel, refusals = module.multiplied
            found.append(LayerKernel(name, module.codes_shape, str(module.scheme), kernel, dict(refusals)))
    return tuple(found)


class _Held:
    """What a model took; `bytes` is known when the block around it has ended."""

    bytes: int | None = None


@contextlib.contextmanager
def _memory() -> Iterator[_Held]:
    """How much more anonymous memory there was, at the most, than at the beginning; what is left over is given back."""
    gc.collect()
    give_back()
    before, held = anonymous_bytes(), _Held()
    with MemoryPeak() as peak:
        yield held
    if before is not None and peak.bytes is not None:
        held.bytes = peak.bytes - before
    gc.collect()
    give_back()


@contextlib.contextmanager
def _threads(wanted: int | None) -> Iterator[int]:
    before = torch.get_num_threads()
    if wanted is not None:
        torch.set_num_threads(wanted)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _dtype(name: str | None, skeleton: Skeleton) -> torch.dtype:
    if name is None:
        return skeleton.dtype
    if name not in DTYPES:
        raise HalfbinError(f"--dtype {name!r} is not understood; expected one of {', '.join(DTYPES)}")
    return DTYPES[name]
