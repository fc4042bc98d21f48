"""Classes by name: what a server's labels are, and which class a name means."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

NEAR_MATCHES = 5


def class_of(name: int | str, labels: Sequence[str], what: str = "class") -> int:
    """The number of a class that is given by number or by label, whatever its case.

    Args:
        name: the class; a text of digits is a number.
        labels: the label of each class.
        what: how messages call the class.

    Raises:
        ValueError: there is no such class, or several have this label; the message says which are near.
    """
    if isinstance(name, int) or re.fullmatch(r"[+-]?\d+", name.strip()):
        number = int(name)
        if not -1 <= number < len(labels):
            raise ValueError(f"{what} {number} is not one of the server's classes, 0 to {len(labels) - 1}")
        return number
    wanted = _plain(name)
    found = [number for number, label in enumerate(labels) if wanted == _plain(label)]
    # ImageNet's labels list synonyms: "tench, Tinca tinca".
    found = found or [number for number, label in enumerate(labels) if wanted in map(_plain, label.split(","))]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{what} {name!r} is the label of {', '.join(map(str, found))}: give the number")
    near = _near(wanted, labels)
    hint = f"near are {', '.join(near)}" if near else "'explain labels' lists them"
    raise ValueError(f"{what} {name!r} is not one of the server's {len(labels)} labels; {hint}")


def names_labels(targets: Sequence[int | str], parameters: Mapping[str, Any]) -> bool:
    """Whether a request names a class by its label."""
    return any(isinstance(name, str) for name in (*targets, parameters.get("contrast")))


def with_classes(
    targets: Sequence[int | str], parameters: Mapping[str, Any], labels: Sequence[str]
) -> tuple[list[int], dict[str, Any]]:
    """A request's targets and parameters with the numbers of classes for their labels.

    Raises:
        ValueError: there is no such class.
    """
    numbers = dict(parameters)
    classes = [class_of(target, labels, "target") if isinstance(target, str) else target for target in targets]
    if isinstance(numbers.get("contrast"), str):
        numbers["contrast"] = class_of(numbers["contrast"], labels, "contrast")
    return classes, numbers


def _near(wanted: str, labels: Sequence[str]) -> list[str]:
    """Labels that have the name among their words, then those that are spelt like it."""
    plain = {_plain(label): label for label in labels}
    parts = [label for key, label in plain.items() if wanted and re.search(rf"\b{re.escape(wanted)}\b", key)]
    spelt = [plain[key] for key in difflib.get_close_matches(wanted, list(plain), NEAR_MATCHES)]
    return list(dict.fromkeys(parts + spelt))[:NEAR_MATCHES]


def _plain(label: str) -> str:
    return " ".join(label.replace("_", " ").casefold().split())
