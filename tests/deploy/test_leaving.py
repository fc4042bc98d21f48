"""A server that is stopped in order: `tools.deploy.drain`, then SIGTERM."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import encode, scene_image
from name_server import name_server

from explain_client import Classification, ExplainClient, ExplainError, Level
from tools.bench.overload import with_settings
from tools.deploy import drain as draining
from tools.deploy.drain import POLL_SECONDS, STUCK_SECONDS, drain
from tools.paths import ROOT
from tools.probe import NoAnswerError, ProbeError, leaving_file
from tools.server import EmbeddedServer, Ports

PORTS = Ports(1, 2, 3)
QUIET = 2 * POLL_SECONDS


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """Time that passes while the code under test sleeps."""
    now = [1000.0]
    monkeypatch.setattr(draining.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(draining.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr(draining, "leaving_file", lambda port: tmp_path / "leaving")
    return now


def metrics(monkeypatch, *readings: tuple[float, float] | Exception) -> None:
    """What the server tells at each reading, requests done and waiting; the last is told for ever."""
    left = list(readings)

    def read(host: str, port: int):
        reading = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(reading, Exception):
            raise reading
        return [
            ("nv_inference_request_success", 'model="explain"', reading[0]),
            ("nv_inference_pending_request_count", 'model="preprocess"', 0.0),
            ("integrated_gradients_waiting_images", 'pid="1"', reading[1]),
        ]

    monkeypatch.setattr(draining, "read_metrics", read)


@pytest.mark.parametrize(
    ("readings", "seconds"),
    [
        ([(5, 0)], QUIET),
        # An image waits at first.
        ([(5, 1), (5, 1), (5, 0)], POLL_SECONDS + QUIET),
        # Requests are answered, though none is seen waiting.
        ([(5, 0), (6, 0), (7, 0)], 2 * POLL_SECONDS + QUIET),
        # The metrics come late: the server is busy.
        ([(5, 0), (5, 0), NoAnswerError("late"), (5, 0)], 3 * POLL_SECONDS + QUIET),
    ],
    ids=["idle", "waiting", "answering", "late"],
)
def test_it_waits_until_nothing_is_under_way(monkeypatch, clock, readings, seconds):
    metrics(monkeypatch, *readings)
    assert drain(PORTS, age_seconds=0, most_seconds=60, quiet_seconds=QUIET)
    assert clock[0] - 1000 == pytest.approx(seconds)


def test_an_idle_server_waits_until_its_connections_have_ended(monkeypatch, clock):
    metrics(monkeypatch, (5, 0))
    assert drain(PORTS, age_seconds=20, most_seconds=60, quiet_seconds=QUIET)
    assert clock[0] - 1000 == pytest.approx(31, abs=POLL_SECONDS)


def test_it_does_not_wait_for_ever_nor_for_a_server_that_is_gone(monkeypatch, clock):
    metrics(monkeypatch, *((number, 1) for number in range(1000)))
    assert not drain(PORTS, age_seconds=20, most_seconds=60)
    assert clock[0] - 1000 == pytest.approx(60, abs=POLL_SECONDS)
    metrics(monkeypatch, ProbeError("refused"))
    assert drain(PORTS, age_seconds=20, most_seconds=60)


@pytest.mark.parametrize("reading", [(5, 1), NoAnswerError("late")], ids=["waiting", "silent"])
def test_a_server_that_hangs_is_not_waited_for(monkeypatch, clock, reading):
    metrics(monkeypatch, (4, 0), reading)
    assert not drain(PORTS, age_seconds=20, most_seconds=240)
    assert clock[0] - 1000 == pytest.approx(STUCK_SECONDS, abs=3 * POLL_SECONDS)


@pytest.mark.parametrize(("kind", "status"), [("--ready", 1), ("--patient", 0)])
def test_a_server_that_drains_is_alive_and_not_ready_and_gets_no_requests_of_probes(kind, status):
    """There is no server here: a probe that asked one would fail."""
    port = Ports.free().http
    leaving_file(port).touch()
    try:
        words = [sys.executable, "-m", "tools.probe", kind, "--port", str(port)]
        result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == status, result.stderr
        assert ("about to be stopped" in result.stderr) == bool(status)
    finally:
        leaving_file(port).unlink()


def ended_well(responses: list[Classification | Level]) -> bool:
    return isinstance(responses[-1], Level) and responses[-1].is_last


# Of the servers' connections; the client looks names up as often. Seconds.
AGE = 2
KINDS = ("classify", "explain", "stream")


@pytest.mark.slow
def test_a_server_that_leaves_loses_no_request_and_no_stream(tmp_path):
    """As a rolling update: one of two servers leaves the name, is drained and stopped, while clients send requests.

    A long explanation and a stream are under way when it begins to leave.
    """
    # Gradients that yield to whatever else runs on this machine would make the test take its time.
    repository = with_settings(tmp_path, "integrated_gradients", cpu_niceness=0)
    ports, image = Ports.free(), encode(scene_image(0))
    hosts = ("127.0.0.2", "127.0.0.3")
    option = (f"--grpc-max-connection-age={1000 * AGE}",)
    servers = [
        EmbeddedServer(repository, ports, tmp_path / f"{host}.log", stop_seconds=30, options=option, host=host)
        for host in hosts
    ]
    done: Counter[str] = Counter()
    failures: list[tuple[str, ExplainError]] = []
    is_over = threading.Event()

    def ask(kind: str) -> None:
        options = {"grpc.dns_min_time_between_resolutions_ms": 500}
        url = f"dns://{names.url}/explain.test:{ports.grpc}"
        with ExplainClient(url, timeout=300, channel_options=options) as client:
            while not is_over.is_set():
                try:
                    if kind == "classify":
                        client.classify(image)
                    elif kind == "explain":
                        client.explain(image, n_steps=4)
                    else:
                        assert ended_well(list(client.explain_stream(image, n_steps=8)))
                    done[kind] += 1
                except ExplainError as error:
                    failures.append((kind, error))

    def ask_leaving(is_stream: bool) -> None:
        """Directly: this one is under way at the server that leaves."""
        with ExplainClient(servers[0].grpc_url, timeout=300, retries=0) as client:
            if is_stream:
                assert ended_well(list(client.explain_stream(image, n_steps=60)))
            else:
                assert client.explain(image, n_steps=60).n_steps == 60

    with servers[0], servers[1], name_server() as names, ThreadPoolExecutor(8) as pool:
        names.addresses = list(hosts)
        calls = [pool.submit(ask, kind) for kind in KINDS]
        try:
            time.sleep(3 * AGE)
            calls += [pool.submit(ask_leaving, is_stream) for is_stream in (False, True)]
            time.sleep(1)
            names.addresses = [hosts[1]]  # as the service's endpoints when a pod terminates
            assert drain(ports, AGE, most_seconds=240, look_up_seconds=AGE, host=hosts[0], say=print)
            assert all(call.done() for call in calls[len(KINDS) :])
            started = time.monotonic()
            servers[0].process.terminate()
            servers[0].process.wait(30)
            ended = time.monotonic() - started
            before = dict(done)
            time.sleep(2 * AGE)
        finally:
            is_over.set()
            leaving_file(ports.http).unlink(missing_ok=True)
        for call in calls:
            call.result()
    print(f"answered {dict(done)}; after SIGTERM it ended within {ended:.1f} s")
    assert not failures
    assert done["classify"] > before["classify"]
    assert min(done[kind] for kind in KINDS) > 0
    log = (tmp_path / f"{hosts[0]}.log").read_text()
    assert "Signal (15) received" in log
    assert not re.findall(r"Model '.+' \(version 1\) has \d+ in-flight inferences", log)
