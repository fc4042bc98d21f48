"""A Triton server as a process that can be started, checked for readiness, and stopped with nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import urllib.request
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from tools.triton.options import Ports

if TYPE_CHECKING:
    from typing_extensions import Self

SHARED_MEMORY = Path("/dev/shm")
# Time beyond its exit timeout for Triton 2.51 to end by itself; it may crash and stay instead.
LAST_SECONDS = 3


class ServerError(Exception):
    """The server cannot run; the message says why."""


class TritonProcess:
    """A running Triton server as a context manager; subclasses launch it.

    Args:
        host: address that it listens on.
        ports: ports that it listens on.
        start_seconds: time for the models to load.
        stop_seconds: time for requests in flight to finish when it stops.
    """

    def __init__(self, host: str, ports: Ports, start_seconds: float, stop_seconds: int) -> None:
        self.host, self.ports = host, ports
        self.start_seconds, self.stop_seconds = start_seconds, stop_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self.log_hint = ""
        # Names this server's shared memory, so that what a killed stub leaves behind can be found and removed.
        self.region_prefix = f"triton_explaining_{uuid.uuid4().hex[:12]}_"

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """Triton's process since the last start."""
        if self._process is None:
            raise ServerError("the server has not been started")
        return self._process

    @property
    def region_option(self) -> str:
        """The option of ``tritonserver`` that names its shared memory."""
        return f"--backend-config=python,shm-region-prefix-name={self.region_prefix}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and wait until it is ready. It can be started again after it was stopped.

        Raises:
            ServerError: it cannot start.
        """
        try:
            self._process = self._launch()
            self._wait_until_ready()
        except BaseException:
            self.stop(0)
            raise

    def stop(self, grace_seconds: float | None = None) -> None:
        """End every process of the server and remove its shared memory.

        Args:
            grace_seconds: time for requests in flight to finish; None: the server's ``stop_seconds``.
        """
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(self.stop_seconds + LAST_SECONDS if grace_seconds is None else grace_seconds)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # stubs that outlived it, or all of them
            self.process.wait()
        self.remove_shared_memory()

    def remove_shared_memory(self) -> None:
        """Remove the shared memory that a killed server has left."""
        left = [*SHARED_MEMORY.glob(f"{self.region_prefix}*")]
        if self._process is not None:
            left.append(SHARED_MEMORY / f"integrated_gradients_{self.process.pid}.breaker")
        for region in left:
            region.unlink(missing_ok=True)

    def is_ready(self) -> bool:
        """Whether the server reports that all models are loaded."""
        try:
            with urllib.request.urlopen(f"http://{self.host}:{self.ports.http}/v2/health/ready", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def _launch(self) -> subprocess.Popen[bytes]:
        """Start the process as leader of its own session, so that a terminal's Ctrl-C does not reach it."""
        raise NotImplementedError

    def _failure(self) -> str:
        """Why the server ended before it was ready."""
        return f"Triton ended with code {self.process.returncode} before it was ready"

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.start_seconds
        while not self.is_ready():
            if self.process.poll() is not None:
                raise ServerError(self._failure())
            if time.monotonic() > deadline:
                raise ServerError(f"the server was not ready after {self.start_seconds:.0f} s{self.log_hint}")
            time.sleep(0.1)
