"""Why a model does not load, as one sentence in Triton's log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class LoadError(ValueError):
    """A model must not load; the message says why and what to do."""


@contextmanager
def refusing_to_load() -> Iterator[None]:
    """Tell Triton of a ``LoadError`` by its message alone, without a traceback."""
    import triton_python_backend_utils as pb_utils

    try:
        yield
    except LoadError as error:
        raise pb_utils.TritonModelException(str(error)) from None
