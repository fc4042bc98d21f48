"""The mean over paths from several baselines to one image, and which of them to refine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from integration_path import LEAST_CHANGE, IntegrationPath, ratio
from torch import Tensor


class BaselineMean:
    """Paths of one job that are refined together, until their mean is within a tolerance.

    A path waits here after each of its stages. Once all wait, those whose errors weigh most go on.

    The errors of the paths partly cancel. Each path estimates its own by a difference in pixel space. Their sum, with
    the signs of these differences, estimates the error of the mean; it is never taken for less than that of independent
    errors, since differences may cancel by chance.

    Args:
        tolerance: relative error and relative completeness gap of the mean; None: take all affordable steps.
        count: number of paths.
    """

    def __init__(self, tolerance: float | None, count: int) -> None:
        self._tolerance, self._count = tolerance or 0.0, count
        self.waiting: list[IntegrationPath] = []

    def add(self, path: IntegrationPath) -> None:
        """Take a path whose stage is complete, or that has ended early."""
        self.waiting.append(path)

    @property
    def is_complete(self) -> bool:
        """Whether all paths wait."""
        return len(self.waiting) == self._count

    def refine(self, affordable: Callable[[IntegrationPath], float]) -> list[IntegrationPath]:
        """The paths that begin another stage, which wait no more; none if the mean is good enough or all is spent.

        Args:
            affordable: the steps of a path that fit into the time left.
        """
        if any(path.stage is None for path in self.waiting):  # it ended early
            return []
        is_trusted = all(path.rule.is_trusted for path in self.waiting)
        stages = [path.stage for path in self.waiting if path.stage is not None]
        total = self._sum()
        whole = max(abs(sum(stage.change for stage in stages)), LEAST_CHANGE * total.abs().sum().item())
        size, error = total.norm().item(), self.error_estimate
        gap = ratio(sum(stage.surplus for stage in stages), whole)
        if is_trusted and max(error, gap) <= self._tolerance:
            return []
        # Independent errors add up by their squares; these cancel as they do now.
        errors = [norm for norm, _ in map(_error, self.waiting)]
        cancelling = ratio(math.hypot(*errors), error * size) if math.isfinite(error) else 1.0
        budget = self._tolerance * size * min(1.0, cancelling)
        allowed = math.sqrt(fair_share([own**2 for own in errors], budget**2))
        allowed_surplus = fair_share([stage.surplus for stage in stages], self._tolerance * whole)
        going_on = []
        for path, stage, own in zip(self.waiting, stages, errors):
            if is_trusted and own <= allowed and stage.surplus <= allowed_surplus:
                continue
            # A path stops by its own relative error and gap.
            aim = ratio(allowed, stage.attributions.norm().item())
            if stage.surplus > allowed_surplus:
                aim = min(aim, stage.gap * allowed_surplus / stage.surplus)
            path.rule.aim(aim)
            if path.refine(affordable(path)):
                going_on.append(path)
        self.waiting = [path for path in self.waiting if path not in going_on]
        return going_on

    @property
    def error_estimate(self) -> float:
        """Estimated relative error of the mean over the paths that wait."""
        norms, maps = zip(*map(_error, self.waiting))
        known = [each for each in maps if each is not None]
        together = torch.stack(known).sum(dim=0).norm().item() if known else 0.0
        unknown = sum(norm for norm, each in zip(norms, maps) if each is None)
        independent = math.hypot(*(norm for norm, each in zip(norms, maps) if each is not None))
        return ratio(max(together, independent) + unknown, self._sum().norm().item())

    def _sum(self) -> Tensor:
        return torch.stack([path.attributions for path in self.waiting]).sum(dim=0)


def fair_share(values: Sequence[float], total: float) -> float:
    """The most that each value may be for their sum to be a total, if smaller ones stay as they are."""
    share = 0.0
    for number, value in enumerate(sorted(values)):
        share = total / (len(values) - number)
        if value > share:
            break
        total -= value
    return share


def _error(path: IntegrationPath) -> tuple[float, Tensor | None]:
    """The norm of a path's estimated error, and that error as a map; None for one that ended before its first stage."""
    if path.stage is None:
        return path.rule.error_estimate * path.attributions.norm().item(), None
    error = path.stage.error_share * path.stage.difference_map
    return error.norm().item(), error
