"""The whole life of a run: open, plan, write, read back, measure, report."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from halfbin import demo
from halfbin.errors import HalfbinError, LimitError
from halfbin.evaluation import Windows
from halfbin.formats.checkpoint import Checkpoint, open_checkpoint
from halfbin.formats.read import layout_named, open_quantized
from halfbin.models import open_skeleton, require_fit, untied
from halfbin.planning import Plan, load_recipe, make_plan
from halfbin.run import html
from halfbin.run.activations import require_memory, with_reading
from halfbin.run.assemble import Finished, assemble
from halfbin.run.calibration import TOKENS_AT_ONCE, Calibration, reading_of, samples_for
from halfbin.run.client import loadable, settle_client
from halfbin.run.device import require_device
from halfbin.run.events import Event, OnEvent
from halfbin.run.execute import Written, execute
from halfbin.run.histogram import weight_histogram
from halfbin.run.laps import Laps
from halfbin.run.measure import (
    Measured,
    Text,
    evaluation_text,
    measure,
    sentences_of,
    too_large,
    unmeasurable,
    windows_of,
)
from halfbin.run.memory import MemoryPeak
from halfbin.run.output import REPORT_NAME, OutputDirectory
from halfbin.run.report import Histogram, Report
from halfbin.tensor.mixed import MixedTensor
from halfbin.tensor.qtensor import QTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the user asked for."""

    model: str | Path
    recipe: str | Path = "int4"
    layout: str | None = None
    text: Path | None = None
    max_tokens: int | None = None
    evaluate: bool = True
    force: bool = False
    trust_remote_code: bool = False
    device: str = "cpu"
    untie: bool = False
    all_experts: bool = False
    calibration: Calibration = field(default_factory=Calibration)
    activations: str = "auto"
    max_kl: float | None = None


@dataclass(slots=True)
class _Clock:
    """Seconds by stage, in order, and the events that tell of them."""

    on_event: OnEvent | None
    laps: Laps = field(default_factory=Laps)

    @contextlib.contextmanager
    def stage(self, name: str, unit: str) -> Iterator[Callable[[int, int], None]]:
        self.tell(name, 0, 0, unit)
        with self.laps.lap(name):
            yield lambda done, total: self.tell(name, done, total, unit)

    def tell(self, stage: str, done: int, total: int, unit: str) -> None:
        if self.on_event:
            self.on_event(Event(stage, done, total, unit))


def model_directory(model: str | Path) -> Path:
    """The directory that the user means. The text `demo` is the embedded model, whatever lies here; `./demo` is a directory."""
    return demo.model_path() if model == "demo" else Path(model)


@contextlib.contextmanager
def planned(job: Job) -> Iterator[tuple[Plan, Checkpoint]]:
    """The plan of a job and the open checkpoint; nothing heavy is done yet."""
    recipe = load_recipe(job.recipe)
    if job.all_experts:
        recipe = dataclasses.replace(recipe, all_experts=True)
    directory = model_directory(job.model)
    with open_checkpoint(directory) as checkpoint:
        skeleton = open_skeleton(directory, trust_remote_code=job.trust_remote_code)
        if job.untie or recipe.untie:
            skeleton = untied(skeleton, checkpoint.names)
            checkpoint.add_copies(skeleton.copies)
        layout = layout_named(job.layout or recipe.layout, skeleton.dtype)
        found = make_plan(skeleton, checkpoint, recipe, layout)
        require_fit(skeleton, checkpoint)
        yield with_reading(loadable(found), reading_of(skeleton, job.calibration), job.activations), checkpoint


def run_job(job: Job, target: Path, on_event: OnEvent | None = None) -> Report:
    """Quantize a model directory into `target`, measure it, and leave report.json and report.html beside the weights.

    Raises:
      HalfbinError: whatever the user can mend; the target is then as it was before.
      LimitError: finished, but KL is above `job.max_kl`; the result is there, with its report.
    """
    require_device(job.device)
    clock = _Clock(on_event)
    text = evaluation_text(job.text, job.max_tokens)
    with (
        MemoryPeak() as peak,
        planned(job) as (plan, checkpoint),
        OutputDirectory(target, source=plan.directory, force=job.force) as output,
    ):
        finished = _carry_out(job, plan, checkpoint, output.work, text=text, clock=clock)
        report = assemble(finished, target, seconds=clock.laps.seconds, peak_memory_bytes=peak.bytes)
        report.write(output.work / REPORT_NAME)
        html.write(report, output.work / "report.html")
        output.commit()
    if job.max_kl is not None and report.kl is not None and not report.kl.mean <= job.max_kl:
        raise LimitError(
            f"mean KL is {report.kl.mean:.4g} nats, above --max-kl {job.max_kl:g}; {target} was written all the same, "
            "with its report: try a recipe with more bits or smaller groups"
        )
    return report


def _carry_out(job: Job, plan: Plan, checkpoint: Checkpoint, work: Path, *, text: Text, clock: _Clock) -> Finished:
    """Write, read back and measure; nothing of it has its final name yet."""
    require_memory(plan)
    obstacle = _obstacle(job, plan, checkpoint)
    windows = None if obstacle else _windows(plan, text)
    samples = samples_for(plan.skeleton, job.calibration) if plan.needs_data else None
    with clock.stage("quantizing", "bytes") as step:
        written = execute(
            plan,
            checkpoint,
            work,
            device=job.device,
            batches=samples.batches(TOKENS_AT_ONCE) if samples else (),
            on_step=step,
            on_block=lambda done, total: clock.tell("calibrating", done, total, "blocks"),
        )
    with clock.stage("checking", "models") as step:
        step(0, 1)
        settled = settle_client(plan, work)
        step(1, 1)
    measured: Measured | None = None
    if windows is not None:
        with clock.stage("evaluating", "windows") as step:
            measured = measure(
                plan.skeleton, work, text, windows, device=job.device, skip=set(written.calibrated), on_step=step
            )
    with clock.stage("reporting", "sites"):
        histograms = _histograms(written, checkpoint, work)
    return Finished(
        model=str(job.model),
        plan=plan.with_columns(written.columns),
        num_parameters=checkpoint.num_parameters,
        written=written,
        measured=measured,
        text_name=text.name,
        samples=samples,
        histograms=histograms,
        warnings=tuple(filter(None, (obstacle, settled, measured.rounded_by_client if measured else None))),
    )


def _obstacle(job: Job, plan: Plan, checkpoint: Checkpoint) -> str | None:
    """Why quality will not be measured, in words; None when it will.

    Raises:
      HalfbinError: the user set a limit that could then not be held against anything.
    """
    obstacle: str | None = "quality was not measured: --no-evaluate"
    if job.evaluate:
        obstacle = unmeasurable(plan.skeleton) or too_large(checkpoint.num_parameters)
    if job.max_kl is not None and (obstacle or not plan.skeleton.generates):
        reason = (obstacle or "").partition(": ")[2] or f"{plan.skeleton.model_class.__name__} predicts no tokens"
        raise HalfbinError(f"--max-kl {job.max_kl:g} has no KL to be held against: {reason}; leave --max-kl out")
    return obstacle


def _windows(plan: Plan, text: Text) -> Windows:
    """What will be read; a tokenizer or a text that does not serve is found here, before the work."""
    if not plan.skeleton.generates:
        sentences_of(text)
    return windows_of(plan.skeleton, text)


def _histograms(written: Written, checkpoint: Checkpoint, work: Path) -> dict[str, Histogram]:
    """Pictures of the weights of the worst, the median and the best site."""
    same = {name for name in written.errors if not written.transformed(name)}
    order = sorted(same, key=lambda name: written.errors[name].relative)
    chosen = dict.fromkeys(order[i] for i in (-1, len(order) // 2, 0)) if order else {}
    pictures = {}
    with open_quantized(work) as result:
        for name in chosen:
            q = result.read(name)
            if isinstance(q, QTensor | MixedTensor):
                pictures[name] = weight_histogram(checkpoint.read(name), q)
    return pictures
