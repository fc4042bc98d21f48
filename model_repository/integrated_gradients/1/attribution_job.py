"""The engine's input and output: a job, and its explanation."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from request_admission import RequestStart
from torch import Tensor

if TYPE_CHECKING:
    from path_rules import Rule

LARGEST_TOLERANCE = 0.5


@dataclass(frozen=True, eq=False)
class Job:
    """One image to explain, by the gradients of one function of the network's logits along one or more paths.

    ``image`` and ``baseline`` are float [channels, height, width] on the engine's device. The function is the logit of
    class ``target``, or its softmax probability with ``probability``, minus that of class ``contrast`` if there is one.

    ``method`` is one of Captum's, or ``calibrated``: nodes from the engine's density and, where the network has them,
    discrete gradients between them.

    With a ``tolerance`` the path is refined until its estimated relative error and its relative completeness gap are
    within it, or until ``n_steps`` (at least 3) are spent. With a ``deadline``, by ``time.monotonic``, the answer
    is the best within this time; it may overrun by one pass. It comes earlier if it is within the tolerance. Either of
    them replaces ``method``.

    With a ``rule``, (nodes float64, weights float32), each [n_steps], the attribution is that of these nodes, and
    ``method`` is not read.

    With ``parts`` the attribution is a summand: that of the nodes ``part``, ``part + parts``, ``part + 2 parts`` and so
    on, of one of Captum's methods.

    The jobs of a request share ``request_start``. They are given up if none of their rows has been passed by its time.

    With ``nt_samples`` and ``stdevs`` (Captum's NoiseTunnel) the attribution is the mean over ``nt_samples`` paths to
    the image plus Gaussian noise of standard deviation ``stdevs``, drawn on the CPU from ``seed`` (SmoothGrad, arXiv
    1706.03825).

    With ``further_baselines`` the attribution is the mean over paths from each baseline, each with the job's method and
    ``n_steps``. A ``tolerance`` then holds for the mean. There is no noise beside them.
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
    baseline_key: Hashable = None  # equal keys promise equal baselines, which are evaluated once
    ends_key: Hashable = None  # equal keys promise equal images and baselines, whose forward passes may be shared
    is_cancelled: Callable[[], bool] = field(default=lambda: False)
    request_start: RequestStart = field(default_factory=RequestStart)
    rule: tuple[Tensor, Tensor] | None = None
    further_baselines: Sequence[tuple[Tensor, Hashable]] = ()  # each with its key
    keeps_state: bool = False  # the explanation has a ``state``, if the job has one path
    state: PathState | None = None  # where a job with a tolerance or a deadline goes on

    def __post_init__(self) -> None:
        if self.further_baselines and (self.nt_samples > 1 or self.stdevs):
            raise ValueError("a mean over baselines takes no noise")

    @property
    def paths(self) -> int:
        """Paths whose mean is the attribution."""
        return self.nt_samples * (1 + len(self.further_baselines))

    def path_job(self, number: int) -> Job:
        """The job of one of the paths, which has one baseline."""
        if not self.further_baselines:
            return self
        baseline, key = ((self.baseline, self.baseline_key), *self.further_baselines)[number]
        return replace(
            self,
            baseline=baseline,
            baseline_key=key,
            ends_key=None if self.ends_key is None else (self.ends_key, number),
            further_baselines=(),
            # The errors of paths partly cancel in the mean. The engine refines those further that the mean needs.
            tolerance=None
            if self.tolerance is None
            else min(LARGEST_TOLERANCE, self.tolerance * math.sqrt(self.paths)),
        )

    @property
    def refines(self) -> bool:
        """Whether its number of steps depends on the image."""
        return self.tolerance is not None or self.deadline is not None

    @property
    def output(self) -> str:
        """The explained output, as calibrations name it."""
        return "probability" if self.probability else "logit"

    @property
    def sharing_key(self) -> Hashable:
        """Jobs of equal keys begin with the same points of the same path; None if it may share none."""
        if self.ends_key is None or self.stdevs or self.rule is not None:
            return None
        return self.ends_key, self.n_steps, self.method, self.tolerance, self.part, self.parts, self.probability

    @property
    def classes(self) -> list[int]:
        """The class that is explained, and the one that is subtracted if there is one."""
        return [self.target] if self.contrast is None else [self.target, self.contrast]

    def objective(self, logits: Tensor) -> Tensor:
        """The explained function of logits [classes], a scalar."""
        values = logits.softmax(dim=-1) if self.probability else logits
        return values[self.target] if self.contrast is None else values[self.target] - values[self.contrast]


@dataclass(frozen=True, eq=False)
class PathState:
    """The complete stages of a path, from which another job with the same path and function goes on.

    Attributes:
        start_logits: [classes], of the baseline.
        rule: after its last complete stage; None if there can be no other stage.
        attributions: of that stage, shaped like the image.
        difference: relative norm of the difference that estimates its error.
    """

    start_logits: Tensor
    rule: Rule | None = None
    attributions: Tensor | None = None
    difference: float = math.nan


@dataclass(frozen=True, eq=False)
class Explanation:
    """The attribution of one job.

    Attributes:
        attributions: shaped like the image.
        convergence_delta: Captum's, a scalar tensor: the sum of the attributions minus (F(image) - F(baseline)), the
            mean over paths; None if it was not requested.
        n_steps: gradients taken.
        error_estimate: estimated relative L2 error, a mean over noise samples, or that of the mean over baselines; NaN
            without a tolerance or deadline.
        weight_sum: sum of the quadrature's weights. For a part it is below 1, and the delta counts that share of the
            output's change.
        started: by ``time.monotonic``, when its first path was started.
        seconds: from there to the last row, other jobs' passes included; on a GPU, as seen from the CPU.
        state: of its path, if the job keeps it.
    """

    attributions: Tensor
    convergence_delta: Tensor | None
    n_steps: int
    error_estimate: float = math.nan
    weight_sum: float = 1.0
    started: float = math.nan
    seconds: float = 0.0
    state: PathState | None = None


def mean_explanation(samples: Sequence[Explanation]) -> Explanation:
    """A job's explanation: the mean over its paths."""
    if len(samples) == 1:
        return samples[0]
    attributions = torch.stack([sample.attributions for sample in samples]).mean(dim=0)
    deltas = [sample.convergence_delta for sample in samples if sample.convergence_delta is not None]
    return Explanation(
        attributions,
        torch.stack(deltas).mean() if deltas else None,
        sum(sample.n_steps for sample in samples),
        # An upper bound: the error of a mean is at most the mean of the errors.
        sum(sample.error_estimate for sample in samples) / len(samples),
        samples[0].weight_sum,
    )
