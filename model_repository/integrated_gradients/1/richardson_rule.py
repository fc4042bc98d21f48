"""Richardson extrapolation: discrete gradients on ever more segments of a path, until two numbers of segments agree.

A discrete gradient is the mean gradient between two points, from the network's slopes between them (arXiv 1905.08604).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from error_law import ErrorLaw, measured_order
from path_quadrature import even_bounds, share_out
from path_rules import LEAST_STEPS, Rule
from torch import Tensor

# Share of Richardson's correction that is applied: errors of two numbers of steps are far from parallel.
CORRECTION = 0.3
# The law overestimates the error of a single step, so the error of the finer steps is a larger share of the difference.
SINGLE_STEP_MARGIN = 1.3
# Coarse steps as a share of the fine ones; they serve only to estimate the error of the fine ones.
COARSE_SHARE = 0.25
# Least growth from one number of steps to the next that is worth its gradients.
LEAST_GROWTH = 1.5
# The few steps of a higher tolerance measure the error roughly. So a path that goes on from them takes at least the
# steps that the law plans, as far as all together are not more than this many times those of a path that starts anew:
# fewer can be too few, and then take a further stage.
RESUMED_COST = 1.15
# Without a calibration, the first two numbers of steps measure where the gradients change. The next stage takes three
# (a quarter, a half and all of one number), which measure how errors fall.
SCOUTING_STEPS = (3, 6)
LEAST_TRIAL_STEPS, MOST_TRIAL_STEPS = 8, 200
# With fewer affordable steps, even steps from the start are more exact.
LEAST_SCOUTED_STEPS = 60
# Each stage places its nodes better than the one before, so only a large growth measures how errors fall.
TRIAL_GROWTH = 2.0
# The density of steps is this power of the gradients' rate of change; `tools/calibrate` fits it to a network.
TYPICAL_EXPONENT = 0.65
# Smaller relative changes from one gradient to the next are rounding errors.
ROUNDING = 1e-6


class RichardsonRule(Rule):
    """Two numbers of steps, whose difference estimates the error of the larger and corrects part of it.

    The first two are taken in one stage. Without a calibration that stage is a few even steps, which measure where the
    gradients change. The next stage takes three numbers of steps, placed accordingly, which measure the law's order.

    Args:
        edges: number of steps -> the ends of that many segments, from 0 to 1, float64; None without a calibration.
        law: the network's; a typical one without ``edges``.
        tolerance: stop at this relative error and relative completeness gap; None: take all affordable steps.
        n_steps: most gradients to take, at least 3.
        affordable: gradients that fit into the time left; at least 3 are taken.
        device: of the network.
    """

    overlap = 1
    _is_resumed = False

    def __init__(
        self,
        edges: Callable[[int], Tensor] | None,
        law: ErrorLaw,
        tolerance: float | None,
        n_steps: int,
        affordable: float,
        device: torch.device,
    ) -> None:
        super().__init__()
        self._law, self._tolerance, self._most_steps, self._device = law, tolerance or 0.0, n_steps, device
        self._edges = edges or even_bounds
        self.error_estimate = math.inf
        first = int(min(n_steps, max(LEAST_STEPS, affordable)))
        self._scouts = edges is None and first >= LEAST_SCOUTED_STEPS
        if self._scouts:
            self._walk(SCOUTING_STEPS)
            return
        fine = int(min(self._planned_steps(), max(2, math.floor(first / (1 + COARSE_SHARE)))))
        coarse = max(1, round(COARSE_SHARE * fine))
        self._walk((coarse, min(fine, first - coarse)))

    def _planned_steps(self) -> float:
        return self._law.planned_steps(self._tolerance) if self._tolerance else math.inf

    def _walk(self, counts: Sequence[int]) -> None:
        """Begin a stage that walks the path once for each number of steps, forwards and backwards in turn."""
        self._counts = tuple(counts)
        ends = [self._edges(count) for count in counts]
        nodes, weights = [ends[0][:1]], torch.zeros(len(counts), sum(counts), dtype=torch.float64)
        taken = 0
        for number, walk in enumerate(ends):
            lengths = walk.diff()
            if number % 2:
                walk, lengths = walk.flip(0), lengths.flip(0)
            nodes.append(walk[1:])  # each walk begins where the one before ended
            weights[number, taken : taken + len(lengths)] = lengths
            taken += len(lengths)
        self._changes: list[Tensor] = []
        self._last_gradient: Tensor | None = None
        self._begin(torch.cat(nodes).to(self._device), weights)

    def add(self, steps: slice, gradients: Tensor) -> None:
        super().add(steps, gradients)
        if not self._scouts:
            return
        gradients = gradients[max(0, sum(self._counts[:-1]) - steps.start) :]  # only the last walk's
        if len(gradients) > 0:
            if self._last_gradient is not None:
                gradients = torch.cat((self._last_gradient, gradients))
            changes = gradients.diff(dim=0).flatten(1).norm(dim=1)
            self._changes.append(changes.where(changes > ROUNDING * gradients[-1].norm(), 0.0))
            self._last_gradient = gradients[-1:].clone()

    def complete_stage(self) -> Tensor:
        if len(self._counts) > 1:
            self._coarse, self._coarse_steps = self._sums[0], self._counts[0]
        if len(self._counts) > 2:
            before, after = ((self._sums[number + 1] - self._sums[number]).norm().item() for number in range(2))
            self._law = replace(self._law, order=measured_order(before / after if after else 1.0, *self._counts))
        fine = self._sums[len(self._counts) - 1]
        difference = fine - self._coarse
        self.gradient = fine + CORRECTION * self._error_share() * difference
        return difference

    def _error_share(self) -> float:
        """The error of the fine steps as a share of the difference."""
        return self._law.share(self._coarse_steps, self._counts[-1])

    @property
    def error_share(self) -> float:
        return self._law.margin * (SINGLE_STEP_MARGIN if self._coarse_steps == 1 else 1) * self._error_share()

    @property
    def is_trusted(self) -> bool:
        # Without a calibration the first two stages may agree by chance, because both miss a part of the path.
        return not self._scouts or len(self._counts) == 1

    def aim(self, tolerance: float) -> None:
        self._tolerance = tolerance

    def refine(self, error: float, gap: float, affordable: float = math.inf) -> bool:
        self.error_estimate = self.error_share * error
        is_exact = error == gap == 0  # no gradient, or a constant one
        if is_exact or math.isnan(error):
            return False
        if self.is_trusted and max(self.error_estimate, gap) <= self._tolerance:
            return False
        steps_left = min(affordable, self._most_steps - self.n_steps)
        is_scouting = self._scouts and self._counts == SCOUTING_STEPS
        if is_scouting and steps_left >= _trial_cost(LEAST_TRIAL_STEPS):
            self._find_density()
            self._walk(_trial(self._trial_steps(steps_left)))
            return True
        fine_steps = self._counts[-1]
        least = math.ceil((TRIAL_GROWTH if self._scouts else LEAST_GROWTH) * fine_steps)
        wanted = math.inf
        if self._tolerance and math.isfinite(self.error_estimate):
            growth = (self.error_estimate / self._tolerance) ** (1 / self._law.order)
            wanted = max(least, math.ceil(growth * fine_steps))
            if self._is_resumed and not self._scouts:
                planned = self._planned_steps()
                room = RESUMED_COST * (1 + COARSE_SHARE) * planned - self.n_steps
                wanted = max(wanted, int(min(planned, room)))
        steps = min(wanted, steps_left)
        if steps < least:
            return False
        if self._scouts:
            self._find_density()
        self._is_resumed = False
        self._coarse, self._coarse_steps = self._sums[len(self._counts) - 1], fine_steps
        self._walk((int(steps),))
        return True

    def _trial_steps(self, steps_left: float) -> int:
        """Steps of the second stage without a calibration."""
        most = max(count for count in range(LEAST_TRIAL_STEPS, MOST_TRIAL_STEPS) if _trial_cost(count) <= steps_left)
        return int(min(most, max(LEAST_TRIAL_STEPS, self._planned_steps())))

    def finish_early(self, taken: int) -> bool:
        """End after the first ``taken`` steps of the stage; whether there is an answer.

        If only the coarse steps are complete, they are the answer, with the error that the law expects of them.
        """
        if self.gradient is None and taken >= self._counts[0]:
            self.gradient = self._sums[0]
            self.error_estimate = self._law.margin * self._law.error(self._counts[0])
        return self.gradient is not None

    def completed(self) -> RichardsonRule:
        kept = copy.copy(self)
        kept.gradient, kept._last_gradient = None, None
        kept._sums = {len(self._counts) - 1: self._sums[len(self._counts) - 1]}
        kept.__dict__.pop("_coarse", None)
        return kept

    def resumed(self, tolerance: float | None, n_steps: int) -> RichardsonRule:
        rule = copy.copy(self)
        rule._is_resumed = True
        rule._tolerance, rule._most_steps = tolerance or 0.0, n_steps
        return rule

    def _find_density(self) -> None:
        """Place further steps where the gradients of the last walk change."""
        changes = torch.cat(self._changes).double().cpu()
        if not changes.isfinite().all() or not changes.any():
            return
        ends = self._edges(self._counts[-1])
        middles = (ends[1:] + ends[:-1]) / 2
        if len(self._counts) % 2 == 0:  # the last walk went backwards
            changes = changes.flip(0)
        density = (changes / middles.diff()) ** TYPICAL_EXPONENT
        self._edges = partial(share_out, density, torch.cat((ends[:1], middles[1:-1], ends[-1:])))


def _trial(steps: int) -> tuple[int, int, int]:
    """A quarter, a half and all of ``steps`` steps."""
    return round(COARSE_SHARE * steps), round(steps / 2), steps


def _trial_cost(steps: int) -> int:
    return sum(_trial(steps))
