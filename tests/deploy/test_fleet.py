"""Two servers behind a real load balancer, one of which is killed and comes back."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc
from conftest import encode, relative_distance, scene_image

from explain_client import ExplainClient, ExplainError
from tools.paths import ROOT
from tools.server import EmbeddedServer, Ports

REQUESTS, CLIENTS = 500, 8
IMAGES = 4


@contextlib.contextmanager
def balancer(servers: list[EmbeddedServer], folder: Path):
    """nginx before some servers, configured as in `tools/deploy/nginx.conf`; yields host and port."""
    port = Ports.free().grpc
    text = (ROOT / "tools" / "deploy" / "nginx.conf").read_text()
    for example, server in zip(("127.0.0.1:8001", "127.0.0.1:9001"), servers):
        text = text.replace(example, server.grpc_url)
    (folder / "nginx.conf").write_text(text.replace("127.0.0.1:7001", f"127.0.0.1:{port}"))
    words = ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf"), "-g", "daemon off;"]
    process = subprocess.Popen(words, stderr=(folder / "stderr").open("w"))
    try:
        time.sleep(0.5)
        assert process.poll() is None, (folder / "stderr").read_text()
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def explained(server: EmbeddedServer) -> int:
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        return client.get_inference_statistics("explain").model_stats[0].inference_stats.success.count


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_a_server_that_is_killed_behind_the_balancer_costs_no_answer(repository, tmp_path):
    servers = [EmbeddedServer(repository, Ports.free(), log_file=tmp_path / f"{name}.log") for name in "ab"]
    images = [encode(scene_image(index)) for index in range(IMAGES)]
    answers: dict[int, list[np.ndarray]] = {number: [] for number in range(REQUESTS)}
    reported: dict[int, ExplainError] = {}
    done = threading.Semaphore(0)
    with servers[0], servers[1], balancer(servers, tmp_path) as url:
        with ExplainClient(servers[0].grpc_url) as client:
            expected = [client.explain(image, n_steps=1).saliency for image in images]

        def ask(number: int) -> None:
            try:
                answers[number].append(clients[number % CLIENTS].explain(images[number % IMAGES], n_steps=1).saliency)
            except ExplainError as error:
                reported[number] = error
            done.release()

        clients = [ExplainClient(url, timeout=120, retries=20) for _ in range(CLIENTS)]
        with ThreadPoolExecutor(CLIENTS) as pool:
            calls = [pool.submit(ask, number) for number in range(REQUESTS)]
            for _ in range(120):
                assert done.acquire(timeout=60)
            before = explained(servers[0])
            assert before > 20  # it gets its share of the requests
            os.killpg(servers[0].process.pid, signal.SIGKILL)
            servers[0].stop(0)
            servers[0].start()
            for call in calls:
                call.result()
        for client in clients:
            client.close()
        shares = [explained(server) for server in servers]

    print(f"served {shares} since the last start, {before} before it was killed; reported {len(reported)}")
    assert shares[0] > 20  # requests since its restart
    for number, attributions in answers.items():
        assert len(attributions) + (number in reported) == 1
        if attributions:
            assert relative_distance(attributions[0], expected[number % IMAGES]) <= 1e-5
    # Every failure can be retried, and the client did so.
    assert not reported
