"""Where the paths of one network need their nodes: found by `tools/calibrate`, kept in a file beside the network."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

FILE_NAME = "path_density.json"
OUTPUTS = ("logit", "probability")
# Of the demo network, for want of another.
TYPICAL_ERROR_SCALE = 1.0
# Of the mean density: no part of a path goes without nodes because calibration images were quiet there.
LEAST_DENSITY = 0.1


class CalibrationError(Exception):
    """There is no calibration of this network; the message says what there is instead."""


@dataclass(frozen=True)
class PathDensity:
    """How much the gradients change along a path, on average over images.

    ``gradient_change``: for each explained output (``logit``, ``probability``), the mean change of the attribution's
    integrand over equal intervals of [0, 1], relative to the attribution, float64 [intervals].

    ``error_scale``: for each output, what the relative error of a single step would be if errors fell with the number
    of steps as they do where there are more; nine in ten images stay below.
    """

    gradient_change: Mapping[str, Tensor]
    error_scale: Mapping[str, float]

    @classmethod
    def unknown(cls) -> PathDensity:
        """For a network that was not calibrated: the same everywhere."""
        return cls(dict.fromkeys(OUTPUTS, torch.ones(1).double()), dict.fromkeys(OUTPUTS, TYPICAL_ERROR_SCALE))

    @classmethod
    def load(cls, file: Path, model_sha256: str) -> PathDensity:
        """Read what `tools/calibrate` wrote for the network whose file has that checksum.

        Raises:
            CalibrationError: there is no such file, it cannot be read, or it is another network's.
        """
        hint = "python -m tools.calibrate writes it"
        try:
            content = json.loads(file.read_text())
            found = content["model_sha256"]
        except FileNotFoundError:
            raise CalibrationError(f"this network has no {file.name}; {hint}") from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CalibrationError(f"{file.name} cannot be read ({error!r:.100}); {hint}") from None
        if found != model_sha256:
            raise CalibrationError(
                f"{file.name} belongs to another network (sha256 {found!s:.12}..., not {model_sha256:.12}...); {hint}"
            )
        changes, scales = {}, {}
        for name in OUTPUTS:
            try:
                changes[name] = torch.tensor(content["gradient_change"][name]).double()
                scales[name] = float(content["error_scale"][name])
                is_valid = changes[name].dim() == 1 and len(changes[name]) > 0 and 0 < scales[name] < math.inf
                is_valid = is_valid and bool((changes[name].isfinite() & (changes[name] >= 0)).all())
            except (KeyError, TypeError, ValueError, RuntimeError):
                is_valid = False
            if not is_valid:
                raise CalibrationError(f"{file.name} has no valid gradient_change or error_scale for {name!r}; {hint}")
        return cls(changes, scales)

    def edges(self, output: str, n_steps: int) -> Tensor:
        """``n_steps`` + 1 places from 0 to 1, float64, with as much density between any two.

        The density is the square root of the gradients' change.
        """
        density = self.gradient_change[output].sqrt()
        density = density.clamp_min(LEAST_DENSITY * density.mean()) if density.any() else torch.ones_like(density)
        reached = torch.cat((torch.zeros(1).double(), density.cumsum(dim=0)))
        wanted = torch.linspace(0, 1, n_steps + 1, dtype=torch.float64)[1:-1] * reached[-1]
        interval = torch.searchsorted(reached, wanted, right=True) - 1
        inside = (interval + (wanted - reached[interval]) / density[interval]) / len(density)
        return torch.cat((torch.zeros(1).double(), inside, torch.ones(1).double()))
