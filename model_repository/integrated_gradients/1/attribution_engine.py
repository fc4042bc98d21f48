"""Integrated Gradients of many different jobs at once, by Captum's definitions, without its repeated work.

A batch becomes **rows**. A row is one image at one point of its path. Rows of different images, targets, step
counts, methods and noise samples share chunks of at most ``max_rows``, which bounds memory, and are summed back per
path. Where the network has an affine ``stem``, it is evaluated at a path's ends only, and its transpose is applied to
the sum of a path's gradients only. README.md beside this folder derives it.

The engine has three verbs: the scheduler decides which rows come next, a pass takes their gradients, and each path
adds its gradients and decides whether it needs another stage.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from attribution_job import Explanation, Job, mean_explanation
from baseline_mean import BaselineMean
from classifier_network import CapturedPasses, EagerPasses, Network, Rows
from error_law import TYPICAL_LAW
from integration_path import IntegrationPath, StartPoint, place_end_points
from pass_clock import Pass, PassClock
from path_density import PathDensity
from path_quadrature import quadrature
from path_rules import LEAST_STEPS, AdaptiveTrapezoidRule, FixedRule, Rule
from richardson_rule import COARSE_SHARE, RichardsonRule
from row_scheduler import Piece, Priority, RowScheduler, Task, halve
from torch import Tensor

logger = logging.getLogger(__name__)

# Share of the time left before a deadline for which steps are planned.
TIME_SHARE = 0.85
# A job whose number of steps depends on the image is expected to take as many as with this tolerance.
USUAL_TOLERANCE = 0.05
# On a GPU the CPU runs ahead. So up to this many passes are timed together, when the CPU waits for the device.
PASSES_TIMED_TOGETHER = 8


class _JobTask(Task):
    """A waiting or running job: the paths still to start, and the explanations of those that have finished.

    ``mean`` holds the paths of a job whose baselines are refined together.
    """

    def __init__(self, job: Job, expected_rows: int, rows_before: int) -> None:
        is_mean = bool(job.further_baselines)
        super().__init__(
            expected_rows,
            rows_before,
            job.paths,
            job.deadline,
            job.request_start,
            job.is_cancelled,
            job.sharing_key,
            needs_all=is_mean,
        )
        self.job = job
        self.mean = BaselineMean(job.tolerance, job.paths) if is_mean and job.refines else None
        self.explanations: list[Explanation] = []
        self._started = math.nan
        self._generator: torch.Generator | None = None

    def next_path(self) -> tuple[Job, Tensor]:
        """The job of the next path, and its image."""
        return self.job.path_job(self.job.paths - self.samples_left), self._draw_image()

    def _draw_image(self) -> Tensor:
        """The next image to explain: the job's image, plus its next noise sample if it has noise."""
        job = self.job
        if not self.is_started:
            self._started = time.monotonic()
        if not job.stdevs:
            return job.image
        self._generator = self._generator or torch.Generator().manual_seed(job.seed)
        return job.image + job.stdevs * torch.randn(job.image.shape, generator=self._generator).to(job.image)

    def result(self) -> Explanation | None:
        """The mean explanation of the paths that finished; None if none did."""
        if not self.explanations:
            return None
        seconds = time.monotonic() - self._started
        explanation = mean_explanation(self.explanations)
        if self.mean is not None:
            explanation = replace(explanation, error_estimate=self.mean.error_estimate)
        return replace(explanation, started=self._started, seconds=seconds)


_Scheduler = RowScheduler[_JobTask, IntegrationPath]
_Chunk = Sequence[Piece[_JobTask, IntegrationPath]]


class AttributionEngine:
    """Explains jobs of one network.

    Args:
        network: a ``Network``, or a module for one. Where it has ``stem`` and ``tail``, the stem is hoisted.
        max_rows: rows of one forward and backward pass; bounds memory.
        capture: replay the passes as CUDA graphs; needs a network on a CUDA device.
        density: node density of this network's paths; the method ``calibrated`` requires it.
        multiply_by_inputs: see Captum's ``IntegratedGradients``.
    """

    def __init__(
        self,
        network: Network | Callable[..., Any],
        max_rows: int = 8,
        capture: bool = False,
        density: PathDensity | None = None,
        multiply_by_inputs: bool = True,
    ) -> None:
        self.network = network if isinstance(network, Network) else Network(network)
        self.max_rows = max_rows
        self.density = density
        self.rows_passed = 0  # gradients in all
        self.rows_shared = 0  # those that took no forward pass of their own
        self.chunks_passed: Counter[int] = Counter()  # by their rows
        self.clock = PassClock()
        self._multiply_by_inputs = multiply_by_inputs
        self._equal_chunks = not capture
        self.passes = (CapturedPasses if capture else EagerPasses)(self.network, max_rows)
        self._known_starts: dict[Hashable, StartPoint] = {}
        self._lock = threading.Lock()  # the passes share buffers
        self._scheduler: _Scheduler | None = None  # of the current call
        self._untimed: list[Pass] = []
        self._timed_until = math.nan

    def explain(
        self, jobs: Sequence[Job], max_rows: int | None = None, with_delta: bool = True
    ) -> list[Explanation | None]:
        """Explain jobs together.

        Args:
            jobs: what to explain. Images of different shapes are allowed, but do not share a chunk.
            max_rows: most rows of a chunk, if below the engine's setting.
            with_delta: compute convergence deltas, which takes up to two forward rows for each path.

        Returns:
            One explanation for each job, in order; None for a cancelled job.
        """
        jobs = [replace(job) for job in jobs]  # a job that is given twice is explained twice
        explanations = dict(self.explain_as_done(jobs, max_rows, with_delta))
        return [explanations[job] for job in jobs]

    @torch.no_grad()
    def explain_as_done(
        self,
        jobs: Iterable[Job],
        max_rows: int | None = None,
        with_delta: bool = True,
        arrivals: Callable[[], Iterable[Job]] = tuple,
    ) -> Iterator[tuple[Job, Explanation | None]]:
        """Yield each job with its explanation as soon as its last row is done.

        Args:
            jobs: see ``explain``; each job once.
            max_rows: see ``explain``.
            with_delta: see ``explain``.
            arrivals: called before each pass; returns further jobs, which join those under way.
        """
        limit = self.max_rows if max_rows is None else min(max_rows, self.max_rows)
        if limit < 1:
            raise ValueError(f"a pass takes at least one row, not {limit}")
        scheduler = _Scheduler(limit, self.passes.shares)
        with self._lock:
            self._scheduler = scheduler
            try:
                self._admit(jobs, scheduler)
                while True:
                    self._admit(arrivals(), scheduler)
                    for task in scheduler.drop_given_up():
                        yield task.job, None
                    if scheduler.is_idle:
                        return
                    for task in self._advance(scheduler, with_delta):
                        yield task.job, task.result()
            finally:
                self._scheduler = None
                self._untimed.clear()
                self._timed_until = math.nan

    @property
    def usual_rows(self) -> int:
        """Expected rows of an image whose number of steps depends on it, by the network's error law."""
        law = TYPICAL_LAW if self.density is None else self.density.law["logit"]
        return math.ceil((1 + COARSE_SHARE) * law.planned_steps(USUAL_TOLERANCE))

    def expected_rows(self, job: Job) -> int:
        """Rows that a job is expected to take."""
        rows = min(job.n_steps, self.usual_rows) if job.refines else math.ceil(job.n_steps / job.parts)
        return job.paths * rows

    def seconds_before(self, job: Job, others: Iterable[Job] = ()) -> float:
        """Expected seconds until the first row of a job that comes now. Safe to call from any thread.

        Args:
            job: the new job.
            others: jobs that came before and are not under way yet.
        """
        return self.clock.seconds(self._rows_before(self._task(job).priority, [self._task(other) for other in others]))

    def _rows_before(self, priority: Priority, others: Sequence[Task]) -> int:
        scheduler = self._scheduler
        waiting = sum(task.rows_left for task in others if task.priority <= priority)
        return waiting + (scheduler.rows_before(priority) if scheduler else 0)

    def _task(self, job: Job) -> _JobTask:
        return _JobTask(job, self.expected_rows(job), self.rows_passed)

    def _admit(self, jobs: Iterable[Job], scheduler: _Scheduler) -> None:
        for job in jobs:
            if job.refines and job.n_steps < LEAST_STEPS:
                raise ValueError(f"a tolerance or a deadline takes at least {LEAST_STEPS} steps, not {job.n_steps}")
            if job.method == "calibrated" and not job.refines and self.density is None:
                raise ValueError("the method 'calibrated' needs a density")
            if scheduler.limit < 2 and self.network.has_mean_slopes and (job.refines or job.method == "calibrated"):
                raise ValueError("mean gradients between two points take at least two rows a pass")
            scheduler.add(self._task(job))

    def _advance(self, scheduler: _Scheduler, with_delta: bool) -> Iterator[_JobTask]:
        """Schedule, run and commit one chunk; yields tasks that have finished."""
        while (task := scheduler.next_to_start()) is not None:
            sharing = scheduler.deadline_paths + (task.job.deadline is None)
            job, image = task.next_path()
            if job.state is not None:
                path = IntegrationPath.resumed(job, self.network)
                scheduler.start(task, path)
                if not path.goes_on(self._affordable_steps(job, path.overlap, sharing)):
                    self._finish(task, path, scheduler, with_delta)
                continue
            path = IntegrationPath(job, image, self._rule(job, sharing), self.network, self._multiply_by_inputs)
            scheduler.start(task, path)
        self._finish_late(scheduler, with_delta)
        yield from scheduler.take_finished()  # before another pass
        if scheduler.has_rows:
            if math.isnan(self._timed_until):
                self._timed_until = time.monotonic()
            chunk = self._run(scheduler.next_chunk(self._equal_chunks))
            self._time(chunk)  # the next stage is planned by it
            self._commit(chunk, scheduler, with_delta)
        yield from scheduler.take_finished()

    def _finish_late(self, scheduler: _Scheduler, with_delta: bool) -> None:
        """End paths whose deadline is over, with the best answer so far.

        If no noise sample of a job has an answer yet, one of them goes on. So do all baselines of a job without one.
        """
        unanswered: list[tuple[_JobTask, IntegrationPath]] = []
        for task, path in scheduler.late():
            if path.finish_early():
                self._complete(task, path, scheduler, with_delta)
            else:
                unanswered.append((task, path))
        going_on: set[_JobTask] = set()
        for task, path in unanswered:
            if not task.needs_all and (task.explanations or task in going_on):
                scheduler.end(task, path)
            going_on.add(task)

    def _run(self, chunk: _Chunk) -> _Chunk:
        """Take the gradients of a chunk and add them to its paths; returns the pieces that were done.

        If the device has too little memory, half of the rows are taken now and the others later.
        """
        members = [path for piece in chunk for _, path in piece.members]
        place_end_points([path for path in members if not path.is_placed], self.network, self._known_starts)
        first = chunk[0].path
        buffers = self.passes.buffers(first.start.features, first.image.dtype)
        any_paired = any(piece.path.overlap for piece in chunk)
        while True:
            rows = chunk[-1].rows.stop
            for piece in chunk:
                piece.path.fill(buffers[piece.rows])
            try:
                shared = self._add_gradients(chunk, buffers, rows, any_paired)
                break
            except torch.OutOfMemoryError:
                smaller = halve(chunk)
                if not smaller:
                    raise
                logger.warning("no memory for %d rows: half of them are taken now", rows)
                chunk = smaller
                if first.image.device.type == "cuda":
                    torch.cuda.empty_cache()
        self.rows_passed += rows + shared
        self.rows_shared += shared
        self.chunks_passed[rows] += 1
        self._untimed.append(Pass(rows, any_paired, shared))
        return chunk

    def _add_gradients(self, chunk: _Chunk, buffers: Rows, rows: int, any_paired: bool) -> int:
        """Take the gradients of a chunk whose first ``rows`` rows are filled; returns how many shared a forward pass.

        Memory for the companions' backward passes may be missing: then those companions go on by themselves.
        """
        companions = len(chunk[0].companions)
        if not companions:
            self._add(chunk, 0, self.passes.gradients(buffers, rows, any_paired))
            return 0
        objectives = [buffers, *(buffers.with_other_objectives() for _ in range(companions))]
        for piece in chunk:
            for (_, path), others in zip(piece.companions, objectives[1:]):
                path.fill_objective(others[piece.rows])
        taken = 0
        try:
            for gradients in self.passes.shared_gradients(objectives, rows, any_paired):
                self._add(chunk, taken, gradients)
                taken += 1
        except torch.OutOfMemoryError:
            if not taken:
                raise
            logger.warning("no memory for a backward pass over %d rows: it is repeated alone", rows)
        return (taken - 1) * rows

    def _add(self, chunk: _Chunk, member: int, gradients: Tensor) -> None:
        """Add gradients of a chunk to one of the members of each piece."""
        for piece in chunk:
            task, path = piece.members[member]
            path.add(gradients[piece.rows])
            task.rows_spent += piece.rows.stop - piece.rows.start

    def _commit(self, chunk: _Chunk, scheduler: _Scheduler, with_delta: bool) -> None:
        """Begin the next stage of each path whose stage is complete, or finish the path."""
        for task, path in (member for piece in chunk for member in piece.members):
            if path.rows_left:
                continue
            sharing = max(1, scheduler.deadline_paths)
            if task.mean is not None:
                path.complete_stage()
                self._complete(task, path, scheduler, with_delta)
            elif not path.next_stage(self._affordable_steps(task.job, path.overlap, sharing)):
                self._finish(task, path, scheduler, with_delta)

    def _complete(self, task: _JobTask, path: IntegrationPath, scheduler: _Scheduler, with_delta: bool) -> None:
        """Finish a path, or let it wait for the others of its job and finish or refine them together."""
        mean = task.mean
        if mean is None:
            self._finish(task, path, scheduler, with_delta)
            return
        scheduler.park(path)
        mean.add(path)
        if not mean.is_complete:
            return
        sharing = scheduler.deadline_paths + task.job.paths
        going_on = (
            [] if task.is_late else mean.refine(lambda each: self._affordable_steps(task.job, each.overlap, sharing))
        )
        for each in going_on:
            scheduler.resume(task, each)
        if not going_on:
            for each in mean.waiting:
                self._finish(task, each, scheduler, with_delta)

    def _finish(self, task: _JobTask, path: IntegrationPath, scheduler: _Scheduler, with_delta: bool) -> None:
        task.explanations.append(path.explanation(with_delta))
        scheduler.end(task, path)

    def _time(self, chunk: _Chunk) -> None:
        """Record the time since the last record, with what came between the passes, once the device has finished."""
        device = chunk[0].path.image.device
        if device.type == "cuda":
            has_deadline = any(task.deadline is not None for piece in chunk for task, _ in piece.members)
            if not has_deadline and len(self._untimed) < PASSES_TIMED_TOGETHER:
                return
            torch.cuda.synchronize(device)
        now = time.monotonic()
        self.clock.record(self._untimed, now - self._timed_until)
        self._timed_until = now
        self._untimed.clear()

    def _rule(self, job: Job, sharing: int) -> Rule:
        """The rule for a path of a job; ``sharing`` paths with a deadline share the passes."""
        device, density, is_paired = job.image.device, self.density, self.network.has_mean_slopes
        if job.refines:
            affordable = self._affordable_steps(job, int(is_paired), sharing)
            if not is_paired:
                return AdaptiveTrapezoidRule(job.tolerance, job.n_steps, affordable, device)
            law = TYPICAL_LAW if density is None else density.law[job.output]
            edges = None if density is None else partial(density.edges, job.output)
            return RichardsonRule(edges, law, job.tolerance, job.n_steps, affordable, device)
        if job.method == "calibrated" and density is not None:
            edges_of_steps = density.edges(job.output, job.n_steps)
            nodes = edges_of_steps if is_paired else (edges_of_steps[1:] + edges_of_steps[:-1]) / 2
            return FixedRule(nodes.to(device), edges_of_steps.diff())
        rule = job.rule or quadrature(job.method, job.n_steps)
        nodes, weights = (values[job.part :: job.parts] for values in rule)
        return FixedRule(nodes.to(device), weights)

    def _affordable_steps(self, job: Job, overlap: int, sharing: int) -> float:
        """Steps of a path that fit before its job's deadline if ``sharing`` paths share the passes."""
        if job.deadline is None:
            return math.inf
        seconds = TIME_SHARE * (job.deadline - time.monotonic())
        rows = self.clock.rows_within(seconds / sharing, self.max_rows, bool(overlap))
        if rows is None:
            return 0
        return rows - overlap * math.ceil(rows / self.max_rows)  # the last row of each pass is the first of the next
