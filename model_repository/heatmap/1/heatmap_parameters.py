"""The request parameters of ``heatmap``: parsed and validated once, trusted by everything after."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError


class ParameterError(ValueError):
    """A request parameter is unknown or has a value that is not allowed; the message names both."""


def _refuse_booleans(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a boolean is no number")
    return value


class HeatmapParameters(BaseModel):
    """How an attribution is drawn. Each description completes "NAME must be"."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    overlay: Literal["blend", "heatmap", "masked"] = Field("blend", description="one of {choices}")
    polarity: Literal["positive", "negative", "absolute", "all"] = Field("positive", description="one of {choices}")
    clip_percentile: Annotated[float, BeforeValidator(_refuse_booleans)] = Field(
        99.0, ge=50, le=100, allow_inf_nan=False, description="a number from 50 to 100"
    )
    colormap: Literal["auto", "inferno", "magma", "plasma", "viridis", "cividis", "turbo", "coolwarm"] = Field(
        "auto", description="one of {choices}"
    )


def parse_parameters(sent: Mapping[str, Any], foreign: Set[str] = frozenset()) -> HeatmapParameters:
    """Validate the parameters of one request.

    Args:
        sent: names and values as they came; numbers may be numeric strings.
        foreign: names that are passed over, because they belong to other steps of an ensemble. Names that begin with
            ``triton_`` are Triton's own and are passed over too.

    Raises:
        ParameterError: names the parameter, what came and what is allowed.
    """
    own = {name: value for name, value in sent.items() if name not in foreign and not name.startswith("triton_")}
    fields = HeatmapParameters.model_fields
    for name in own:
        if name not in fields:
            raise ParameterError(f"unknown parameter {name!r:.100}; known are {', '.join(sorted(fields))}")
    try:
        return HeatmapParameters.model_validate(own)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
    choices = ", ".join(getattr(fields[name].annotation, "__args__", ()))
    raise ParameterError(
        f"parameter {name!r} must be {fields[name].description.format(choices=choices)}, not {own[name]!r:.100}"
    )
