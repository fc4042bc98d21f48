"""Validation of request parameters. Numbers may be numeric strings; errors name the parameter and its value."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError


class ParameterError(ValueError):
    """A request parameter is unknown or has a value that is not allowed; the message names both."""


def _refuse_booleans(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a boolean is no number")
    return value


Integer = Annotated[int, BeforeValidator(_refuse_booleans)]
Number = Annotated[float, BeforeValidator(_refuse_booleans)]


class RequestParameters(BaseModel):
    """Parameters of one model. Each field's description completes "NAME must be"."""

    model_config = ConfigDict(frozen=True, extra="forbid")


ParametersT = TypeVar("ParametersT", bound=RequestParameters)


def is_of_triton(name: str) -> bool:
    """Whether a parameter is Triton's own: ``triton_...``, or ``id``, the request id of its generate extension."""
    return name.startswith("triton_") or name == "id"


def validate(
    kind: type[ParametersT],
    sent: Mapping[str, Any],
    foreign: Set[str] = frozenset(),
    limits: Mapping[str, Any] | None = None,
    internal: Set[str] = frozenset(),
) -> ParametersT:
    """Validate the parameters of one request.

    Args:
        kind: the model's parameter class.
        sent: names and values as received.
        foreign: names to ignore, because they belong to other steps of an ensemble. Triton's own are ignored too.
        limits: values for the names in braces in descriptions.
        internal: names that are accepted, but not listed in messages.

    Raises:
        ParameterError: names the parameter, its value and what is allowed.
    """
    values = {name: value for name, value in sent.items() if name not in foreign and not is_of_triton(name)}
    fields = kind.model_fields
    for name in values:
        if name not in fields:
            known = ", ".join(sorted(set(fields) - internal))
            raise ParameterError(f"unknown parameter {name!r:.100}; known are {known}")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        raise refusal(kind, name, values[name], limits or {}) from None


def refusal(kind: type[RequestParameters], name: str, value: Any, limits: Mapping[str, Any]) -> ParameterError:
    """The error for a parameter's value that is not allowed."""
    field = kind.model_fields[name]
    choices = ", ".join(map(str, getattr(field.annotation, "__args__", ())))
    allowed = (field.description or "").format(**limits, choices=choices)
    return ParameterError(f"parameter {name!r} must be {allowed}, not {value!r:.100}")
