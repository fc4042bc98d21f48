"""The manifests on a cluster, under load: ``make test-kubernetes``.

They need a kubectl of 1.21 or newer and these variables:

- KUBECONFIG: of a cluster with room for 2 cores and 8 GB.
- IMAGE: the server's image, by a name under which the nodes have it or can pull it.
- CLIENT_IMAGE: the client's; by default IMAGE's name with ``-client`` before its tag.

With kind: ``kind create cluster``, then ``kind load docker-image`` of both images. With k3s: ``docker save`` of both
into ``k3s ctr images import -``, and KUBECONFIG=/etc/rancher/k3s/k3s.yaml.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from programs import run

from tools.paths import ROOT

IMAGE = os.environ.get("IMAGE", "")
NAME, _, TAG = IMAGE.rpartition(":")
CLIENT_IMAGE = os.environ.get("CLIENT_IMAGE") or f"{NAME}-client:{TAG}"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.kubernetes,
    pytest.mark.skipif(not (IMAGE and os.environ.get("KUBECONFIG")), reason="set KUBECONFIG and IMAGE"),
]
OVERLAY = ROOT / "tools" / "deploy" / "kubernetes" / "cpu"
START_SECONDS = 900
PYTHON = "/opt/explaining/.venv/bin/python"
# So that five pods fit on a small node.
RESOURCES = {"requests": {"cpu": "100m", "memory": "1Gi"}, "limits": {"cpu": "2", "memory": "4Gi"}}


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

    def wait(self) -> None:
        """Wait until all pods are ready and the old ones are gone."""
        for name in ("explain", "classify"):
            self.kubectl("rollout", "status", f"deployment/{name}", f"--timeout={START_SECONDS}s")
        deadline = time.monotonic() + START_SECONDS
        while len(self.pods("explain")) > 2:
            assert time.monotonic() < deadline
            time.sleep(1)

    def pods(self, role: str) -> list[dict]:
        return json.loads(self.kubectl("get", "pods", "--selector", f"role={role}", "--output", "json"))["items"]

    def ready(self, role: str) -> int:
        """How many addresses the service has."""
        subsets = json.loads(self.kubectl("get", "endpoints", role, "--output", "json")).get("subsets", [])
        return sum(len(subset.get("addresses", [])) for subset in subsets)

    @contextlib.contextmanager
    def load(self, clients: int, n_steps: int) -> Iterator[dict]:
        """Requests from the client's pod; what became of them is there afterwards."""
        program = (ROOT / "tests" / "deploy" / "fleet_load.py").read_text()
        words = ["kubectl", "--namespace", self.namespace, "exec", "--stdin", "client", "--", PYTHON, "-c", program]
        urls = [f"dns:///{name}:8001" for name in ("explain", "classify")]
        process = subprocess.Popen(
            [*words, *urls, str(clients), str(n_steps)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        told: dict = {}
        try:
            yield told
        finally:
            output, _ = process.communicate()  # closes its input, which ends the load
        told.update(json.loads(output))
        print(f"answered {told['answered']}, failed {len(told['failures'])}")


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
        cluster.kubectl("delete", "namespace", cluster.namespace, "--wait=false")


def test_it_comes_up_and_answers(cluster):
    with cluster.load(1, 4) as told:
        time.sleep(20)
    assert not told["failures"]
    assert set(told["answered"]) == {"explain", "stream", "classify"}


def restart(cluster: Cluster) -> None:
    cluster.kubectl("rollout", "restart", "deployment/explain", "deployment/classify")


def delete(cluster: Cluster) -> None:
    for role in ("explain", "classify"):
        cluster.kubectl("delete", "pod", cluster.pods(role)[0]["metadata"]["name"], "--wait=false")


def evict(cluster: Cluster) -> None:
    """What `kubectl drain` does to each pod of a node."""
    versions = cluster.kubectl("api-versions").split()
    version = "policy/v1" if "policy/v1" in versions else "policy/v1beta1"
    for role in ("explain", "classify"):
        name = cluster.pods(role)[0]["metadata"]["name"]
        eviction = {
            "apiVersion": version,
            "kind": "Eviction",
            "metadata": {"name": name, "namespace": cluster.namespace},
        }
        path = f"/api/v1/namespaces/{cluster.namespace}/pods/{name}/eviction"
        cluster.kubectl("create", "--raw", path, "--filename", "-", text=json.dumps(eviction))


@pytest.mark.parametrize("disturb", [restart, delete, evict])
def test_pods_that_go_lose_no_request(cluster, disturb):
    before = {pod["metadata"]["uid"] for role in ("explain", "classify") for pod in cluster.pods(role)}
    with cluster.load(2, 10) as told:
        time.sleep(10)
        disturb(cluster)
        time.sleep(5)
        cluster.wait()
        time.sleep(30)  # clients find the new pods
    assert not told["failures"]
    assert min(told["answered"][kind] for kind in ("explain", "stream", "classify")) > 0
    assert before != {pod["metadata"]["uid"] for role in ("explain", "classify") for pod in cluster.pods(role)}


def test_overload_makes_no_pod_unready(cluster):
    def restarts() -> list[int]:
        return [
            status["restartCount"] for pod in cluster.pods("explain") for status in pod["status"]["containerStatuses"]
        ]

    before = restarts()
    with cluster.load(12, 50) as told:  # 24 clients that want gradients, beside 12 that do not
        ready = []
        for _ in range(60):
            time.sleep(3)
            ready.append(cluster.ready("explain"))
    assert min(ready) == 2
    assert restarts() == before
    # Explanations may be refused, one by one; predictions go on.
    assert not [failure for failure in told["failures"] if failure.startswith("classify")]
    assert all("UNAVAILABLE" in failure or "DEADLINE_EXCEEDED" in failure for failure in told["failures"])
