"""`Report`: what a finished run did and what it cost, one frozen value. Printed as a table, as a page, as JSON.

The JSON keys are a promise, described in docs/report.md; what they mean changes only with `REPORT_VERSION`, though keys may
be added. Only facts are fields; ratios, counts and bits per weight are computed from them, and written for those who
read the file without halfbin. No tensor is needed to hold or read a report.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfbin.errors import FormatError
from halfbin.run import jsonable
from halfbin.run.wording import change, count, number, ratio, size

REPORT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """The model before, or after: its size on disk and how well it predicts the text; None where not measured.

    bytes: weights on disk.  perplexity: exp(nll).  nll: mean nats per scored token.  dtype: what it was computed in.
    """

    bytes: int
    perplexity: float | None = None
    nll: float | None = None
    dtype: str = "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class DefaultLoad:
    """The written checkpoint once more, in the type that clients load it in when nobody asks for another."""

    dtype: str
    perplexity: float
    nll: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """KL(before || after) of the next-token distributions in nats, over all scored tokens."""

    mean: float
    median: float
    p99: float
    maximum: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Embeddings:
    """For models that predict no tokens: how far sentence embeddings moved. mean_cosine: 1 is the same direction."""

    mean_cosine: float
    mean_squared_error: float
    num_sentences: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorSize:
    """How far a tensor moved: ||x - x_hat|| / ||x||, the same as a signal-to-noise ratio, and the largest move."""

    relative: float
    snr_db: float
    max_abs: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """Where the weights of one site lie, in steps of their own scale (its zero point added), so that all groups agree.

    edges: [n + 1], rising.  counts: [n] weights in each bin; the outermost also hold what lies beyond.
    levels: every value that a code stands for, in the same steps, rising.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    levels: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteReport:
    """One weight: what became of it, why, and what it lost. Exactly one of `scheme` and `dtype` is given.

    float_columns: how many columns data chose to keep in floating point beside the codes; None: nobody asked.
    column_dtype:  the type they have; None where there are none.
    """

    name: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    reason: str
    scheme: str | None = None
    dtype: str | None = None
    method: str | None = None
    weight_error: ErrorSize | None = None
    output_error: ErrorSize | None = None
    histogram: Histogram | None = None
    transforms: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    float_columns: int | None = None
    column_dtype: str | None = None

    def __post_init__(self) -> None:
        if (self.scheme is None) == (self.dtype is None):
            raise ValueError(
                f"site {self.name!r} needs either a scheme or a dtype, got {self.scheme!r} and {self.dtype!r}"
            )

    @property
    def num_weights(self) -> int:
        """Elements of the weight."""
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """All stored bits, scales included, over the number of weights; 0 for an empty tensor."""
        return 8 * self.bytes_after / max(self.num_weights, 1)

    @property
    def weights(self) -> str:
        """What it is stored as: the scheme, and columns beside it, or the floating type."""
        beside = f" + {self.float_columns} {self.column_dtype}" if self.float_columns else ""
        return f"{self.scheme}{beside}" if self.scheme else self.dtype or ""

    def to_json(self) -> dict[str, Any]:
        """The fields, and what follows from them."""
        derived = {"num_weights": self.num_weights, "bits_per_weight": self.bits_per_weight}
        return {**jsonable.to_json(self), **derived}


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What the quality was measured on. `definition` says how the text was cut and scored, so that it can be repeated.

    context, stride: tokens read at once, and from one window to the next.  bos: token before each window, None: nothing.
    Both are None for models that predict no tokens.
    """

    text: str
    definition: str
    num_tokens: int
    context: int | None = None
    stride: int | None = None
    bos: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationReport:
    """What the run was calibrated on; output errors of calibrated sites are on these samples."""

    text: str
    definition: str
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a run did and what it cost.

    model, output: as the user named them.  recipe: its name or file.  layout: how the weights lie on disk.
    model_class: the transformers class that the checkpoint is of.
    num_parameters: elements of the whole checkpoint, sites and everything else.
    sites: in the model's order, also those left alone.
    timings: seconds per stage, in order.  peak_memory_bytes: highest anonymous resident memory of the process.
    """

    halfbin_version: str
    model: str
    output: str | None
    recipe: str
    layout: str
    before: Quality
    after: Quality
    num_parameters: int
    sites: tuple[SiteReport, ...]
    after_default_load: DefaultLoad | None = None
    kl: Divergence | None = None
    top1_agreement: float | None = None
    embeddings: Embeddings | None = None
    evaluation: Evaluation | None = None
    calibration: CalibrationReport | None = None
    timings: Mapping[str, float] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    warnings: tuple[str, ...] = ()
    model_class: str = ""

    @property
    def bytes_before(self) -> int:
        """Weights on disk before."""
        return self.before.bytes

    @property
    def bytes_after(self) -> int:
        """Weights on disk after."""
        return self.after.bytes

    @property
    def quantized(self) -> tuple[SiteReport, ...]:
        """The sites that a scheme was applied to."""
        return tuple(site for site in self.sites if site.scheme is not None)

    @property
    def left_alone(self) -> tuple[SiteReport, ...]:
        """The sites that stay floating point."""
        return tuple(site for site in self.sites if site.scheme is None)

    @property
    def float_columns(self) -> str:
        """How many columns are kept in floating point, in words; empty where no site was asked for any."""
        asked = [site for site in self.sites if site.float_columns is not None]
        if not asked:
            return ""
        kept = [site for site in asked if site.float_columns]
        if not kept:
            return "none: no feature was an outlier on the calibration data"
        return f"{sum(site.float_columns or 0 for site in kept):,}, in {len(kept)} of {count(len(asked), 'site')}"

    @property
    def worst(self) -> tuple[SiteReport, ...]:
        """Quantized sites whose error is known, the largest relative weight error first; NaN counts as largest."""
        known = [site for site in self.quantized if site.weight_error is not None]
        return tuple(sorted(known, key=_badness, reverse=True))

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits over weights, of the quantized sites; None when there is none."""
        num_weights = sum(site.num_weights for site in self.quantized)
        return 8 * sum(site.bytes_after for site in self.quantized) / num_weights if num_weights else None

    @property
    def bits_per_weight_total(self) -> float:
        """Stored bits over weights, of the whole checkpoint."""
        return 8 * self.bytes_after / max(self.num_parameters, 1)

    @property
    def seconds(self) -> float:
        """All stages together."""
        return sum(self.timings.values())

    def to_json(self) -> dict[str, Any]:
        """The promised keys; `json.dumps(..., allow_nan=False)` accepts the result."""
        derived = {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bits_per_weight": self.bits_per_weight,
            "bits_per_weight_total": self.bits_per_weight_total,
            "left_at_16_bits": {"count": len(self.left_alone), "names": [site.name for site in self.left_alone]},
            "sites": [site.to_json() for site in self.sites],
        }
        return {"report_version": REPORT_VERSION, **jsonable.to_json(self), **derived}

    @classmethod
    def from_json(cls, data: object) -> Report:
        """Read what `to_json` wrote, parsed; keys that are not known are passed over.

        Raises:
          FormatError: another report version, or a key that is missing or of the wrong type, with the path to it.
        """
        version = data.get("report_version") if isinstance(data, dict) else None
        if version != REPORT_VERSION:
            raise FormatError(
                f"report_version is {version!r}, and this halfbin reads version {REPORT_VERSION}; "
                "read it with the halfbin that wrote it (key 'halfbin_version'), or run again with this one"
            )
        try:
            return jsonable.from_json(cls, data)
        except ValueError as error:
            raise FormatError(str(error)) from error

    def write(self, path: Path) -> None:
        """Write the JSON document to `path`."""
        path.write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read a `report.json`.

        Raises:
          FormatError: the file is no such report.
        """
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise FormatError(f"{path} is not JSON ({error}); was it cut off?") from error

    def __str__(self) -> str:
        """The headline: sizes, and what it cost where that was measured."""
        sizes = (size(self.bytes_before), size(self.bytes_after), ratio(self.bytes_before, self.bytes_after))
        line = "{}: {} -> {} ({} smaller)".format(self.model, *sizes)
        if self.after.perplexity is None:
            return line
        before, after = self.before.perplexity, self.after.perplexity
        line += f", perplexity {number(before)} -> {number(after)} {change(before, after)}".rstrip()
        return line if self.kl is None else f"{line}, KL {number(self.kl.mean, 3)} nats per token"


def _badness(site: SiteReport) -> float:
    assert site.weight_error is not None
    relative = site.weight_error.relative
    return math.inf if math.isnan(relative) else relative
