"""The launcher of the embedded server. These tests start their own servers, mostly with one small model."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tools.paths import MODEL_REPOSITORY, ROOT
from tools.server import EmbeddedServer, Ports
from tools.triton.process import SHARED_MEMORY, ServerError


@pytest.fixture
def small_repository(tmp_path):
    model = tmp_path / "models" / "heatmap"
    model.mkdir(parents=True)
    (model / "1").symlink_to(MODEL_REPOSITORY / "heatmap" / "1")  # beside which lie the modules that all models share
    shutil.copy(MODEL_REPOSITORY / "heatmap" / "config.pbtxt", model)
    return tmp_path / "models"


def running_with(text: str) -> list[str]:
    """Command lines of the processes that mention ``text``, other than pgrep itself."""
    listed = subprocess.run(["pgrep", "-af", text], capture_output=True, text=True, check=False).stdout
    return [line for line in listed.splitlines() if "pgrep" not in line]


def test_nothing_is_left_when_it_stops(small_repository, tmp_path):
    with EmbeddedServer(small_repository, Ports.free(), tmp_path / "log") as server:
        prefix = server.region_prefix
        assert list(SHARED_MEMORY.glob(f"{prefix}*"))
        assert running_with(prefix)
        assert urllib.request.urlopen(server.metrics_url).status == 200
    assert not list(SHARED_MEMORY.glob(f"{prefix}*"))
    assert not running_with(prefix)


def test_command_stops_cleanly_on_sigterm(repository):
    ports = Ports.free()
    environment = {
        **os.environ,
        "HTTP_PORT": str(ports.http),
        "GRPC_PORT": str(ports.grpc),
        "METRICS_PORT": str(ports.metrics),
        "NETWORK": "shapes",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tools.server", "--repository", str(repository)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("ready"):
            break
    assert f"gRPC     127.0.0.1:{ports.grpc}\n" in lines
    assert "threads  1 for each model: OMP_NUM_THREADS is set\n" in lines
    (log,) = (line.removeprefix("log").strip() for line in lines if line.startswith("log "))
    for model in ("preprocess: ", "classifier: ", "integrated_gradients explains"):
        assert re.search(rf"{model}.*\bthreads 1,?\b", Path(log).read_text()), model
    process.send_signal(signal.SIGTERM)
    assert "stopped" in process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert not running_with(f"http-port={ports.http}")


@pytest.mark.parametrize("which", ["http", "grpc", "metrics"])
def test_port_in_use_is_named(small_repository, tmp_path, which):
    ports = Ports.free()
    with socket.socket() as other:
        other.bind(("127.0.0.1", getattr(ports, which)))
        other.listen()
        server = EmbeddedServer(small_repository, ports, tmp_path / "log")
        with pytest.raises(ServerError, match=f"port {getattr(ports, which)} .* {which.upper()}_PORT"), server:
            pass


def test_failed_model_is_named_with_its_reason(small_repository, tmp_path):
    folder = small_repository / "heatmap" / "1"
    folder.unlink()  # a link to the model itself
    folder.mkdir()
    (folder / "model.py").write_text("raise RuntimeError('no colours today')\n")
    server = EmbeddedServer(small_repository, Ports.free(), tmp_path / "log")
    with pytest.raises(ServerError, match=r"model heatmap failed to load: .*no colours today"), server:
        pass
    assert not running_with(server.region_prefix)
    assert not list(SHARED_MEMORY.glob(f"{server.region_prefix}*"))


def test_broken_config_is_named(small_repository, tmp_path):
    (small_repository / "heatmap" / "config.pbtxt").write_text('backend: "python"\nmax_batch_size: many\n')
    server = EmbeddedServer(small_repository, Ports.free(), tmp_path / "log")
    with pytest.raises(ServerError, match="heatmap"), server:
        pass


def test_python_without_shared_library_is_named(small_repository, tmp_path, monkeypatch):
    monkeypatch.setattr("tools.triton.installation.sysconfig.get_config_var", lambda name: "/nowhere")
    server = EmbeddedServer(small_repository, Ports.free(), tmp_path / "log")
    with pytest.raises(ServerError, match="no shared libpython"), server:
        pass
