"""Where the paths of a network need their nodes: measured by `tools/calibrate`, kept in a file beside the network."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from error_law import ErrorLaw
from path_quadrature import even_bounds, share_out
from torch import Tensor

FILE_NAME = "path_density.json"
OUTPUTS = ("logit", "probability")
# With a lower order, planned numbers of steps would grow without bound.
LEAST_ORDER = 0.3


class CalibrationError(Exception):
    """There is no valid calibration of this network; the message says why."""


@dataclass(frozen=True)
class PathDensity:
    """Where the nodes of a network's paths belong, and what error to expect of a number of steps.

    ``density``: for each explained output (``logit``, ``probability``), the relative density of nodes on equal
    intervals of [0, 1], float64 [intervals].

    ``law``: for each output, how the relative error falls with the number of steps that are placed by that density.
    """

    density: Mapping[str, Tensor]
    law: Mapping[str, ErrorLaw]

    @classmethod
    def load(cls, file: Path, model_sha256: str) -> PathDensity:
        """Read the file of `tools/calibrate` for the network whose file has that checksum.

        Raises:
            CalibrationError: the file is missing, not valid, or another network's.
        """
        hint = "python -m tools.calibrate writes it"
        try:
            content = json.loads(file.read_text())
            calibrated_sha256 = content["model_sha256"]
        except FileNotFoundError:
            raise CalibrationError(f"this network has no {file.name}; {hint}") from None
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise CalibrationError(f"{file.name} cannot be read ({error!r:.100}); {hint}") from None
        if calibrated_sha256 != model_sha256:
            raise CalibrationError(
                f"{file.name} belongs to another network (sha256 {calibrated_sha256!s:.12}..., "
                f"not {model_sha256:.12}...); {hint}"
            )
        densities, laws = {}, {}
        for name in OUTPUTS:
            try:
                density = torch.tensor(content["density"][name]).double()
                law = ErrorLaw(**{key: float(value) for key, value in content["error_law"][name].items()})
                is_valid = density.dim() == 1 and len(density) > 0
                is_valid = is_valid and bool((density.isfinite() & (density >= 0)).all())
                is_valid = is_valid and all(0 < value < math.inf for value in vars(law).values())
                is_valid = is_valid and law.order >= LEAST_ORDER
            except (KeyError, TypeError, ValueError, OverflowError, RuntimeError, AttributeError):
                is_valid = False
            if not is_valid:
                raise CalibrationError(f"{file.name} has no valid density or error_law for {name!r}; {hint}")
            densities[name], laws[name] = density, law
        return cls(densities, laws)

    def edges(self, output: str, n_steps: int) -> Tensor:
        """``n_steps`` + 1 places from 0 to 1, float64, with equal density between neighbours."""
        density = self.density[output]
        return share_out(density, even_bounds(len(density)), n_steps)
