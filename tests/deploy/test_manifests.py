"""Deployment files: compose, the image and Kubernetes' manifests are well formed and fit together."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from programs import needs, run

from tools.paths import ROOT
from tools.probe import served_model
from tools.triton.process import LAST_SECONDS

DEPLOY = ROOT / "tools" / "deploy"
KUBERNETES, KUBERNETES_VERSION = DEPLOY / "kubernetes", "1.31"


def compose(*words: str, **settings: str) -> dict:
    result = run("docker-compose", *words, "config", cwd=ROOT, env={"PATH": os.environ["PATH"], **settings})
    assert result.returncode == 0, result.stderr
    return yaml.safe_load(result.stdout)


@needs("docker-compose")
def test_compose_is_valid_and_takes_its_settings():
    config = compose(TRITON_VERSION="26.99", BIND="10.1.2.3", GRPC_PORT="9001", SHM_SIZE="5gb", WEIGHTS="imagenet")
    triton = config["services"]["triton"]
    assert triton["image"] == "explaining-triton:26.99"
    assert triton["build"]["args"]["TRITON_VERSION"] == "26.99"
    assert "10.1.2.3:9001:8001" in map(_port, triton["ports"])
    assert str(triton["shm_size"]) == "5gb"
    assert config["services"]["prepare"]["environment"]["WEIGHTS"] == "imagenet"
    (models,) = (volume for volume in triton["volumes"] if "/models" in str(volume))
    assert models.endswith(":ro")
    assert triton["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


def _port(port: dict | str) -> str:
    """Address, port and the container's port, in either format of docker-compose."""
    if isinstance(port, str):
        return port.removesuffix("/tcp")
    return f"{port['host_ip']}:{port['published']}:{port['target']}"


@needs("docker-compose")
def test_compose_gives_triton_longer_than_triton_gives_requests_and_opens_loopback_alone():
    config = compose()
    for name, service in config["services"].items():
        for port in service.get("ports", ()):
            assert _port(port).startswith("127.0.0.1:"), name
        assert ":latest" not in service["image"]
        assert ":" in service["image"]
    for name in ("triton", "triton-cpu", "triton-mps"):
        triton = config["services"][name] if name == "triton" else compose("--profile", name[7:])["services"][name]
        most = sum(int(triton["environment"][f"{name}_SECONDS"]) for name in ("DRAIN", "STOP"))
        assert most + LAST_SECONDS < _seconds(triton["stop_grace_period"])
        assert triton["restart"] == "unless-stopped"
    assert "deploy" not in compose("--profile", "cpu")["services"]["triton-cpu"]


def _seconds(text: str) -> int:
    ((minutes, seconds),) = re.findall(r"^(?:(\d+)m)?(?:(\d+)s)?$", text)
    return 60 * int(minutes or 0) + int(seconds or 0)


def test_every_setting_of_the_example_is_one_of_composes_and_the_other_way_round():
    example = set(re.findall(r"^#([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    used = set(re.findall(r"(?<!\$)\$\{([A-Z_]+)", (ROOT / "docker-compose.yml").read_text()))
    assert example == used


def test_the_image_is_well_formed():
    result = run(
        str(Path(sys.executable).with_name("hadolint")), "--failure-threshold", "style", str(DEPLOY / "Dockerfile")
    )
    assert result.returncode == 0, result.stdout


def test_triton_has_one_version():
    (default,) = re.findall(r"^#TRITON_VERSION=(\S+)", (ROOT / ".env.example").read_text(), re.MULTILINE)
    assert re.findall(r"^ARG TRITON_VERSION=(\S+)", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE) == [default]
    assert set(re.findall(r"TRITON_VERSION:-([\d.]+)", (ROOT / "docker-compose.yml").read_text())) == {default}
    for file in (KUBERNETES / "kserve.yaml", ROOT / "docs" / "operations.md"):
        assert set(re.findall(r"explaining-triton:([\d.]+)", file.read_text())) == {default}
    (tag,) = re.findall(r'newTag: "(\S+)"', (KUBERNETES / "base" / "kustomization.yaml").read_text())
    assert tag == default


def test_images_are_labelled_with_the_version_that_is_released():
    stated = re.findall(r'^version = "(.+)"$', (ROOT / "client" / "pyproject.toml").read_text(), re.MULTILINE)
    labels = re.findall(r'image\.version="(.+?)"', (DEPLOY / "Dockerfile").read_text())
    assert labels == 2 * stated


@pytest.mark.parametrize("image", ["server", "client"])
def test_images_install_the_pinned_packages_by_hash(image):
    lock = (DEPLOY / f"requirements-{image}.txt").read_text()
    entries = re.split(r"^(?=\w)", lock, flags=re.MULTILINE)[1:]
    assert all("--hash=sha256:" in entry for entry in entries)
    locked = set(re.findall(r"^(\S+?)==(\S+)", lock, re.MULTILINE))
    pins = set(re.findall(r"^(\S+?)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert locked <= pins, "run make image-requirements"
    project = {"server": "pyproject.toml", "client": "client/pyproject.toml"}[image]
    declared = (ROOT / project).read_text().split("\ndependencies = [")[1].split("]\n")[0]
    names = {re.split(r"[\[=<>]", name)[0] for name in re.findall(r'"(.+?)"', declared)}
    assert names <= {name for name, _ in locked}


@needs("shellcheck")
def test_shell_scripts_are_clean():
    result = run("shellcheck", *map(str, [*DEPLOY.glob("*.sh"), ROOT / ".ci" / "run"]))
    assert result.returncode == 0, result.stdout


def rendered(folder: str | Path) -> list[dict]:
    """The manifests that ``kubectl apply -k`` would send; a folder of `kubernetes`, or another one."""
    result = run("kubectl", "kustomize", str(KUBERNETES / folder))
    assert result.returncode == 0, result.stderr
    assert "deprecated" not in result.stderr
    return list(yaml.safe_load_all(result.stdout))


def kserve() -> list[dict]:
    return list(yaml.safe_load_all((KUBERNETES / "kserve.yaml").read_text()))


def of_kind(manifests: list[dict], kind: str) -> dict[str, dict]:
    return {each["metadata"]["name"]: each for each in manifests if each["kind"] == kind}


# `needs` skips where there is no kubectl; Debian's kubernetes-client of bookworm is too old (1.20).
@needs("kubectl")
@pytest.mark.parametrize("overlay", ["cpu", "gpu"])
def test_an_overlay_fits_the_api_and_needs_no_operator(overlay):
    manifests = rendered(overlay)
    for manifest in manifests:
        kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)
    assert {manifest["kind"] for manifest in manifests} == {"ConfigMap", "Deployment", "Service", "PodDisruptionBudget"}
    (config,) = of_kind(manifests, "ConfigMap").values()
    settings = {name: int(value) for name, value in config["data"].items() if name.endswith("_SECONDS")}
    assert settings.keys() == {"CONNECTION_SECONDS", "DRAIN_SECONDS", "STOP_SECONDS"}
    deployments = of_kind(manifests, "Deployment")
    assert deployments.keys() == {"explain", "classify"}
    for name, deployment in deployments.items():
        pod = deployment["spec"]["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] > settings["DRAIN_SECONDS"] + settings["STOP_SECONDS"]
        (triton,), (prepare,) = pod["containers"], pod["initContainers"]
        models = {each["name"]: each["value"] for each in triton["env"]}["MODELS"]
        # Probes ask what MODELS says; preStop reads the same settings as the server.
        assert served_model({"MODELS": models}) == name
        sources = [{"configMapRef": {"name": config["metadata"]["name"]}}]
        for container in (triton, prepare):
            assert container["envFrom"] == sources
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert re.fullmatch(r"explaining-triton:[\d.]+", container["image"])
        assert _module(triton["lifecycle"]["preStop"]) == ["tools.deploy.drain"]
        # Overload makes no pod unready and ends none; a pod that is about to be stopped is not ready.
        assert "--ready" in _module(triton["readinessProbe"])
        assert "--patient" in _module(triton["livenessProbe"])
        assert not {"--ready", "--patient"} & set(_module(triton["startupProbe"]))
        limits = triton["resources"]["limits"]
        assert ("nvidia.com/gpu" in limits) == (overlay == "gpu" and name == "explain")
        assert ("cpu" in limits) == (overlay == "cpu")


@needs("kubectl")
def test_pods_with_a_model_in_their_image_prepare_none(tmp_path):
    paths = {name: os.path.relpath(KUBERNETES / name, tmp_path) for name in ("cpu", "baked")}
    content = {"kind": "Kustomization", "resources": [paths["cpu"]], "components": [paths["baked"]]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(content))
    manifests = rendered(tmp_path)
    for name, deployment in of_kind(manifests, "Deployment").items():
        kubernetes_validate.validate(deployment, KUBERNETES_VERSION, strict=True)
        pod = deployment["spec"]["template"]["spec"]
        expected = of_kind(rendered("cpu"), "Deployment")[name]["spec"]["template"]["spec"]
        assert not pod["initContainers"]
        assert [each["name"] for each in pod["volumes"]] == ["shared-memory"]
        assert [each["mountPath"] for each in pod["containers"][0]["volumeMounts"]] == ["/dev/shm"]
        for spec in (pod, expected):
            spec.pop("initContainers")
            spec.pop("volumes")
            spec["containers"][0].pop("volumeMounts")
        assert pod == expected


def _module(action: dict) -> list[str]:
    """What ``python3 -m`` is given."""
    command = action["exec"]["command"]
    assert command[:2] == ["python3", "-m"]
    return command[2:]


def test_every_module_that_a_pod_runs_takes_these_options():
    for file in KUBERNETES.rglob("*.yaml"):
        for words in re.findall(r'"python3", "-m", ("[^\]]+)\]', file.read_text()):
            module, *options = re.findall(r'"([^"]+)"', words)
            source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
            for option in options:
                assert not option.startswith("--") or f'"{option}"' in source, (file.name, module, option)


@needs("kubectl")
def test_selectors_and_scalers_meet_their_deployments():
    manifests = rendered("cpu")
    deployments = of_kind(manifests, "Deployment")
    for deployment in deployments.values():
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    selectors = {name: each["spec"]["selector"] for name, each in of_kind(manifests, "Service").items()}
    budgets = of_kind(manifests, "PodDisruptionBudget")
    assert selectors == {name: each["spec"]["selector"]["matchLabels"] for name, each in budgets.items()}
    for name, selector in selectors.items():
        assert selector.items() <= deployments[name]["spec"]["template"]["metadata"]["labels"].items()
    scalers = of_kind(rendered("autoscaling"), "ScaledObject")
    assert {each["spec"]["scaleTargetRef"]["name"] for each in scalers.values()} == deployments.keys()


def test_kserves_pods_fit_the_api():
    runtime = of_kind(kserve(), "ServingRuntime")["explaining-triton"]
    spec = {name: runtime["spec"][name] for name in ("containers", "volumes")}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "runtime"}, "spec": spec}
    kubernetes_validate.validate(pod, KUBERNETES_VERSION, strict=True)


@needs("kubectl")
def test_kserves_pods_are_started_probed_and_stopped_as_the_others():
    manifests, (runtime, service) = rendered("gpu"), kserve()
    pod = of_kind(manifests, "Deployment")["explain"]["spec"]["template"]["spec"]
    (triton,), (own,) = pod["containers"], runtime["spec"]["containers"]
    for name in ("startupProbe", "readinessProbe", "livenessProbe", "lifecycle", "image"):
        assert own[name] == triton[name], name
    (config,) = of_kind(manifests, "ConfigMap").values()
    assert {each["name"]: each["value"] for each in own["env"]} == config["data"]
    assert service["spec"]["predictor"]["terminationGracePeriodSeconds"] == pod["terminationGracePeriodSeconds"]
    assert service["spec"]["predictor"]["model"]["runtime"] == runtime["metadata"]["name"]
