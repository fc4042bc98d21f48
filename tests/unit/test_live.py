"""The live page's pictures, without Gradio and without a server."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from conftest import encode
from PIL import Image

from explain_client import Classification, Level, Network, Prediction, RefusedError
from explain_client.images import View
from explain_client.live import Question, Session, Style

FILE = encode(Image.new("RGB", (600, 200), (128, 128, 128)))
PREDICTIONS = (Prediction(1, "ring", 0.7), Prediction(0, "star", 0.2))
QUESTION = Question(None, None, 0.05)


class Answers:
    """Stands in for a client: answers each stream with a prediction and two levels, and remembers the requests."""

    def __init__(self, strength: float = 1.0) -> None:
        self.strength = strength
        self.requests: list[dict[str, object]] = []

    def explain_stream(self, file, *, target, want, **parameters):
        self.requests.append({"target": target, "want": want, **parameters})
        if parameters["tolerance"] == 0.5:
            raise RefusedError("[invalid] tolerance <b>0.5</b>")
        yield Classification(PREDICTIONS, 1 if target is None else target, 30.0)
        for steps, error, is_last in ((3, 0.8, False), (40, 0.04, True)):
            saliency = np.full((224, 224), self.strength, np.float32)
            yield Level(0.0, steps, error, 100.0, saliency, None, None, is_last)


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def session(answers) -> Session:
    return Session(answers, View(), Network("resnet18", "", "c0ffee"), ("star", "ring"))


def explain(session: Session, number: int = 0, question: Question = QUESTION) -> list[str]:
    """What the panel shows each time."""
    return [session.html(number, Style()) for _ in session.explain(number, FILE, "one.png", question)]


def strength(html: str) -> float:
    return float(re.findall(r"--strength:([\d.]+)", html)[0])


def test_prediction_comes_first_and_then_the_colours_sharpen(session):
    first, coarse, last = explain(session)
    assert "The network says <b>ring, 70\N{NO-BREAK SPACE}%</b>" in first
    assert "explaining" in first
    assert 'class="layer"' not in first
    assert "rough explanation, off by about 80\N{NO-BREAK SPACE}%, getting sharper" in coarse
    assert 'class="layer"' in coarse
    assert "<b>explanation accurate to about ±4\N{NO-BREAK SPACE}%</b> · 40 gradient steps" in last
    assert "74\N{NO-BREAK SPACE}% of this picture lies outside the frame" in last


def test_question_goes_to_the_server_and_is_shown(session, answers):
    *_, last = explain(session, question=Question(0, 1, 0.02))
    assert answers.requests == [{"target": 0, "contrast": 1, "tolerance": 0.02, "n_steps": 400, "want": ["saliency"]}]
    assert "Why star rather than ring?" in last
    assert "speaks for ring" in last


def test_another_style_takes_no_request(session, answers):
    explain(session)
    one, other = (session.html(0, Style(polarity, "colours")) for polarity in ("positive", "negative"))
    assert one != other
    assert 'class="panel colours"' in one
    assert len(answers.requests) == 1


def test_two_pictures_share_one_scale(session, answers):
    explain(session, 0)
    assert strength(session.html(0, Style())) == 1
    answers.strength = 4.0
    explain(session, 1)
    assert strength(session.html(0, Style())) == pytest.approx(0.25, abs=1e-3)
    assert "colours 25\N{NO-BREAK SPACE}% as strong as in the other picture, the strongest here" in session.html(
        0, Style()
    )


def test_a_later_picture_ends_the_earlier_stream(session):
    earlier = session.explain(0, FILE, "one.png", QUESTION)
    next(earlier)
    explain(session)
    assert list(earlier) == []
    assert "40 gradient steps" in session.html(0, Style())


@pytest.mark.parametrize(
    ("file", "question", "message"),
    [
        (FILE, Question(None, None, 0.5), "[invalid] tolerance &lt;b&gt;0.5&lt;/b&gt;"),
        (b"no image", QUESTION, "the image cannot be read"),
    ],
)
def test_failures_are_shown(session, file, question, message):
    for _ in session.explain(0, file, "one.png", question):
        pass
    assert message in session.html(0, Style())


def test_no_picture_shows_nothing(session, answers):
    explain(session)
    for _ in session.explain(0, b"", "", QUESTION):
        pass
    assert session.html(0, Style()) == '<div class="panel"></div>'
    assert len(answers.requests) == 1


def test_the_report_has_what_is_shown(session, tmp_path: Path):
    explain(session, 0, Question(0, 1, 0.05))
    explain(session, 1, Question(None, None, 0.5))
    path = tmp_path / "report.html"
    session.write_report(path, Style())
    page = path.read_text()
    assert page.count("<article") == 2
    assert page.count('data-failed="1"') == 1
    assert "Why star rather than ring?" in page
    assert "c0ffee" in page
