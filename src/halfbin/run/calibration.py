"""Which samples a run is calibrated on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbin.errors import ModelError
from halfbin.evaluation import default_context
from halfbin.evaluation.logits import embedded_vocabulary
from halfbin.models import Skeleton
from halfbin.planning.footprint import Reading
from halfbin.run.measure import load_tokenizer
from halfbin.samples import Samples, load_samples

NUM_SAMPLES = 128
LENGTH = 512  # tokens; more of the same number gained nothing on the models measured, see docs/calibration.md
SENTENCE_LENGTH = 128  # for models that read sentences
TOKENS_AT_ONCE = 2048  # rows of one sum in float32: fixed, so that results depend on neither memory nor machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What the user asked for.

    path:        a file or folder; None: the text that ships with halfbin.
    num_samples: how many at most.
    length:      tokens of each; None: what suits the model.
    seed:        of the choice.
    """

    path: Path | None = None
    num_samples: int = NUM_SAMPLES
    length: int | None = None
    seed: int = 0


def reading_of(skeleton: Skeleton, calibration: Calibration) -> Reading:
    """How much will be read, at most; no text is read for it. A file has no more tokens than bytes."""
    length = calibration.length or usual_length(skeleton)
    path, num_samples = calibration.path, calibration.num_samples
    if path is not None and path.is_file():
        num_samples = min(num_samples, max(path.stat().st_size // length, 1))
    return Reading(num_samples, length, TOKENS_AT_ONCE)


def usual_length(skeleton: Skeleton) -> int:
    """Tokens of a sample that suit a model."""
    return default_context(skeleton.config, at_most=LENGTH if skeleton.generates else SENTENCE_LENGTH)


def samples_for(skeleton: Skeleton, calibration: Calibration) -> Samples:
    """The samples, as this model reads them.

    Raises:
      DataError: the file gives no tokens.
      ModelError: the tokens are none of this model's, or samples are longer than it reads.
    """
    reads_on = skeleton.generates
    if calibration.length is not None:
        context = default_context(skeleton.config, at_most=calibration.length)
        if calibration.length > context:
            raise ModelError(
                f"samples of {calibration.length} tokens are longer than the {context} that {skeleton.model_class.__name__} "
                f"was made for; give --sample-length {context} or less"
            )
    found = load_samples(
        calibration.path,
        lambda: load_tokenizer(skeleton),
        num_samples=calibration.num_samples,
        length=calibration.length or usual_length(skeleton),
        seed=calibration.seed,
        packed=reads_on,
        pad=_pad(skeleton),
    )
    size, highest = embedded_vocabulary(skeleton.model), max(int(ids.max()) for ids in found.ids)
    if size is not None and highest >= size:
        raise ModelError(
            f"{found.name} holds token {highest}, but the model knows {size} tokens only: the tokens are another model's; give "
            "the text itself, or the right tokenizer's files"
        )
    return found


def _pad(skeleton: Skeleton) -> int | None:
    """The token that fills samples up, where that is stated and ends nothing."""
    config: Any = skeleton.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    pad, eos = (getattr(text, name, None) for name in ("pad_token_id", "eos_token_id"))
    return pad if isinstance(pad, int) and pad not in (eos if isinstance(eos, list) else [eos]) else None
