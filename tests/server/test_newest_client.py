"""The client's tests with the newest tritonclient: the other tests use the last one that carries perf_analyzer."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from programs import run

from tools.paths import ROOT

NEWEST = "2.73.0"  # of the release of Triton that .env.example names
TESTS = ["server/test_client.py", *(f"unit/test_{name}.py" for name in ("retries", "errors", "doctor"))]


@pytest.mark.slow
def test_the_client_works_with_the_newest_tritonclient(tmp_path):
    uv = Path(sys.executable).with_name("uv")
    # The server's process cannot read NumPy 2, and this environment's NumPy is hidden by what is installed here.
    packages = [f"tritonclient[grpc,http]=={NEWEST}", f"numpy=={np.__version__}"]
    installed = run(
        str(uv), "pip", "install", "--quiet", "--python", sys.executable, "--target", str(tmp_path), *packages
    )
    assert installed.returncode == 0, installed.stderr
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    version = "from importlib.metadata import version; print(version('tritonclient'))"
    assert run(sys.executable, "-c", version, env=environment).stdout.strip() == NEWEST
    words = ["-m", "pytest", "-m", "not slow", "--quiet", "-p", "no:cacheprovider", "--durations", "5"]
    result = run(sys.executable, *words, *(str(ROOT / "tests" / test) for test in TESTS), env=environment, cwd=ROOT)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
