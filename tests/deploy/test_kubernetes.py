"""The manifests on a cluster, under load: ``make test-kubernetes``.

They need a kubectl of 1.21 or newer and these variables:

- KUBECONFIG: of a cluster with room for 2 cores and 8 GB, whose pods can be reached from here.
- IMAGE: the server's image, by a name under which the nodes have it or can pull it.
- CLIENT_IMAGE: the client's; by default IMAGE's name with ``-client`` before its tag.

With kind: ``kind create cluster``, then ``kind load docker-image`` of both images. With k3s: ``docker save`` of both
into ``k3s ctr images import -``, and KUBECONFIG=/etc/rancher/k3s/k3s.yaml.

The queries of the autoscaling are evaluated where Debian's packages prometheus and victoria-metrics are installed: the
latter reads Prometheus' configuration and finds the pods, for which Debian's Prometheus has no code.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import statistics
import subprocess
import time
import urllib.parse
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from deploy.container_engine import wait_for
from programs import run

from tools.paths import ROOT
from tools.server import Ports

IMAGE = os.environ.get("IMAGE", "")
NAME, _, TAG = IMAGE.rpartition(":")
CLIENT_IMAGE = os.environ.get("CLIENT_IMAGE") or f"{NAME}-client:{TAG}"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.kubernetes,
    pytest.mark.skipif(not (IMAGE and os.environ.get("KUBECONFIG")), reason="set KUBECONFIG and IMAGE"),
]
DEPLOY = ROOT / "tools" / "deploy"
OVERLAY = DEPLOY / "kubernetes" / "cpu"
START_SECONDS = 900
PYTHON = "/opt/explaining/.venv/bin/python"
# So that five pods fit on a small node.
RESOURCES = {"requests": {"cpu": "100m", "memory": "1Gi"}, "limits": {"cpu": "2", "memory": "4Gi"}}
ROLES = ("explain", "classify")
# Images of the run of `explain` during which pods go.
FOLDER = 60
# Where pods are counted: images for each, and steps of each, so that the client's own work takes little of the machine.
IMAGES_A_POD, SCALING_STEPS = 18, 20


class Cluster:
    """A namespace of a cluster, which holds the pods of the overlay and a client's pod."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.namespace = folder, f"explaining-{uuid.uuid4().hex[:8]}"

    def kubectl(self, *words: str, text: str | None = None) -> str:
        result = run("kubectl", "--namespace", self.namespace, *words, input=text)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def apply(self) -> None:
        """``kubectl apply -k`` of the overlay, with the images and little resources."""
        patch = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "any"},
            "spec": {
                "template": {
                    "spec": {
                        "initContainers": [{"name": "prepare", "resources": RESOURCES}],
                        "containers": [{"name": "triton", "resources": RESOURCES}],
                    }
                }
            },
        }
        content = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "namespace": self.namespace,
            "resources": [os.path.relpath(OVERLAY, self.folder)],
            "images": [{"name": "explaining-triton", "newName": NAME, "newTag": TAG}],
            "configMapGenerator": [{"name": "explaining-triton", "behavior": "merge", "literals": ["WEIGHTS=shapes"]}],
            "patches": [{"patch": json.dumps(patch), "target": {"kind": "Deployment"}}],
        }
        (self.folder / "kustomization.yaml").write_text(yaml.safe_dump(content))
        if "policy/v1" in self.kubectl("api-versions").split():
            self.kubectl("apply", "-k", str(self.folder))
            return
        # Kubernetes 1.20 has the disruption budgets under an older name.
        rendered = self.kubectl("kustomize", str(self.folder))
        self.kubectl(
            "apply", "-f", "-", text=rendered.replace("apiVersion: policy/v1\n", "apiVersion: policy/v1beta1\n")
        )

    def wait(self, **replicas: int) -> None:
        """Wait until so many pods of each role are ready, two by default, and all others are gone."""
        for role in ROLES:
            self.kubectl("rollout", "status", f"deployment/{role}", f"--timeout={START_SECONDS}s")
        deadline = time.monotonic() + START_SECONDS
        while any(not len(self.pods(role)) == self.ready(role) == replicas.get(role, 2) for role in ROLES):
            assert time.monotonic() < deadline, self.kubectl("get", "pods")
            time.sleep(1)

    def scale(self, **replicas: int) -> None:
        for role, number in replicas.items():
            self.kubectl("scale", f"deployment/{role}", f"--replicas={number}")
        self.wait(**replicas)

    def pods(self, role: str) -> list[dict]:
        return json.loads(self.kubectl("get", "pods", "--selector", f"role={role}", "--output", "json"))["items"]

    def ready(self, role: str) -> int:
        """How many addresses the service has."""
        subsets = json.loads(self.kubectl("get", "endpoints", role, "--output", "json")).get("subsets", [])
        return sum(len(subset.get("addresses", [])) for subset in subsets)

    def restarts(self) -> dict[str, int]:
        pods = [pod for role in ROLES for pod in self.pods(role)]
        return {pod["metadata"]["name"]: pod["status"]["containerStatuses"][0]["restartCount"] for pod in pods}

    @contextlib.contextmanager
    def load(self, n_steps: int, folder: int = 0, concurrency: int = 2, **clients: int) -> Iterator[dict[str, Any]]:
        """Requests from the client's pod; what `fleet_load.py` tells of them is there afterwards."""
        program = (ROOT / "tests" / "deploy" / "fleet_load.py").read_text()
        words = ["kubectl", "--namespace", self.namespace, "exec", "--stdin", "client", "--", PYTHON, "-c", program]
        asked = {
            **{role: f"dns:///{role}:8001" for role in ROLES},
            "clients": clients,
            "n_steps": n_steps,
            "folder": folder,
            "concurrency": concurrency,
        }
        process = subprocess.Popen(
            [*words, json.dumps(asked)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        told: dict[str, Any] = {}
        try:
            yield told
        finally:
            output, _ = process.communicate()  # closes its input, which ends the load
        told.update(json.loads(output))
        print(f"answered {told['answered']}, failed {told['failures'][:5]}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("overlay"))
    cluster.kubectl("create", "namespace", cluster.namespace)
    try:
        cluster.kubectl("run", "client", "--image", CLIENT_IMAGE, "--restart=Never", "--command", "sleep", "infinity")
        started = time.monotonic()
        cluster.apply()
        cluster.wait()
        cluster.kubectl("wait", "--for=condition=Ready", "pod/client", "--timeout=300s")
        print(f"ready {time.monotonic() - started:.0f} s after apply")
        yield cluster
    finally:
        # The pods first: a namespace that still has some is looked at again after half their grace period.
        for what in (("deployments,pods", "--all"), ("namespace", cluster.namespace)):
            cluster.kubectl("delete", *what, f"--timeout={START_SECONDS}s")


def test_it_comes_up_and_answers(cluster):
    with cluster.load(4, explain=1, stream=1, classify=1, plain=1) as told:
        time.sleep(20)
    assert not told["failures"]
    assert set(told["answered"]) == {"explain", "stream", "classify", "plain"}


class Prometheus:
    """A Prometheus that scrapes the pods; a context manager.

    VictoriaMetrics discovers them, by the file that Prometheus would read in the cluster.
    """

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._cluster, self._folder = cluster, folder

    def __enter__(self) -> Prometheus:
        (self._folder / "targets.json").write_text(json.dumps(self._discovered()))
        configuration = {
            "global": {"scrape_interval": "5s"},
            "scrape_configs": [{"job_name": "triton", "file_sd_configs": [{"files": ["targets.json"]}]}],
        }
        (self._folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
        words = [f"--config.file={self._folder}/prometheus.yml", f"--storage.tsdb.path={self._folder}/data"]
        self._stop, self._ask = self._start("prometheus", "--web.listen-address", *words)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _start(self, program: str, option: str, *words: str) -> tuple[Callable[[], None], Callable[[str], Any]]:
        """Start a program that answers HTTP; returns what stops it and what asks it."""
        address = f"127.0.0.1:{Ports.free().http}"
        with (self._folder / f"{program}.log").open("w") as log:
            process = subprocess.Popen([program, f"{option}={address}", *words], stdout=log, stderr=log)

        def stop() -> None:
            process.terminate()
            process.wait(20)

        def ask(path: str) -> Any:
            with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
                return json.load(answer)["data"]

        return stop, ask

    def _discovered(self) -> list[dict[str, Any]]:
        """The pods that `prometheus/kubernetes.yml` finds, in the format of files of targets."""
        content = yaml.safe_load((DEPLOY / "prometheus" / "kubernetes.yml").read_text())
        (scrape,) = content["scrape_configs"]
        (discovery,) = scrape["kubernetes_sd_configs"]
        discovery |= {"kubeconfig_file": os.environ["KUBECONFIG"], "namespaces": {"names": [self._cluster.namespace]}}
        (self._folder / "discovery.yml").write_text(yaml.safe_dump(content))
        words = [f"-promscrape.config={self._folder}/discovery.yml", f"-storageDataPath={self._folder}/victoria"]
        words += ["-promscrape.config.strictParse=false"]  # it leaves rules to another program
        stop, ask = self._start("victoria-metrics", "-httpListenAddr", *words)
        try:
            return wait_for(
                lambda: [
                    {"targets": [each["labels"]["instance"]], "labels": each["labels"]}
                    for each in ask("/api/v1/targets")["activeTargets"]
                ],
                60,
            )
        finally:
            stop()

    def values(self, query: str) -> list[float]:
        answer = self._ask(f"/api/v1/query?query={urllib.parse.quote(query)}")
        return [float(each["value"][1]) for each in answer["result"]]

    def pods_wanted(self, role: str) -> int:
        """The pods that KEDA's object would have the horizontal autoscaler make of those that there are.

        Its rule for a metric of the type Value: none more within a tenth of the threshold, else in proportion.
        """
        objects = yaml.safe_load_all((DEPLOY / "kubernetes" / "autoscaling" / "scaled_objects.yaml").read_text())
        (spec,) = [each["spec"] for each in objects if each["metadata"]["name"] == role]
        (trigger,) = spec["triggers"]
        assert trigger["metricType"] == "Value"
        pods = self._cluster.ready(role)
        (value,) = self.values(trigger["metadata"]["query"])
        ratio = value / float(trigger["metadata"]["threshold"])
        wanted = pods if abs(ratio - 1) <= 0.1 else math.ceil(ratio * pods)
        print(f"{role}: {ratio:.3g} times the threshold")
        return min(max(wanted, spec["minReplicaCount"]), spec["maxReplicaCount"])


@pytest.fixture(scope="module")
def prometheus(cluster, tmp_path_factory) -> Iterator[Prometheus]:
    if absent := [name for name in ("prometheus", "victoria-metrics") if shutil.which(name) is None]:
        pytest.skip(f"not installed: {', '.join(absent)}")
    with Prometheus(cluster, tmp_path_factory.mktemp("prometheus")) as prometheus:
        wait_for(lambda: prometheus.values("up") == 4 * [1], 60)
        yield prometheus


def test_prometheus_finds_the_pods_and_idle_ones_are_enough(prometheus):
    for role in ROLES:
        assert prometheus.values(f'count by (pod) (up{{role="{role}"}})') == [1, 1]
    time.sleep(60)  # the queries' minute
    assert {role: prometheus.pods_wanted(role) for role in ROLES} == {"explain": 2, "classify": 2}


def test_overload_makes_no_pod_unready_and_asks_for_more(cluster, prometheus):
    before = cluster.restarts()
    wanted: dict[str, int] = {}
    with cluster.load(50, explain=16, stream=8, classify=32) as told:
        ready = []
        for _ in range(45):  # in over two minutes two readiness probes in a row fail, if they fail for overload
            time.sleep(3)
            ready.append([cluster.ready(role) for role in ROLES])
        wanted = {role: prometheus.pods_wanted(role) for role in ROLES}
    assert all(each == [2, 2] for each in ready)
    assert cluster.restarts() == before
    assert wanted["explain"] == 8
    assert wanted["classify"] > 2
    # Explanations may be refused, one by one; predictions go on.
    assert not [failure for failure in told["failures"] if failure.startswith("classify")]
    assert all("UNAVAILABLE" in failure or "DEADLINE_EXCEEDED" in failure for failure in told["failures"])


def restart(cluster: Cluster) -> None:
    cluster.kubectl("rollout", "restart", *(f"deployment/{role}" for role in ROLES))


def delete(cluster: Cluster) -> None:
    for role in ROLES:
        cluster.kubectl("delete", "pod", cluster.pods(role)[0]["metadata"]["name"], "--wait=false")


def evict(cluster: Cluster) -> None:
    """What `kubectl drain` does to each pod of a node."""
    versions = cluster.kubectl("api-versions").split()
    version = "policy/v1" if "policy/v1" in versions else "policy/v1beta1"
    for role in ROLES:
        name = cluster.pods(role)[0]["metadata"]["name"]
        eviction = {
            "apiVersion": version,
            "kind": "Eviction",
            "metadata": {"name": name, "namespace": cluster.namespace},
        }
        path = f"/api/v1/namespaces/{cluster.namespace}/pods/{name}/eviction"
        cluster.kubectl("create", "--raw", path, "--filename", "-", text=json.dumps(eviction))


def test_pods_that_go_lose_no_request(cluster):
    """Every kind of request, and one run of the command over a folder, while pods are restarted, deleted, evicted."""

    def pods() -> set[str]:
        return {pod["metadata"]["uid"] for role in ROLES for pod in cluster.pods(role)}

    cluster.wait()
    with cluster.load(6, folder=FOLDER, explain=1, stream=1, classify=1, plain=1, rare=2) as told:
        time.sleep(10)
        for disturb in (restart, delete, evict):
            before, started = pods(), time.monotonic()
            disturb(cluster)
            time.sleep(5)
            cluster.wait()
            print(f"{disturb.__name__}: pods replaced after {time.monotonic() - started:.0f} s")
            assert len(pods() - before) == (4 if disturb is restart else 2)
        time.sleep(30)  # clients find the new pods
    assert not told["failures"]
    assert min(told["answered"][kind] for kind in ("explain", "stream", "classify", "plain", "rare")) > 0
    assert sum(told["answered"].values()) >= 500
    folder = told["folder"]
    assert folder["status"] == 0, folder["stderr"]
    assert not any("error" in line for line in folder["lines"])
    images = Counter(line["image"] for line in folder["lines"])
    assert len(images) == FOLDER == images.total()


def test_images_a_second_grow_with_the_pods(cluster):
    """One, two and three pods with half a core each."""
    cluster.scale(explain=0, classify=0)  # or the new pods would come one after the other
    cluster.kubectl("set", "resources", "deployment/explain", "--containers=triton", "--limits=cpu=500m,memory=4Gi")
    cluster.scale(explain=3, classify=0)
    rates: dict[int, float] = {}
    for pods in (3, 2, 1):
        cluster.scale(explain=pods, classify=0)
        with cluster.load(SCALING_STEPS, folder=IMAGES_A_POD * pods, concurrency=12) as told:
            pass
        folder = told["folder"]
        assert folder["status"] == 0, folder["stderr"]
        rates[pods] = IMAGES_A_POD * pods / folder["seconds"]
        milliseconds = [line["milliseconds"] for line in folder["lines"]]
        median, p95 = statistics.median(milliseconds), float(np.percentile(milliseconds, 95))
        print(f"{pods} pods: {rates[pods]:.2f} images a second, p50 {median:.0f} ms, p95 {p95:.0f} ms")
        assert p95 <= 2 * median
    assert rates[2] >= 1.9 * rates[1]
    assert rates[3] >= 2.8 * rates[1]
