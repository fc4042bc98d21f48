"""The codes of errors. Each message to a client begins with one in brackets, for example ``[invalid] ...``.

A stream's errors, and those that one model gets from another, come without a status: Triton 2.51 makes all of them
INTERNAL. The code says what they are. The client keeps a copy of this list in ``explain_client/errors.py``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import triton_python_backend_utils as pb_utils

# Code -> name of the status among ``pb_utils.TritonError``'s. The codes are also the metrics' outcomes.
STATUSES = {
    "invalid": "INVALID_ARG",  # the request; sent again, it is refused again
    "overloaded": "UNAVAILABLE",  # the server takes no more at present
    "late": "UNAVAILABLE",  # the request's timeout is over
    "cancelled": "CANCELLED",  # by the client
    "failed": "INTERNAL",  # a fault of the server
}
# An ensemble puts its own name before.
_CODE = re.compile(r"(?:in ensemble '[^']*', )*\[([a-z]+)\] ")


def code_of(message: str) -> str | None:
    """The code that a message begins with; None if there is none of ours."""
    found = _CODE.match(message)
    return found[1] if found and found[1] in STATUSES else None


def triton_error(code: str, message: str) -> pb_utils.TritonError:
    """The error with that code and its status."""
    return with_status(code, f"[{code}] {message}")


def with_status(code: str, message: str) -> pb_utils.TritonError:
    """The error of a message that has its code already."""
    import triton_python_backend_utils as pb_utils  # is there inside Triton alone

    return pb_utils.TritonError(message, getattr(pb_utils.TritonError, STATUSES[code]))
