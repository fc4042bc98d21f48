"""One picture of a whole run: each photograph beside its explanation, with the words that it needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from explain_client import captions, pictures
from explain_client.images import DEFAULT_VIEW, View, photograph, share_cut_away
from explain_client.results import Explanation
from explain_client.run_facts import Run

# Pixels: the largest picture in a figure, the space around it, and the heights of text.
PICTURE, GAP, TITLE, TEXT = (330, 248), 16, 20, 14
COLUMNS = 2
INK, SOFT, NOTE = (27, 27, 31), (95, 99, 104), (150, 85, 0)
BAR = (110, 11)


@dataclass(frozen=True)
class _Entry:
    """What is kept of an image until the scale of the colours is known; the photograph is reduced."""

    name: str
    picture: Image.Image
    saliency: npt.NDArray[np.float32]
    words: captions.Caption
    strength: float


class ContactSheet:
    """A sheet under way, as a context manager; the file is written at the end, and only if there are images.

    Colours of all images are on one scale. The sheet keeps some 700 KB an image until then.

    Args:
        path: file of the sheet, by whose suffix Pillow chooses the format.
        view: of the server's classifier.
        run: what all images have in common.

    Raises:
        OSError: the sheet cannot be written.
        ValueError: Pillow knows no format of that suffix.
    """

    def __init__(self, path: Path, view: View = DEFAULT_VIEW, run: Run | None = None) -> None:
        self._path, self._view, self._run = path, view, run or Run()
        self._entries: list[_Entry] = []

    def __enter__(self) -> ContactSheet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._entries:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self.draw().save(self._path)

    @property
    def is_empty(self) -> bool:
        """Whether no image was added, so that nothing will be written."""
        return not self._entries

    def add(self, name: str, file: bytes, explanation: Explanation) -> None:
        """Add an image by its encoded bytes and its explanation, which must have the saliency."""
        if explanation.saliency is None:
            raise ValueError("the contact sheet draws the saliency, which was not requested; name it in `want`")
        picture = photograph(file)
        words = captions.caption(
            explanation.predictions,
            explanation.explained_label,
            explanation.error_estimate,
            share_cut_away(picture.size, self._view),
            self._run.contrast_label,
            self._run.polarity,
        )
        picture.thumbnail(PICTURE)
        strength = pictures.strength(explanation.saliency)
        title = f"{captions.title(name)}: {words.question}" if self._run.explained else captions.title(name)
        self._entries.append(_Entry(title, picture, explanation.saliency, words, strength))

    def draw(self) -> Image.Image:
        """The sheet, RGB."""
        strongest = max(self._entries, key=lambda entry: entry.strength)
        figures = [self._figure(entry, strongest) for entry in self._entries]
        columns = min(COLUMNS, len(figures))
        rows = [figures[start : start + columns] for start in range(0, len(figures), columns)]
        heights = [max(figure.height for figure in row) for row in rows]
        sheet = Image.new("RGB", (columns * figures[0].width, sum(heights)), "white")
        top = 0
        for row, height in zip(rows, heights):
            for column, figure in enumerate(row):
                sheet.paste(figure, (column * figure.width, top))
            top += height
        return sheet

    def _figure(self, entry: _Entry, strongest: _Entry) -> Image.Image:
        """One image: title, photograph and coloured photograph, colour bar, what to know."""
        words, polarity, scale = entry.words, self._run.polarity, strongest.strength
        layer = pictures.colour_layer(entry.saliency, scale, polarity)
        pair = (pictures.framed(entry.picture, self._view), pictures.overlay(entry.picture, layer, self._view))
        relative = captions.strength(entry.strength / (scale or 1.0), len(self._entries), strongest.name)
        notes = [(words.accuracy, SOFT), (relative, SOFT)]
        if words.warning:
            notes.append((words.warning, NOTE))
        width = 2 * PICTURE[0] + 3 * GAP
        height = GAP + TITLE * 3 // 2 + entry.picture.height + (len(notes) + 1) * TEXT * 3 // 2 + 2 * TEXT
        figure = Image.new("RGB", (width, height), "white")
        pen = ImageDraw.Draw(figure)
        _write(pen, (GAP, GAP), f"{words.prediction} sure   ({entry.name})", TITLE, INK, width - 2 * GAP)
        top = GAP + TITLE * 3 // 2
        for left, drawn in zip((GAP, 2 * GAP + entry.picture.width), pair):
            figure.paste(drawn, (left, top))
        top += entry.picture.height + TEXT // 2
        left = GAP
        for part in (words.against, None, words.in_favour):
            if part is None:
                figure.paste(pictures.colour_bar(*BAR, polarity, background=222), (left, top + 3))
                left += BAR[0] + TEXT // 2
            else:
                left += _write(pen, (left, top), part, TEXT, INK, (width - BAR[0]) // 2 - GAP) + TEXT // 2
        for number, (note, colour) in enumerate(notes, 1):
            _write(pen, (GAP, top + number * TEXT * 3 // 2), note, TEXT, colour, width - 2 * GAP)
        return figure


def _write(
    pen: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, colour: tuple[int, int, int], most: int
) -> int:
    """Write a line, shortened to ``most`` pixels; returns its width."""
    font = ImageFont.load_default(size)
    text = text.replace("\N{NO-BREAK SPACE}", " ")  # which the font lacks
    if pen.textlength(text, font) > most:
        while text and pen.textlength(f"{text}…", font) > most:
            text = text[:-1]
        text += "…"
    pen.text(at, text, colour, font)
    return round(pen.textlength(text, font))
