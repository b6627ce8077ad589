"""What quantization did to a model's predictions: both models read the same windows side by side.

    KL of a token   sum over the vocabulary of P(v) * (ln P(v) - ln Q(v)), nats; P: original, Q: quantized
    agreement       share of tokens where the most likely token is the same

Nothing of a batch stays but one float32 per scored token, its KL.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from halfbin.errors import ModelError
from halfbin.evaluation.logits import LogitSource, embedded_vocabulary, evaluating, position_chunks, windows_at_once
from halfbin.evaluation.perplexity import OnStep, Perplexity, token_nll
from halfbin.evaluation.windows import Batch, Definition, Windows


@dataclass(frozen=True, slots=True)
class Spread:
    """How per-token values are distributed: quantiles interpolate linearly between the two nearest ranks."""

    mean: float
    median: float
    p99: float
    maximum: float

    @classmethod
    def of(cls, values: Tensor) -> Spread:
        """Float [num_tokens], at least one; the mean is summed in float64."""
        array = values.numpy().astype(np.float64)
        median, p99 = np.quantile(array, [0.5, 0.99])
        return cls(float(array.mean()), float(median), float(p99), float(array.max()))


@dataclass(frozen=True, slots=True, eq=False)
class WindowMeans:
    """Means over each window's scored tokens, float64 [num_windows]: what two runs on one text are compared by, in pairs."""

    kl: Tensor
    nll_before: Tensor
    nll_after: Tensor


@dataclass(frozen=True, slots=True)
class Comparison:
    """A model beside its original on one text.

    before, after:  perplexity of the original and of the model.
    kl:             KL(original || model) per token, nats.
    top1_agreement: share of scored tokens where both find the same token most likely.
    num_tokens:     how many tokens were scored.
    definition:     how the text was cut and scored.
    by_window:      the same for each window.
    """

    before: Perplexity
    after: Perplexity
    kl: Spread
    top1_agreement: float
    num_tokens: int
    definition: Definition | None = None
    by_window: WindowMeans | None = field(default=None, compare=False)


@dataclass(slots=True)
class _Sums:
    before: float = 0.0
    after: float = 0.0
    agreed: int = 0
    by_window: list[Tensor] = field(default_factory=list)  # float64 [3, windows of a batch]


def compare(reference: nn.Module, model: nn.Module, windows: Windows, *, on_step: OnStep | None = None) -> Comparison:
    """Read every window with both models.

    Args:
      reference: the original, causal; called with input_ids [batch, length], gives something with logits.
      model: the quantized one, with the same vocabulary.
      windows: the text, cut.
      on_step: called with (windows done, windows in all) after each batch.

    Raises:
      ModelError: vocabularies differ, a model gives no logits, is not causal, or gives NaN.
      DataError: the text has tokens outside the vocabulary.
    """
    sums, kl = _Sums(), []
    with evaluating(reference, model):
        sources = _same_vocabulary(reference, model, windows)
        for batch in windows.batches(windows_at_once(windows.context, sources[0].vocabulary)):
            kl.append(_compare_batch(sources, batch, sums))
            if on_step:
                on_step(batch.first_window + len(batch.input_ids), len(windows))
    return Comparison(
        before=Perplexity.of(sums.before, windows),
        after=Perplexity.of(sums.after, windows),
        kl=Spread.of(torch.cat(kl)),
        top1_agreement=sums.agreed / windows.num_scored,
        num_tokens=windows.num_scored,
        definition=windows.definition,
        by_window=WindowMeans(*torch.cat(sums.by_window, dim=1)),
    )


def _same_vocabulary(reference: nn.Module, model: nn.Module, windows: Windows) -> tuple[LogitSource, LogitSource]:
    read = embedded_vocabulary(reference), embedded_vocabulary(model)
    if None not in read:
        _require_equal(*read)
    alike = type(model) is type(reference)  # then it is as causal, though inputs with one scale a batch may hide that
    sources = (
        LogitSource(reference, "the original model", windows),
        LogitSource(model, "the quantized model", windows, known_causal=alike),
    )
    _require_equal(sources[0].vocabulary, sources[1].vocabulary)
    return sources


def _require_equal(before: int | None, after: int | None) -> None:
    if before != after:
        raise ModelError(
            f"the original model's vocabulary has {before} tokens and the other's has {after}: KL and agreement compare "
            "the same tokens; give two versions of one model, or evaluate each alone and compare bits per byte"
        )


def _compare_batch(sources: tuple[LogitSource, LogitSource], batch: Batch, sums: _Sums) -> Tensor:
    kept = []
    totals, num_tokens = torch.zeros(3, len(batch.input_ids), dtype=torch.float64), 0
    with contextlib.ExitStack() as stack:
        original, quantized = (stack.enter_context(source.hold(batch.input_ids)) for source in sources)
        for begin, end in position_chunks(batch, sources[0].vocabulary):
            log_p = original(begin, end).float().log_softmax(-1)
            log_q = quantized(begin, end).to(log_p.device).float().log_softmax(-1)
            nll = [token_nll(log, batch, begin, s.role) for log, s in zip((log_p, log_q), sources, strict=True)]
            kl = token_kl(log_p, log_q)
            sums.before += float(nll[0].sum(dtype=torch.float64))
            sums.after += float(nll[1].sum(dtype=torch.float64))
            sums.agreed += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            totals += torch.stack([values.sum(1, dtype=torch.float64) for values in (kl, *nll)]).cpu()
            num_tokens += kl.shape[1]
            kept.append(kl.flatten().cpu())
    sums.by_window.append(totals / num_tokens)
    return torch.cat(kept)


def token_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(P || Q) over the last axis.

    Computed as the sum of P (ln P - ln Q) - P + Q. The sums of P and Q are both 1, so the last two terms change nothing but
    the rounding: log-softmax is off by one constant a row, up to 1e-6 in float32, which would be the error of the result (and
    make it negative); here such a constant cancels to first order. With d = ln P - ln Q the same is P (d + exp(-d) - 1),
    which keeps its digits where d is small: KLs of 1e-8 nats, float16 against float32, come out right.

    Args:
      log_p: float [..., vocabulary], normalised; -inf where P is 0.
      log_q: the same shape.

    Returns:
      float [...], nats, >= 0; infinite where Q is 0 and P is not.
    """
    p, d = log_p.exp(), log_p - log_q
    near = (-d).expm1_().add_(d).mul_(p)
    far = d.mul(p).masked_fill_(p == 0, 0.0).sub_(p).add_(log_q.exp())  # 0 ln 0 = 0; exp(-d) may overflow out here
    return torch.where(d.abs() < 1, near, far).sum(-1).clamp_(min=0.0)
