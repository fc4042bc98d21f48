"""Prometheus metrics of the gradients, in the registry of the server they run in.

Counts are collected here and handed to the server at intervals, because each update takes as long as a few rows on a
GPU. One thread does it: two threads that update the same metric at once make Triton 2.51 read freed memory. Triton has
only counters and gauges, so a histogram is written as the counters that Prometheus makes of one.
"""

from __future__ import annotations

import bisect
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from error_codes import STATUSES

FLUSH_SECONDS = 0.25
# Upper bounds of each histogram's buckets; the last bucket, up to infinity, is added.
BUCKETS = {
    "steps": (4, 8, 12, 16, 20, 32, 50, 100, 200, 500, 1000),
    "chunk_fill": (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1),
    "convergence_gap": (1e-6, 1e-5, 1e-4, 1e-3, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5),
    "error_estimate": (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    "wait_seconds": (0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 180),
    "compute_seconds": (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 1.5, 2, 3, 5, 10, 30, 60, 180),
}
PREFIX = "integrated_gradients_"
DESCRIPTIONS = {
    "rows_total": "Gradients taken: images at one point of their path",
    "shared_rows_total": "Gradients of further classes, which shared the forward pass of another one",
    "answers_total": "Images by how their gradients were got: hit (kept), joined (of an equal image under way), "
    "continued (some kept), miss",
    "kept_bytes": "Bytes of kept answers",
    "chunks_total": "Forward and backward passes",
    "explanations_total": "Images explained, by method",
    "requests_total": "Requests by outcome, health checks apart",
    "probes_total": "Requests of health checks by outcome",
    "waiting_images": "Images that wait for gradients or get them",
    "steps": "Gradients spent on an image",
    "chunk_fill": "Rows of a pass as a share of the most",
    "convergence_gap": "Absolute convergence delta as a share of the sum of absolute attributions",
    "error_estimate": "Estimated relative error of an attribution that estimates it",
    "wait_seconds": "From a request's arrival to its first gradient",
    "compute_seconds": "From an image's first gradient to its explanation",
}
ANSWER_SOURCES = ("hit", "joined", "continued", "miss")
OUTCOMES = ("explained", *STATUSES)
Labels = tuple[tuple[str, str], ...]


class AttributionMetrics:
    """Counters and histograms, safe to use from any thread.

    Args:
        make_family: called with name, description and whether it is a gauge; returns a family as Triton's
            ``pb_utils.MetricFamily``, or None where the server takes no metrics.
        labels: of all metrics; they must differ between processes.
        gauges: return the present values of gauges, by name.
        before_flush: called before each flush.
    """

    def __init__(
        self,
        make_family: Callable[[str, str, bool], Any | None],
        labels: Mapping[str, str],
        gauges: Mapping[str, Callable[[], float]],
        before_flush: Callable[[], None] = lambda: None,
    ) -> None:
        self._make_family, self._labels, self._gauges = make_family, dict(labels), gauges
        self._before_flush = before_flush
        self._lock = threading.Lock()
        self._counts: defaultdict[tuple[str, Labels], float] = defaultdict(float)
        self._families: dict[str, Any] = {}
        self._metrics: dict[tuple[str, Labels], Any] = {}
        self._is_over = threading.Event()
        for name in ("rows_total", "chunks_total", "shared_rows_total"):
            self.count(name, 0)
        for source in ANSWER_SOURCES:
            self.count("answers_total", 0, source=source)
        for outcome in OUTCOMES:  # Prometheus sees the first failure only as a rise from 0
            self.count("requests_total", 0, outcome=outcome)
            self.count("probes_total", 0, outcome=outcome)
        self._thread = threading.Thread(target=self._flush_at_intervals, name="metrics", daemon=True)
        self._thread.start()

    def count(self, name: str, more: float = 1, **labels: str) -> None:
        """Add to a counter."""
        with self._lock:
            self._counts[name, tuple(labels.items())] += more

    def observe(self, name: str, value: float, times: int = 1, **labels: str) -> None:
        """Add a value to a histogram; NaN is ignored."""
        if math.isnan(value):
            return
        ends = BUCKETS[name]
        with self._lock:
            for end in (*ends[bisect.bisect_left(ends, value) :], math.inf):
                le = "+Inf" if end == math.inf else f"{end:g}"
                self._counts[f"{name}_bucket", (("le", le), *labels.items())] += times
            self._counts[f"{name}_sum", tuple(labels.items())] += times * value
            self._counts[f"{name}_count", tuple(labels.items())] += times

    def close(self) -> None:
        """Stop the thread and drop the metrics."""
        self._is_over.set()
        self._thread.join()
        self._metrics.clear()  # first: a metric must not outlive its family
        self._families.clear()

    def flush(self) -> None:
        """Hand the counts since the last flush to the server."""
        self._before_flush()
        with self._lock:
            counts, self._counts = self._counts, defaultdict(float)
        for (name, labels), more in counts.items():
            metric = self._metric(name, labels)
            if metric is not None and (more or name.endswith("_total")):
                metric.increment(more)
        for name, value in self._gauges.items():
            gauge = self._metric(name, (), is_gauge=True)
            if gauge is not None:
                gauge.set(value())

    def _flush_at_intervals(self) -> None:
        while not self._is_over.wait(FLUSH_SECONDS):
            self.flush()

    def _metric(self, name: str, labels: Labels, is_gauge: bool = False) -> Any | None:
        key = (name, labels)
        if key not in self._metrics:
            if name not in self._families:
                described = name if name in DESCRIPTIONS else name.rpartition("_")[0]
                self._families[name] = self._make_family(PREFIX + name, DESCRIPTIONS[described], is_gauge)
            family = self._families[name]
            self._metrics[key] = family and family.Metric(labels={**self._labels, **dict(labels)})
        return self._metrics[key]
