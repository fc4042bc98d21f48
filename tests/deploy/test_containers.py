"""The images and the compose project, run by a Docker engine of the tests' own: ``make test-containers``.

Stand-ins (`stand_ins/Dockerfile`) replace the images that cannot be pulled, among them NVIDIA's. The tests share one
project, and run in this order: later ones find it as earlier ones leave it, and each can run alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import encode, scene_image
from deploy.container_engine import Engine, Project, memory_lock, missing, traces, wait_for

from explain_client import ExplainClient, ExplainError
from tools.imagenet.photographs import COFFEE
from tools.paths import ROOT
from tools.triton.options import Ports

reason = missing()
pytestmark = [pytest.mark.slow, pytest.mark.containers, pytest.mark.skipif(reason is not None, reason=str(reason))]

IMAGE = encode(scene_image(0))
VERSION = re.findall(r"TRITON_VERSION=(\S+)", (ROOT / ".env.example").read_text())[0]
# A model's process and Triton, by parts of their command lines.
MODEL = ("triton_python_backend_stub", "/integrated_gradients/")
TRITON = ("tritonserver", "--model-repository")


@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    """An engine with the stand-ins; the folder CONTAINERS keeps its data for the next session, if it is set."""
    folder = tmp_path_factory.mktemp("engine")
    before = traces(folder)
    keep = os.environ.get("CONTAINERS")
    with Engine(folder, Path(keep).resolve() if keep else None) as running:
        yield running
    assert not folder.exists()
    assert not sorted(traces(folder) - before)


@pytest.fixture(scope="session")
def project(engine, tmp_path_factory):
    """The compose project with its images built and no container started."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    engine.build_stand_ins(
        {
            "tritonserver": f"nvcr.io/nvidia/tritonserver:{VERSION}-py3",
            "sdk": f"nvcr.io/nvidia/tritonserver:{VERSION}-py3-sdk",
            "prometheus": services["prometheus"]["image"],
            "nginx": "stand-in/nginx:bookworm",
        }
    )
    project = Project(
        engine, tmp_path_factory.mktemp("project") / "copy", {"WEIGHTS": "shapes", "PROMETHEUS_PORT": str(free_port())}
    )
    project.override(SERVICES)
    started = time.monotonic()
    project.compose("--profile", "perf", "build", "triton-cpu", "perf")
    print(f"both images were built in {time.monotonic() - started:.0f} s")
    yield project
    project.compose("down", "--volumes", "--remove-orphans")
    shutil.rmtree(project.folder)
    assert not project.left()


def free_port() -> int:
    return Ports.free().http


# Builds reach the package index by the machine's network. Two servers share two cores, so each gets one thread.
SERVICES: dict[str, Any] = {
    "prepare": {"build": {"network": "host"}, "environment": {"OMP_NUM_THREADS": "1"}},
    "triton-cpu": {
        "build": {"network": "host"},
        "environment": {"OMP_NUM_THREADS": "1"},
        "ulimits": {"memlock": memory_lock()},
    },
    "perf": {"build": {"network": "host"}},
}


@pytest.fixture
def running(project) -> Project:
    """The project with Triton and Prometheus, answering."""
    if not explains(project):
        project.compose("up", "--detach", "triton-cpu", "prometheus")
        wait_until_it_explains(project)
    return project


def explains(project: Project, seconds: float = 10) -> bool:
    with ExplainClient(f"127.0.0.1:{project.ports.grpc}", timeout=seconds, retries=0) as client:
        try:
            return client.explain(IMAGE, n_steps=2).n_steps == 2
        except ExplainError:
            return False


def wait_until_it_explains(project: Project, seconds: float = 180) -> None:
    wait_for(lambda: explains(project), seconds, lambda: project.logs("triton-cpu"))


def read(port: str | int, path: str) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return json.load(answer)


@pytest.mark.parametrize("service", ["triton-cpu", "perf"])
def test_an_image_says_what_it_is_and_holds_no_compiler(project, engine, service):
    name = {"triton-cpu": "explaining-triton", "perf": "explaining-triton-client"}[service]
    (image,) = re.findall(rf"^{name} +\S+", engine.docker("images", "--format", "{{.Repository}} {{.Tag}}"), re.M)
    image = ":".join(image.split())
    told = engine.inspect(image)
    labels = {key.removeprefix("org.opencontainers.image."): text for key, text in told["Config"]["Labels"].items()}
    version = re.findall(r'^version = "(\S+)"', (ROOT / "client" / "pyproject.toml").read_text(), re.M)[0]
    added = told["Size"] - engine.inspect(labels["base.name"])["Size"]
    print(f"{image} adds {added / 1e6:.0f} MB to its base")
    assert labels["version"] == version
    assert labels["licenses"] == "BSD-3-Clause"
    assert labels["title"] == name
    assert {"source", "revision", "description"} <= labels.keys()
    assert told["Config"]["User"] == {"triton-cpu": "1000", "perf": "1001"}[service]
    if service == "triton-cpu":
        assert set(told["Config"]["ExposedPorts"]) == {"8000/tcp", "8001/tcp", "8002/tcp"}
        assert told["Config"]["Healthcheck"]["Test"][1:4] == ["python3", "-m", "tools.probe"]

    def inside(*words: str) -> str:
        return engine.docker("run", "--rm", "--network=none", "--entrypoint=/bin/sh", image, "-c", *words).strip()

    assert inside("command -v gcc g++ cc c++ clang ld make uv; ls -A /root/.cache /tmp 2>/dev/null || true") == "/tmp:"
    lock = ROOT / "tools" / "deploy" / f"requirements-{'server' if service == 'triton-cpu' else 'client'}.txt"
    listing = "from importlib.metadata import distributions as d; print(*(f'{i.name}=={i.version}' for i in d()))"
    installed = inside(f'/opt/explaining/.venv/bin/python3 -c "{listing}"').lower().replace("_", "-").split()
    pins = set(re.findall(r"^(\S+==\S+)", lock.read_text(), re.M))
    assert set(installed) - {f"explain-client=={version}"} <= pins
    assert len(installed) > 8


def test_the_cpu_profile_starts_and_explains_over_the_published_port(project):
    started = time.monotonic()
    project.compose("up", "--detach", "triton-cpu", "prometheus")
    wait_until_it_explains(project)
    print(f"it explains {time.monotonic() - started:.0f} s after compose up")
    assert project.state("prepare")["ExitCode"] == 0
    with ExplainClient(f"127.0.0.1:{project.ports.grpc}") as client:
        explanation = client.explain(IMAGE, n_steps=8)
    assert explanation.saliency.shape == (224, 224)
    doctor = subprocess.run(
        [str(Path(sys.executable).with_name("explain")), "doctor", "--url", f"127.0.0.1:{project.ports.grpc}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    wait_for(lambda: project.state("triton-cpu")["Health"]["Status"] == "healthy", 60)


def test_containers_can_do_no_more_than_they_need(running, engine):
    told = engine.inspect(running.container("triton-cpu"))
    (models,) = (mount for mount in told["Mounts"] if mount["Destination"] == "/models")
    assert models["RW"] is False
    attempt = engine.try_docker("exec", running.container("triton-cpu"), "touch", "/models/file")
    assert attempt.returncode != 0
    assert "Read-only file system" in attempt.stderr
    assert told["HostConfig"]["ShmSize"] == 2 << 30
    published = {port: [(each["HostIp"], each["HostPort"]) for each in to] for port, to in _ports(told).items()}
    ports = running.ports
    expected = {"8000/tcp": ports.http, "8001/tcp": ports.grpc, "8002/tcp": ports.metrics}
    assert published == {port: [("127.0.0.1", str(number))] for port, number in expected.items()}
    processes = running.processes("triton-cpu")
    assert len(processes) > 5
    for number in processes:
        status = dict(re.findall(r"^(\w+):\s*(.*)$", Path(f"/proc/{number}/status").read_text(), re.M))
        assert set(status["Uid"].split()) == {"1000"}
        assert {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd")} == {0}
        assert status["NoNewPrivs"] == "1"


def _ports(told: dict[str, Any]) -> dict[str, Any]:
    return {port: to for port, to in told["NetworkSettings"]["Ports"].items() if to}


def test_prometheus_scrapes_by_service_name_and_has_its_rules(running):
    port = running.settings["PROMETHEUS_PORT"]

    def target() -> Any:
        (only,) = read(port, "/api/v1/targets")["data"]["activeTargets"]
        return only if only["health"] == "up" else None

    found = wait_for(target, 60, lambda: running.logs("prometheus"))
    assert found["scrapeUrl"] == "http://triton:8002/metrics"
    query = "/api/v1/query?query=integrated_gradients_requests_total"
    wait_for(lambda: read(port, query)["data"]["result"], 30)
    (group,) = read(port, "/api/v1/rules")["data"]["groups"]
    alerts = yaml.safe_load((ROOT / "tools" / "deploy" / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"]
    assert [rule["name"] for rule in group["rules"]] == [rule["alert"] for rule in alerts]
    assert not [rule for rule in group["rules"] if rule["health"] == "err"]


def test_the_perf_profile_measures_the_server(running):
    options = "--concurrency-range 1 --measurement-mode count_windows --measurement-request-count 5"
    printed = running.compose(
        *("--profile", "perf", "run", "--rm", "-T", "perf"),
        PERF_MODEL="classify",
        PERF_OPTIONS=f"{options} --stability-percentage 99",
    )
    assert float(re.findall(r"throughput: ([\d.]+) infer/sec", printed)[-1]) > 0.5


def test_a_model_can_be_in_the_image(project, engine, tmp_path):
    lines = [f"FROM explaining-triton:{VERSION}", "RUN WEIGHTS=shapes python3 -m tools.deploy.prepare"]
    (tmp_path / "Dockerfile").write_text("\n".join(lines))
    engine.docker("build", "--tag", "with-model", str(tmp_path))
    container = engine.docker("run", "--detach", "with-model").strip()
    try:
        probe = ("exec", container, "python3", "-m", "tools.probe")
        wait_for(lambda: engine.try_docker(*probe).returncode == 0, 120, lambda: engine.docker("logs", container))
    finally:
        engine.docker("rm", "--force", container)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("process", [MODEL, TRITON], ids=["model", "triton"])
def test_a_process_that_dies_or_hangs_is_replaced_within_the_container(running, process, number):
    container, before = running.container("triton-cpu"), running.state("triton-cpu")
    (triton,) = running.processes("triton-cpu", *TRITON)
    (hurt,) = running.processes("triton-cpu", *process)
    started = time.monotonic()
    os.kill(hurt, number)

    def is_replaced() -> bool:
        tritons = running.processes("triton-cpu", *TRITON)
        return bool(tritons) and triton not in tritons and explains(running)

    wait_for(is_replaced, 120, lambda: running.logs("triton-cpu"))
    print(f"it explains again after {time.monotonic() - started:.0f} s")
    assert running.container("triton-cpu") == container
    assert running.state("triton-cpu")["StartedAt"] == before["StartedAt"]
    assert hurt not in running.processes("triton-cpu")


def test_docker_restarts_a_container_whose_supervisor_gave_up(running, engine):
    container = running.container("triton-cpu")
    restarts = engine.inspect(container)["RestartCount"]

    def kill_triton() -> bool:
        for number in running.processes("triton-cpu", *TRITON):
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        return engine.inspect(container)["RestartCount"] > restarts

    # Its pauses are 1, 2, 4, 8, 16 and 30 s, less those of the last ten minutes.
    wait_for(kill_triton, 180, lambda: running.logs("triton-cpu"))
    wait_until_it_explains(running)
    log = engine.try_docker("logs", container)
    assert "supervise: gave up after 6 restarts" in log.stdout + log.stderr


def test_another_network_is_served_after_prepare_and_triton_are_made_anew(running):
    url = f"127.0.0.1:{running.ports.grpc}"
    running.compose("up", "--detach", "--force-recreate", "prepare", "triton-cpu", WEIGHTS="lite0")
    wait_until_it_explains(running)
    with ExplainClient(url) as client:
        explanation = client.explain(COFFEE.file, method="calibrated", n_steps=8)
    assert explanation.predictions[0].label == "espresso"


def test_stop_lets_requests_end_within_the_grace_period(running):
    def ask() -> str:
        with ExplainClient(f"127.0.0.1:{running.ports.grpc}", timeout=120, retries=0) as client:
            try:
                client.explain(IMAGE, n_steps=100)
                return "answered"
            except ExplainError as error:
                return type(error).__name__

    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(ask) for _ in range(2)]
        time.sleep(2)
        assert not any(call.done() for call in calls)
        started = time.monotonic()
        running.compose("stop", "triton-cpu")
        seconds = time.monotonic() - started
        answers = {call.result() for call in calls}
    print(f"stopped in {seconds:.1f} s; the requests under way: {answers}")
    assert seconds < 45
    assert answers <= {"answered", "UnavailableError"}
    state = running.state("triton-cpu")
    assert (state["ExitCode"], state["OOMKilled"], state["Status"]) == (0, False, "exited")


def test_two_servers_behind_nginx_lose_no_request_when_one_is_killed(project, engine):
    service = yaml.safe_load(project.compose("config"))["services"]["triton-cpu"]
    second = {key: value for key, value in service.items() if key not in ("ports", "profiles", "build", "networks")}
    port = free_port()
    text = (ROOT / "tools" / "deploy" / "nginx.conf").read_text().replace("127.0.0.1:7001", "7001")
    text = text.replace("127.0.0.1:8001", "triton-cpu:8001").replace("127.0.0.1:9001", "second:8001")
    (project.folder / "balancer.conf").write_text(text)
    balancer = {
        "image": "stand-in/nginx:bookworm",
        "depends_on": ["triton-cpu", "second"],
        "volumes": ["./balancer.conf:/etc/balancer.conf:ro"],
        "ports": [f"127.0.0.1:{port}:7001"],
    }
    project.override({**SERVICES, "second": second, "balancer": balancer})
    project.compose("up", "--detach", "triton-cpu", "second", "balancer")
    wait_until_it_explains(project)
    fetch = "from urllib.request import urlopen as o; print(o('http://localhost:8000/v2/models/explain/stats').read())"

    def explained(name: str) -> int:
        statistics = engine.docker("exec", project.container(name), "python3", "-c", fetch)
        return int(re.findall(r'"success":\{"count":(\d+)', statistics)[0])

    def second_answers() -> bool:
        return engine.try_docker("exec", project.container("second"), "python3", "-m", "tools.probe").returncode == 0

    wait_for(second_answers, 120, lambda: project.logs("second"))
    before = {name: explained(name) for name in ("triton-cpu", "second")}
    with ExplainClient(f"127.0.0.1:{port}", timeout=60, retries=20) as client, ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(client.explain, IMAGE, n_steps=1) for _ in range(40)]
        wait_for(lambda: sum(call.done() for call in calls) >= 15, 60)
        assert explained("second") > before["second"]
        engine.docker("kill", project.container("second"))
        answers = [call.result() for call in calls]
    assert len(answers) == 40
    assert explained("triton-cpu") > before["triton-cpu"]


def test_down_removes_containers_volumes_and_networks(project):
    project.compose("up", "--detach", "--no-deps", "prometheus")
    assert len(project.left()) >= 3
    project.compose("down", "--volumes", "--remove-orphans")
    assert not project.left()
