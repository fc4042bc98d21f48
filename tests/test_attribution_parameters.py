"""The parameters of `integrated_gradients`."""

import math

import pytest
from attribution_parameters import AttributionParameters, Limits, ParameterError, parse_parameters


def test_defaults_are_captums():
    assert parse_parameters({}, Limits()) == AttributionParameters.model_construct(
        n_steps=50, method="gausslegendre", baseline="zero", output="logit"
    )


@pytest.mark.parametrize("value", [20, "20", 20.0, "20.0", " 20 "])
def test_numbers_may_come_in_any_form(value):
    assert parse_parameters({"n_steps": value}, Limits()).n_steps == 20


@pytest.mark.parametrize(
    "value", [0, -1, 1001, 2.5, "2.5", "", "ten", "nan", math.nan, math.inf, "inf", 10**30, True, None, [20]], ids=str
)
def test_other_step_counts_are_refused_by_name(value):
    with pytest.raises(ParameterError, match=r"'n_steps' must be an integer from 1 .* to 1000"):
        parse_parameters({"n_steps": value}, Limits())


def test_riemann_rules_need_two_steps():
    with pytest.raises(ParameterError, match="n_steps"):
        parse_parameters({"n_steps": 1, "method": "riemann_middle"}, Limits())
    assert parse_parameters({"n_steps": 1}, Limits()).n_steps == 1


def test_the_limit_is_the_servers_for_the_default_too():
    with pytest.raises(ParameterError, match=r"to 20, not 50"):
        parse_parameters({}, Limits(max_n_steps=20))


def test_foreign_names_and_tritons_own_pass_by():
    parse_parameters({"colormap": "x", "triton_enable_empty_final_response": True}, Limits(), {"colormap"})


def test_unknown_names_are_refused():
    with pytest.raises(ParameterError, match="unknown parameter 'nsteps'"):
        parse_parameters({"nsteps": 20}, Limits())


def test_messages_stay_short_whatever_came():
    with pytest.raises(ParameterError) as refusal:
        parse_parameters({"method": "x" * 100_000}, Limits())
    assert len(str(refusal.value)) < 400
