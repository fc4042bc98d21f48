"""The request parameters of ``heatmap``: parsed and validated once, here."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any, Literal

from pydantic import Field
from request_parameters import Number, RequestParameters, validate


class HeatmapParameters(RequestParameters):
    """How an attribution is drawn."""

    overlay: Literal["blend", "heatmap", "masked", "regions"] = Field("blend", description="one of {choices}")
    polarity: Literal["positive", "negative", "absolute", "all"] = Field("positive", description="one of {choices}")
    clip_percentile: Number = Field(99.0, ge=50, le=100, allow_inf_nan=False, description="a number from 50 to 100")
    colormap: Literal["auto", "inferno", "magma", "plasma", "viridis", "cividis", "turbo", "coolwarm"] = Field(
        "auto", description="one of {choices}"
    )


def parse_parameters(sent: Mapping[str, Any], foreign: Set[str] = frozenset()) -> HeatmapParameters:
    """Validate the parameters of one request.

    Args:
        sent: names and values as received; numbers may be numeric strings.
        foreign: names to ignore, because they belong to other steps of an ensemble. Triton's own are ignored too.

    Raises:
        ParameterError: names the parameter, its value and what is allowed.
    """
    return validate(HeatmapParameters, sent, foreign)
