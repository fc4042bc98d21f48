"""The real Triton server from the nvidia-pytriton wheel, on this machine: ``python -m tools.server``.

The wheel carries Triton 2.51 with the Python backend but without libtorch, so `tools/triton/pytorch_backend` stands in
for the ``pytorch`` backend; the model repository is the one that a Triton container would mount. TRITON_FOLDER and
TRITON_PYTHON name another Triton (``tools.triton.installation``). The server listens on 127.0.0.1 only. Every API but
inference (shared memory, models, logging, tracing) requires a key that is made at each start. From Python:

    with EmbeddedServer(ports=Ports.free()) as server:
        client = tritonclient.grpc.InferenceServerClient(server.grpc_url)
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tools.paths import MODEL_REPOSITORY, OUTPUTS, ROOT
from tools.triton.installation import Installation
from tools.triton.options import (
    ADMIN_HEADER,
    LOCALHOST,
    SettingError,
    describe_threads,
    server_environment,
    server_options,
)
from tools.triton.options import Ports as Ports
from tools.triton.process import ServerError, TritonProcess
from tools.triton.supervisor import Watch, stop_on_signals, supervise

DEFAULT_PORTS = Ports()


class EmbeddedServer(TritonProcess):
    """A running Triton server as a context manager.

    Args:
        repository: the model repository to serve.
        ports: where to listen on 127.0.0.1.
        log_file: file for the server's log.
        start_seconds: how long the models may take to load.
        stop_seconds: how long requests in flight may take to finish when it stops.
        options: further options of ``tritonserver``.
        host: address of this machine to listen on.

    Raises:
        ServerError: on entering, when it cannot start.
        SettingError: on entering, when a setting of the environment is not valid.
    """

    def __init__(
        self,
        repository: Path = MODEL_REPOSITORY,
        ports: Ports = DEFAULT_PORTS,
        log_file: Path = OUTPUTS / "triton.log",
        start_seconds: float = 180,
        stop_seconds: int = 30,
        options: Sequence[str] = (),
        host: str = LOCALHOST,
    ) -> None:
        super().__init__(host, ports, start_seconds, stop_seconds)
        self.repository, self.log_file, self.options = repository, log_file, options
        self.log_hint = f"; see {log_file}"
        self._admin_key = secrets.token_urlsafe(32)

    @property
    def http_url(self) -> str:
        return f"{self.host}:{self.ports.http}"

    @property
    def grpc_url(self) -> str:
        return f"{self.host}:{self.ports.grpc}"

    @property
    def metrics_url(self) -> str:
        return f"http://{self.host}:{self.ports.metrics}/metrics"

    @property
    def http_admin_headers(self) -> dict[str, str]:
        """Headers that give access to the restricted APIs over HTTP."""
        return {ADMIN_HEADER: self._admin_key}

    @property
    def grpc_admin_headers(self) -> dict[str, str]:
        """Headers that give access to the restricted APIs over gRPC."""
        return {f"triton-grpc-protocol-{ADMIN_HEADER}": self._admin_key}

    def start(self) -> None:
        """Start the server and wait until it is ready. It can be started again after it was stopped.

        Raises:
            ServerError: it cannot start.
        """
        self._check_ports()
        self._folder = tempfile.TemporaryDirectory(prefix="embedded-triton-")
        super().start()

    def stop(self, grace_seconds: float | None = None) -> None:
        super().stop(grace_seconds)
        self._folder.cleanup()

    def _check_ports(self) -> None:
        for name, port in vars(self.ports).items():
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((self.host, port))
                except OSError as error:
                    raise ServerError(
                        f"port {port} cannot be used ({error.strerror}); set {name.upper()}_PORT to another one"
                    ) from None

    def _launch(self) -> subprocess.Popen[bytes]:
        command, environment = self.command_line(Path(self._folder.name))
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("wb" if self._process is None else "ab") as log:
            return subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def command_line(self, folder: Path) -> tuple[list[str], dict[str, str]]:
        """The server's command line and environment. Assembles its backends in ``folder``.

        Raises:
            ServerError: something is missing.
            SettingError: a setting of the environment is not valid.
        """
        triton = Installation.find(os.environ)
        command = [
            str(triton.server),
            f"--backend-directory={_assemble_backends(triton, folder)}",
            self.region_option,
            "--model-control-mode=none",
            *server_options(self.repository, self.host, self.ports, self._admin_key, self.stop_seconds),
            *self.options,
        ]
        environment = {
            **server_environment(os.environ),
            # The stub takes its environment from the first python3 on PATH.
            "PATH": os.pathsep.join([str(triton.python), os.environ.get("PATH", "")]),
            "LD_LIBRARY_PATH": os.pathsep.join(
                [*map(str, triton.libraries), os.environ.get("LD_LIBRARY_PATH", "")]
            ).rstrip(os.pathsep),
        }
        return command, environment

    def _failure(self) -> str:
        """Why the server ended before it was ready, from its log."""
        log = self.log_file.read_text(errors="replace")
        for pattern in (
            r"failed to load '(?P<model>[^']+)' version \d+: (?P<reason>.*)",
            r"Poll failed for model directory '(?P<model>[^']+)': (?P<reason>.*)",
            r"error while loading shared libraries: (?P<reason>.*)",
            r"error: (?P<reason>.*)",
        ):
            if match := re.search(pattern, log):
                parts = match.groupdict()
                what = f"model {parts['model']} failed to load" if "model" in parts else "the server did not start"
                return f"{what}: {parts['reason'].strip().strip(chr(34))} (log: {self.log_file})"
        return f"the server ended with code {self.process.returncode} before it was ready; see {self.log_file}"


def _assemble_backends(triton: Installation, folder: Path) -> Path:
    """Make a backend directory: the Python backend with this Python's stub, and the stand-in for libtorch."""
    backends = folder / "backends"
    shutil.copytree(triton.python_backend, backends / "python")
    shutil.copy(triton.stub, backends / "python")
    shutil.copytree(ROOT / "tools" / "triton" / "pytorch_backend", backends / "pytorch")
    return backends


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.server", description=__doc__.splitlines()[0])
    parser.add_argument("--repository", type=Path, default=MODEL_REPOSITORY)
    parser.add_argument("--most-restarts", type=int, default=Watch().most_restarts, help="within ten minutes")
    parser.add_argument(
        "--probe-seconds",
        type=float,
        default=Watch().probe_seconds,
        help="time in which there must be progress; longer than one pass of the gradients (default: 4)",
    )
    arguments = parser.parse_args()
    from tools.classifiers.source import ExportError  # torch takes seconds to import
    from tools.export import describe_served, ensure_exported  # torch takes seconds to import

    stop_on_signals()
    try:
        print("starting Triton ...", flush=True)
        ensure_exported(arguments.repository, os.environ.get("NETWORK"))
        with EmbeddedServer(arguments.repository, Ports.from_settings(os.environ)) as server, _key_file(server) as key:
            print(f"serves   {describe_served(arguments.repository)}")
            print(f"gRPC     {server.grpc_url}")
            print(f"HTTP     http://{server.http_url}")
            print(f"metrics  {server.metrics_url}")
            print(f"log      {server.log_file}")
            print(f"threads  {describe_threads(os.environ)}")
            print(f"key      {key}")
            print("ready; Ctrl-C stops it", flush=True)
            watch = Watch(probe_seconds=arguments.probe_seconds, most_restarts=arguments.most_restarts)
            supervise(server, watch, say=lambda message: print(f"server: {message}", flush=True))
    except (ServerError, SettingError, ExportError) as error:
        sys.exit(f"server: {error}")
    except KeyboardInterrupt:
        print("stopped")


@contextlib.contextmanager
def _key_file(server: EmbeddedServer) -> Iterator[Path]:
    """Write the key of the restricted APIs to a file that only this user can read, while the server runs."""
    path = OUTPUTS / f"admin-{server.ports.grpc}.key"
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write("".join(server.http_admin_headers.values()) + "\n")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
