"""What is said beside a picture of an explanation, in words for people who do not know the method."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from explain_client.parameters import Polarity
from explain_client.results import Prediction

# Of the serving contract -> what the colours show. The signed view is the one that needs no explanation.
POLARITIES: Mapping[Polarity, str] = {
    "all": "evidence for and against",
    "positive": "evidence for, alone",
    "negative": "evidence against, alone",
    "absolute": "evidence of either sign",
}
NOTHING = "says nothing"
# Before a per cent sign, so that no line ends there.
_SPACE = "\N{NO-BREAK SPACE}"
# A larger share of a picture that the network did not see is worth a warning.
CUT_WORTH_A_WARNING = 1 / 3
# "Accurate to about 80 %" would sound like praise.
ROUGH = 0.2
# Below this strength, relative to the strongest of the run, hardly a colour is visible.
WEAK = 0.25


@dataclass(frozen=True)
class Caption:
    """The words of one picture.

    Attributes:
        prediction: the likeliest class with its probability.
        question: which class is explained, and compared with which.
        against, in_favour: the ends of the colour bar.
        accuracy: how exactly the colours were computed.
        warning: how much of the picture the network did not see, if that is much; else empty.
    """

    prediction: str
    question: str
    against: str
    in_favour: str
    accuracy: str
    warning: str


def caption(
    predictions: tuple[Prediction, ...],
    explained: str,
    error_estimate: float,
    cut_away: float,
    contrast: str | None = None,
    polarity: Polarity = "all",
) -> Caption:
    """The words for an explanation.

    Args:
        predictions: the likeliest classes, best first.
        explained: label of the class that is explained.
        error_estimate: of the explanation, relative; NaN if there is none.
        cut_away: share of the picture that the network did not see.
        contrast: label of the class that was subtracted.
        polarity: of the colours.
    """
    best = predictions[0]
    against = f"speaks for {contrast}" if contrast else f"speaks against {explained}"
    in_favour = f"speaks for {explained}"
    ends = {
        "all": (against, in_favour),
        "positive": (NOTHING, in_favour),
        "negative": (against, NOTHING),
        "absolute": (NOTHING, "speaks for or against"),
    }[polarity]
    return Caption(
        prediction=f"{best.label}, {percent(best.probability)}",
        question=f"Why {explained}{f' rather than {contrast}' if contrast else ''}?",
        against=ends[0],
        in_favour=ends[1],
        accuracy=accuracy(error_estimate),
        warning=cut_warning(cut_away),
    )


def accuracy(error_estimate: float) -> str:
    """The error estimate in words that nobody takes for the prediction's."""
    if math.isnan(error_estimate):
        return "the accuracy of this explanation was not estimated"
    if error_estimate > ROUGH:
        return f"rough explanation, off by about {percent(error_estimate)}"
    if error_estimate < 0.01:
        return f"explanation accurate to better than 1{_SPACE}%"
    return f"explanation accurate to about ±{percent(error_estimate)}"


def regions(explained: str, contrast: str | None = None, polarity: Polarity = "positive") -> str:
    """What the server's picture of regions shows.

    Args:
        explained: label of the class that is explained.
        contrast: label of the class that was subtracted.
        polarity: of that picture.
    """
    other = f"for {contrast}" if contrast else f"against {'it' if polarity in ('absolute', 'all') else explained}"
    evidence = {
        "positive": f"for {explained}",
        "negative": other,
        "absolute": f"for {explained} or {other}",
        "all": f"for {explained} (red) or {other} (blue)",
    }[polarity]
    return f"In colour: the parts that hold half of the evidence {evidence}"


def cut_warning(share: float) -> str:
    """A warning if a large part of a picture was cut away; else empty."""
    if share <= CUT_WORTH_A_WARNING:
        return ""
    return f"{percent(share)} of this picture lies outside the frame: the network never saw it"


def strength(share: float, pictures: int, strongest: str) -> str:
    """How strong the evidence of one picture is beside that of its run, in words.

    Args:
        share: of the strength of the run's strongest picture, in [0, 1].
        pictures: in the run.
        strongest: name of the strongest one.
    """
    if pictures == 1:
        return "the only picture here: nothing to compare its strength with"
    if share >= 1:
        return f"the strongest colours of the {pictures} pictures here"
    what = "weak colours," if share < WEAK else "colours"
    return f"{what} {percent(share)} as strong as in {strongest}, the strongest here"


def title(name: str) -> str:
    """What a picture is called: the name of its file, without folders."""
    return Path(name).name or name


def percent(share: float) -> str:
    """A share as whole per cent, never rounded to none or all."""
    if share >= 1 or share <= 0:
        return f"{100 * share:.0f}{_SPACE}%"
    if share < 0.005:
        return f"under 1{_SPACE}%"
    return f"over 99{_SPACE}%" if share > 0.995 else f"{100 * share:.0f}{_SPACE}%"
