"""Prometheus' alerts and Grafana's dashboard, with a real Prometheus over a live server."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.parse
import urllib.request

import yaml
from conftest import encode, scene_image
from live_server import Stream, infer
from programs import needs, run

from tools.paths import ROOT
from tools.server import Ports

DEPLOY = ROOT / "tools" / "deploy"
# Panels that are empty on a machine without a GPU.
GPU_PANELS = {"GPU use", "GPU memory"}


@needs("promtool")
def test_alerts_fire_when_they_should():
    folder = DEPLOY / "prometheus"
    for words in (("check", "config", "prometheus.yml"), ("test", "rules", "alerts_test.yml")):
        result = run("promtool", *words, cwd=folder)
        assert result.returncode == 0, result.stdout + result.stderr


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

    def load():  # explanations with small gaps, or an alert would be pending
        infer(triton, image, n_steps=2, method="calibrated")
        infer(triton, image, outputs=("N_STEPS",), tolerance="0.2")
        infer(triton, image, outputs=("PROBABILITIES",), model="classify")
        Stream(server, image, n_steps=4, method="calibrated").hear()

    def empty() -> list[str]:
        texts = [(title, expr.replace("$__rate_interval", "40s").replace("$instance", ".*")) for title, expr in targets]
        return [title for title, text in texts if title not in GPU_PANELS and not _is_number(query(text))]

    try:
        load()  # creates the series before the first scrape
        wait_for(lambda: query("up == 1"))
        # A rate needs two scrapes with a change between them.
        wait_for(lambda: load() or not empty())
        assert not query("ALERTS")
    finally:
        process.terminate()
        process.wait(30)


def _is_number(result: list) -> bool:
    return any(entry["value"][1] != "NaN" for entry in result)
