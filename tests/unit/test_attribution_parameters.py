"""The parameters of `integrated_gradients`."""

import math

import pytest
from attribution_parameters import AttributionParameters, Limits, parse_parameters
from request_parameters import ParameterError


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
    sent = {"colormap": "x", "triton_enable_empty_final_response": True, "id": "a request"}
    parse_parameters(sent, Limits(), {"colormap"})


def test_unknown_names_are_refused():
    with pytest.raises(ParameterError, match="unknown parameter 'nsteps'"):
        parse_parameters({"nsteps": 20}, Limits())


def test_messages_stay_short_whatever_came():
    with pytest.raises(ParameterError) as refusal:
        parse_parameters({"method": "x" * 100_000}, Limits())
    assert len(str(refusal.value)) < 400


def test_tolerance_takes_no_method_and_three_steps():
    assert parse_parameters({"tolerance": "0.05"}, Limits()).tolerance == 0.05
    with pytest.raises(ParameterError, match=r"'method' must be absent beside 'tolerance'.*'riemann_middle'"):
        parse_parameters({"tolerance": 0.05, "method": "riemann_middle"}, Limits())
    with pytest.raises(ParameterError, match=r"'n_steps' must be .* 3 with tolerance"):
        parse_parameters({"tolerance": 0.05, "n_steps": 2}, Limits())


@pytest.mark.parametrize("value", [0, 0.0009, 0.51, -0.1, math.nan, math.inf, "nan", "small", True, [0.1]], ids=str)
def test_other_tolerances_are_refused_by_name(value):
    with pytest.raises(ParameterError, match=r"'tolerance' must be a number from 0.001 to 0.5"):
        parse_parameters({"tolerance": value}, Limits())


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ({"parts": 2, "tolerance": 0.1}, "'parts' must be absent beside 'tolerance'"),
        ({"parts": 2, "deadline_ms": 100}, "'parts' must be absent beside"),
        ({"parts": 2, "method": "calibrated"}, "'parts' must be absent beside"),
        ({"parts": 2, "part": 2}, "'part' must be below 'parts', 2, not 2"),
        ({"part": 1}, "'part' must be below 'parts', 1, not 1"),
        ({"parts": 9, "n_steps": 8}, "'parts' must be at most 'n_steps', 8, not 9"),
        ({"parts": 0}, "'parts' must be an integer"),
    ],
    ids=str,
)
def test_parts_that_make_no_sense_are_refused(sent, message):
    with pytest.raises(ParameterError, match=message):
        parse_parameters(sent, Limits())


def test_cost_of_a_request_is_bounded():
    limits = Limits(max_gradients=1000)
    parse_parameters({"n_steps": 50, "nt_samples": 10}, limits).check_cost(2, 1, limits)
    with pytest.raises(
        ParameterError, match=r"'n_steps' times 'nt_samples' times images .* 1000, not 50 x 10 x 3 = 1500"
    ):
        parse_parameters({"n_steps": 50, "nt_samples": 10}, limits).check_cost(3, 1, limits)


def test_several_baselines_are_separated_by_commas():
    assert parse_parameters({"baseline": "black, white,blur"}, Limits()).baselines == ("black", "white", "blur")
    assert parse_parameters({}, Limits()).baselines == ("zero",)


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ({"baseline": "black,purple"}, "'baseline' must be one of zero, black.*, not 'black,purple'"),
        ({"baseline": "black,"}, "'baseline' must be one of"),
        ({"baseline": "black,black"}, "'baseline' must name each baseline once, not 'black,black'"),
        ({"baseline": "images,black"}, "'baseline' must be 'images' alone, not 'images,black'"),
        ({"baseline": "images", "stdevs": 0.1}, "'stdevs' must be absent beside several baselines"),
        ({"baseline": "black,white", "nt_samples": 2}, "'nt_samples' must be absent beside several baselines"),
    ],
)
def test_other_baselines_are_refused_with_the_reason(sent, message):
    with pytest.raises(ParameterError, match=message):
        parse_parameters(sent, Limits())


def test_gradients_of_all_baselines_count_towards_the_limit():
    parameters = parse_parameters({"baseline": "black,white", "n_steps": 100}, Limits(max_gradients=400))
    parameters.check_cost(2, 2, Limits(max_gradients=400))
    with pytest.raises(ParameterError, match="times baselines times images must be at most 399, not 100 x 1 x 2 x 2"):
        parameters.check_cost(2, 2, Limits(max_gradients=399))
