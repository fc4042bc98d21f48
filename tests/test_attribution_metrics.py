"""What the gradients tell Prometheus."""

from __future__ import annotations

import math
import re
import urllib.request

import pytest
from attribution_metrics import BUCKETS, AttributionMetrics
from conftest import encode, scene_image
from test_serving import infer
from test_streaming import rows_passed
from tritonclient.utils import InferenceServerException


class Family:
    """Stands in for Triton's, and remembers what it is told."""

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
    metrics = AttributionMetrics(lambda name, *_: Family(name, told), {"pid": "7"}, lambda: 3)
    metrics.close()  # what the thread would do now and then is done by hand
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
    metrics = AttributionMetrics(lambda *_: None, {}, lambda: 0)
    metrics.close()
    metrics.count("requests_total", outcome="explained")
    metrics.observe("steps", 3)
    metrics.flush()


def test_the_live_server_counts_requests_by_outcome_and_images_by_method(server, triton):
    def read() -> dict[str, float]:
        rows_passed(server)  # waits until the server has been told
        text = urllib.request.urlopen(server.metrics_url, timeout=10).read().decode()
        found = re.findall(r"^(integrated_gradients_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE)
        return {
            f"{name} {' '.join(re.findall(r'(?:le|method|outcome)=.[^,]*', labels))}": float(value)
            for name, labels, value in found
        }

    before = read()
    image = [encode(scene_image(0))]
    infer(triton, image, outputs=("N_STEPS",), n_steps=5)
    infer(triton, image * 2, outputs=("N_STEPS",), tolerance="0.2")
    with pytest.raises(InferenceServerException):
        infer(triton, image, outputs=("N_STEPS",), n_steps=0)
    after = read()
    grown = {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)}
    assert grown['integrated_gradients_requests_total outcome="explained"'] == 2
    assert grown['integrated_gradients_requests_total outcome="invalid"'] == 1
    assert grown['integrated_gradients_explanations_total method="gausslegendre"'] == 1
    assert grown['integrated_gradients_explanations_total method="tolerance"'] == 2
    assert grown['integrated_gradients_error_estimate_count method="tolerance"'] == 2
    assert grown['integrated_gradients_steps_bucket le="8" method="gausslegendre"'] == 1
    assert grown['integrated_gradients_steps_sum method="gausslegendre"'] == 5
    assert grown["integrated_gradients_rows_total "] >= 5 + 2 * 4
    assert grown["integrated_gradients_chunks_total "] == grown["integrated_gradients_chunk_fill_count "] >= 2
    assert grown["integrated_gradients_wait_seconds_count "] == 3
    assert 0 < grown['integrated_gradients_compute_seconds_sum method="gausslegendre"'] < 60
    assert after["integrated_gradients_waiting_images "] == 0
