"""The request parameters of ``integrated_gradients``: parsed and validated once, here."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import Field
from request_parameters import Integer, Number, ParameterError, RequestParameters, refusal, validate

# `explain_stream` uses them to request an attribution in interleaved parts; messages to clients leave them out.
INTERNAL = frozenset({"part", "parts"})
BASELINES = ("zero", "black", "gray", "white", "blur", "noise", "images")


@dataclass(frozen=True)
class Limits:
    """The largest values that a request may have; settings of the model.

    ``max_gradients`` bounds ``n_steps`` times ``nt_samples`` times baselines times images, to which a request's time is
    proportional.
    """

    max_n_steps: int = 1000
    max_nt_samples: int = 50
    max_gradients: int = 5000


class AttributionParameters(RequestParameters):
    """Parameters of Integrated Gradients."""

    n_steps: Integer = Field(
        50,
        ge=1,
        description="an integer from 1 (2 with a riemann method, 3 with tolerance or deadline_ms) to {max_n_steps}",
    )
    method: Literal[
        "gausslegendre", "riemann_left", "riemann_right", "riemann_middle", "riemann_trapezoid", "calibrated"
    ] = Field("gausslegendre", description="one of {choices}")
    baseline: str = Field(
        "zero",
        description=f"one of {', '.join(BASELINES)}, or several but images, separated by commas, for their mean",
    )
    output: Literal["logit", "probability"] = Field("logit", description="one of {choices}")
    contrast: Integer | None = Field(None, ge=0, description="an integer from 0 to the number of classes - 1")
    tolerance: Number | None = Field(
        None, ge=0.001, le=0.5, allow_inf_nan=False, description="a number from 0.001 to 0.5"
    )
    deadline_ms: Number | None = Field(
        None, ge=1, le=60_000, allow_inf_nan=False, description="a number from 1 to 60000"
    )
    parts: Integer = Field(1, ge=1, description="an integer from 1 to n_steps")
    part: Integer = Field(0, ge=0, description="an integer from 0 to parts - 1")
    nt_samples: Integer = Field(1, ge=1, description="an integer from 1 to {max_nt_samples}")
    stdevs: Number = Field(0.1, ge=0, le=10, allow_inf_nan=False, description="a number from 0 to 10")
    seed: Integer = Field(0, ge=0, lt=2**63, description="an integer from 0 to 2**63 - 1")

    @property
    def baselines(self) -> tuple[str, ...]:
        """The names of the baselines."""
        return tuple(name.strip() for name in self.baseline.split(","))

    @property
    def smooths(self) -> bool:
        """Whether the request names a noise parameter; without one there is no noise, whatever their defaults."""
        return bool(self.model_fields_set & {"nt_samples", "stdevs"})

    def check_combinations(self) -> None:
        """Refuse values that contradict each other.

        Raises:
            ParameterError: two values do; the message names both.
        """
        self._check_baselines()
        for name in ("tolerance", "deadline_ms"):
            if getattr(self, name) is not None and "method" in self.model_fields_set:
                places = f"{name!r}, which places its own nodes"
                raise ParameterError(f"parameter 'method' must be absent beside {places}, not {self.method!r}")
        if self.parts > 1 and (
            self.method == "calibrated" or self.tolerance is not None or self.deadline_ms is not None
        ):
            raise ParameterError(
                "parameter 'parts' must be absent beside 'tolerance', 'deadline_ms' and the method 'calibrated', "
                f"not {self.parts}"
            )
        if self.part >= self.parts:
            raise ParameterError(f"parameter 'part' must be below 'parts', {self.parts}, not {self.part}")
        if self.parts > self.n_steps:
            raise ParameterError(f"parameter 'parts' must be at most 'n_steps', {self.n_steps}, not {self.parts}")

    def _check_baselines(self) -> None:
        names = self.baselines
        if not set(names) <= set(BASELINES):
            raise refusal(type(self), "baseline", self.baseline, {})
        if len(set(names)) < len(names):
            raise ParameterError(f"parameter 'baseline' must name each baseline once, not {self.baseline!r:.100}")
        if len(names) > 1 and "images" in names:
            raise ParameterError(f"parameter 'baseline' must be 'images' alone, not {self.baseline!r:.100}")
        if (len(names) > 1 or "images" in names) and self.smooths:
            noise = " and ".join(repr(name) for name in ("nt_samples", "stdevs") if name in self.model_fields_set)
            raise ParameterError(f"parameter {noise} must be absent beside several baselines")

    def check_limits(self, limits: Limits) -> None:
        """Check the values against the server's limits.

        Raises:
            ParameterError: a value is over its limit.
        """
        least = (
            3
            if self.tolerance is not None or self.deadline_ms is not None
            else 2
            if self.method.startswith("riemann")
            else 1
        )
        if not least <= self.n_steps <= limits.max_n_steps:
            raise _refusal("n_steps", self.n_steps, limits)
        if self.nt_samples > limits.max_nt_samples:
            raise _refusal("nt_samples", self.nt_samples, limits)

    def check_cost(self, images: int, baselines: int, limits: Limits) -> None:
        """Check the gradients of a request against the server's limit.

        Args:
            images: of the request.
            baselines: that ``baseline`` stands for.
            limits: the server's.

        Raises:
            ParameterError: they are too many.
        """
        gradients = self.n_steps * self.nt_samples * baselines * images
        if gradients > limits.max_gradients:
            several = baselines > 1
            raise ParameterError(
                f"parameter 'n_steps' times 'nt_samples' {'times baselines ' * several}times images must be at most "
                f"{limits.max_gradients}, not {self.n_steps} x {self.nt_samples} "
                f"{f'x {baselines} ' * several}x {images} = {gradients}"
            )


def parse_parameters(sent: Mapping[str, Any], limits: Limits, foreign: Set[str] = frozenset()) -> AttributionParameters:
    """Validate the parameters of one request.

    Args:
        sent: names and values as received; numbers may be numeric strings.
        limits: the server's limits.
        foreign: names to ignore, because they belong to other steps of an ensemble. Triton's own are ignored too.

    Raises:
        ParameterError: names the parameter, its value and what is allowed.
    """
    parameters = validate(AttributionParameters, sent, foreign, asdict(limits), INTERNAL)
    parameters.check_combinations()
    parameters.check_limits(limits)
    return parameters


def read_parameters(sent: Mapping[str, Any]) -> AttributionParameters | None:
    """The same for other models: ignores all unknown names, and returns None for values that will be refused later."""
    try:
        foreign = sent.keys() - AttributionParameters.model_fields.keys()
        parameters = validate(AttributionParameters, sent, foreign, asdict(Limits()))
        parameters.check_combinations()
    except ParameterError:
        return None
    return parameters


def _refusal(name: str, value: Any, limits: Limits) -> ParameterError:
    return refusal(AttributionParameters, name, value, asdict(limits))
