"""The containers' entry points, run without a container."""

from __future__ import annotations

import ctypes
import os
import re
import stat
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import encode, scene_image
from cpu_quota import CpuShare
from programs import run

from explain_client import ExplainClient
from tools.bench.overload import with_settings
from tools.deploy.serve import command
from tools.deploy.supervise import ContainerServer
from tools.paths import ROOT
from tools.probe import ProbeError, probe
from tools.server import EmbeddedServer, Ports
from tools.triton.options import SettingError, describe_threads, server_environment, server_options


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"STOP_SECONDS": "soon"}, "STOP_SECONDS"),
        ({"MODELS": "some"}, "MODELS"),
        ({"GRPC_PORT": "x"}, "GRPC_PORT"),
        ({"ADMIN_KEY_FILE": "/nowhere"}, "ADMIN_KEY_FILE"),
        ({"MODEL_REPOSITORY": "/nowhere"}, "/nowhere"),
        ({"OMP_NUM_THREADS": "many"}, "OMP_NUM_THREADS"),
    ],
)
def test_settings_that_cannot_be_are_named(settings, names, repository):
    with pytest.raises(SettingError, match=names):
        ContainerServer({"MODEL_REPOSITORY": str(repository), **settings})


@pytest.mark.parametrize("setting", [{}, {"OMP_NUM_THREADS": ""}])
def test_triton_computes_with_the_threads_that_the_quota_allows_unless_they_are_set(setting, monkeypatch):
    monkeypatch.setattr("tools.triton.options.cpu_share", lambda: CpuShare(64, 4.5))
    environment = server_environment({"KEY": "value", **setting})
    assert environment == {"KEY": "value", "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "4"}
    assert describe_threads(setting) == "4 for each model: 64 cores, of which a quota allows 4.5"
    assert server_environment({"OMP_NUM_THREADS": "3"})["OMP_NUM_THREADS"] == "3"
    assert describe_threads({"OMP_NUM_THREADS": "3"}) == "3 for each model: OMP_NUM_THREADS is set"


def test_the_container_starts_triton_with_the_embedded_servers_options(repository):
    words = command({"MODEL_REPOSITORY": str(repository), "ADMIN_KEY": "key", "STOP_SECONDS": "30"})
    assert words[0] == "tritonserver"
    assert set(server_options(repository, "0.0.0.0", Ports(), "key", 30)) < set(words)
    # Without a configured key there is a random one.
    keys = [re.search(r"admin-key=(\S+)", " ".join(command({"MODEL_REPOSITORY": str(repository)}))) for _ in "ab"]
    assert keys[0][1] != keys[1][1]


OTHER_USER = 1000
# Linux's numbers of the capability to change what another user owns, and of the operation that gives one up.
CAP_FOWNER, PR_CAPBSET_DROP = 3, 24


@pytest.fixture(scope="module")
def prepared():
    """A repository as `prepare` makes it in a volume that it may write into and that belongs to another user.

    Such is Kubernetes' `emptyDir` with `fsGroup`. If the tests do not run as root, the volume belongs to this user.
    """
    with tempfile.TemporaryDirectory() as folder:
        volume = Path(folder) / "models"
        volume.mkdir()
        if os.geteuid() == 0:
            os.chown(volume, OTHER_USER, -1)
        volume.chmod(0o2777)
        result = run(
            sys.executable,
            "-m",
            "tools.deploy.prepare",
            cwd=ROOT,
            env={**os.environ, "MODEL_REPOSITORY": str(volume), "WEIGHTS": "shapes"},
            preexec_fn=lambda: ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_FOWNER, 0, 0, 0),
        )
        assert result.returncode == 0, result.stderr
        yield volume


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_the_volume_of_the_models_may_belong_to_another_user(prepared):
    assert prepared.stat().st_uid == OTHER_USER
    assert (prepared / "classifier" / "1" / "model.pt").stat().st_uid == os.geteuid()
    assert (prepared / "explain" / "config.pbtxt").is_file()


def test_preparing_what_cannot_be_says_so(tmp_path):
    environment = {**os.environ, "MODEL_REPOSITORY": str(tmp_path), "WEIGHTS": "/nowhere.pt"}
    result = run(sys.executable, "-m", "tools.deploy.prepare", cwd=ROOT, env=environment)
    assert result.returncode == 1
    assert "/nowhere.pt" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture
def triton_on_path(tmp_path, prepared):
    """An environment in which ``tritonserver`` is the embedded server's, in place of the container's."""
    ports = Ports.free()
    embedded = EmbeddedServer(prepared, ports)
    words, environment = embedded.command_line(tmp_path)
    script = tmp_path / "tritonserver"
    options = " ".join(
        f"'{word}'" for word in words[1:] if word.startswith(("--backend-directory", "--backend-config"))
    )
    lines = [f"export LD_LIBRARY_PATH='{environment['LD_LIBRARY_PATH']}'", f"exec '{words[0]}' {options} \"$@\""]
    script.write_text("#!/bin/sh\n" + "\n".join(lines) + "\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    yield (
        ports,
        {
            **environment,
            "PATH": f"{tmp_path}:{environment['PATH']}",
            "MODEL_REPOSITORY": str(prepared),
            "HOST": "127.0.0.1",
            "HTTP_PORT": str(ports.http),
            "GRPC_PORT": str(ports.grpc),
            "METRICS_PORT": str(ports.metrics),
        },
    )
    embedded.remove_shared_memory()


def started(entry: str, environment: dict[str, str], log: Path, *options: str) -> subprocess.Popen:
    words = [sys.executable, "-m", f"tools.deploy.{entry}", *options]
    return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT)


def wait_until_it_answers(process: subprocess.Popen, ports: Ports, model: str, log: Path) -> None:
    until = time.monotonic() + 60
    while True:
        try:
            probe("127.0.0.1", ports.http, model)
            return
        except ProbeError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until
            time.sleep(0.3)


PROBE_SECONDS = 2


@pytest.mark.parametrize("entry", [pytest.param("serve", marks=pytest.mark.slow), "supervise"])
def test_the_containers_entry_points_serve_predictions_alone_and_stop_in_order(triton_on_path, tmp_path, entry):
    ports, environment = triton_on_path
    settings = {"MODELS": "classify", "PROBE_SECONDS": str(PROBE_SECONDS), "DRAIN_SECONDS": "1", "OMP_NUM_THREADS": "1"}
    process = started(entry, {**environment, **settings}, tmp_path / "log", "--log-info=false")
    try:
        wait_until_it_answers(process, ports, "classify", tmp_path / "log")
        with pytest.raises(ProbeError, match="explain answers 404"):
            probe("127.0.0.1", ports.http, "explain")
        assert "Started HTTPService" not in (tmp_path / "log").read_text()  # as the further option asks
        assert f"{entry}: threads 1 for each model" in (tmp_path / "log").read_text()
        if entry == "supervise":  # it must find the server healthy
            time.sleep(3 * PROBE_SECONDS)
            assert "restart" not in (tmp_path / "log").read_text()
    finally:
        process.terminate()
        assert process.wait(60) == 0


@pytest.mark.slow
def test_the_supervisor_lets_an_explanation_and_a_stream_end_before_it_stops_triton(triton_on_path, tmp_path):
    ports, environment = triton_on_path
    # Gradients that yield to whatever else runs on this machine would make the test take its time.
    repository = with_settings(tmp_path, "integrated_gradients", cpu_niceness=0)
    settings = {"MODEL_REPOSITORY": str(repository), "PROBE_SECONDS": "30", "DRAIN_SECONDS": "200"}
    image, log = encode(scene_image(0)), tmp_path / "log"
    process = started("supervise", {**environment, **settings}, log)
    try:
        wait_until_it_answers(process, ports, "explain", log)
        with ExplainClient(f"127.0.0.1:{ports.grpc}", timeout=200, retries=0) as client, ThreadPoolExecutor(2) as pool:
            explanation = pool.submit(client.explain, image, n_steps=40)
            stream = pool.submit(lambda: list(client.explain_stream(image, n_steps=40)))
            time.sleep(1.5)
            assert not explanation.done()
            process.terminate()
            assert explanation.result().n_steps == 40
            assert stream.result()[-1].is_last
    finally:
        process.terminate()
        assert process.wait(120) == 0
    assert "supervise: nothing is under way after" in log.read_text()
