"""Requests of health checks, which the metrics count apart from traffic.

A health check has a reserved request id, which Triton hands to each step of an ensemble. A parameter would reach them
too, but every model would have to know and ignore it.
"""

from __future__ import annotations

from typing import Any

# `tools/probe.py` sends it, too.
PROBE_ID = "health-probe"


def is_probe(request: Any) -> bool:
    """Whether a request of Triton's is a health check's."""
    return bool(request.request_id() == PROBE_ID)
