"""Prometheus metrics of the gradients."""

from __future__ import annotations

import math

import pytest
from attribution_metrics import BUCKETS, AttributionMetrics


class Family:
    """Stands in for Triton's and records its calls."""

    def __init__(self, name, told):
        self.name, self.told = name, told

    def Metric(self, labels):  # noqa: N802
        return Series((self.name, tuple(sorted(labels.items()))), self.told)


class Series:
    def __init__(self, key, told):
        self.key, self.told = key, told

    def increment(self, more):
        self.told[self.key] = self.told.get(self.key, 0) + more

    def set(self, value):
        self.told[self.key] = value


@pytest.fixture
def told():
    return {}


def test_histograms_are_cumulative_counters(told):
    metrics = AttributionMetrics(lambda name, *_: Family(name, told), {"pid": "7"}, {"waiting_images": lambda: 3})
    metrics.close()  # the test flushes itself instead of the thread
    for value in (10, 20, 21, 5000):
        metrics.observe("steps", value, method="calibrated")
    metrics.observe("steps", math.nan, method="calibrated")
    metrics.flush()

    def value(name, **labels):
        return told[f"integrated_gradients_{name}", tuple(sorted({"pid": "7", **labels}.items()))]

    counts = [
        told.get(("integrated_gradients_steps_bucket", (("le", f"{end:g}"), ("method", "calibrated"), ("pid", "7"))), 0)
        for end in BUCKETS["steps"]
    ]
    assert counts == [0, 0, 1, 1, 2, 3, 3, 3, 3, 3, 3]
    assert value("steps_bucket", le="+Inf", method="calibrated") == value("steps_count", method="calibrated") == 4
    assert value("steps_sum", method="calibrated") == 5051
    assert value("waiting_images") == 3
    metrics.observe("steps", 1, method="calibrated")
    metrics.flush()
    assert value("steps_count", method="calibrated") == 5


def test_a_server_without_metrics_is_no_hindrance():
    metrics = AttributionMetrics(lambda *_: None, {}, {"waiting_images": lambda: 0})
    metrics.close()
    metrics.count("requests_total", outcome="explained")
    metrics.observe("steps", 3)
    metrics.flush()
