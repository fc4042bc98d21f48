"""The health check, on the live server."""

import subprocess
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from conftest import encode, scene_image
from live_server import infer, rows_passed

from tools.probe import NoAnswerError, ProbeError, probe, probe_patiently, read_metrics
from tools.triton.supervisor import Watch, trouble


def test_the_probe_asks_all_models(server):
    probe_patiently("127.0.0.1", server.ports.http, server.ports.metrics)
    probe_patiently("127.0.0.1", server.ports.http, server.ports.metrics, "classify")
    with pytest.raises(ProbeError, match="does not answer"):
        probe("127.0.0.1", 1)


@pytest.mark.parametrize("ended", [(3.0, 3.0), (3.0, 4.0)], ids=["none ends", "one ends"])
def test_late_streams_are_distinguished_from_streams_that_hang(server, monkeypatch, ended):
    """A real server; only its streams are made late."""

    def late(host, port, seconds):
        raise NoAnswerError("explain_stream did not answer")

    counts = iter(ended)
    monkeypatch.setattr("tools.probe.probe_stream", late)
    monkeypatch.setattr("tools.probe.total", lambda series, *names: next(counts))
    with pytest.raises(NoAnswerError) if ended[0] == ended[1] else nullcontext():
        probe_patiently("127.0.0.1", server.ports.http, server.ports.metrics, seconds=3)
    assert next(counts, None) is None


# What the models count of a health check: that it happened, and the work of the device.
OF_PROBES = (
    "integrated_gradients_probes_total",
    "integrated_gradients_rows_total",
    "integrated_gradients_chunks_total",
    "integrated_gradients_chunk_fill_",
    "explain_stream_probes_total",
    "preprocess_probes_total",
    "preprocess_images_total",
)


def test_a_server_that_its_supervisor_alone_asks_has_explained_nothing(server, triton):
    """And a request that is no probe counts as before."""

    def counts() -> dict[str, float]:
        rows_passed(server)  # waits until the metrics have been flushed
        series = read_metrics("127.0.0.1", server.ports.metrics)
        return {f"{name} {labels}": value for name, labels, value in series if not name.startswith("nv_")}

    def grown(before: dict[str, float]) -> dict[str, float]:
        return {name: value for name, value in counts().items() if value != before.get(name, 0)}

    probes_left = iter(range(3))

    def wait(seconds: float) -> int:
        if next(probes_left, None) is None:
            return 0  # as if the server had ended, which ends its supervision
        time.sleep(0.1)
        raise subprocess.TimeoutExpired("tritonserver", seconds)

    watched = SimpleNamespace(host="127.0.0.1", ports=server.ports, process=SimpleNamespace(wait=wait))
    before = counts()
    assert trouble(watched, Watch()) == ("Triton ended with code 0", True)
    after = grown(before)
    assert {name for name in after if not name.startswith(OF_PROBES)} == set()
    for name, outcome in (("integrated_gradients", "explained"), ("explain_stream", "invalid")):
        (probes,) = (s for s in after if s.startswith(f"{name}_probes_total") and f'outcome="{outcome}"' in s)
        assert after[probes] - before.get(probes, 0) == 3
    before = counts()
    infer(triton, [encode(scene_image(0))], outputs=("N_STEPS",), n_steps=1)
    after = grown(before)
    assert not [name for name in after if "_probes_total" in name]
    assert any(name.startswith("integrated_gradients_explanations_total") for name in after)
