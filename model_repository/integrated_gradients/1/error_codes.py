"""Error codes. Each message to a client begins with one in brackets, for example ``[invalid] ...``.

Triton 2.51 gives the status INTERNAL to all errors of a stream and to those that one model gets from another. The code
says what they are. The client keeps a copy of this list in ``explain_client/errors.py``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import triton_python_backend_utils as pb_utils

# Code -> name of its status in ``pb_utils.TritonError``. The codes are also the outcomes in the metrics.
STATUSES = {
    "invalid": "INVALID_ARG",  # the request is refused; retrying does not help
    "overloaded": "UNAVAILABLE",  # the server has no room at present
    "late": "UNAVAILABLE",  # the request's timeout is over
    "cancelled": "CANCELLED",  # by the client
    "failed": "INTERNAL",  # a fault of the server
}
# An ensemble puts its name before the code.
_CODE = re.compile(r"(?:in ensemble '[^']*', )*\[([a-z]+)\] ")


def code_of(message: str) -> str | None:
    """The code that a message begins with; None if it begins with none."""
    match = _CODE.match(message)
    return match[1] if match and match[1] in STATUSES else None


def triton_error(code: str, message: str) -> pb_utils.TritonError:
    """The error of a message without its code: adds the code and its status."""
    return with_status(code, f"[{code}] {message}")


def with_status(code: str, message: str) -> pb_utils.TritonError:
    """The error of a message that has its code already: adds the code's status."""
    import triton_python_backend_utils as pb_utils  # exists only inside Triton

    return pb_utils.TritonError(message, getattr(pb_utils.TritonError, STATUSES[code]))


def outcome_of(error: pb_utils.TritonError) -> str:
    """The code of an error; of Triton's own, which has none, the one that its status stands for."""
    import triton_python_backend_utils as pb_utils

    by_status = {getattr(pb_utils.TritonError, status): code for code, status in reversed(STATUSES.items())}
    return code_of(error.message()) or by_status.get(error.code(), "failed")
