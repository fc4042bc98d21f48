"""Why something failed, in one line of a message."""

from __future__ import annotations

import re

_TERMINAL_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def in_brief(text: str, characters: int) -> str:
    """One line of at most so many characters; a longer one loses its middle."""
    line = " ".join(text.split())
    if len(line) <= characters:
        return line
    end = characters // 3
    return f"{line[: characters - end - 5]} ... {line[-end:]}"


def reason(error: BaseException) -> str:
    """Why something failed, without a traceback of TorchScript; ends without a full stop."""
    lines = [line.strip() for line in _TERMINAL_COLOUR.sub("", str(error)).splitlines() if line.strip()]
    named = [line for line in lines if line.startswith("RuntimeError: ")]
    line = (named[-1].removeprefix("RuntimeError: ") if named else lines[0]) if lines else type(error).__name__
    return in_brief(re.split(r"\.\s", line)[0].rstrip("."), 90)
