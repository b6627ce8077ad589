"""The logits of one causal model at the scored positions, a bounded number at a time.

Logits are the largest thing in an evaluation: 2,048 positions of a vocabulary of 150,000 are 1.2 GB in float32. So at most
`CHUNK_BYTES` of them exist at once for each model: the body runs once for a batch of windows, its hidden states are kept, and
the head is applied to a few positions after the other. The model's own `forward` does that, so whatever it does after the
head (scaling, soft-capping) is done; only its body is answered from memory. It needs a `logits_to_keep` argument, which nearly
every causal model of transformers has; for other models the logits of one batch are computed at once.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from halfbin.errors import DataError, ModelError
from halfbin.evaluation.windows import Batch, Windows

CHUNK_BYTES = 32 * 2**20  # float32 logits of one model at a time; log-softmax and comparison need a few times as much
BATCH_TOKENS = 2048  # read together; more gained nothing on two cores
PROBE_TOKENS = 16

Logits = Callable[[int, int], Tensor]


class LogitSource:
    """A model that gives logits, checked once: it is causal, and knows the text's tokens.

    Attributes:
      vocabulary: how many tokens it gives logits for.
    """

    def __init__(self, model: nn.Module, role: str, windows: Windows, *, known_causal: bool = False) -> None:
        """Look at the model with the first few tokens.

        Args:
          model: called with input_ids [batch, length], gives something with logits [batch, length, vocabulary].
          role: what errors call it, such as "the quantized model".
          windows: what it will read.
          known_causal: take its word for it.

        Raises:
          ModelError: it gives no logits, or sees the tokens that it should predict.
          DataError: the text has tokens outside its vocabulary.
        """
        self.model, self.role = model, role
        parameters = inspect.signature(model.forward).parameters
        if "decoder_input_ids" in parameters:
            raise ModelError(f"{role} ({type(model).__name__}) is an encoder-decoder: perplexity needs a causal model")
        self._options: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
        body = getattr(model, "base_model", None)
        sliced = "logits_to_keep" in parameters and isinstance(body, nn.Module) and body is not model
        self._body: nn.Module | None = body if sliced else None
        first = next(iter([*model.parameters(), *model.buffers()]), None)
        self._device = torch.device("cpu") if first is None else first.device
        self._dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        if (size := embedded_vocabulary(model)) is not None:
            self._require_known(windows, size)
        self.vocabulary = self._probe(windows.input_ids(0)[:PROBE_TOKENS], known_causal)
        self._require_known(windows, self.vocabulary)

    def _require_known(self, windows: Windows, size: int) -> None:
        highest = max(int(windows.tokens.max()), -1 if windows.bos is None else windows.bos)
        if highest >= size:
            raise DataError(
                f"the text holds token {highest}, but the vocabulary of {self.role} has {size} tokens; it was tokenized "
                "for another model: use this model's own tokenizer"
            )

    def _probe(self, ids: Tensor, known_causal: bool) -> int:
        """Change the last token; if that moves what was predicted before it, the model sees what it should predict."""
        other = ids.clone()
        other[-1] = ids[0] if ids[0] != ids[-1] else ids[-1] - 1 if ids[-1] else 1
        seen, changed = self._run(ids[None])[0, :-1].float(), self._run(other[None])[0, :-1].float()
        moved = torch.linalg.vector_norm(seen - changed) / torch.linalg.vector_norm(seen).clamp(min=1e-30)
        # A causal model moves by exactly 0, or by rounding (some eps) where tokens are sorted by expert. A bidirectional one
        # moves by parts in a hundred, and by 3e-4 even when tiny and untrained. The limit lies between: 7e-5 in float32.
        if not known_causal and bool(moved > torch.finfo(self._dtype).eps ** 0.6):
            raise ModelError(
                f"{self.role} ({type(self.model).__name__}) sees the tokens that it should predict: changing token "
                f"{len(ids) - 1} moved the logits before it by {float(moved):.1%}. Perplexity and KL are for causal "
                "language models; compare encoders by their embeddings"
            )
        return seen.shape[-1]

    def _run(self, input_ids: Tensor, **options: Any) -> Tensor:
        output = self.model(input_ids=input_ids.to(self._device), **self._options, **options)
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[0] != input_ids.shape[0]:
            raise ModelError(
                f"{self.role} ({type(self.model).__name__}) gives no logits of shape [batch, length, vocabulary]: "
                "perplexity and KL need a causal language model with its output head"
            )
        return logits

    @contextlib.contextmanager
    def hold(self, input_ids: Tensor) -> Iterator[Logits]:
        """Read a batch int64 [batch, length]; gives logits(begin, end), [batch, end - begin, vocabulary], for positions."""
        if self._body is None:
            whole = self._run(input_ids)
            yield lambda begin, end: whole[:, begin:end]
            return

        def part(begin: int, end: int) -> Tensor:
            logits = self._run(input_ids, logits_to_keep=torch.arange(begin, end, device=self._device))
            return logits if logits.shape[1] == end - begin else logits[:, begin:end]

        with answered_once(self._body):
            yield part


@contextlib.contextmanager
def answered_once(module: nn.Module) -> Iterator[None]:
    """Inside, `module` computes on its first call only and gives the same answer from then on."""
    own = module.__dict__.get("forward")
    forward = module.forward
    answers: list[Any] = []

    def once(*args: Any, **kwargs: Any) -> Any:
        if not answers:
            answers.append(forward(*args, **kwargs))
        return answers[0]

    module.forward = once
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Inside, models are in evaluation mode (no dropout) and no gradients are kept; each module's mode is put back."""
    training = [module for model in models for module in model.modules() if module.training]
    for model in models:
        model.eval()
    try:
        # Not inference_mode: what a model caches inside it could never be trained with again.
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def embedded_vocabulary(model: nn.Module) -> int | None:
    """How many tokens the model can read; None where it does not say."""
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]  # transformers' models have it, others need not
    except (AttributeError, NotImplementedError):
        return None
    size = getattr(embedding, "num_embeddings", None)
    return size if isinstance(size, int) else None


def windows_at_once(length: int, vocabulary: int) -> int:
    """How many windows of `length` tokens to read together."""
    return max(1, min(BATCH_TOKENS // length, CHUNK_BYTES // (4 * vocabulary * length)))


def position_chunks(batch: Batch, vocabulary: int) -> Iterator[tuple[int, int]]:
    """Ranges of positions whose logits predict scored tokens, `CHUNK_BYTES` of float32 logits or one position each."""
    num_windows, length = batch.input_ids.shape
    step = max(1, CHUNK_BYTES // (4 * vocabulary * num_windows))
    for begin in range(batch.first_scored - 1, length - 1, step):
        yield begin, min(begin + step, length - 1)
