"""The parameters of `heatmap`."""

from __future__ import annotations

import math
from typing import Any

import pytest
from heatmap_parameters import parse_parameters
from matplotlib import colormaps
from pydantic import ValidationError
from request_parameters import ParameterError

CHOICES = {
    "overlay": ["blend", "heatmap", "masked", "regions"],
    "polarity": ["positive", "negative", "absolute", "all"],
    "colormap": ["auto", "inferno", "magma", "plasma", "viridis", "cividis", "turbo", "coolwarm"],
}


def test_without_parameters_the_documented_defaults_hold() -> None:
    assert parse_parameters({}).model_dump() == {
        "overlay": "blend",
        "polarity": "positive",
        "clip_percentile": 99.0,
        "colormap": "auto",
    }


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in CHOICES.items() for value in values])
def test_every_choice_is_taken(name: str, value: str) -> None:
    assert getattr(parse_parameters({name: value}), name) == value


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("value", ["", "Blend", "positive ", 1, True, None, ["all"]], ids=str)
def test_other_choices_are_refused_with_what_is_allowed(name: str, value: Any) -> None:
    with pytest.raises(ParameterError) as refusal:
        parse_parameters({name: value})
    assert str(refusal.value) == f"parameter {name!r} must be one of {', '.join(CHOICES[name])}, not {value!r}"


def test_every_colormap_but_auto_is_matplotlibs() -> None:
    assert set(CHOICES["colormap"]) - {"auto"} <= set(colormaps)


@pytest.mark.parametrize("value", [50, 100, 99.5, "99.5", " 50 ", "1e2"], ids=repr)
def test_a_percentile_is_a_number_or_its_text(value: Any) -> None:
    percentile = parse_parameters({"clip_percentile": value}).clip_percentile
    assert percentile == float(value)
    assert isinstance(percentile, float)


@pytest.mark.parametrize(
    "value",
    [49.99, 100.01, -99, "101", "", "many", math.nan, "nan", math.inf, "inf", 10**30, True, False, None, [99]],
    ids=str,
)
def test_other_percentiles_are_refused_by_name(value: Any) -> None:
    with pytest.raises(ParameterError, match="parameter 'clip_percentile' must be a number from 50 to 100, not "):
        parse_parameters({"clip_percentile": value})


def test_an_unknown_name_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ParameterError) as refusal:
        parse_parameters({"colourmap": "magma"})
    assert str(refusal.value) == (
        "unknown parameter 'colourmap'; known are clip_percentile, colormap, overlay, polarity"
    )


def test_names_of_other_steps_and_tritons_own_are_passed_over() -> None:
    sent = {"n_steps": 20, "triton_enable_empty_final_response": True, "id": "a request", "overlay": "masked"}
    assert parse_parameters(sent, {"n_steps"}) == parse_parameters({"overlay": "masked"})
    with pytest.raises(ParameterError, match="unknown parameter 'n_steps'"):
        parse_parameters(sent)


def test_messages_stay_short_whatever_came() -> None:
    for sent in ({"x" * 10_000: 1}, {"overlay": "x" * 10_000}, {"clip_percentile": "9" * 10_000}):
        with pytest.raises(ParameterError) as refusal:
            parse_parameters(sent)
        assert len(str(refusal.value)) < 250


def test_parsed_parameters_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        parse_parameters({}).overlay = "masked"


def test_what_was_sent_is_left_as_it_was() -> None:
    sent = {"clip_percentile": "98", "triton_priority": 1}
    parse_parameters(sent)
    assert sent == {"clip_percentile": "98", "triton_priority": 1}
