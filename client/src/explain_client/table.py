"""Tables that fit the terminal: columns shrink, and at last some are left out."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace

NO_TERMINAL = 120  # columns where the output goes to a file or a pipe


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        least, most: characters.
        is_number: aligned to the right, and never shortened.
        keeps_end: of a text that is too long the middle is left out, so that names that differ at the end still do.
        left_out: rank in which columns are left out where there is no room, the highest first; 0: never.
    """

    title: str
    least: int
    most: int
    is_number: bool = False
    keeps_end: bool = False
    left_out: int = 0

    def cell(self, text: str) -> str:
        """A text in this column's width."""
        if self.is_number:
            return text.rjust(self.least)
        if len(text) > self.least:
            tail = self.least // 2 if self.keeps_end else 0
            text = text[: self.least - tail - 1] + "…" + text[len(text) - tail :]
        return text.ljust(self.least)


IMAGE, LABEL = Column("image", 12, 28, keeps_end=True), Column("label", 9, 14)
EXPLAINED = Column("explained", 9, 14, left_out=2)
PROBABILITY, ERROR = (Column(title, 6, 6, is_number=True) for title in ("prob.", "error"))
STEPS = Column("steps", 5, 5, is_number=True, left_out=1)
DELTA = Column("delta", 8, 9, is_number=True, left_out=4)
MILLISECONDS = Column("ms", 6, 7, is_number=True, left_out=3)
EXPLANATIONS = (IMAGE, LABEL, PROBABILITY, EXPLAINED, STEPS, ERROR, DELTA, MILLISECONDS)
LEVELS = (IMAGE, LABEL, PROBABILITY, STEPS, ERROR, MILLISECONDS)


class Table:
    """Lines of a table of some columns, as wide as the terminal allows."""

    def __init__(self, columns: Sequence[Column], width: int | None = None) -> None:
        self._columns = _fitted(columns, width or shutil.get_terminal_size((NO_TERMINAL, 24)).columns)

    def header(self) -> str:
        """The titles."""
        return self._line([column.title for _, column in self._columns])

    def row(self, cells: Sequence[str]) -> str:
        """One line, of a text for each of the columns that the table was made of."""
        return self._line([cells[place] for place, _ in self._columns])

    def _line(self, texts: Sequence[str]) -> str:
        return " ".join(column.cell(text) for (_, column), text in zip(self._columns, texts)).rstrip()


def _fitted(columns: Sequence[Column], width: int) -> list[tuple[int, Column]]:
    """The columns that there is room for, with their places, each as wide as it will be."""
    kept = list(enumerate(columns))

    def room() -> int:
        return width - sum(column.least + 1 for _, column in kept) + 1

    while room() < 0 and any(column.left_out for _, column in kept):
        kept.remove(max(kept, key=lambda each: each[1].left_out))
    while room() > 0 and any(column.least < column.most for _, column in kept):
        narrowest = min(
            (each for each in kept if each[1].least < each[1].most), key=lambda each: each[1].least / each[1].most
        )
        kept[kept.index(narrowest)] = (narrowest[0], replace(narrowest[1], least=narrowest[1].least + 1))
    return kept


def percent(value: float, places: int = 1) -> str:
    """A share in percent; a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:.{places}%}"


def decimal(value: float, places: int = 4) -> str:
    """A number without the sign of a zero."""
    return f"{round(value, places) + 0.0:.{places}f}"
