"""How the error of discrete gradients falls with their number, by which Richardson extrapolation plans its steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Cosine between the errors of two numbers of steps: 0.4 to 0.75 for EfficientNet-Lite0 and 9 photographs, with 5 to 40
# steps and ratios of 1.5 to 4. With 1, `share` would be Richardson's formula.
ERROR_CORRELATION = 0.65
# Planned for in the first stage: if it just fails, the second one costs half as many steps again.
PLANNING_RESERVE = 1.15
# Range of orders that three numbers of steps can measure; values beyond it are chance.
LEAST_ORDER, MOST_ORDER = 1.2, 1.75


@dataclass(frozen=True)
class ErrorLaw:
    """The relative error of n steps is at most ``scale * n**-order`` for 90 % of images.

    The difference of two numbers of steps, times ``share`` and ``margin``, is at least the error of the larger number
    for 95 % of images.
    """

    scale: float
    order: float
    margin: float

    def error(self, n_steps: int) -> float:
        """The relative error to expect of ``n_steps`` steps."""
        return self.scale / n_steps**self.order

    def share(self, coarse: int, fine: int) -> float:
        """The error of ``fine`` steps as a share of their difference to ``coarse`` steps, both as norms."""
        times = (fine / coarse) ** self.order
        return 1 / math.sqrt(times**2 + 1 - 2 * ERROR_CORRELATION * times)

    def planned_steps(self, tolerance: float) -> int:
        """Steps, at least 2, whose error estimate is expected to be within a tolerance, with some reserve."""
        estimate = PLANNING_RESERVE * self.margin * self.scale
        return max(2, math.ceil((estimate / tolerance) ** (1 / self.order)))


# Used without a calibration; near the law of EfficientNet-Lite0 with ImageNet weights (2.2, 1.2, 1.4).
TYPICAL_LAW = ErrorLaw(scale=2.0, order=1.2, margin=1.2)


def measured_order(ratio: float, coarsest: int, coarse: int, fine: int) -> float:
    """The order p of errors n**-p, from the difference of coarsest and coarse steps and that of coarse and fine steps.

    Args:
        ratio: the first difference divided by the second, as norms.
    """

    def expected(order: float) -> float:
        law = ErrorLaw(1.0, order, 1.0)
        return law.error(coarse) / law.share(coarsest, coarse) * law.share(coarse, fine) / law.error(fine)

    low, high = LEAST_ORDER, MOST_ORDER  # the ratio grows with the order
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if expected(middle) < ratio else (low, middle)
    return (low + high) / 2
