"""The pictures of the live page: explains them level by level, and draws them as HTML."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Literal, TypeAlias

from PIL import Image

from explain_client import captions, cards, pictures
from explain_client.client import ExplainClient
from explain_client.errors import ExplainError
from explain_client.images import View, photograph, share_cut_away
from explain_client.parameters import Polarity
from explain_client.report import Report
from explain_client.results import Classification, Explanation, Level, Network
from explain_client.run_facts import Run

Overlay: TypeAlias = Literal["photograph", "original", "colours"]
OVERLAYS: dict[Overlay, str] = {
    "photograph": "over the photograph, faded",
    "original": "over the photograph as it is",
    "colours": "on blank paper",
}
# A hard photograph takes more than the contract's default of 50.
MOST_STEPS = 400


@dataclass(frozen=True)
class Question:
    """What is asked of a picture: the class to explain (None: the predicted one), one to subtract, the tolerance."""

    target: int | None
    contrast: int | None
    tolerance: float


@dataclass(frozen=True)
class Style:
    """How all pictures are drawn. Another style takes no request."""

    polarity: Polarity = "all"
    overlay: Overlay = "photograph"


@dataclass
class Panel:
    """One picture and what is known of it so far."""

    file: bytes = b""
    name: str = ""
    picture: Image.Image | None = None
    url: str = ""
    question: Question | None = None
    prediction: Classification | None = None
    level: Level | None = None
    failure: str = ""


@dataclass
class Session:
    """The pictures of one visitor, side by side, on one scale of colours.

    Attributes:
        client: asks the server.
        view, network: of the server; ``network`` is None if it does not say.
        labels: of all classes.
    """

    client: ExplainClient
    view: View
    network: Network | None
    labels: Sequence[str]
    panels: tuple[Panel, ...] = field(default_factory=lambda: (Panel(), Panel()))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def explain(self, number: int, file: bytes, name: str, question: Question) -> Iterator[None]:
        """Explain a picture; yields whenever there is more to show: the prediction first, then each level.

        A later call for the same panel ends this one. Failures are shown in the panel.
        """
        panel = Panel(file, name, question=question)
        self._replace(number, panel)
        if not file:
            yield
            return
        parameters: dict[str, Any] = {"tolerance": question.tolerance, "n_steps": MOST_STEPS}
        if question.contrast is not None:
            parameters["contrast"] = question.contrast
        try:
            panel.picture = photograph(file)
            panel.url = cards.jpeg_url(panel.picture, cards.LONGEST_SIDE)
            for response in self.client.explain_stream(file, target=question.target, want=["saliency"], **parameters):
                if self.panels[number] is not panel:
                    return  # which cancels the stream
                if isinstance(response, Level):
                    panel.level = response
                else:
                    panel.prediction = response
                yield
        except (ExplainError, OSError) as error:
            panel.failure = str(error)
            yield

    def html(self, number: int, style: Style) -> str:
        """A panel as it is now."""
        panel = self.panels[number]
        if panel.failure:
            return f'<div class="panel"><p class="failure">{escape(panel.failure)}</p></div>'
        if panel.picture is None or panel.prediction is None:
            return '<div class="panel"></div>'
        words = self._words(panel, style.polarity)
        if panel.level is None or panel.level.saliency is None:
            shown = [cards.coloured_figure(panel.picture, self.view, words, None, panel.url)]
            share, status = 1.0, "explaining …"
        else:
            strength = pictures.strength(panel.level.saliency)
            share = strength / (self._strongest() or 1.0)
            layer = pictures.colour_layer(panel.level.saliency, strength, style.polarity)
            shown = [cards.coloured_figure(panel.picture, self.view, words, layer, panel.url)]
            status = words.accuracy if panel.level.is_last else f"{words.accuracy}, getting sharper …"
        count = sum(each.level is not None for each in self.panels)
        if count > 1 and panel.level is not None:
            shown.append(cards.strength_meter(escape(captions.strength(share, count, "the other picture"))))
        contrast = panel.question.contrast if panel.question else None
        parts = (
            cards.answer(words),
            '<div class="pictures one">',
            shown[0],
            "</div>",
            cards.colour_bar(words),
            *shown[1:],
            cards.warning(words),
            cards.prediction_bars(panel.prediction.predictions, [panel.prediction.explained_class], contrast),
            cards.facts(self._facts(panel, status)),
        )
        css = f"--strength:{share:.4f};{cards.style(style.polarity)}"
        return f'<div class="panel {style.overlay}" style="{css}">{"".join(parts)}</div>'

    def write_report(self, path: Path, style: Style) -> None:
        """Write the report of the pictures that are explained.

        Raises:
            OSError: it cannot be written.
        """
        asked = [panel.question for panel in self.panels if panel.question is not None and panel.level is not None]
        same = len(set(asked)) == 1
        run = self._run(asked[0], style) if same else Run(self.network, parameters={"polarity": style.polarity})
        with Report(path, self.view, run) as report:
            for panel in self.panels:
                if panel.failure:
                    report.add_failure(panel.name, panel.failure, panel.file)
                elif panel.prediction is not None and panel.level is not None:
                    report.add(panel.name, panel.file, [_explanation(panel.prediction, panel.level)])

    def _run(self, question: Question, style: Style) -> Run:
        asked = {"tolerance": question.tolerance, "polarity": style.polarity, "contrast": question.contrast}
        return Run.of(self.network, self.labels, question.target, asked)

    def _words(self, panel: Panel, polarity: Polarity) -> captions.Caption:
        assert panel.picture is not None
        assert panel.prediction is not None
        contrast = panel.question.contrast if panel.question else None
        return captions.caption(
            panel.prediction.predictions,
            panel.prediction.explained_label,
            panel.level.error_estimate if panel.level else float("nan"),
            share_cut_away(panel.picture.size, self.view),
            None if contrast is None else self.labels[contrast],
            polarity,
        )

    def _facts(self, panel: Panel, status: str) -> list[str]:
        assert panel.prediction is not None
        facts = [f"<b>{escape(status)}</b>"]
        if panel.level is not None:
            facts += [f"{panel.level.n_steps} gradient steps", cards.duration(panel.level.milliseconds)]
        return [*facts, f"prediction after {cards.duration(panel.prediction.milliseconds)}"]

    def _strongest(self) -> float:
        maps = [panel.level.saliency for panel in self.panels if panel.level is not None]
        return max((pictures.strength(saliency) for saliency in maps if saliency is not None), default=0.0)

    def _replace(self, number: int, panel: Panel) -> None:
        with self._lock:
            self.panels = tuple(panel if at == number else each for at, each in enumerate(self.panels))


def _explanation(prediction: Classification, level: Level) -> Explanation:
    return Explanation(
        level.convergence_delta,
        level.n_steps,
        level.error_estimate,
        level.milliseconds,
        level.saliency,
        level.attributions,
        level.heatmap_png,
        prediction.predictions,
        prediction.explained_class,
        prediction.explained_label,
    )
