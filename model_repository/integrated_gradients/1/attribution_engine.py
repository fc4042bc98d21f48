"""Integrated Gradients of many unlike requests at once, with Captum's definitions and none of its repeated work.

Everything a batch asks becomes **rows**: one image at one point of its path. Rows of whatever images, targets, step
counts, methods and noise samples share chunks of at most ``max_rows``, which bounds memory, and are summed back per
path. Where the network has an affine ``stem``, it is evaluated at a path's ends only, and its transpose applied to the
sum of a path's gradients only. README.md beside this folder derives it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import captum.attr
import torch
from captum.attr._utils.common import _format_input_baseline, _validate_input
from captum.log import log_usage
from classifier_network import CapturedPasses, EagerPasses, Network, Rows, UnsupportedOutputError
from pass_clock import PassClock
from path_density import PathDensity
from path_quadrature import place_points, quadrature
from path_rules import LEAST_STEPS, TYPICAL_LAW, FixedRule, LadderRule, RefinedRule
from torch import Tensor

logger = logging.getLogger(__name__)

# Of the sum of absolute attributions: a completeness gap is measured against no smaller change of the output.
LEAST_CHANGE = 0.1
# Of the time that is left before a deadline: what is planned for.
TIME_SHARE = 0.85
# Rows of a path that finds its steps on the way, before they are known: about those for a tolerance of 0.05.
USUAL_ROWS = 8
# A job is due when so many times its own rows have been passed since it came. So a short one overtakes long ones, and a
# long one is overtaken by those alone that come before it is due.
PATIENCE = 10
# How often all that wait are asked whether they still do.
ASK_ALL_SECONDS = 1.0
# Before all others go those whose deadline is so near.
URGENT_SECONDS = 2.0


@dataclass(frozen=True)
class Job:
    """One image to explain: the gradients of one function of the network's logits, along one path or several.

    ``image`` and ``baseline`` are float [channels, height, width] on the engine's device. The function is the logit, or
    with ``probability`` the softmax probability, of class ``target``, minus that of class ``contrast`` if there is one.

    With a ``tolerance`` the path is refined until its estimated relative error and its relative completeness gap are
    within it, or ``n_steps``, then at least 3, are spent. With a ``deadline``, by ``time.monotonic``, it is the best
    that there is time for, at most a pass later, and within the tolerance if that comes first. ``method`` is not used
    then. Else it is one of Captum's, or ``calibrated``: nodes from the engine's density and, where the
    network has them, mean gradients between them.

    With ``parts`` the attribution is a summand: that of the nodes number ``part``, ``part + parts``, ``part + 2 parts``
    and so on of one of Captum's methods.

    With ``start_by``, by ``time.monotonic``, it is given up if no row of it has been passed by then.

    With ``nt_samples`` or ``stdevs`` (Captum's NoiseTunnel) the attribution is the mean over that many paths to the
    image plus Gaussian noise of that deviation, drawn on the CPU from ``seed`` (SmoothGrad, arXiv 1706.03825).
    """

    image: Tensor
    baseline: Tensor
    target: int
    n_steps: int = 50
    method: str = "gausslegendre"
    tolerance: float | None = None
    deadline: float | None = None
    part: int = 0
    parts: int = 1
    probability: bool = False
    contrast: int | None = None
    nt_samples: int = 1
    stdevs: float = 0.0
    seed: int = 0
    image_logits: Tensor | None = None  # [classes], of the image without noise; computed where absent and needed
    baseline_key: Hashable = None  # equal keys promise equal baselines, whose evaluation is then kept
    is_cancelled: Callable[[], bool] = field(default=lambda: False)
    start_by: float = math.inf

    @property
    def refines(self) -> bool:
        """Whether its steps are found on the way."""
        return self.tolerance is not None or self.deadline is not None


@dataclass(frozen=True)
class Explanation:
    """The attribution of one job.

    ``attributions`` is shaped like the image; ``convergence_delta``, a scalar tensor, is Captum's: the sum of the
    attributions minus (F(image) - F(baseline)), a mean over noise samples; ``n_steps`` counts gradient evaluations;
    ``error_estimate`` is the estimated relative L2 error, NaN without a tolerance or deadline and a mean over noise
    samples; ``weight_sum`` is the sum of the quadrature's weights, of a part less than 1, and its delta is to as much
    of the change; ``started``, by ``time.monotonic``, is when its first rows came up, and ``seconds`` from there to its
    last, whatever else was passed between (of a GPU's work, what the CPU sees of it).
    """

    attributions: Tensor
    convergence_delta: Tensor | None
    n_steps: int
    error_estimate: float = math.nan
    weight_sum: float = 1.0
    started: float = math.nan
    seconds: float = 0.0


@dataclass
class _Start:
    """A baseline in feature space [1, ...], and what the network says of it [classes] once that is needed."""

    features: Tensor
    logits: Tensor | None = None


Rule = FixedRule | LadderRule | RefinedRule


class _Task:
    """A job that has come: the noise samples that are still to be drawn, and what those that are done say.

    Args:
        job: what to explain.
        rows_before: how many rows the engine had passed when it came.
    """

    def __init__(self, job: Job, rows_before: int) -> None:
        self.job = job
        self.samples_left = job.nt_samples
        self.paths = 0  # under way
        self.rows_spent = 0
        self.found: list[Explanation] = []
        self._started = math.nan
        self._rows_before = rows_before
        self._generator: torch.Generator | None = None

    @property
    def due(self) -> tuple[float, float]:
        """Ascending: the nearest deadline first, then what is due by the rows that have been passed since it came.

        What takes more than was expected falls back as it does.
        """
        by_rows = self._rows_before + PATIENCE * max(expected_rows(self.job), self.rows_spent)
        return (self.job.deadline if self.is_urgent else math.inf), by_rows

    @property
    def is_urgent(self) -> bool:
        """Whether its deadline is near, or over."""
        return self.job.deadline is not None and time.monotonic() > self.job.deadline - URGENT_SECONDS

    @property
    def is_over(self) -> bool:
        return not self.samples_left and not self.paths

    @property
    def is_started(self) -> bool:
        return self.samples_left < self.job.nt_samples

    @property
    def is_late(self) -> bool:
        return self.job.deadline is not None and time.monotonic() >= self.job.deadline

    @property
    def rows_left(self) -> int:
        """Rows of what is not drawn yet, as far as that is known."""
        return expected_rows(self.job) * self.samples_left // self.job.nt_samples

    def is_given_up(self, asks: bool) -> bool:
        """Whether it has waited too long itself, or nobody waits for it any more, if that is asked."""
        if not self.is_started and time.monotonic() >= self.job.start_by:
            return True
        return asks and self.job.is_cancelled()

    def draw(self) -> Tensor:
        """The next image to explain: its own, or with noise of its own."""
        job = self.job
        if not self.is_started:
            self._started = time.monotonic()
        self.samples_left -= 1
        self.paths += 1
        if not job.stdevs:
            return job.image
        self._generator = self._generator or torch.Generator().manual_seed(job.seed)
        return job.image + job.stdevs * torch.randn(job.image.shape, generator=self._generator).to(job.image)

    def result(self) -> Explanation | None:
        """The explanation, once it is over: of those noise samples that there was time for."""
        if not self.found:
            return None
        return replace(_mean(self.found), started=self._started, seconds=time.monotonic() - self._started)


class _Path:
    """One path under way: its end points in feature space, and the rule that walks it."""

    def __init__(self, task: _Task, image: Tensor, rule: Rule) -> None:
        self.task, self.job, self.image, self.rule = task, task.job, image, rule
        self.next_step = 0
        self.start: _Start | None = None
        self.displacement: Tensor | None = None
        self.attributions: Tensor | None = None
        self.change: Tensor | None = None

    @property
    def rows_left(self) -> int:
        """Rows that the present stage still takes, if one chunk takes them all."""
        nodes = len(self.rule.nodes) - self.next_step
        return nodes if nodes > self.rule.overlap else 0

    def fill(self, into: Rows) -> None:
        """Write the inputs of the path's next rows, as many as there is room for."""
        job = self.job
        nodes = self.rule.nodes[self.next_step : self.next_step + len(into.signs)]
        place_points(self.start.features, self.displacement, nodes, into.features)
        into.classes[:, 0] = job.target
        into.classes[:, 1] = job.target if job.contrast is None else job.contrast
        into.signs[:, 0] = 1.0
        into.signs[:, 1] = 0.0 if job.contrast is None else -1.0
        into.on_probability[:] = job.probability
        into.paired[:] = bool(self.rule.overlap)
        into.paired[-1] = False

    def add(self, gradients: Tensor) -> None:
        """Take the gradients of those rows."""
        steps = slice(self.next_step, self.next_step + len(gradients) - self.rule.overlap)
        self.rule.add(steps, gradients[: steps.stop - steps.start])
        self.next_step = steps.stop


class IntegratedGradients(captum.attr.IntegratedGradients):
    """``captum.attr.IntegratedGradients``, with a batched entry for unlike jobs.

    Args:
        forward_func: see Captum; or a ``Network``. A module that has ``stem`` and ``tail`` takes the hoisted road.
        multiply_by_inputs: see Captum.
        max_rows: rows of one forward and backward pass; bounds memory.
        capture: replay the passes as CUDA graphs; needs a network on a CUDA device.
        density: where paths of this network need their nodes; needed for the method ``calibrated``.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        multiply_by_inputs: bool = True,
        max_rows: int = 8,
        capture: bool = False,
        density: PathDensity | None = None,
    ) -> None:
        self.network = forward_func if isinstance(forward_func, Network) else Network(forward_func)
        # Captum's code needs a function that returns logits and nothing else; it finds hooks only on the module itself.
        returns_tuple = self.network.hoists or isinstance(self.network.module, torch.jit.ScriptModule)
        super().__init__(self.network if returns_tuple else self.network.module, multiply_by_inputs)
        self.max_rows = max_rows
        self._equal_chunks = not capture
        self.passes = (CapturedPasses if capture else EagerPasses)(self.network, max_rows)
        self._kept_starts: dict[Hashable, _Start] = {}
        self._lock = threading.Lock()  # the passes share buffers
        self.density = density
        self.rows_passed = 0  # in all
        self.chunks_passed: Counter[int] = Counter()  # by their rows
        self._schedule: _Schedule | None = None  # of the call under way
        # By whether any row is paired, which takes longer.
        self._clocks = {False: PassClock(), True: PassClock()}
        self._judging_seconds = 0.0

    @log_usage()  # NoiseTunnel calls what this decorator wraps
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        internal_batch_size: int | None = None,
        return_convergence_delta: bool = False,
    ) -> Any:
        """Captum's ``attribute``, faster where one tensor goes into a module that returns class scores.

        Several inputs, extra forward arguments, functions that are no modules, modules with hooks, and targets other
        than one class an example go to Captum's own code. Arguments, results and errors are Captum's.
        """
        jobs = None
        if additional_forward_args is None:
            jobs = self._captum_jobs(inputs, baselines, target, n_steps, method)
        if jobs is not None:
            try:
                found = self.explain(jobs, internal_batch_size, with_delta=return_convergence_delta)
            except UnsupportedOutputError:
                jobs = None
        if jobs is None:
            return super().attribute(
                inputs,
                baselines,
                target,
                additional_forward_args,
                n_steps,
                method,
                internal_batch_size,
                return_convergence_delta,
            )
        attributions = torch.stack([explanation.attributions for explanation in found])
        attributions = (attributions,) if isinstance(inputs, tuple) else attributions
        if not return_convergence_delta:
            return attributions
        return attributions, torch.stack([explanation.convergence_delta for explanation in found])

    def _captum_jobs(self, inputs: Any, baselines: Any, target: Any, n_steps: int, method: str) -> list[Job] | None:
        """A call in Captum's form as jobs, or None where it is not one that the engine accelerates."""
        formatted, starts = _format_input_baseline(inputs, baselines)
        _validate_input(formatted, starts, n_steps, method)
        images, start = formatted[0], starts[0]
        if len(formatted) > 1 or not images.is_floating_point() or not _is_hookless_module(self.network.module):
            return None
        if isinstance(target, int):
            targets = [target] * len(images)
        elif isinstance(target, Tensor) and target.dim() <= 1 and not target.is_floating_point():
            targets = target.reshape(-1).tolist()
        elif isinstance(target, list) and all(isinstance(each, int) for each in target):
            targets = list(target)
        else:
            return None
        if len(targets) == 1:
            targets *= len(images)
        if len(targets) != len(images) or not targets or min(targets) < 0:
            return None
        images = images.detach()
        if not isinstance(start, Tensor):
            start = torch.full_like(images[:1], start)
        start = start.detach().to(images).expand_as(images)
        return [
            Job(image, own_start, own_target, n_steps, method)
            for image, own_start, own_target in zip(images, start, targets)
        ]

    def explain(
        self, jobs: Sequence[Job], max_rows: int | None = None, with_delta: bool = True
    ) -> list[Explanation | None]:
        """Explain unlike jobs together.

        Args:
            jobs: what to explain; their images need not have one shape, but chunks are shared only where they do.
            max_rows: fewer rows a chunk than the engine's own setting.
            with_delta: compute convergence deltas, which takes up to two forward rows a path.

        Returns:
            One explanation a job, in order; None for a job that was cancelled on the way.
        """
        jobs = [replace(job) for job in jobs]  # one that was given twice is two
        found = {id(job): explanation for job, explanation in self.explain_as_done(jobs, max_rows, with_delta)}
        return [found[id(job)] for job in jobs]

    @torch.no_grad()
    def explain_as_done(
        self,
        jobs: Iterable[Job],
        max_rows: int | None = None,
        with_delta: bool = True,
        arrivals: Callable[[], Iterable[Job]] = tuple,
    ) -> Iterator[tuple[Job, Explanation | None]]:
        """The same, job by job: each with its explanation as soon as its last row is done.

        Args:
            jobs: see ``explain``; no job twice.
            max_rows: see ``explain``.
            with_delta: see ``explain``.
            arrivals: asked before each pass for further jobs, which join those under way.
        """
        limit = min(max_rows or self.max_rows, self.max_rows)
        with self._lock:
            self._schedule = schedule = _Schedule(limit)
            try:
                self._admit(jobs, schedule)
                yield from self._explain_all(schedule, arrivals, with_delta)
            finally:
                self._schedule = None

    def rows_before(self, job: Job, others: Iterable[Job] = ()) -> int:
        """Rows that would go before those of a job if it came now, as far as that is known; from any thread.

        Args:
            job: the one that comes.
            others: jobs that have come and are not under way yet.
        """
        due = _Task(job, self.rows_passed).due
        schedule = self._schedule
        tasks = [_Task(other, self.rows_passed) for other in others]
        return sum(task.rows_left for task in tasks if task.due <= due) + (schedule.rows_before(due) if schedule else 0)

    def _explain_all(
        self, schedule: _Schedule, arrivals: Callable[[], Iterable[Job]], with_delta: bool
    ) -> Iterator[tuple[Job, Explanation | None]]:
        while True:
            self._admit(arrivals(), schedule)
            for task in schedule.drop_given_up():
                yield task.job, None
            self._draw(schedule)
            for task in self._settle_late(schedule, with_delta):
                yield task.job, task.result()
            if schedule.under_way:
                for task in self._pass(schedule, with_delta):
                    yield task.job, task.result()
            elif not any(task.samples_left for task in schedule.waiting):
                return

    def _admit(self, jobs: Iterable[Job], schedule: _Schedule) -> None:
        for job in jobs:
            if schedule.limit < 2 and self.network.has_mean_slopes and (job.refines or job.method == "calibrated"):
                raise ValueError("mean gradients between two points take at least two rows a pass")
            schedule.add(_Task(job, self.rows_passed))

    def _rule(self, job: Job, sharing: int) -> Rule:
        """The rule for one of a job's paths, which shares the passes with so many that are in a hurry, too."""
        device = job.image.device
        output = "probability" if job.probability else "logit"
        if job.refines and job.n_steps < LEAST_STEPS:
            raise ValueError(f"a tolerance or a deadline takes at least {LEAST_STEPS} steps, not {job.n_steps}")
        density = self.density
        if job.refines and self.network.has_mean_slopes:
            edges = None if density is None else partial(density.edges, output)
            law = TYPICAL_LAW if density is None else density.law[output]
            affordable = self._affordable_steps(job, 1, sharing)
            return LadderRule(edges, law, job.tolerance, job.n_steps, affordable, device)
        if job.refines:
            return RefinedRule(job.tolerance, job.n_steps, self._affordable_steps(job, 0, sharing), device)
        if job.method != "calibrated":
            chosen = slice(job.part, None, job.parts)
            nodes, weights = (values[chosen] for values in quadrature(job.method, job.n_steps))
            return FixedRule(nodes.to(device), weights)
        if density is None:
            raise ValueError("the method 'calibrated' needs a density")
        edges = density.edges(output, job.n_steps)
        nodes = edges if self.network.has_mean_slopes else (edges[1:] + edges[:-1]) / 2
        return FixedRule(nodes.to(device), edges.diff())

    def _affordable_steps(self, job: Job, overlap: int, sharing: int) -> float:
        """Steps of a path that there is time for before its job's deadline, when so many paths share the passes."""
        if job.deadline is None:
            return math.inf
        seconds = TIME_SHARE * (job.deadline - time.monotonic() - self._judging_seconds)
        rows = self._clocks[bool(overlap)].rows_within(seconds / sharing, self.max_rows)
        if rows is None:
            return 0
        return rows - overlap * math.ceil(rows / self.max_rows)  # each pass ends with a row for the next

    def _draw(self, schedule: _Schedule) -> None:
        """Begin the paths whose rows come up."""
        while (task := schedule.next_to_draw()) is not None:
            sharing = schedule.in_a_hurry + (task.job.deadline is None)
            schedule.begin(_Path(task, task.draw(), self._rule(task.job, sharing)))

    def _settle_late(self, schedule: _Schedule, with_delta: bool) -> list[_Task]:
        """End what has a deadline that is over, with the best that there is; returns tasks that are over.

        Of noise samples that have no answer yet, one goes on, if none has an answer.
        """
        late = [path for path in schedule.under_way if path.task.is_late]
        for path in late:
            path.task.samples_left = 0
            if path.rule.settle(path.next_step):
                self._finish(path, schedule, with_delta)
        going_on: set[_Task] = set()
        for path in late:
            if path not in schedule.under_way:
                continue
            if path.task.found or path.task in going_on:
                schedule.end(path)
            going_on.add(path.task)
        return schedule.take_over()

    def _pass(self, schedule: _Schedule, with_delta: bool) -> list[_Task]:
        """Take the gradients of the rows that come next; returns tasks that are over."""
        chunk = schedule.next_chunk(self._equal_chunks)
        self._run_chunk(chunk)
        for path, _ in chunk:
            if path.rows_left:
                continue
            affordable = self._affordable_steps(path.job, path.rule.overlap, max(1, schedule.in_a_hurry))
            if path.rule.refine(partial(self._judge, path), affordable):
                path.next_step = 0
            else:
                self._finish(path, schedule, with_delta)
        return schedule.take_over()

    def _finish(self, path: _Path, schedule: _Schedule, with_delta: bool) -> None:
        path.task.found.append(self._conclude(path, with_delta))
        schedule.end(path)

    def _run_chunk(self, chunk: list[tuple[_Path, slice]]) -> None:
        """Take the gradients of some paths' next rows; the slices are their places among the rows of the pass.

        Where a device has no memory for them, for once, half of them are taken; the others come later.
        """
        self._enter([path for path, _ in chunk if path.start is None])
        started = time.monotonic()
        first = chunk[0][0]
        buffers = self.passes.buffers(first.start.features, first.image.dtype)
        any_paired = any(path.rule.overlap for path, _ in chunk)
        while True:
            last = chunk[-1][1]
            for path, rows in chunk:
                path.fill(buffers[rows])
            try:
                gradients = self.passes.gradients(buffers, last.stop, any_paired)
                break
            except torch.OutOfMemoryError:
                smaller = _half(chunk)
                if smaller is None:
                    raise
                logger.warning("no memory for %d rows: half of them are taken now", last.stop)
                chunk = smaller
                if first.image.device.type == "cuda":
                    torch.cuda.empty_cache()
        for path, rows in chunk:
            path.add(gradients[rows])
            path.task.rows_spent += rows.stop - rows.start
        self.rows_passed += last.stop
        self.chunks_passed[last.stop] += 1
        on_gpu = first.image.device.type == "cuda"
        if on_gpu and any(path.job.deadline is not None for path, _ in chunk):
            torch.cuda.synchronize(first.image.device)
        elif on_gpu:
            return  # what the clock says before the device is done is no measure
        self._clocks[any_paired].record(last.stop, time.monotonic() - started)

    def _enter(self, paths: list[_Path]) -> None:
        """Place the ends of new paths in feature space, in one pass through the stem."""
        if not paths:
            return
        for path in paths:
            path.start = self._kept_starts.get(path.job.baseline_key)
        # Once for all noise samples of a job that come up together, and once and for all for a constant baseline.
        baselines = {_start_key(path.job): path.job.baseline for path in paths if path.start is None}
        features = self.network.stem(torch.stack([*(path.image for path in paths), *baselines.values()])).split(1)
        starts = {key: _Start(own.clone()) for key, own in zip(baselines, features[len(paths) :])}
        for path, end in zip(paths, features):
            if path.start is None:
                path.start = starts[_start_key(path.job)]
                if path.job.baseline_key is not None:
                    self._kept_starts[path.job.baseline_key] = path.start
            path.displacement = end - path.start.features

    def _pull_back(self, path: _Path, gradients: Tensor) -> Tensor:
        """Attributions [n, ...] that weighted sums of gradients [n, ...] in feature space amount to."""
        images = path.image.expand(len(gradients), *path.image.shape)
        attributions = self.network.transposed_stem(gradients, images)
        return attributions * (path.image - path.job.baseline) if self.multiplies_by_inputs else attributions

    def _judge(self, path: _Path, total: Tensor, difference: Tensor) -> tuple[float, float]:
        """Relative norm of a difference, and the relative completeness gap, of a path's attributions."""
        started = time.monotonic()
        path.attributions, between = self._pull_back(path, torch.cat((total, difference)))
        change = self._change(path)
        size = path.attributions.abs().sum()
        gap = path.attributions.sum() - change if self.multiplies_by_inputs else torch.zeros_like(size)
        # A change far below what the attributions add up to without their signs is no measure of anything.
        scale = torch.maximum(change.abs(), LEAST_CHANGE * size)
        found = torch.stack((between.norm(), path.attributions.norm(), gap.abs(), scale)).tolist()
        self._judging_seconds = time.monotonic() - started
        return tuple(part / whole if whole else math.inf if part else 0.0 for part, whole in (found[:2], found[2:]))

    def _conclude(self, path: _Path, with_delta: bool) -> Explanation:
        """The explanation that a finished path amounts to."""
        attributions = path.attributions
        if attributions is None:
            (attributions,) = self._pull_back(path, path.rule.gradient)
        job, weight_sum, delta = path.job, 1.0, None
        if job.parts > 1:
            weight_sum = quadrature(job.method, job.n_steps)[1][job.part :: job.parts].sum().item()
        if with_delta:
            delta = attributions.sum() - weight_sum * self._change(path)
        return Explanation(attributions, delta, path.rule.n_steps, path.rule.error_estimate, weight_sum)

    def _change(self, path: _Path) -> Tensor:
        """F(image) - F(baseline), a scalar."""
        if path.change is None:
            job = path.job
            known = job.image_logits is not None and not job.stdevs
            end = job.image_logits if known else self.network(path.image.unsqueeze(0))[0]
            if path.start.logits is None:
                path.start.logits = self.network(job.baseline.unsqueeze(0))[0]
            path.change = _objective(end, job) - _objective(path.start.logits, job)
        return path.change


class _Schedule:
    """The tasks and paths of a call, the first due first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit  # rows a chunk
        self.waiting: list[_Task] = []  # those that have images to draw
        self.under_way: list[_Path] = []
        self._over: list[_Task] = []
        self._asked_all = time.monotonic()

    def add(self, task: _Task) -> None:
        self.waiting.append(task)

    def sort(self) -> None:
        """Bring all in the order in which they are due now."""
        self.waiting = sorted((task for task in self.waiting if task.samples_left), key=lambda task: task.due)
        self.under_way.sort(key=lambda path: path.task.due)

    @property
    def in_a_hurry(self) -> int:
        """How many paths have a deadline."""
        drawn = sum(path.job.deadline is not None for path in self.under_way)
        return drawn + sum(task.samples_left for task in self.waiting if task.job.deadline is not None)

    def rows_before(self, due: tuple[float, float]) -> int:
        """Rows of what is due by then."""
        tasks = sum(task.rows_left for task in tuple(self.waiting) if task.due <= due)
        return tasks + sum(path.rows_left for path in tuple(self.under_way) if path.task.due <= due)

    def drop_given_up(self) -> list[_Task]:
        """Leave out the tasks that nobody waits for, and return them.

        Whether somebody waits may be a question to another process: of those that wait, only the next are asked before
        each pass, all of them now and then.
        """
        asks_all = time.monotonic() >= self._asked_all + ASK_ALL_SECONDS
        if asks_all:
            self._asked_all = time.monotonic()
        waiting = [task for task in self.waiting if task.samples_left]  # the others may be over
        asked = {id(task): task for task in (*waiting[: self.limit], *(path.task for path in self.under_way))}
        tasks = {id(task): task for task in waiting} | asked
        given_up = {key: task for key, task in tasks.items() if task.is_given_up(asks_all or key in asked)}
        if given_up:
            self.waiting = [task for task in self.waiting if id(task) not in given_up]
            self.under_way = [path for path in self.under_way if id(path.task) not in given_up]
        return list(given_up.values())

    def next_to_draw(self) -> _Task | None:
        """The task whose next image's rows come up in the next chunk.

        Noisy images are drawn so late, and paths that others overtake are so few, for their memory's sake: there are
        never more paths than two chunks have rows, or four of those in a hurry.
        """
        self.sort()
        if not self.waiting:
            return None
        task = self.waiting[0]
        if len(self.under_way) >= (4 if task.is_urgent else 2) * self.limit:
            return None
        rows_before = sum(path.rows_left for path in self.under_way if path.task.due <= task.due)
        return task if rows_before < self.limit else None

    def begin(self, path: _Path) -> None:
        self.under_way.append(path)

    def end(self, path: _Path) -> None:
        self.under_way.remove(path)
        path.task.paths -= 1
        if path.task.is_over:
            self._over.append(path.task)

    def take_over(self) -> list[_Task]:
        """The tasks that have come to their end since this was called last."""
        over, self._over = self._over, []
        return over

    def next_chunk(self, equal: bool) -> list[tuple[_Path, slice]]:
        """Paths and their places among the rows of the next pass.

        Args:
            equal: 50 rows at 8 a chunk are 7 chunks of 7 or 8, not 6 of 8 and one of 2, and no chunk is filled up with
                what costs more than it saves; for passes that are not padded.
        """
        room = self.limit
        if equal:
            rows_left = self.rows_before((math.inf, math.inf))
            room = math.ceil(rows_left / math.ceil(rows_left / self.limit))
        chunk: list[tuple[_Path, slice]] = []
        count = 0
        for path in self.under_way:
            rows = min(room - count, path.rows_left)
            if rows <= path.rule.overlap or path.image.shape != self.under_way[0].image.shape:
                break
            if equal and chunk and path.rule.overlap and self._adds_a_piece(path, rows):
                break
            chunk.append((path, slice(count, count + rows)))
            count += rows
        return chunk

    def _adds_a_piece(self, path: _Path, rows: int) -> bool:
        """Whether a path whose pieces overlap is cut into more of them if so many rows go before the rest.

        Each more is a row more, and a pass that stays so much smaller costs less than that.
        """
        whole, rest = (math.ceil((path.rows_left - begun) / (self.limit - 1)) for begun in (1, rows))
        return 1 + rest > whole


def _half(chunk: list[tuple[_Path, slice]]) -> list[tuple[_Path, slice]] | None:
    """The first half of a chunk's rows; None where they are as few as they can be."""
    room = chunk[-1][1].stop // 2
    half = [(path, slice(rows.start, min(rows.stop, room))) for path, rows in chunk if rows.start < room]
    half = [(path, rows) for path, rows in half if rows.stop - rows.start > path.rule.overlap]
    return half or None


def _mean(parts: list[Explanation]) -> Explanation:
    """The explanation of a job from those of its paths."""
    if len(parts) == 1:
        return parts[0]
    attributions = torch.stack([part.attributions for part in parts]).mean(dim=0)
    delta = None
    if parts[0].convergence_delta is not None:
        delta = torch.stack([part.convergence_delta for part in parts]).mean()
    # Errors that do not cancel add up to no more than their mean.
    estimate = sum(part.error_estimate for part in parts) / len(parts)
    return Explanation(attributions, delta, sum(part.n_steps for part in parts), estimate, parts[0].weight_sum)


def expected_rows(job: Job) -> int:
    """Rows that a job is going to take, as far as that is known."""
    return job.nt_samples * (USUAL_ROWS if job.refines else math.ceil(job.n_steps / job.parts))


def _start_key(job: Job) -> Hashable:
    return id(job) if job.baseline_key is None else job.baseline_key


def _is_hookless_module(function: Any) -> bool:
    """Whether Captum's own code would see nothing of this module's inside, either."""
    if not isinstance(function, torch.nn.Module):
        return False
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return not any(getattr(module, name, None) for module in function.modules() for name in hooks)


def _objective(logits: Tensor, job: Job) -> Tensor:
    """The explained function of logits [classes]."""
    values = logits.softmax(dim=-1) if job.probability else logits
    return values[job.target] if job.contrast is None else values[job.target] - values[job.contrast]
