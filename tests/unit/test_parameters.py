"""What the client checks of request parameters, against what the server does."""

import re

import pytest
from attribution_parameters import BASELINES, INTERNAL, AttributionParameters, Limits
from attribution_parameters import parse_parameters as parse_attribution
from heatmap_parameters import HeatmapParameters
from request_parameters import ParameterError

from explain_client import parameters
from explain_client.labels import class_of
from explain_client.protocol import explain_call

SERVED = {**AttributionParameters.model_fields, **HeatmapParameters.model_fields}


def test_the_client_knows_the_parameters_of_the_server():
    assert set(parameters.NAMES) == set(SERVED) - INTERNAL
    assert parameters.BASELINES == BASELINES
    for name in parameters.NAMES:
        words = parameters.choices(name)
        assert words == getattr(SERVED[name].annotation, "__args__", ()) or not words
        if words or name == "baseline":  # which takes several words
            continue
        bounds = {
            key: getattr(each, key)
            for each in SERVED[name].metadata
            for key in ("ge", "le", "lt")
            if hasattr(each, key)
        }
        highest = bounds.get("le", bounds["lt"] - 1 if "lt" in bounds else None)
        assert parameters.RANGES[name] == (bounds["ge"], highest), name


@pytest.mark.parametrize(
    "values",
    [
        {"tolerance": 0.1, "method": "calibrated"},
        {"deadline_ms": 100, "method": "riemann_left"},
        {"tolerance": 0.1, "n_steps": 2},
        {"deadline_ms": 100, "n_steps": 2},
        {"method": "riemann_middle", "n_steps": 1},
        {"method": "gausslegendre", "n_steps": 1},
        {"tolerance": 0.1, "n_steps": 3},
        {"n_steps": 1},
        {"baseline": "black,white", "nt_samples": 2},
        {"baseline": "black,white", "stdevs": 0.1},
        {"baseline": "black", "nt_samples": 2},
        {"baseline": "black,white"},
        {"baseline": "images"},
        {"baseline": "images,white"},
        {"baseline": "images", "stdevs": 0.1},
    ],
)
def test_contradictions_are_those_that_the_server_refuses(values):
    try:
        parse_attribution(values, Limits())
        is_refused = False
    except ParameterError:
        is_refused = True
    assert bool(parameters.contradiction(values)) == is_refused


def test_an_unknown_parameter_gets_the_name_that_is_near():
    message = re.escape("unknown parameter 'tolerence'; did you mean 'tolerance'?; known are n_steps, ")
    with pytest.raises(TypeError, match=message):
        explain_call("explain", b"image", [-1], 5, [], {"tolerence": 0.05})
    with pytest.raises(TypeError, match="unknown parameter 'xyz'; known are"):
        explain_call("explain", b"image", [-1], 5, [], {"xyz": 1})


LABELS = ["tench, Tinca tinca", "tiger cat", "Egyptian_cat", "crane", "crane", "star", "7 seas"]


def test_classes_have_numbers_and_names():
    for name, number in (
        (3, 3),
        (-1, -1),
        ("3", 3),
        ("Star", 5),
        ("egyptian cat", 2),
        ("tinca tinca", 0),
        ("7 seas", 6),
    ):
        assert class_of(name, LABELS) == number


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cat", "'cat' is not one of the server's 7 labels; near are tiger cat, Egyptian_cat"),
        ("strar", "near are star"),
        ("zzz", "'explain labels' lists them"),
        ("crane", "'crane' is the label of 3, 4: give the number"),
        (7, "7 is not one of the server's classes, 0 to 6"),
        (-2, "-2 is not"),
    ],
)
def test_an_unknown_class_gets_near_ones(name, message):
    with pytest.raises(ValueError, match=message):
        class_of(name, LABELS)


@pytest.mark.parametrize("baseline", ["black,white", ["black", "white"], ("black", "white")], ids=str)
def test_several_baselines_are_sent_as_one_text(baseline):
    assert parameters.as_sent({"baseline": baseline, "n_steps": 5}) == {"baseline": "black,white", "n_steps": 5}
