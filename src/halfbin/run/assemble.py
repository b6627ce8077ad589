"""From what a run did to the `Report` that tells of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import halfbin
from halfbin.evaluation import Comparison, TensorError
from halfbin.planning import Plan, SitePlan
from halfbin.run.execute import Written
from halfbin.run.measure import Measured
from halfbin.run.report import (
    CalibrationReport,
    DefaultLoad,
    Divergence,
    Embeddings,
    ErrorSize,
    Evaluation,
    Histogram,
    Quality,
    Report,
    SiteReport,
)
from halfbin.samples import Samples
from halfbin.tensor.scheme import Scheme


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Finished:
    """Everything a run knows at its end."""

    model: str
    plan: Plan
    num_parameters: int
    written: Written
    measured: Measured | None
    text_name: str
    samples: Samples | None  # what data decided about codes, where any did
    histograms: Mapping[str, Histogram]  # by the tensor's name on disk
    warnings: tuple[str, ...]


def assemble(
    finished: Finished, target: Path, *, seconds: Mapping[str, float], peak_memory_bytes: int | None
) -> Report:
    """The report of a finished run; `target` is where its result will lie."""
    plan, measured = finished.plan, finished.measured
    comparison = measured.language if measured else None
    return Report(
        halfbin_version=halfbin.__version__,
        model=finished.model,
        output=str(target),
        recipe=plan.recipe.name,
        layout=plan.layout.name,
        before=_quality(plan.bytes_before, comparison, after=False),
        after=_quality(plan.bytes_after, comparison, after=True),
        num_parameters=finished.num_parameters,
        sites=tuple(_site(site, finished) for site in plan.sites),
        after_default_load=_default_load(plan, measured),
        kl=_divergence(comparison),
        top1_agreement=comparison.top1_agreement if comparison else None,
        embeddings=_embeddings(measured),
        evaluation=_evaluation(finished),
        calibration=_calibration(finished.samples),
        timings=seconds,
        peak_memory_bytes=peak_memory_bytes,
        warnings=(
            *finished.warnings,
            *_remarks(plan),
            *finished.written.remarks,
            *_calibration_remarks(finished),
        ),
        model_class=plan.skeleton.model_class.__name__,
    )


def _quality(num_bytes: int, comparison: Comparison | None, *, after: bool) -> Quality:
    if comparison is None:
        return Quality(bytes=num_bytes)
    found = comparison.after if after else comparison.before
    return Quality(bytes=num_bytes, perplexity=found.value, nll=found.nll)


def _default_load(plan: Plan, measured: Measured | None) -> DefaultLoad | None:
    if measured is None or measured.default_load is None:
        return None
    dtype = str(plan.skeleton.dtype).removeprefix("torch.")
    return DefaultLoad(dtype=dtype, perplexity=measured.default_load.value, nll=measured.default_load.nll)


def _divergence(comparison: Comparison | None) -> Divergence | None:
    if comparison is None:
        return None
    kl = comparison.kl
    return Divergence(mean=kl.mean, median=kl.median, p99=kl.p99, maximum=kl.maximum)


def _embeddings(measured: Measured | None) -> Embeddings | None:
    if measured is None or measured.embeddings is None:
        return None
    found = measured.embeddings
    return Embeddings(
        mean_cosine=found.mean_cosine,
        mean_squared_error=found.mean_squared_error,
        num_sentences=found.num_sentences,
    )


def _evaluation(finished: Finished) -> Evaluation | None:
    measured = finished.measured
    if measured is None:
        return None
    language = measured.language
    cut = language.definition if language else None
    return Evaluation(
        text=finished.text_name,
        definition=measured.definition,
        num_tokens=language.num_tokens if language else 0,
        context=cut.context if cut else None,
        stride=cut.stride if cut else None,
        bos=cut.bos if cut else None,
    )


def _calibration(samples: Samples | None) -> CalibrationReport | None:
    if samples is None:
        return None
    return CalibrationReport(text=samples.name, definition=samples.how, num_tokens=samples.num_tokens)


def _calibration_remarks(finished: Finished) -> list[str]:
    """Each remark about sites once, with how many it is about."""
    about: dict[str, list[str]] = {}
    for name, decided in finished.written.calibrated.items():
        for remark in decided.remarks:
            about.setdefault(remark, []).append(name.removesuffix(".weight"))
    return [
        f"{remark}: {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}" for remark, names in about.items()
    ]


def _site(planned: SitePlan, finished: Finished) -> SiteReport:
    site, weights = planned.site, planned.weights
    scheme = weights if isinstance(weights, Scheme) else None
    outputs = dict(finished.measured.output_errors) if finished.measured else {}
    outputs |= {n: d.output_error for n, d in finished.written.calibrated.items() if d.output_error is not None}
    decided = finished.written.calibrated.get(site.tensor)
    return SiteReport(
        name=site.name,
        shape=site.shape,
        bytes_before=planned.bytes_before,
        bytes_after=planned.bytes_after,
        reason=planned.reason,
        scheme=None if scheme is None else str(scheme),
        dtype=planned.spelled if scheme is None else None,
        method=planned.method if scheme is not None else None,
        transforms=planned.transforms if decided is not None and decided.transformed else (),
        remarks=decided.remarks if decided is not None else (),
        weight_error=_error(finished.written.errors.get(site.tensor)),
        output_error=_error(outputs.get(site.tensor)),
        histogram=finished.histograms.get(site.tensor),
    )


def _error(error: TensorError | None) -> ErrorSize | None:
    if error is None:
        return None
    return ErrorSize(relative=error.relative, snr_db=error.snr_db, max_abs=error.max_abs)


def _remarks(plan: Plan) -> list[str]:
    """What a user should know about the plan without reading every site's reason."""
    kept = [site for site in plan.sites if not site.quantized and "cannot hold it" in site.reason]
    remarks = []
    if kept:
        size = sum(site.bytes_after for site in kept) / 1e6
        remarks.append(
            f"{len(kept)} sites ({size:.1f} MB) stay as they were because the layout {plan.layout.name} cannot hold them, "
            f"such as {kept[0].site.name}: {kept[0].reason.partition(': ')[2]}"
        )
    return remarks
