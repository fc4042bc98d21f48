"""Formats error messages."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path


def shown(path: Path | str) -> str:
    """A path as it was given; of a long one, its end."""
    text = str(path)
    return text if len(text) <= 70 else f"...{text[-67:]}"


def suggestion(name: str, known: Iterable[str]) -> str:
    """``; did you mean A, B or C?`` for the known names near to a name; empty if there are none."""
    by_letters = {_letters(each): each for each in known}
    wanted = _letters(name)
    near = [letters for letters in by_letters if wanted and letters.startswith(wanted)][:3]
    near = near or difflib.get_close_matches(wanted, by_letters, n=3, cutoff=0.75)
    return f"; did you mean {either([by_letters[letters] for letters in near])}?" if near else ""


def either(names: Sequence[str]) -> str:
    """``A, B or C``"""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
