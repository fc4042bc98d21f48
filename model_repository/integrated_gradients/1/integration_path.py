"""One integration path: its end points behind the stem, its rows, and the attributions from their gradients."""

from __future__ import annotations

import math
from collections.abc import Hashable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from attribution_job import Explanation, Job, PathState
from classifier_network import Network, Rows
from path_quadrature import place_points, quadrature
from path_rules import Rule
from torch import Tensor

# A completeness gap is relative to the change of the output, but at least to this share of the sum of absolute
# attributions: where large attributions cancel, the change itself is too small a scale.
LEAST_CHANGE = 0.1
# Rounding of logits in float32, relative to the largest: two passes over one image differ by this in batches of other
# sizes, and so does the classifier's answer.
ROUNDING = 4e-6


@dataclass(eq=False)
class StartPoint:
    """A baseline behind the stem [1, ...], and its logits [classes], computed when they are first needed."""

    features: Tensor
    logits: Tensor | None = None


@dataclass(frozen=True, eq=False)
class StageError:
    """The result of a complete stage of a path, and its error.

    Attributes:
        attributions: shaped like the image.
        difference_map: the difference that estimates the error, likewise.
        difference: its relative norm.
        error_share: the estimated error as a share of the difference.
        surplus: absolute completeness gap, without what may be rounding.
        change: F(image) - F(baseline).
        gap: relative completeness gap.
    """

    attributions: Tensor
    difference_map: Tensor
    difference: float
    error_share: float
    surplus: float
    change: float
    gap: float


class IntegrationPath:
    """The straight path from a job's baseline to one image.

    Args:
        job: what to explain.
        image: [channels, height, width], the job's image or that with noise.
        rule: which points get a gradient, and their weights.
        network: the one whose logits are explained.
        multiply_by_inputs: multiply gradients by (image - baseline), as in Captum.
    """

    start: StartPoint
    displacement: Tensor  # from start to end, behind the stem

    def __init__(
        self, job: Job, image: Tensor, rule: Rule, network: Network | None, multiply_by_inputs: bool = True
    ) -> None:
        self.job, self.image, self.rule = job, image, rule
        self._given_network, self._multiply_by_inputs = network, multiply_by_inputs
        self._next_step = 0
        self._state: PathState | None = None
        self.stage: StageError | None = None  # the last complete one
        self.is_placed = False

    @classmethod
    def resumed(cls, job: Job, network: Network | None = None) -> IntegrationPath:
        """The path of a job with a ``state``; call ``goes_on`` next.

        Args:
            job: with ``image_logits``.
            network: needed only if the path goes on.
        """
        state = job.state
        assert state is not None
        assert state.rule is not None
        path = cls(job, job.image, state.rule.resumed(job.tolerance, job.n_steps), network)
        path.start = StartPoint(torch.empty(0), state.start_logits)  # until it is placed
        path._state = state
        return path

    def goes_on(self, affordable: float) -> bool:
        """Begin the next stage of a resumed path; False if it has reached its aim, or cannot afford more."""
        assert self._state is not None
        return self.rule.refine(self._state.difference, ratio(*self._gap(self.attributions).tolist()), affordable)

    @property
    def rows_left(self) -> int:
        """Rows that the present stage still takes, if one chunk takes them all."""
        nodes = len(self.rule.nodes) - self._next_step
        return nodes if nodes > self.rule.overlap else 0

    @property
    def overlap(self) -> int:
        """Rows at the end of a piece that the next piece begins with."""
        return self.rule.overlap

    @property
    def shape(self) -> Hashable:
        """Only paths of equal shape share a chunk."""
        return self.image.shape

    @property
    def points(self) -> Hashable:
        """Equal for paths whose next rows are the same points of the same path; None if they may not be shared."""
        if self.job.sharing_key is None:
            return None
        return self.job.ends_key, self._next_step, self.overlap, self.rule.nodes.cpu().numpy().tobytes()

    def place(self, start: StartPoint, end: Tensor) -> None:
        """Set both end points; ``end`` [1, ...] is the image behind the stem."""
        self.start, self.displacement = start, end - start.features
        self.is_placed = True

    def fill(self, rows: Rows) -> None:
        """Write the inputs of the path's next rows into all of ``rows``."""
        nodes = self.rule.nodes[self._next_step : self._next_step + len(rows.signs)]
        place_points(self.start.features, self.displacement, nodes, rows.features)
        rows.paired[:] = bool(self.rule.overlap)
        rows.paired[-1] = False
        self.fill_objective(rows)

    def fill_objective(self, rows: Rows) -> None:
        """Write which function of the logits is explained into all of ``rows``."""
        job = self.job
        rows.classes[:, 0] = job.target
        rows.classes[:, 1] = job.target if job.contrast is None else job.contrast
        rows.signs[:, 0] = 1.0
        rows.signs[:, 1] = 0.0 if job.contrast is None else -1.0
        rows.on_probability[:] = job.probability

    def add(self, gradients: Tensor) -> None:
        """Add the gradients of the rows that ``fill`` wrote."""
        steps = slice(self._next_step, self._next_step + len(gradients) - self.rule.overlap)
        self.rule.add(steps, gradients[: steps.stop - steps.start])
        self._next_step = steps.stop

    def next_stage(self, affordable: float) -> bool:
        """Complete the stage; whether the rule begins another, of at most ``affordable`` steps."""
        self.complete_stage()
        return self.refine(affordable)

    def complete_stage(self) -> None:
        """Complete the stage and, if its rule can refine it, estimate its error."""
        difference = self.rule.complete_stage()
        if difference is None:
            return
        self.stage = stage = self.estimate_error(difference)
        if self.job.keeps_state and not self.job.stdevs:
            start = self._end_logits[1]
            self._state = PathState(start, self.rule.completed(), stage.attributions, stage.difference)

    def refine(self, affordable: float) -> bool:
        """Whether the rule begins another stage after the complete one, of at most ``affordable`` steps."""
        stage = self.stage
        if stage is None or not self.rule.refine(stage.difference, stage.gap, affordable):
            return False
        self._next_step = 0
        return True

    def finish_early(self) -> bool:
        """End in the middle of a stage; whether there is an answer."""
        return self._of_complete_stages is not None or self.rule.finish_early(self._next_step)

    def estimate_error(self, difference: Tensor) -> StageError:
        """The rule's present answer as attributions, and the relative sizes that estimate its error.

        Args:
            difference: [1, ...], between two weighted sums of gradients behind the stem.
        """
        attributions, difference_map = self._pull_back(torch.cat((self._gradient, difference)))
        sizes = torch.stack((difference_map.norm(), attributions.norm(), self._change))
        error, norm, change, surplus, scale = torch.cat((sizes, self._gap(attributions))).tolist()
        return StageError(
            attributions,
            difference_map,
            ratio(error, norm),
            self.rule.error_share,
            surplus,
            change,
            ratio(surplus, scale),
        )

    def _gap(self, attributions: Tensor) -> Tensor:
        """The completeness gap of attributions and what it is relative to, [2]."""
        change = self._change
        size = attributions.abs().sum()
        gap = attributions.sum() - change if self._multiply_by_inputs else torch.zeros_like(size)
        scale = torch.maximum(change.abs(), LEAST_CHANGE * size)
        gap = (gap.abs() - self._rounding).clamp_min(0)  # an image without anything to explain has no gap at all
        return torch.stack((gap, scale))

    def explanation(self, with_delta: bool) -> Explanation:
        """The explanation of a finished path."""
        job, weight_sum, delta = self.job, 1.0, None
        attributions = self.attributions
        if job.parts > 1:
            weight_sum = quadrature(job.method, job.n_steps)[1][job.part :: job.parts].sum().item()
        if with_delta:
            delta = attributions.sum() - weight_sum * self._change
        state = self._state
        if state is None and with_delta and job.keeps_state and not job.stdevs:
            state = PathState(self._end_logits[1])
        return Explanation(attributions, delta, self.rule.n_steps, self.rule.error_estimate, weight_sum, state=state)

    @property
    def _network(self) -> Network:
        assert self._given_network is not None
        return self._given_network

    @property
    def attributions(self) -> Tensor:
        """The answer so far, shaped like the image."""
        complete = self._of_complete_stages
        return self._pull_back(self._gradient)[0] if complete is None else complete

    @property
    def _of_complete_stages(self) -> Tensor | None:
        """The attributions of the last complete stage, which may be an earlier job's."""
        last = self.stage or self._state
        return None if last is None else last.attributions

    @property
    def _gradient(self) -> Tensor:
        """The rule's answer [1, ...], which exists after each complete stage."""
        assert self.rule.gradient is not None
        return self.rule.gradient

    def _pull_back(self, gradients: Tensor) -> Tensor:
        """Attributions [n, ...] of weighted sums of gradients [n, ...] behind the stem."""
        images = self.image.expand(len(gradients), *self.image.shape)
        attributions = self._network.transposed_stem(gradients, images)
        return attributions * (self.image - self.job.baseline) if self._multiply_by_inputs else attributions

    @property
    def _change(self) -> Tensor:
        """F(image) - F(baseline), a scalar."""
        end, start = self._end_logits
        return self.job.objective(end) - self.job.objective(start)

    @property
    def _rounding(self) -> Tensor:
        """The part of the change that may be rounding, a scalar."""
        job, logits = self.job, torch.stack(self._end_logits)
        size = logits.abs().max()
        return ROUNDING * size * (logits.softmax(dim=1)[:, job.classes].max() if job.probability else 1.0)

    @cached_property
    def _end_logits(self) -> tuple[Tensor, Tensor]:
        """Logits [classes] of the image and of the baseline."""
        job = self.job
        end = None if job.stdevs else job.image_logits
        if end is None:
            end = self._network(self.image.unsqueeze(0))[0]
        if self.start.logits is None:
            self.start.logits = self._network(job.baseline.unsqueeze(0).contiguous())[0]
        return end, self.start.logits


def place_end_points(
    paths: Sequence[IntegrationPath], network: Network, known: MutableMapping[Hashable, StartPoint]
) -> None:
    """Place the end points of new paths in one pass through the stem.

    Args:
        paths: paths of one shape.
        network: of the paths.
        known: start points by baseline key; new ones are added.
    """
    if not paths:
        return
    starts: dict[Hashable, StartPoint] = dict(known)
    # Evaluated once for all noise samples of a job in this call, and only once ever for a baseline with a key.
    baselines = {_start_key(path.job): path.job.baseline for path in paths if _start_key(path.job) not in starts}
    images = {_end_key(path): path.image for path in paths}
    features = network.stem(torch.stack([*images.values(), *baselines.values()])).split(1)
    for key, start_features in zip(baselines, features[len(images) :]):
        starts[key] = StartPoint(start_features.clone())
    ends = dict(zip(images, features))
    for path in paths:
        key = _start_key(path.job)
        if path.job.baseline_key is not None:
            known[key] = starts[key]
        path.place(starts[key], ends[_end_key(path)])


def _start_key(job: Job) -> Hashable:
    return job if job.baseline_key is None else job.baseline_key


def _end_key(path: IntegrationPath) -> Hashable:
    return path if path.job.sharing_key is None else path.job.ends_key


def ratio(part: float, whole: float) -> float:
    """A relative size; that of nothing in nothing is 0."""
    return part / whole if whole else math.inf if part else 0.0
