"""What a written checkpoint costs: it is loaded as its clients load it, and held against the original on a text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from halfbin import demo
from halfbin.errors import DataError, FormatError, ModelError
from halfbin.evaluation import (
    Comparison,
    EmbeddingComparison,
    Perplexity,
    TensorError,
    Windows,
    compare,
    compare_embeddings,
    cut,
    default_context,
    embed,
    output_errors,
    perplexity,
    tokenize,
)
from halfbin.evaluation.logits import embedded_vocabulary, evaluating
from halfbin.formats.read import open_quantized
from halfbin.models import Skeleton, load_as_client, load_weights, targets
from halfbin.run.memory import available_bytes

DEFAULT_TOKENS = 32_768  # of the embedded text, when the user gave none
PROOF_TOKENS = 64
OUTPUT_ERROR_TOKENS = 1024
SENTENCES = 256
SENTENCE_TOKENS = 128
SENTENCE_CHARACTERS = 20  # shorter lines are brackets and headings
# Client and halfbin multiply the same weights in the same type; what differs is only how a product is summed up.
PROOF_TOLERANCE = 1e-4
PROOF_TOLERANCE_16_BIT = 8 * 2.0**-8  # bfloat16's rounding, a few layers deep

OnStep = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Text:
    """What quality is measured on, and what it is called in reports."""

    name: str
    text: str
    max_tokens: int | None = None


def text_name(path: Path | None) -> str:
    """What a text is called in results; None is the one that ships with halfbin."""
    return "halfbin's held-out Python source" if path is None else path.name


def evaluation_text(path: Path | None, max_tokens: int | None = None) -> Text:
    """The user's text, or the one that ships with halfbin: Python source that the demo model has not seen.

    Raises:
      DataError: the file cannot be read or is not text.
    """
    if path is None:
        return Text(text_name(None), demo.heldout_text(), max_tokens or DEFAULT_TOKENS)
    try:
        return Text(text_name(path), path.read_text(encoding="utf-8"), max_tokens)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from error


def windows_of(skeleton: Skeleton, text: Text, *, context: int | None = None, stride: int | None = None) -> Windows:
    """The text, tokenized by the model's own tokenizer and cut into windows.

    Raises:
      DataError: the text is too short, or context and stride do not fit together.
      ModelError: there is no tokenizer, or it is another model's.
    """
    tokenizer = load_tokenizer(skeleton)
    try:
        tokens = tokenize(tokenizer, text.text)
        ids = tokens.ids[: text.max_tokens]
        _require_known(skeleton, ids, tokens.bos)
        whole = len(ids) == len(tokens.ids)
        return cut(
            ids,
            context=context or default_context(skeleton.config, at_most=1024),
            stride=stride,
            bos=tokens.bos,
            num_bytes=tokens.num_bytes if whole else None,
        )
    except DataError as error:
        error.add_note(f"while reading the text {text.name}")
        raise


def _require_known(skeleton: Skeleton, ids: Tensor, bos: int | None) -> None:
    size = embedded_vocabulary(skeleton.model)
    highest = max(int(ids.max()), -1 if bos is None else bos)
    if size is not None and highest >= size:
        raise ModelError(
            f"{skeleton.path}: its tokenizer gives token {highest}, but the model knows {size} tokens only: tokenizer and "
            "weights come from different models; copy the right tokenizer's files, or pass --no-evaluate"
        )


def sentences_of(text: Text) -> list[str]:
    """The lines that an encoder is measured on.

    Raises:
      DataError: none is long enough.
    """
    found = [line.strip() for line in text.text.splitlines() if len(line.strip()) >= SENTENCE_CHARACTERS]
    if not found:
        raise DataError(
            f"{text.name} has no line of {SENTENCE_CHARACTERS} characters or more, and an encoder is measured on such lines; "
            "give another text"
        )
    return found[:SENTENCES]


def load_tokenizer(skeleton: Skeleton) -> transformers.PreTrainedTokenizerBase:
    """The model's own tokenizer.

    Raises:
      ModelError: the directory has none that transformers can open.
    """
    try:
        return transformers.AutoTokenizer.from_pretrained(str(skeleton.path), local_files_only=True)
    except Exception as error:  # transformers raises many kinds
        raise ModelError(
            f"{skeleton.path}: no tokenizer that transformers can open ({type(error).__name__}: {error}); "
            "add its files, or pass --no-evaluate"
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Everything that was measured on a written checkpoint; exactly one of `language` and `embeddings` is given."""

    definition: str
    language: Comparison | None = None
    embeddings: EmbeddingComparison | None = None
    default_load: Perplexity | None = None
    output_errors: Mapping[str, TensorError]  # by the tensor's name on disk
    rounded_by_client: str | None = None  # what the client does not hold to the bit, in words


def too_large(num_parameters: int) -> str | None:
    """Why a model cannot be measured on this machine; None when it can."""
    needed, free = 3 * 4 * num_parameters, available_bytes()  # the original, the client's, and what proves the client
    if free is None or needed < 0.9 * free:
        return None
    return (
        f"quality was not measured: the models in float32 take {needed / 2**30:.1f} GiB, "
        f"{free / 2**30:.1f} GiB are free; run `halfbin evaluate` on a larger machine"
    )


def unmeasurable(skeleton: Skeleton) -> str | None:
    """Why a text tells nothing about a model; None when it does."""
    if skeleton.reads_text:
        return None
    return (
        f"quality was not measured: {skeleton.model_class.__name__} needs more than a text (pictures, sound, or a second "
        "text for its decoder); compare both checkpoints on its own task"
    )


def measure(
    skeleton: Skeleton,
    directory: Path,
    text: Text,
    windows: Windows,
    *,
    device: str = "cpu",
    skip: Collection[str] = (),
    on_step: OnStep | None = None,
) -> Measured:
    """Load `directory` as its clients do, prove that it computes what was written, and compare it with the original.

    Args:
      skeleton: the original model.
      directory: the written checkpoint.
      text: what to measure on.
      windows: that text, as `windows_of` cut it.
      device: where to compute.
      skip: tensors whose output errors are known, or that do not compare one by one because a transform changed them.
      on_step: called with (windows read, windows to read); each model's reading of a window counts.

    Raises:
      ModelError: the client does not load it.
      FormatError: the client computes something else than the dequantized weights give.
    """
    original = load_weights(skeleton).to(device)
    client = load_checked(skeleton, directory).to(device)
    rounded = prove_client(skeleton, directory, client, windows)
    if not skeleton.generates:
        return _measure_encoder(skeleton, original, client, text, rounded)
    default = skeleton.dtype != torch.float32
    readings = 3 if default else 2  # of each window: by both models, and by the one in its default type

    def first(done: int, total: int) -> None:
        if on_step:
            on_step(2 * done, readings * total)

    def second(done: int, total: int) -> None:
        if on_step:
            on_step(2 * total + done, readings * total)

    comparison = compare(original, client, windows, on_step=first)
    errors = _output_errors(skeleton, directory, original, windows, skip)
    del original, client
    default_load = (
        perplexity(load_checked(skeleton, directory, None).to(device), windows, known_causal=True, on_step=second)
        if default
        else None
    )
    return Measured(
        definition=windows.describe(),
        language=comparison,
        default_load=default_load,
        output_errors=errors,
        rounded_by_client=rounded,
    )


def load_checked(skeleton: Skeleton, directory: Path, dtype: torch.dtype | None = torch.float32) -> nn.Module:
    """The checkpoint as whoever can read it loads it: transformers, or halfbin for its own layout."""
    with open_quantized(directory) as checkpoint:
        ours = checkpoint.layout_name == "halfbin"
    if ours:
        return load_weights(skeleton, dtype=dtype or skeleton.dtype, directory=directory)
    return load_as_client(skeleton, directory, dtype=dtype)


def prove_client(skeleton: Skeleton, directory: Path, client: nn.Module, windows: Windows) -> str | None:
    """The client must hold the dequantized weights to the bit, and compute their outputs within float32 rounding.

    Some of its loading paths round the dequantized weights to the 16-bit type of their scales. Then it must hold exactly
    those, and where it also multiplies in that type, its outputs are held to that type's rounding.

    Returns:
      What it rounded, in words; None: nothing.

    Raises:
      FormatError: it holds or computes something else.
    """
    ids = windows.input_ids(0)[None, :PROOF_TOKENS]
    with open_quantized(directory) as checkpoint:
        layout = checkpoint.layout_name
    ours = load_weights(skeleton, directory=directory, as_client=layout != "halfbin").to(
        next(client.parameters()).device
    )
    with evaluating(client, ours):
        got = _outputs(client, ids)  # first, as weights may be decompressed on the first call
        rounded = _adopt_weights(client, ours, directory)
        expected = _outputs(ours, ids)
    difference, size = float((expected - got).abs().max()), float(expected.abs().max())
    theirs = _weights(client)
    narrow = any(theirs[name].dtype != torch.float32 for name in _weights(ours) if name in theirs)
    if not difference <= (PROOF_TOLERANCE_16_BIT if narrow else PROOF_TOLERANCE) * size:
        raise FormatError(
            f"{directory}: transformers computes other outputs than the written weights give: they differ by "
            f"{difference:.3g} where the largest is {size:.3g}; please report this, and use --format halfbin meanwhile"
        )
    if not rounded:
        return None
    return f"transformers rounds {len(rounded)} dequantized weights to 16 bits when it loads them, such as {rounded[0]}"


def _adopt_weights(client: nn.Module, ours: nn.Module, directory: Path) -> list[str]:
    """Take over the weights that the client rounded to 16 bits; their names. Every other one must be ours to the bit."""
    rounded, theirs = [], _weights(client)
    for name, weight in ours.named_parameters():
        found = theirs.get(name)
        if found is None or torch.equal(found.to(weight.dtype), weight):
            continue
        if not any(torch.equal(found.to(t), weight.to(t)) for t in (torch.bfloat16, torch.float16)):
            raise FormatError(
                f"{directory}: transformers reads {name!r} as something else than was written; please report this, and use "
                "--format halfbin meanwhile"
            )
        weight.data.copy_(found)
        rounded.append(name)
    return rounded


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.data for name, p in model.named_parameters() if p.is_floating_point()}


def _outputs(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits, or the last hidden state of a model that has none."""
    output = model(input_ids=ids.to(next(model.parameters()).device))
    found: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return found.float()


def _output_errors(
    skeleton: Skeleton, directory: Path, original: nn.Module, windows: Windows, skip: Collection[str]
) -> dict[str, TensorError]:
    """The error of each quantized layer's outputs on a few windows, by the weight's name on disk."""
    few = cut(windows.tokens[:OUTPUT_ERROR_TOKENS], context=windows.context, stride=None, bos=windows.bos)
    with open_quantized(directory) as checkpoint:
        rounded = [name for name in checkpoint.names if checkpoint.scheme(name) is not None and name not in skip]
        tensor_of = {
            target.parameter.removesuffix(".weight"): name
            for name, target in targets(skeleton, rounded).items()
            if target.unchanged and target.parameter.endswith(".weight")
        }
        device = next(original.parameters()).device
        errors = output_errors(
            original, lambda module: checkpoint.read_values(tensor_of[module]).to(device), few, names=list(tensor_of)
        )
    return {tensor_of[module]: error for module, error in errors.items()}


def _measure_encoder(
    skeleton: Skeleton, original: nn.Module, client: nn.Module, text: Text, rounded: str | None
) -> Measured:
    sentences, tokenizer = sentences_of(text), load_tokenizer(skeleton)
    before, after = (
        getattr(model, "base_model", model) for model in (original, client)
    )  # without a head for some task
    longest = default_context(skeleton.config, at_most=SENTENCE_TOKENS)
    first, second = (embed(model, tokenizer, sentences, max_tokens=longest) for model in (before, after))
    embeddings = compare_embeddings(first, second)
    definition = (
        f"mean-pooled, L2-normalised embeddings of {len(sentences)} lines of the text, at most {longest} tokens each"
    )
    return Measured(definition=definition, embeddings=embeddings, output_errors={}, rounded_by_client=rounded)
