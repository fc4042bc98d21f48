"""One self-contained HTML page for a run: photographs, predictions and explanations are embedded."""

from __future__ import annotations

import math
import re
import secrets
import shutil
from collections.abc import Sequence
from datetime import datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryFile
from types import TracebackType

from PIL import Image

from explain_client import captions, cards, pictures
from explain_client.images import DEFAULT_VIEW, View, photograph, share_cut_away
from explain_client.results import Explanation
from explain_client.run_facts import Run

_PLACE, _RUN, _STYLE = "<!-- items -->", "<!-- run -->", "/* style */"


class Report:
    """A page under way, as a context manager. Items go to a temporary file; the page is written at the end.

    Colours of all images are on one scale, which is known only then.

    Args:
        path: file of the page; an existing one is replaced when the page is complete.
        view: of the server's classifier, to show which part of an image it sees.
        run: what all images have in common.

    Raises:
        OSError: the page cannot be written.
    """

    def __init__(self, path: Path, view: View = DEFAULT_VIEW, run: Run | None = None) -> None:
        self._path, self._view, self._run = path, view, run or Run()
        self._started = datetime.now()
        self._strengths: list[tuple[float, str]] = []  # with the titles of the images
        self._count = 0
        # Stands in an item for what depends on all strengths; no image can have it in its name.
        self._token = f"strength-{secrets.token_hex(8)}"

    def __enter__(self) -> Report:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._items = TemporaryFile("w+", encoding="utf-8", dir=self._path.parent)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        template = files("explain_client").joinpath("report.html").read_text("utf-8")
        before, after = template.replace(_RUN, self._header()).replace(_STYLE, self._style()).split(_PLACE)
        with (
            self._items,
            NamedTemporaryFile(
                "w", encoding="utf-8", dir=self._path.parent, prefix=f".{self._path.name}.", delete=False
            ) as page,
        ):
            page.write(before)
            self._items.seek(0)
            for line in self._items:
                page.write(self._with_strengths(line))
            page.write(after)
        Path(page.name).chmod(0o644)
        shutil.move(page.name, self._path)

    def add(
        self, name: str, file: bytes, explanations: Sequence[Explanation], milliseconds: float | None = None
    ) -> None:
        """Add an image by its encoded bytes and its explanations, side by side.

        Args:
            name: its path, or what stands for one. The page shows the last part.
            file: the encoded image.
            explanations: of one class or several, with ``saliency``; their heatmaps are shown, too, if the run asked
                for regions.
            milliseconds: that the image took, without waiting for others; None: those of the explanation.
        """
        saliencies = [each.saliency for each in explanations if each.saliency is not None]
        if len(saliencies) < len(explanations):
            raise ValueError("the report draws the saliency, which was not requested; name it in `want`")
        took = explanations[0].milliseconds if milliseconds is None else milliseconds
        error = "" if math.isnan(worst := _worst_error(explanations)) else f"{worst:.4f}"
        steps = sum(each.n_steps for each in explanations)
        strength = max(map(pictures.strength, saliencies))
        layers = [pictures.colour_layer(saliency, strength, self._run.polarity) for saliency in saliencies]
        number = len(self._strengths)
        self._strengths.append((strength, captions.title(name)))
        self._write(
            name,
            f'data-probability="{explanations[0].predictions[0].probability:.6f}" data-error="{error}" '
            f'data-steps="{steps}" data-milliseconds="{took:.1f}" data-strength="{strength:.6g}" '
            f'style="--strength:{self._token}-share-{number}-"',
            self._card(photograph(file), explanations, layers, f"{self._token}-words-{number}-", took),
        )

    def _card(
        self,
        picture: Image.Image,
        explanations: Sequence[Explanation],
        layers: Sequence[Image.Image],
        strength: str,
        took: float,
    ) -> str:
        """What a card shows below its title."""
        run, url, first = self._run, cards.jpeg_url(picture, cards.LONGEST_SIDE), explanations[0]
        cut_away = share_cut_away(picture.size, self._view)
        error = _worst_error(explanations)

        def words_for(explained: str) -> captions.Caption:
            return captions.caption(first.predictions, explained, error, cut_away, run.contrast_label, run.polarity)

        labels = [each.explained_label for each in explanations]
        words = words_for(labels[0] if len(labels) == 1 else "the named class")
        steps = sum(each.n_steps for each in explanations)
        facts = [f"<b>{escape(words.accuracy)}</b>", f"{steps} gradient steps", cards.duration(took)]
        parts = (
            cards.answer(words),
            '<div class="pictures">',
            cards.photograph_figure(picture, self._view, url),
            *(
                cards.coloured_figure(picture, self._view, words_for(label), layer)
                for label, layer in zip(labels, layers)
            ),
            "</div>",
            cards.colour_bar(words),
            cards.strength_meter(strength),
            *map(self._regions, explanations),
            cards.warning(words),
            cards.prediction_bars(first.predictions, [each.explained_class for each in explanations], run.contrast),
            cards.facts(facts),
            '<p class="tools"><button class="toggle" aria-pressed="true">colours</button>',
            '<button class="download">download</button></p>',
        )
        return "".join(parts)

    def _regions(self, explanation: Explanation) -> str:
        """The server's picture of regions, if the run asked for it."""
        run = self._run
        if not run.shows_regions or explanation.heatmap_png is None:
            return ""
        caption = captions.regions(explanation.explained_label, run.contrast_label, run.heatmap_polarity)
        return cards.regions_figure(explanation.heatmap_png, caption)

    def add_failure(self, name: str, message: str, file: bytes = b"") -> None:
        """Add an image that was not explained, the reason, and a thumbnail if the file can be read."""
        try:
            thumbnail = f'<img alt="" src="{cards.jpeg_url(photograph(file), cards.THUMBNAIL_SIDE)}">'
        except OSError:
            thumbnail = '<span class="nothing" aria-hidden="true">?</span>'
        self._write(name, 'data-failed="1"', f'{thumbnail}<p class="failure">{escape(message)}</p>')

    def _write(self, name: str, data: str, content: str) -> None:
        attributes = f'data-number="{self._count}" data-name="{escape(name)}" {data}'
        title = f'<h2 title="{escape(name)}">{escape(captions.title(name))}</h2>'
        self._items.write(" ".join(f"<article {attributes}>{title}{content}</article>".splitlines()) + "\n")
        self._count += 1

    def _with_strengths(self, item: str) -> str:
        """An item with its strength relative to the strongest of the run."""
        strongest, title = max(self._strengths, key=lambda each: each[0], default=(0.0, ""))

        def replacement(match: re.Match[str]) -> str:
            share = self._strengths[int(match[2])][0] / (strongest or 1.0)
            words = escape(captions.strength(share, len(self._strengths), title))
            return f"{share:.4f}" if match[1] == "share" else words

        return re.sub(rf"{self._token}-(share|words)-(\d+)-", replacement, item)

    def _header(self) -> str:
        facts = self._run.facts(self._started).items()
        return "".join(f"<div><dt>{what}</dt><dd>{escape(words)}</dd></div>" for what, words in facts)

    def _style(self) -> str:
        return f":root {{ {cards.style(self._run.polarity)} }}\n{cards.stylesheet()}"


def _worst_error(explanations: Sequence[Explanation]) -> float:
    """The largest error estimate; NaN if one is missing."""
    errors = [each.error_estimate for each in explanations]
    return math.nan if any(map(math.isnan, errors)) else max(errors)
