"""The request parameters of the serving contract: their types, and what the client checks before it sends them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypedDict, get_args, get_origin, get_type_hints

Method: TypeAlias = Literal[
    "gausslegendre", "riemann_left", "riemann_right", "riemann_middle", "riemann_trapezoid", "calibrated"
]
Baseline: TypeAlias = Literal["zero", "black", "gray", "white", "blur", "noise", "images"]
Output: TypeAlias = Literal["logit", "probability"]
Overlay: TypeAlias = Literal["blend", "heatmap", "masked", "regions"]
Polarity: TypeAlias = Literal["positive", "negative", "absolute", "all"]
Colormap: TypeAlias = Literal["auto", "inferno", "magma", "plasma", "viridis", "cividis", "turbo", "coolwarm"]


class TensorParameters(TypedDict, total=False):
    """Parameters of ``integrated_gradients``: those of an explanation, without those of its drawing."""

    n_steps: int
    method: Method
    baseline: Baseline | Sequence[Baseline]
    output: Output
    contrast: int | str
    tolerance: float
    deadline_ms: float
    nt_samples: int
    stdevs: float
    seed: int


class Parameters(TensorParameters, total=False):
    """Parameters of an explanation; the serving contract says what they mean. ``contrast`` is a class or its label.

    Several baselines are a list, and the explanation is the mean over them.
    """

    overlay: Overlay
    polarity: Polarity
    clip_percentile: float
    colormap: Colormap


BASELINES: tuple[Baseline, ...] = get_args(Baseline)
# Smallest and largest value, None where the server's settings decide. Tests compare them with the server's own.
RANGES: Mapping[str, tuple[float, float | None]] = {
    "n_steps": (1, None),
    "contrast": (0, None),
    "tolerance": (0.001, 0.5),
    "deadline_ms": (1, 60_000),
    "nt_samples": (1, None),
    "stdevs": (0, 10),
    "seed": (0, 2**63 - 1),
    "clip_percentile": (50, 100),
}
NAMES = tuple(get_type_hints(Parameters))


def choices(name: str) -> tuple[str, ...]:
    """The values of a parameter that takes one word; empty for others."""
    kind = get_type_hints(Parameters)[name]
    return get_args(kind) if get_origin(kind) is Literal else ()


def is_integer(name: str) -> bool:
    """Whether a parameter is an integer."""
    return get_type_hints(Parameters)[name] in (int, int | str)


def as_sent(parameters: Mapping[str, Any]) -> dict[str, str | int]:
    """Request parameters to send: several baselines as one text, floats as text.

    The Python backend of Triton 2.51 drops doubles.

    Raises:
        TypeError: a name is no parameter.
    """
    for name in parameters:
        if name not in NAMES:
            raise TypeError(f"unknown parameter {name!r}{did_you_mean(name, NAMES)}; known are {', '.join(NAMES)}")
    return {name: _as_sent(value) for name, value in parameters.items()}


def _as_sent(value: Any) -> str | int:
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    sent: str | int = str(value) if isinstance(value, float) else value
    return sent


def contradiction(parameters: Mapping[str, Any]) -> str:
    """What the server would refuse about values that are each allowed; empty if nothing."""
    method = parameters.get("method")
    adaptive = [name for name in ("tolerance", "deadline_ms") if parameters.get(name) is not None]
    if adaptive and method is not None:
        return f"method must be absent beside {adaptive[0]}, which places its own points"
    noise = next((name for name in ("nt_samples", "stdevs") if parameters.get(name) is not None), "")
    baseline = str(_as_sent(parameters.get("baseline", "")))
    if "," in baseline and "images" in baseline:
        return "baseline must be images alone"
    if noise and ("," in baseline or baseline == "images"):
        return f"{noise} must be absent beside several baselines"
    least = 3 if adaptive else 2 if (method or "").startswith("riemann") else 1
    if parameters.get("n_steps") is not None and parameters["n_steps"] < least:
        return f"n_steps must be at least {least} with {adaptive[0] if adaptive else method}"
    return ""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A suggestion to append to an error about an unknown word; empty if nothing known is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
