"""Metrics in Triton's own registry, where the server keeps one."""

from __future__ import annotations

import triton_python_backend_utils as pb_utils


def metric_family(name: str, description: str, is_gauge: bool = False) -> pb_utils.MetricFamily | None:
    """A counter or gauge; None from a server without metrics."""
    kind = pb_utils.MetricFamily.GAUGE if is_gauge else pb_utils.MetricFamily.COUNTER
    try:
        return pb_utils.MetricFamily(name=name, description=description, kind=kind)
    except pb_utils.TritonModelException as error:
        pb_utils.Logger.log_warn(f"no metric {name}: {error}")
        return None
