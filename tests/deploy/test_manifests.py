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

DEPLOY = ROOT / "tools" / "deploy"
KUBERNETES_VERSION = "1.31"
# Kinds of operators with their own schemas.
CUSTOM_KINDS = {"ScaledObject", "ServingRuntime", "InferenceService"}


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
        assert int(triton["environment"]["STOP_SECONDS"]) < _seconds(triton["stop_grace_period"])
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
    for file in (*(DEPLOY / "kubernetes").glob("*.yaml"), ROOT / "docs" / "operations.md"):
        assert set(re.findall(r"explaining-triton:([\d.]+)", file.read_text())) == {default}


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


def manifests() -> list[tuple[str, dict]]:
    files = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    return [(file.name, each) for file in files for each in yaml.safe_load_all(file.read_text())]


def test_kubernetes_manifests_fit_the_api():
    kinds = set()
    for _, manifest in manifests():
        kinds.add(manifest["kind"])
        if manifest["kind"] == "ServingRuntime":  # it has a pod's containers
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
