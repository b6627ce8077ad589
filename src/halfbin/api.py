"""The few verbs that a user imports: `import halfbin as hb`.

hb.quantize("path/to/model", "out", recipe="int4")     a directory in, a directory out, a Report back
hb.quantize(module, recipe="int8")                     any torch.nn.Module, its layers replaced in place
hb.load("out")                                         a quantized directory as a running model
hb.inspect("out")                                      what a checkpoint holds, tensor by tensor
hb.evaluate("model", "out", text="file.txt")           what it cost
hb.check_calibration("model", "mine.jsonl")            whether calibration data suit a model
hb.plan("path/to/model", recipe="int4")                what would be done, without doing it
hb.bench("out")                                        how fast it runs here, and which kernels it got
"""

from __future__ import annotations

from pathlib import Path
from typing import overload

import torch
from torch import nn

from halfbin.errors import RecipeError
from halfbin.evaluation import Comparison, Perplexity
from halfbin.models import load_weights, open_skeleton
from halfbin.models.running import load_running
from halfbin.nn.convert import Swap
from halfbin.planning import Plan
from halfbin.run.benchmark import Benchmark, benchmark
from halfbin.run.calibration import NUM_SAMPLES, Calibration
from halfbin.run.checking import CalibrationCheck
from halfbin.run.checking import check_calibration as run_check
from halfbin.run.events import OnEvent
from halfbin.run.inspection import Inspection, inspect_checkpoint
from halfbin.run.job import Job, model_directory, planned, run_job
from halfbin.run.judge import judge
from halfbin.run.memory import give_back
from halfbin.run.module import quantize_in_memory
from halfbin.run.report import Report


@overload
def quantize(
    model: nn.Module, output: None = None, *, recipe: str | Path = "int4", on_event: OnEvent | None = None
) -> list[Swap]: ...
@overload
def quantize(
    model: str | Path,
    output: str | Path,
    *,
    recipe: str | Path = "int4",
    format: str | None = None,
    text: str | Path | None = None,
    max_tokens: int | None = None,
    evaluate: bool = True,
    force: bool = False,
    trust_remote_code: bool = False,
    device: str = "cpu",
    max_kl: float | None = None,
    calibration: str | Path | None = None,
    num_samples: int = NUM_SAMPLES,
    sample_length: int | None = None,
    seed: int = 0,
    activations: str = "auto",
    untie: bool = False,
    all_experts: bool = False,
    on_event: OnEvent | None = None,
) -> Report: ...
def quantize(
    model: str | Path | nn.Module,
    output: str | Path | None = None,
    *,
    recipe: str | Path = "int4",
    format: str | None = None,
    text: str | Path | None = None,
    max_tokens: int | None = None,
    evaluate: bool = True,
    force: bool = False,
    trust_remote_code: bool = False,
    device: str = "cpu",
    max_kl: float | None = None,
    calibration: str | Path | None = None,
    num_samples: int = NUM_SAMPLES,
    sample_length: int | None = None,
    seed: int = 0,
    activations: str = "auto",
    untie: bool = False,
    all_experts: bool = False,
    on_event: OnEvent | None = None,
) -> Report | list[Swap]:
    """Quantize a model directory into another one, or the layers of a module in place.

    Args:
      model: a Hugging Face directory, "demo", or any torch.nn.Module.
      output: the directory to write; for a module leave it out.
      recipe: a preset's name or a TOML file.
      format: "compressed-tensors", "halfbin" or "safetensors"; the recipe's own layout by default.
      text: a UTF-8 file to measure quality on; the embedded held-out text by default.
      max_tokens: measure on no more than so many tokens.
      evaluate: measure quality, which loads both models.
      force: replace an earlier result of halfbin's in `output`.
      trust_remote_code: run Python code that the model directory brings along.
      device: where to compute: "cpu" or "cuda".
      max_kl: raise LimitError when the mean KL is above this.
      calibration: text or tokens for recipes that need data: a .txt, .jsonl, .npy or .safetensors file, or a folder; the
        embedded calibration text by default.
      num_samples: how many samples to take of it, at most.
      sample_length: tokens of each; what suits the model by default.
      seed: of the choice.
      activations: where what stands between two blocks is kept while a run is calibrated: "memory", "disk" (in files that
        leave nothing behind), or "auto", which takes the disk from a quarter of the free memory on. Results are the same.
      all_experts: let every expert of a mixture see every token while statistics are taken, whatever the router says.
      untie: write an embedding and an output head that share a tensor as two, so that rotations can change them apart.
      on_event: told of progress.

    Returns:
      The report of a directory's run; for a module, what became of each of its layers.
    """
    if isinstance(model, nn.Module):
        _require_unused(
            output=output,
            format=format,
            text=text,
            max_tokens=max_tokens,
            force=force,
            max_kl=max_kl,
            calibration=calibration,
            untie=untie,
            all_experts=all_experts,
        )
        return quantize_in_memory(model, recipe, on_event)
    if output is None:
        raise RecipeError("quantizing a directory needs an output directory; pass output=...")
    job = Job(
        model=model,
        recipe=recipe,
        layout=format,
        text=None if text is None else Path(text),
        max_tokens=max_tokens,
        evaluate=evaluate,
        force=force,
        trust_remote_code=trust_remote_code,
        device=device,
        max_kl=max_kl,
        untie=untie,
        activations=activations,
        all_experts=all_experts,
        calibration=Calibration(
            path=None if calibration is None else Path(calibration),
            num_samples=num_samples,
            length=sample_length,
            seed=seed,
        ),
    )
    return run_job(job, Path(output), on_event)


def _require_unused(**of_directories: object) -> None:
    """Refuse what says something about a directory's run only, instead of passing it over in silence."""
    given = [name for name, value in of_directories.items() if value is not None and value is not False]
    if given:
        raise RecipeError(
            f"{', '.join(given)}: for model directories only, and the model is a module in memory, which is changed in place; "
            "leave it out, or give the directory that the model was loaded from"
        )


def plan(
    model: str | Path,
    *,
    recipe: str | Path = "int4",
    format: str | None = None,
    trust_remote_code: bool = False,
    calibration: str | Path | None = None,
    num_samples: int = NUM_SAMPLES,
    sample_length: int | None = None,
    activations: str = "auto",
    untie: bool = False,
) -> Plan:
    """What `quantize` would do: a scheme, bytes and a reason for every site. Reads headers, no weights.

    How much it calibrates on, and where activations are kept, count for the memory that the plan tells.
    """
    job = Job(
        model=model,
        recipe=recipe,
        layout=format,
        trust_remote_code=trust_remote_code,
        calibration=Calibration(
            path=None if calibration is None else Path(calibration), num_samples=num_samples, length=sample_length
        ),
        activations=activations,
        untie=untie,
    )
    with planned(job) as (found, _):
        return found


def load(
    path: str | Path, dtype: torch.dtype | None = None, *, dequantize: bool = False, trust_remote_code: bool = False
) -> nn.Module:
    """A checkpoint of any layout that halfbin reads, as its transformers model, in evaluation mode.

    Layers compute with the checkpoint's codes, by halfbin's kernels (docs/kernels.md says what each does to inputs). Experts
    that transformers merges into stacks do, too, where a compiled kernel takes them; other weights that no layer reads as codes
    are dequantized.

    Args:
      path: a directory that halfbin or another tool wrote, a float model, or "demo".
      dtype: of activations and of weights that are no codes; the config's own by default.
      dequantize: give an ordinary model with float weights, to look at or to train on; inputs that the checkpoint quantizes
        are fake-quantized.
      trust_remote_code: run Python code that the directory brings along.
    """
    skeleton = open_skeleton(model_directory(path), trust_remote_code=trust_remote_code)
    if dequantize:
        return load_weights(skeleton, dtype=dtype or skeleton.dtype)
    return load_running(skeleton, dtype=dtype, on_step=lambda done, total: give_back()).model


def inspect(path: str | Path, *, on_event: OnEvent | None = None) -> Inspection:
    """What a checkpoint holds: per tensor its scheme, bytes, bits per weight, and how its codes are used."""
    return inspect_checkpoint(model_directory(path), on_event)


def evaluate(
    a: str | Path,
    b: str | Path | None = None,
    *,
    text: str | Path | None = None,
    context: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    kv_cache: str | None = None,
    trust_remote_code: bool = False,
    device: str = "cpu",
    on_event: OnEvent | None = None,
) -> Comparison | Perplexity:
    """Perplexity of one model on a text, or two models side by side with KL and agreement.

    Both are dequantized to float32 by halfbin's own readers. The result's `definition` says how the text was cut and scored:
    context, stride, what stands before each window.

    Args:
      a: the model, or the original one: a directory, or "demo".
      b: what is held against it.
      text: a UTF-8 file; the embedded held-out text, 32,768 tokens of it, by default.
      context: tokens that the model reads at once; what it was made for by default, at most 1024.
      stride: tokens from one window to the next; windows do not overlap by default.
      max_tokens: measure on no more than so many tokens.
      kv_cache: let `b`, or `a` beside itself, keep keys and values rounded to a scheme such as "int8-token"; simulated.
      trust_remote_code: run Python code that the directories bring along.
      device: where to compute: "cpu" or "cuda".
      on_event: told of progress.
    """
    return judge(
        model_directory(a),
        None if b is None else model_directory(b),
        text=None if text is None else Path(text),
        context=context,
        stride=stride,
        max_tokens=max_tokens,
        kv_cache=kv_cache,
        trust_remote_code=trust_remote_code,
        device=device,
        on_event=on_event,
    )


def check_calibration(
    model: str | Path,
    calibration: str | Path | None = None,
    *,
    against: str | Path | None = None,
    num_samples: int = NUM_SAMPLES,
    sample_length: int | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    on_event: OnEvent | None = None,
) -> CalibrationCheck:
    """Whether calibration data suit a model: what they cover, and what they leave open.

    Args:
      model: a directory, or "demo".
      calibration, num_samples, sample_length, seed: as for `quantize`.
      against: a text like those the model is for.
      trust_remote_code: run Python code that the directory brings along.
      on_event: told of progress.
    """
    chosen = Calibration(
        path=None if calibration is None else Path(calibration),
        num_samples=num_samples,
        length=sample_length,
        seed=seed,
    )
    return run_check(
        model_directory(model),
        chosen,
        name=str(model),
        against=None if against is None else Path(against),
        trust_remote_code=trust_remote_code,
        on_event=on_event,
    )


def bench(
    model: str | Path,
    *,
    dtype: str | None = None,
    prompt_tokens: int = 256,
    new_tokens: int = 32,
    rounds: int = 5,
    threads: int | None = None,
    alone: bool = False,
    trust_remote_code: bool = False,
    on_event: OnEvent | None = None,
) -> Benchmark:
    """How fast a checkpoint runs here: prefill, first token, decoding, memory, and which kernel each layer got.

    Args:
      model: a directory of any layout that halfbin reads, or "demo".
      dtype: of activations: "bf16", "fp16" or "fp32"; the config's own by default.
      prompt_tokens, new_tokens, rounds: how much is timed.
      threads: as many as torch has by default.
      alone: leave out the same weights as floats.
      trust_remote_code: run Python code that the directory brings along.
      on_event: told of progress.
    """
    return benchmark(
        model_directory(model),
        dtype=dtype,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
        threads=threads,
        alone=alone,
        trust_remote_code=trust_remote_code,
        on_event=on_event,
    )
