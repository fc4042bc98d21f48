"""The words beside a picture."""

from __future__ import annotations

import math

import pytest

from explain_client import Prediction, captions

PREDICTIONS = (Prediction(3, "tabby", 0.614), Prediction(4, "tiger cat", 0.2))


def words(error=0.021, cut=0.0, contrast=None, polarity="all", explained="tabby"):
    return captions.caption(PREDICTIONS, explained, error, cut, contrast, polarity)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (0.021, "explanation accurate to about ±2\N{NO-BREAK SPACE}%"),
        (0.126, "explanation accurate to about ±13\N{NO-BREAK SPACE}%"),
        (0.83, "rough explanation, off by about 83\N{NO-BREAK SPACE}%"),
        (0.004, "explanation accurate to better than 1\N{NO-BREAK SPACE}%"),
        (math.nan, "the accuracy of this explanation was not estimated"),
    ],
)
def test_the_error_is_the_explanations(error, said):
    assert words(error=error).accuracy == said


@pytest.mark.parametrize(("cut", "is_warned"), [(0.0, False), (0.33, False), (0.34, True), (0.7, True)])
def test_a_warning_when_more_than_a_third_was_cut_away(cut, is_warned):
    warning = words(cut=cut).warning
    assert bool(warning) is is_warned
    assert not is_warned or warning.startswith(
        f"{100 * cut:.0f}\N{NO-BREAK SPACE}% of this picture lies outside the frame"
    )


@pytest.mark.parametrize(
    ("contrast", "polarity", "question", "ends"),
    [
        (None, "all", "Why tabby?", ("speaks against tabby", "speaks for tabby")),
        ("tiger cat", "all", "Why tabby rather than tiger cat?", ("speaks for tiger cat", "speaks for tabby")),
        (None, "positive", "Why tabby?", ("says nothing", "speaks for tabby")),
        (None, "negative", "Why tabby?", ("speaks against tabby", "says nothing")),
        (None, "absolute", "Why tabby?", ("says nothing", "speaks for or against")),
    ],
)
def test_question_and_ends_of_the_colour_bar(contrast, polarity, question, ends):
    said = words(contrast=contrast, polarity=polarity)
    assert (said.question, (said.against, said.in_favour)) == (question, ends)
    assert said.prediction == "tabby, 61\N{NO-BREAK SPACE}%"


@pytest.mark.parametrize(
    ("share", "pictures", "said"),
    [
        (1.0, 1, "the only picture here: nothing to compare its strength with"),
        (1.0, 8, "the strongest colours of the 8 pictures here"),
        (0.5, 8, "colours 50\N{NO-BREAK SPACE}% as strong as in moon.jpg, the strongest here"),
        (0.04, 8, "weak colours, 4\N{NO-BREAK SPACE}% as strong as in moon.jpg, the strongest here"),
    ],
)
def test_strength_is_relative_to_the_run(share, pictures, said):
    assert captions.strength(share, pictures, "moon.jpg") == said


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (0, "0\N{NO-BREAK SPACE}%"),
        (0.001, "under 1\N{NO-BREAK SPACE}%"),
        (0.614, "61\N{NO-BREAK SPACE}%"),
        (0.9999, "over 99\N{NO-BREAK SPACE}%"),
        (1, "100\N{NO-BREAK SPACE}%"),
    ],
)
def test_percent_never_rounds_to_none_or_all(share, said):
    assert captions.percent(share) == said


@pytest.mark.parametrize(
    ("polarity", "contrast", "said"),
    [
        ("positive", None, "for tabby"),
        ("negative", None, "against tabby"),
        ("negative", "lynx", "for lynx"),
        ("absolute", None, "for tabby or against it"),
        ("all", None, "for tabby (red) or against it (blue)"),
        ("all", "lynx", "for tabby (red) or for lynx (blue)"),
    ],
)
def test_a_picture_of_regions_says_what_is_in_colour(polarity, contrast, said):
    caption = captions.regions("tabby", contrast, polarity)
    assert caption == f"In colour: the parts that hold half of the evidence {said}"
