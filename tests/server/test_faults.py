"""Faults provoked on a live server: requests under way end, and the next good request is answered soon."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import tritonclient.grpc
import tritonclient.utils
from circuit_breaker import MOST_SECONDS, CircuitBreaker
from conftest import encode, scene_image
from live_server import infer, stub
from path_density import FILE_NAME

from explain_client import ExplainClient, ExplainError, RefusedError, UnavailableError
from tools.bench.overload import measure, with_settings
from tools.bench.soak import soak
from tools.paths import ROOT
from tools.probe import probe_patiently, read_metrics, total
from tools.server import EmbeddedServer, Ports
from tools.triton.process import ServerError
from tools.triton.supervisor import Watch, supervise

STUBBED = ("preprocess", "classifier", "integrated_gradients", "heatmap", "explain_stream")
LIBFAKETIME = next(map(str, Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)
# Time for the next good request to be answered.
RECOVERY_SECONDS = 30


@pytest.fixture(scope="module")
def image() -> bytes:
    return encode(scene_image(0))


def triton_process(parent: int) -> int:
    """Process number of the tritonserver that a process has started."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_child = int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent
            if is_child and (folder / "cmdline").read_bytes().split(b"\0")[0].endswith(b"/tritonserver"):
                return int(folder.name)
    raise AssertionError("there is no Triton")


@pytest.fixture(scope="module")
def supervised(repository, tmp_path_factory):
    """What ``NETWORK=shapes make serve`` runs: its gRPC address and its process."""
    folder, ports = tmp_path_factory.mktemp("supervised"), Ports.free()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "NETWORK": "shapes"}
    environment |= {f"{name.upper()}_PORT": str(port) for name, port in vars(ports).items()}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tools.server", "--repository", str(repository), "--most-restarts", "100"],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        until = time.monotonic() + 120
        while "ready" not in (folder / "log").read_text():
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < until
            time.sleep(0.2)
        yield f"127.0.0.1:{ports.grpc}", process, folder / "log"
    finally:
        process.terminate()
        process.wait(60)


def seconds_until(is_reported: Callable[[], object], since: float) -> float:
    """Seconds from ``since`` until a supervisor reports a restart, which it does after it has stopped the server."""
    while not is_reported():
        assert time.monotonic() < since + RECOVERY_SECONDS, "the supervisor has not reported a restart"
        time.sleep(0.1)
    return time.monotonic() - since


def recovers(url: str, image: bytes, stream: bool = False, since: float | None = None) -> float:
    """Seconds from ``since``, or now, until a good request is answered; fails after ``RECOVERY_SECONDS``."""
    started = time.monotonic() if since is None else since
    while True:
        try:
            with ExplainClient(url, timeout=3, retries=0) as client:
                client.explain(image, n_steps=1)
                if stream:
                    for _ in client.explain_stream(image, n_steps=1):
                        pass
                seconds = time.monotonic() - started
                assert seconds < RECOVERY_SECONDS
                return seconds
        except ExplainError as error:
            if time.monotonic() - started >= RECOVERY_SECONDS:
                raise AssertionError(f"no answer after {RECOVERY_SECONDS} s: {error}") from None
            time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hanging"])
@pytest.mark.parametrize("model", [*STUBBED, "tritonserver"])
def test_a_process_that_dies_or_hangs_is_replaced_and_nobody_waits_for_ever(supervised, image, model, number):
    url, process, log = supervised
    server = triton_process(process.pid)
    victim = server if model == "tritonserver" else stub(server, model)
    ended: queue.Queue[float] = queue.Queue()
    logged = len(log.read_text())

    def ask() -> None:
        # A long timeout, so that the server or the supervisor ends the request.
        with ExplainClient(url, timeout=120, retries=0) as client, contextlib.suppress(ExplainError):
            client.explain(image, n_steps=100)
        ended.put(time.monotonic())

    time.sleep(3 * Watch().interval)  # for the supervisor to see that the server has recovered from the fault before
    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(1)
    killed = time.monotonic()
    os.kill(victim, number)
    noticed = seconds_until(lambda: "restart " in log.read_text()[logged:], since=killed)
    seconds = recovers(url, image, stream=True, since=killed)
    under_way = ended.get(timeout=1) - killed
    print(f"{model} {number.name}: noticed after {noticed:.1f} s, good again after {seconds:.1f} s", end=", ")
    print(f"what was under way ended after {under_way:.1f} s")
    assert under_way <= RECOVERY_SECONDS


@pytest.mark.slow
def test_it_gives_up_after_a_bound(repository, tmp_path):
    server = EmbeddedServer(repository, Ports.free(), log_file=tmp_path / "log")
    said: list[str] = []

    def say(message: str) -> None:
        said.append(message)
        assert "restart 3" not in message

    watch = Watch(interval=0.2, first_pause=0.1, longest_pause=0.2, most_restarts=2)
    with server:

        def kill_again_and_again() -> None:
            for restarts in range(3):
                while said.count("ready again") < restarts:
                    time.sleep(0.1)
                server.process.kill()

        thread = threading.Thread(target=kill_again_and_again, daemon=True)
        thread.start()
        with pytest.raises(
            ServerError, match="gave up after 2 restarts within 600 s; the last time: Triton ended with"
        ):
            supervise(server, watch, say)
        thread.join(10)
    assert said[0].endswith("restart 1 of at most 2 in 0.1 s")


@contextlib.contextmanager
def supervised_with(tmp_path: Path, fault: str) -> Iterator[tuple[EmbeddedServer, list[str], Path]]:
    """A supervised server whose passes have a fault while a file exists: the server, the reports, the file."""
    repository = with_settings(tmp_path, "integrated_gradients")
    there, file = tmp_path / "fault", repository / "integrated_gradients" / "1" / "classifier_network.py"
    before = "        return self._network.row_gradients(rows[:count], any_paired)\n"
    injected = f"""
        import os, time
        while os.path.exists({str(there)!r}):
            {fault}
"""
    assert file.read_text().count(before) == 1
    file.write_text(file.read_text().replace(before, injected + before))
    server = EmbeddedServer(repository, Ports.free(), log_file=tmp_path / "log")
    said: list[str] = []

    def watch() -> None:
        with contextlib.suppress(ServerError):
            supervise(server, Watch(most_restarts=1), said.append)

    with server:
        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield server, said, there
        finally:
            there.unlink(missing_ok=True)
            server.process.kill()  # exceeds the limit of restarts, which ends the thread
            thread.join(60)


@pytest.mark.slow
def test_a_device_that_has_failed_ends_its_process_which_is_started_anew(tmp_path, image):
    fault = 'raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")'
    with supervised_with(tmp_path, fault) as (server, said, there):
        there.touch()
        with (
            ExplainClient(server.grpc_url, timeout=20, retries=0) as client,
            pytest.raises(ExplainError, match="illegal memory access") as failure,
        ):
            client.explain(image, n_steps=20)
        assert failure.value.status == "INTERNAL"
        there.unlink()
        failed = time.monotonic()
        seconds_until(lambda: said, since=failed)
        seconds = recovers(server.grpc_url, image, since=failed)
        print(f"good again {seconds:.1f} s after the failure: {said}")
    assert "its device has failed" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_gradients_that_hang_in_a_process_that_answers_are_noticed(tmp_path, image):
    with supervised_with(tmp_path, "time.sleep(0.1)") as (server, said, there):
        there.touch()
        hung = time.monotonic()
        with (
            ExplainClient(server.grpc_url, timeout=RECOVERY_SECONDS, retries=0) as client,
            pytest.raises(ExplainError),
        ):
            client.explain(image, n_steps=20)
        seconds_until(lambda: said, since=hung)
        there.unlink()
        seconds = recovers(server.grpc_url, image, since=hung)
        print(f"good again {seconds:.1f} s after the beginning: {said}")
        assert "integrated_gradients makes no progress" in said[0]


@pytest.mark.slow
def test_sigterm_with_sixteen_requests_under_way_answers_or_fails_each_in_time(repository, tmp_path, image):
    server = EmbeddedServer(repository, Ports.free(), log_file=tmp_path / "log", stop_seconds=10)
    outcomes: list[str] = []

    def ask(number: int) -> None:
        try:
            with ExplainClient(server.grpc_url, timeout=60, retries=0) as client:
                client.explain(image, n_steps=20)
            outcomes.append("answered")
        except ExplainError as error:
            outcomes.append(error.status or "failed")

    with server, ThreadPoolExecutor(17) as pool:
        calls = [pool.submit(ask, number) for number in range(16)]
        time.sleep(2.5)
        started = time.monotonic()
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        time.sleep(0.5)
        calls.append(pool.submit(ask, 16))  # arrives during the shutdown
        for call in calls:
            call.result()
        seconds = time.monotonic() - started
        stopping.join()
    print(f"{outcomes} in {seconds:.1f} s")
    assert seconds < 10 + 3 + 2
    assert len(outcomes) == 17
    assert "answered" in outcomes
    # After SIGTERM Triton 2.51 starts no further step of an ensemble, so late gradients get no heatmap.
    assert set(outcomes) == {"answered", "UNAVAILABLE"}


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["missing", "truncated", "no TorchScript", "of another version", "NaN weights"])
def test_a_model_file_that_cannot_serve_is_named_when_the_server_starts(repository, tmp_path, fault):
    models = tmp_path / "models"
    shutil.copytree(repository, models)
    file = models / "classifier" / "1" / "model.pt"
    if fault == "missing":
        file.unlink()
    elif fault == "truncated":
        file.write_bytes(file.read_bytes()[:100_000])
    elif fault == "no TorchScript":
        torch.save({"weight": torch.zeros(3)}, file)
    elif fault == "of another version":  # than the gradients'
        file.parent.rename(file.parent.with_name("2"))
    else:
        module = torch.jit.load(str(file))
        with torch.no_grad():
            next(iter(module.parameters())).fill_(float("nan"))
        module.save(str(file))
    with pytest.raises(ServerError, match=r"model (classifier|integrated_gradients) failed to load"):
        EmbeddedServer(models, Ports.free(), log_file=tmp_path / "log").start()


@pytest.mark.slow
@pytest.mark.parametrize(
    "content", [b"", b"{half", b'{"model_sha256": "of another"}'], ids=["empty", "half", "another's"]
)
def test_a_broken_calibration_is_refused_where_it_is_needed_and_nowhere_else(repository, tmp_path, image, content):
    models = tmp_path / "models"
    shutil.copytree(repository, models)
    (models / "classifier" / "1" / FILE_NAME).write_bytes(content)
    with (
        EmbeddedServer(models, Ports.free(), log_file=tmp_path / "log") as server,
        ExplainClient(server.grpc_url) as client,
    ):
        with pytest.raises(RefusedError, match=r"python -m tools\.calibrate"):
            client.explain(image, method="calibrated", n_steps=4)
        assert client.explain(image, tolerance=0.2).error_estimate <= 0.2
        assert client.explain(image, n_steps=4).n_steps == 4
    assert FILE_NAME in (tmp_path / "log").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not LIBFAKETIME, reason="needs libfaketime")
@pytest.mark.parametrize("jump", ["+2h", "-2h"])
def test_a_clock_that_jumps_ends_nothing_early_or_never(repository, tmp_path, image, jump):
    """Deadlines, timeouts and waits of requests under way and of later ones."""
    now = tmp_path / "now"
    now.write_text("+0")
    fake = {"LD_PRELOAD": LIBFAKETIME, "FAKETIME_TIMESTAMP_FILE": str(now), "FAKETIME_NO_CACHE": "1"}
    fake |= {"FAKETIME_DONT_FAKE_MONOTONIC": "1"}

    class FakeTime(EmbeddedServer):
        def command_line(self, folder: Path) -> tuple[list[str], dict[str, str]]:
            command, environment = super().command_line(folder)
            return command, {**environment, **fake}

    with FakeTime(repository, Ports.free(), log_file=tmp_path / "log") as server:
        with ExplainClient(server.grpc_url, timeout=30, retries=0) as client, ThreadPoolExecutor(3) as pool:
            client.explain(image, n_steps=1)
            options = {"n_steps": 60}, {"deadline_ms": 1500, "n_steps": 1000}, {"n_steps": 40}
            calls = [pool.submit(client.explain, image, **kind) for kind in options]
            time.sleep(0.7)
            now.write_text(jump)
            full, timely, other = (call.result() for call in calls)
            assert (full.n_steps, other.n_steps) == (60, 40)
            assert 3 <= timely.n_steps < 1000
            started = time.monotonic()
            assert client.explain(image, deadline_ms=500, n_steps=1000).n_steps >= 3
            assert time.monotonic() - started < 3
            *_, last = client.explain_stream(image, n_steps=13)
            assert last.n_steps == 13
        probe_patiently(server.host, server.ports.http, server.ports.metrics)
    stamps = set(re.findall(r"[IWE]\d{4} (\d\d):", (tmp_path / "log").read_text()))
    assert len(stamps) > 1, "the server's clock did not jump"


class SmallSharedMemory(EmbeddedServer):
    """A server in whose view of the machine there are so many bytes of shared memory."""

    size = "40m"

    def command_line(self, folder: Path) -> tuple[list[str], dict[str, str]]:
        command, environment = super().command_line(folder)
        mount = f'mount -t tmpfs -o size={self.size} tmpfs /dev/shm && exec "$@"'
        return ["unshare", "--mount", "sh", "-c", mount, "sh", *command], environment


@pytest.mark.slow
@pytest.mark.skipif(
    subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode
    != 0,
    reason="mounts cannot be made here",
)
def test_shared_memory_that_is_full_fails_requests_and_not_the_server(repository, tmp_path, image):
    with SmallSharedMemory(repository, Ports.free(), log_file=tmp_path / "log") as server:
        with tritonclient.grpc.InferenceServerClient(server.grpc_url) as triton:
            infer(triton, [image], n_steps=1)
            # 32 images in and out of each model take far more than there is.
            with pytest.raises(tritonclient.grpc.InferenceServerException) as failure:
                infer(triton, [image] * 32, n_steps=1, timeout_seconds=60)
            print(failure.value)
            recovers(server.grpc_url, image)
        assert server.process.poll() is None


def test_clients_that_go_away_cost_nobody_else_anything(server, triton, image):
    """In the middle of a request, in the middle of a stream, and two hundred that open connections and say little."""
    before = len(os.listdir(f"/proc/{server.process.pid}/fd"))
    beginnings = {
        server.ports.http: b"POST /v2/models/explain/infer HTTP/1.1\r\nContent-Length: 100000\r\n\r\n{",
        # HTTP/2's preface and empty settings.
        server.ports.grpc: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]),
    }
    sockets = []
    for number in range(100):
        for port, beginning in beginnings.items():
            sockets.append(socket.create_connection(("127.0.0.1", port), timeout=10))
            sockets[-1].sendall(beginning if number % 2 else b"")
    infer(triton, [image], n_steps=1)  # beside them
    for connection in sockets:
        connection.close()
    leaver = ExplainClient(server.grpc_url)
    for _ in leaver.explain_stream(image, n_steps=50):
        break
    leaver.close()
    program = "import sys, explain_client; explain_client.ExplainClient(sys.argv[1]).explain(sys.argv[2], n_steps=30)"
    file = Path(os.environ.get("TMPDIR", "/tmp")) / f"leaver-{os.getpid()}.png"
    file.write_bytes(image)
    process = subprocess.Popen([sys.executable, "-c", program, server.grpc_url, str(file)])
    until = time.monotonic() + 30
    while not total(read_metrics(server.host, server.ports.metrics), "integrated_gradients_waiting_images"):
        assert time.monotonic() < until
        time.sleep(0.05)
    process.kill()
    process.wait()
    file.unlink()
    infer(triton, [image], n_steps=1)
    until = time.monotonic() + 15
    while len(os.listdir(f"/proc/{server.process.pid}/fd")) > before + 20 and time.monotonic() < until:
        time.sleep(0.2)
    assert len(os.listdir(f"/proc/{server.process.pid}/fd")) <= before + 20


def test_an_open_breaker_turns_no_request_away_that_needs_no_gradients(server, triton, image):
    breaker = CircuitBreaker(server.process.pid, 24)
    refused = pytest.raises(tritonclient.utils.InferenceServerException, match="are refused at present")
    try:
        breaker.open(1, MOST_SECONDS)
        infer(triton, [image], outputs=("PROBABILITIES",))
        with refused:
            infer(triton, [image], outputs=("HEATMAP",), n_steps=1)
        with refused:
            infer(triton, [image], [3], outputs=("HEATMAP",))
        with ExplainClient(server.grpc_url, retries=0) as client, pytest.raises(UnavailableError, match="refused at"):
            client.explain(image)
    finally:
        breaker.remove()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a disk full")
def test_a_full_disk_ends_the_command_with_a_sentence(server, tmp_path, image):
    folder = tmp_path / "full"
    folder.mkdir()
    picture = tmp_path / "picture.png"
    picture.write_bytes(image)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounts cannot be made here")
    try:
        command = [str(Path(sys.executable).with_name("explain")), str(picture), "--n-steps", "1"]
        result = subprocess.run(
            [*command, "--url", server.grpc_url, "--out", str(folder)], capture_output=True, text=True, check=False
        )
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    assert result.returncode != 0
    assert "No space left on device" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_ten_times_what_it_can_do_leaves_predictions_and_accepted_explanations_well(tmp_path, served_module):
    repository = with_settings(tmp_path, "integrated_gradients", max_wait_seconds=5)
    with EmbeddedServer(repository, Ports.free(), log_file=tmp_path / "log") as server:
        measured = measure(server, (10,), 30)
    (row,) = measured["rows"]
    assert row["classify_failures"] == 0
    assert row["refused_seconds"]["count"] > 0
    assert row["accepted_seconds"]["count"] + row["refused_seconds"]["count"] == row["offered"]
    refusal = "UNAVAILABLE in ensemble 'explain', [overloaded] "
    assert all(message.startswith(refusal) for message in row["errors"])
    assert np.isfinite(row["computing_p99_at_most"])
    # The longest wait, its computing time, and a second for the steps before and after the gradients.
    assert row["accepted_seconds"]["p99"] < 5 + row["computing_p99_at_most"] + 1


@pytest.mark.slow
def test_a_large_batch_is_answered_on_a_loaded_server_whatever_its_own_length(tmp_path):
    repository = with_settings(tmp_path, "integrated_gradients", max_wait_seconds=5)
    images = [encode(scene_image(index)) for index in range(32)]
    ended, counts = threading.Event(), Counter()

    def load(url: str) -> None:
        with ExplainClient(url, retries=0) as client:
            while not ended.is_set():
                with contextlib.suppress(UnavailableError):
                    counts[client.explain(images[0], n_steps=10).n_steps] += 1

    with EmbeddedServer(repository, Ports.free(), log_file=tmp_path / "log") as server, ThreadPoolExecutor(2) as pool:
        try:
            for _ in range(2):
                pool.submit(load, server.grpc_url)
            time.sleep(2)
            with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
                answer = infer(client, images, outputs=("N_STEPS", "ATTRIBUTIONS"), n_steps=50)
        finally:
            ended.set()
    assert answer["N_STEPS"].tolist() == [[50]] * 32
    assert counts[10] > 10  # it was loaded


@pytest.mark.slow
def test_two_minutes_of_everything_leave_nothing_wrong(repository, tmp_path):
    with EmbeddedServer(repository, Ports.free(), log_file=tmp_path / "log") as server:
        report = soak(server, 120)
    assert report["wrong"] == []
    assert report["accounted"]
    assert report["requests"] > 100
