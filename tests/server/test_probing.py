"""The health check, on the live server."""

import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace

import pytest
from conftest import encode, scene_image
from live_server import infer, rows_passed, stub

from tools.bench.load import jpeg_images
from tools.bench.overload import open_loop, with_settings
from tools.probe import NoAnswerError, ProbeError, probe, probe_patiently, read_metrics, total
from tools.server import EmbeddedServer, Ports
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


@pytest.mark.slow
def test_overload_is_no_reason_to_be_unready_and_gradients_that_hang_are(tmp_path):
    """Ten times what the server can do; then, still under load, its gradients' process is stopped.

    As in the manifests and for the supervisor, two failures in a row count: a batch of the classifier may take seconds.
    """
    # Gradients that yield to whatever else runs on this machine may make no progress here.
    repository = with_settings(tmp_path, "integrated_gradients", max_wait_seconds=5, cpu_niceness=0)
    server = EmbeddedServer(repository, Ports.free(), log_file=tmp_path / "log")

    def complaint(patiently: bool = True) -> str:
        """What the probe says; empty if the server is healthy."""
        try:
            if patiently:
                probe_patiently("127.0.0.1", server.ports.http, server.ports.metrics, seconds=4)
            else:
                probe("127.0.0.1", server.ports.http, seconds=4)
            return ""
        except ProbeError as error:
            return str(error)

    with server, ThreadPoolExecutor(1) as pool:
        load = pool.submit(open_loop, server.grpc_url, jpeg_images(), 8, 60, {"n_steps": 50})
        time.sleep(8)  # until it is full
        before = total(read_metrics("127.0.0.1", server.ports.metrics), "preprocess_overloaded_total")
        told = [(complaint(), complaint(patiently=False)) for _ in range(4)]
        refused = total(read_metrics("127.0.0.1", server.ports.metrics), "preprocess_overloaded_total") - before
        os.kill(stub(server.process.pid, "integrated_gradients"), signal.SIGSTOP)
        hanging = [complaint() for _ in range(2)]
        server.stop(0)  # what waits in the process that hangs would wait for ever
        load.result()
    print(f"{refused:.0f} requests were refused; an answer in time: {[impatient for _, impatient in told]}; {hanging}")
    assert refused > 0
    assert any(impatient for _, impatient in told)
    patient = [each for each, _ in told]
    assert not [pair for pair in pairwise(patient) if all(pair)], patient
    assert all(hanging)
    assert "integrated_gradients makes no progress" in " ".join(hanging)
