"""The container's Triton, watched: ``python3 -m tools.deploy.supervise`` starts it and starts it anew when it fails.

For where nothing else does, as under compose; Kubernetes' own probes do the same for `tools.deploy.serve`. Settings are
those of `serve.py`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from pathlib import Path

from tools.deploy.serve import SettingError, command, ports, stop_seconds
from tools.supervisor import ServerError, supervise
from tools.triton_options import ENVIRONMENT, Ports

START_SECONDS = 300.0
HOST = "127.0.0.1"
SHARED_MEMORY = Path("/dev/shm")


class ContainerServer:
    """Triton as `serve.py` would start it, as a process of its own.

    Args:
        words: its command line.
        ports: where it listens.
        stop_seconds: how long requests in flight may take to finish.
    """

    def __init__(self, words: list[str], ports: Ports, stop_seconds: float) -> None:
        self.words, self.ports, self.stop_seconds = words, ports, stop_seconds
        self._region_prefix = f"triton_explaining_{uuid.uuid4().hex[:12]}_"

    def start(self) -> None:
        words = [*self.words, f"--backend-config=python,shm-region-prefix-name={self._region_prefix}"]
        self.process = subprocess.Popen(words, env={**ENVIRONMENT, **os.environ}, start_new_session=True)
        until = time.monotonic() + START_SECONDS
        while not self._is_ready():
            if self.process.poll() is not None:
                raise ServerError(f"Triton ended with code {self.process.returncode} before it was ready")
            if time.monotonic() > until:
                self.stop(0)
                raise ServerError(f"Triton was not ready after {START_SECONDS:g} s")
            time.sleep(0.2)

    def stop(self, grace_seconds: float | None = None) -> None:
        seconds = self.stop_seconds + 3 if grace_seconds is None else grace_seconds
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # stubs that outlived it, or all of them
        self.process.wait()
        # What a killed process has left, which the container would keep.
        left = [*SHARED_MEMORY.glob(f"{self._region_prefix}*")]
        for region in (*left, SHARED_MEMORY / f"integrated_gradients_{self.process.pid}.notice"):
            region.unlink(missing_ok=True)

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{self.ports.http}/v2/health/ready", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False


def main() -> None:
    try:
        server = ContainerServer(command(os.environ), ports(os.environ), stop_seconds(os.environ))
    except SettingError as error:
        sys.exit(f"supervise: {error}")

    def stop(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one must not break off the orderly stop
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        server.start()
        supervise(server, HOST, say=lambda message: print(f"supervise: {message}", flush=True))
    except ServerError as error:
        sys.exit(f"supervise: {error}")
    except KeyboardInterrupt:
        server.stop()


if __name__ == "__main__":
    main()
