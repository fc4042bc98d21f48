"""What goes to other machines: compose, image, metrics, Kubernetes, and the entry points, run without a container."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from contextlib import nullcontext
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from conftest import encode, scene_image
from test_serving import infer
from test_streaming import Stream

from tools.bench.perf import libraries
from tools.deploy.serve import SettingError, command
from tools.paths import ROOT
from tools.probe import CHAINS, NoAnswerError, ProbeError, _hanging, probe, probe_patiently
from tools.server import EmbeddedServer, Ports
from tools.triton.options import server_options
from tools.triton.supervisor import Watch

DEPLOY = ROOT / "tools" / "deploy"
KUBERNETES_VERSION = "1.31"
# Of operators that bring their own schemas.
CUSTOM_KINDS = {"ScaledObject", "ServingRuntime", "InferenceService"}
# What a machine without a GPU has nothing to show in.
GPU_PANELS = {"GPU use", "GPU memory"}


def needs(program: str):
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


def run(*words: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(words, capture_output=True, text=True, check=False, **options)


def compose(*words: str, **settings: str) -> dict:
    found = run("docker-compose", *words, "config", cwd=ROOT, env={"PATH": os.environ["PATH"], **settings})
    assert found.returncode == 0, found.stderr
    return yaml.safe_load(found.stdout)


@needs("docker-compose")
def test_compose_is_valid_and_takes_its_settings():
    found = compose(TRITON_VERSION="26.99", BIND="10.1.2.3", GRPC_PORT="9001", SHM_SIZE="5gb", WEIGHTS="imagenet")
    triton = found["services"]["triton"]
    assert triton["image"] == "explaining-triton:26.99"
    assert triton["build"]["args"]["TRITON_VERSION"] == "26.99"
    assert "10.1.2.3:9001:8001" in map(_port, triton["ports"])
    assert str(triton["shm_size"]) == "5gb"
    assert found["services"]["prepare"]["environment"]["WEIGHTS"] == "imagenet"
    (models,) = (volume for volume in triton["volumes"] if "/models" in str(volume))
    assert models.endswith(":ro")
    assert triton["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


def _port(port: dict | str) -> str:
    """Address, port and the container's port, whichever way this docker-compose writes them."""
    if isinstance(port, str):
        return port.removesuffix("/tcp")
    return f"{port['host_ip']}:{port['published']}:{port['target']}"


@needs("docker-compose")
def test_compose_gives_triton_longer_than_triton_gives_requests_and_opens_loopback_alone():
    found = compose()
    for name, service in found["services"].items():
        for port in service.get("ports", ()):
            assert _port(port).startswith("127.0.0.1:"), name
        assert ":latest" not in service["image"]
        assert ":" in service["image"]
    for name in ("triton", "triton-cpu", "triton-mps"):
        triton = found["services"][name] if name == "triton" else compose("--profile", name[7:])["services"][name]
        assert int(triton["environment"]["STOP_SECONDS"]) < _seconds(triton["stop_grace_period"])
        assert triton["restart"] == "unless-stopped"
    assert "deploy" not in compose("--profile", "cpu")["services"]["triton-cpu"]


def _seconds(text: str) -> int:
    minutes, seconds = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", text).groups()
    return 60 * int(minutes or 0) + int(seconds or 0)


def test_every_setting_of_the_example_is_one_of_composes_and_the_other_way_round():
    example = set(re.findall(r"^#([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    used = set(re.findall(r"(?<!\$)\$\{([A-Z_]+)", (ROOT / "docker-compose.yml").read_text()))
    assert example == used


def test_the_image_is_well_formed():
    found = run(
        str(Path(sys.executable).with_name("hadolint")), "--failure-threshold", "style", str(DEPLOY / "Dockerfile")
    )
    assert found.returncode == 0, found.stdout


def test_triton_has_one_version():
    (default,) = re.findall(r"^#TRITON_VERSION=(\S+)", (ROOT / ".env.example").read_text(), re.MULTILINE)
    assert re.findall(r"^ARG TRITON_VERSION=(\S+)", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE) == [default]
    assert set(re.findall(r"TRITON_VERSION:-([\d.]+)", (ROOT / "docker-compose.yml").read_text())) == {default}
    for file in (DEPLOY / "kubernetes").glob("*.yaml"):
        assert set(re.findall(r"explaining-triton:([\d.]+)", file.read_text())) == {default}


@needs("shellcheck")
def test_shell_scripts_are_clean():
    found = run("shellcheck", *map(str, [*DEPLOY.glob("*.sh"), ROOT / ".ci" / "run"]))
    assert found.returncode == 0, found.stdout


def manifests() -> list[tuple[str, dict]]:
    files = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    return [(file.name, each) for file in files for each in yaml.safe_load_all(file.read_text())]


def test_kubernetes_manifests_fit_the_api():
    kinds = set()
    for _, manifest in manifests():
        kinds.add(manifest["kind"])
        if manifest["kind"] == "ServingRuntime":  # its containers are a pod's
            spec = {name: manifest["spec"][name] for name in ("containers", "volumes")}
            manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "runtime"}, "spec": spec}
        if manifest["kind"] not in CUSTOM_KINDS:
            kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)
    assert {"Deployment", "Service", "PodDisruptionBudget"} | CUSTOM_KINDS == kinds


def test_kubernetes_selectors_and_scalers_meet_their_deployments():
    deployments = {m["metadata"]["name"]: m for _, m in manifests() if m["kind"] == "Deployment"}
    for _, manifest in manifests():
        kind, spec = manifest["kind"], manifest["spec"]
        if kind == "Deployment":
            labels = spec["template"]["metadata"]["labels"]
            assert spec["selector"]["matchLabels"].items() <= labels.items()
            (container,) = spec["template"]["spec"]["containers"]
            stop_seconds = next(int(each["value"]) for each in container["env"] if each["name"] == "STOP_SECONDS")
            assert spec["template"]["spec"]["terminationGracePeriodSeconds"] > stop_seconds + 10
        elif kind in ("Service", "PodDisruptionBudget"):
            selector = spec["selector"] if kind == "Service" else spec["selector"]["matchLabels"]
            chosen = deployments[manifest["metadata"]["name"]]["spec"]["template"]["metadata"]["labels"]
            assert selector.items() <= chosen.items()
        elif kind == "ScaledObject":
            assert spec["scaleTargetRef"]["name"] in deployments


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"STOP_SECONDS": "soon"}, "STOP_SECONDS"),
        ({"MODELS": "some"}, "MODELS"),
        ({"GRPC_PORT": "x"}, "GRPC_PORT"),
        ({"ADMIN_KEY_FILE": "/nowhere"}, "ADMIN_KEY_FILE"),
        ({"MODEL_REPOSITORY": "/nowhere"}, "/nowhere"),
    ],
)
def test_settings_that_cannot_be_are_named(settings, names, repository):
    with pytest.raises(SettingError, match=names):
        command({"MODEL_REPOSITORY": str(repository), **settings})


def test_the_container_starts_triton_with_the_embedded_servers_options(repository):
    words = command({"MODEL_REPOSITORY": str(repository), "ADMIN_KEY": "key", "STOP_SECONDS": "30"})
    assert words[0] == "tritonserver"
    assert set(server_options(repository, "0.0.0.0", Ports(), "key", 30)) < set(words)
    # Without a key nobody has one.
    keys = [re.search(r"admin-key=(\S+)", " ".join(command({"MODEL_REPOSITORY": str(repository)}))) for _ in "ab"]
    assert keys[0][1] != keys[1][1]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A repository as the container's first service makes it."""
    repository = tmp_path_factory.mktemp("models")
    found = run(
        sys.executable,
        "-m",
        "tools.deploy.prepare",
        cwd=ROOT,
        env={**os.environ, "MODEL_REPOSITORY": str(repository), "WEIGHTS": "shapes"},
    )
    assert found.returncode == 0, found.stderr
    return repository


def test_preparing_what_cannot_be_says_so(tmp_path):
    environment = {**os.environ, "MODEL_REPOSITORY": str(tmp_path), "WEIGHTS": "/nowhere.pt"}
    found = run(sys.executable, "-m", "tools.deploy.prepare", cwd=ROOT, env=environment)
    assert found.returncode == 1
    assert "/nowhere.pt" in found.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture
def triton_on_path(tmp_path, prepared):
    """An environment in which ``tritonserver`` is the embedded one, as the container has its own."""
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


@pytest.mark.parametrize("entry", ["serve", "supervise"])
def test_the_containers_entry_points_serve_predictions_alone_and_stop_in_order(triton_on_path, tmp_path, entry):
    ports, environment = triton_on_path
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", f"tools.deploy.{entry}"],
            cwd=ROOT,
            env={**environment, "MODELS": "classify"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        until = time.monotonic() + 60
        while True:
            try:
                probe("127.0.0.1", ports.http, "classify")
                break
            except ProbeError:
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < until
                time.sleep(0.3)
        with pytest.raises(ProbeError, match="explain answers 404"):
            probe("127.0.0.1", ports.http, "explain")
        if entry == "supervise":  # which finds nothing wrong with it
            time.sleep(3 * Watch().probe_seconds)
            assert "restart" not in (tmp_path / "log").read_text()
    finally:
        process.terminate()
        assert process.wait(60) == 0


def chain(**changes) -> dict[str, tuple[int, int]]:
    return {name: changes.get(name, (5, 0)) for name in CHAINS["explain"]}


@pytest.mark.parametrize(
    ("before", "after", "is_stuck", "hanging"),
    [
        # a request stuck in a model that does nothing
        ({}, {"preprocess": (6, 0), "classifier": (6, 0)}, True, "integrated_gradients"),
        # gradients wait and none is taken, whatever waits elsewhere and whether or not the probe was refused
        (
            {"integrated_gradients": (5, 3)},
            {"preprocess": (9, 4), "integrated_gradients": (5, 4)},
            True,
            "integrated_gradients",
        ),
        ({"integrated_gradients": (5, 3)}, {"integrated_gradients": (5, 4)}, False, "integrated_gradients"),
        # much waits and it goes on
        ({}, {"preprocess": (9, 40)}, True, None),
        ({"integrated_gradients": (5, 3)}, {"integrated_gradients": (9, 4)}, False, None),
        # all have done something and nothing waits: the answer was late
        ({}, {name: (6, 0) for name in CHAINS["explain"]}, True, None),
    ],
)
def test_a_server_that_has_much_to_do_is_told_from_one_that_hangs(before, after, is_stuck, hanging):
    assert _hanging(chain(**before), chain(**after), is_stuck) == hanging


def test_the_probe_asks_all_models(server):
    probe_patiently("127.0.0.1", server.ports.http, server.ports.metrics)
    probe_patiently("127.0.0.1", server.ports.http, server.ports.metrics, "classify")
    with pytest.raises(ProbeError, match="does not answer"):
        probe("127.0.0.1", 1)


@pytest.mark.parametrize("ended", [(3.0, 3.0), (3.0, 4.0)], ids=["none ends", "one ends"])
def test_streams_that_are_late_are_told_from_streams_that_hang(server, monkeypatch, ended):
    """The server is the real one; only its streams are late."""

    def late(host, port, seconds):
        raise NoAnswerError("explain_stream did not answer")

    counts = iter(ended)
    monkeypatch.setattr("tools.probe.probe_stream", late)
    monkeypatch.setattr("tools.probe.total", lambda series, name: next(counts))
    with pytest.raises(NoAnswerError) if ended[0] == ended[1] else nullcontext():
        probe_patiently("127.0.0.1", server.ports.http, server.ports.metrics, seconds=3)
    assert next(counts, None) is None


@needs("promtool")
def test_alerts_fire_when_they_should():
    folder = DEPLOY / "prometheus"
    for words in (("check", "config", "prometheus.yml"), ("test", "rules", "alerts_test.yml")):
        found = run("promtool", *words, cwd=folder)
        assert found.returncode == 0, found.stdout + found.stderr


@needs("promtool")
def test_every_alert_has_a_test():
    folder = DEPLOY / "prometheus"
    rules = yaml.safe_load((folder / "alerts.yml").read_text())["groups"][0]["rules"]
    tests = yaml.safe_load((folder / "alerts_test.yml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert {rule["alert"] for rule in rules} == fired


@needs("prometheus")
def test_prometheus_fills_every_panel_of_the_dashboard(server, triton, tmp_path):
    configuration = tmp_path / "prometheus"
    shutil.copytree(DEPLOY / "prometheus", configuration)
    (configuration / "targets.yml").write_text(json.dumps([{"targets": [f"127.0.0.1:{server.ports.metrics}"]}]))
    port = Ports.free().http
    words = ["prometheus", f"--config.file={configuration}/prometheus.yml", f"--web.listen-address=127.0.0.1:{port}"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*words, f"--storage.tsdb.path={tmp_path}/data"], stdout=log, stderr=subprocess.STDOUT
        )

    def query(text: str) -> list:
        url = f"http://127.0.0.1:{port}/api/v1/query?query={urllib.parse.quote(text)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]["result"]

    def wait_for(condition, seconds=60):
        until = time.monotonic() + seconds
        while True:
            try:
                if condition():
                    return
            except OSError:
                pass
            assert time.monotonic() < until, (tmp_path / "log").read_text()
            time.sleep(0.5)

    image = [encode(scene_image(0))]
    dashboard = json.loads((DEPLOY / "grafana" / "dashboards" / "explaining.json").read_text())
    targets = [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(targets) > 20

    def load():  # of explanations that add up, or an alert would be pending
        infer(triton, image, n_steps=2, method="calibrated")
        infer(triton, image, outputs=("N_STEPS",), tolerance="0.2")
        infer(triton, image, outputs=("PROBABILITIES",), model="classify")
        Stream(server, image, n_steps=4, method="calibrated").hear()

    def empty() -> list[str]:
        texts = [(title, expr.replace("$__rate_interval", "40s").replace("$instance", ".*")) for title, expr in targets]
        return [title for title, text in texts if title not in GPU_PANELS and not _is_number(query(text))]

    try:
        load()  # its series are there when they are scraped first
        wait_for(lambda: query("up == 1"))
        # A rate takes two scrapes with a change between them.
        wait_for(lambda: load() or not empty())
        assert not query("ALERTS")
    finally:
        process.terminate()
        process.wait(30)


def _is_number(result: list) -> bool:
    return any(entry["value"][1] != "NaN" for entry in result)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["classify", "explain_stream"])
def test_perf_script_measures_a_server(server, tmp_path, model):
    options = [
        "--measurement-mode",
        "count_windows",
        "--measurement-request-count",
        "3",
        "--stability-percentage",
        "99",
    ]
    with libraries() as environment:
        found = run(
            str(DEPLOY / "perf.sh"),
            model,
            *options,
            env={
                **environment,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "IMAGE": str(ROOT / "docs" / "explanations.jpg"),
                "TRITON_URL": server.grpc_url,
            },
        )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "Throughput" in found.stdout


def test_perf_script_says_what_it_lacks(tmp_path):
    assert "usage" in run(str(DEPLOY / "perf.sh")).stderr
    found = run(str(DEPLOY / "perf.sh"), "classify", env={"PATH": os.environ["PATH"], "IMAGE": "/nowhere.jpg"})
    assert (found.returncode, "/nowhere.jpg" in found.stderr) == (1, True)
