"""The client image's entry point, run without a container."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from programs import run

from tools.bench.perf import libraries
from tools.paths import ROOT

DEPLOY = ROOT / "tools" / "deploy"


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
        result = run(
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
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Throughput" in result.stdout


def test_perf_script_says_what_it_lacks(tmp_path):
    assert "usage" in run(str(DEPLOY / "perf.sh")).stderr
    result = run(str(DEPLOY / "perf.sh"), "classify", env={"PATH": os.environ["PATH"], "IMAGE": "/nowhere.jpg"})
    assert (result.returncode, "/nowhere.jpg" in result.stderr) == (1, True)
