"""The container's Triton, watched: ``python3 -m tools.deploy.supervise`` starts it and starts it anew when it fails.

For where nothing else does, as under compose; Kubernetes' own probes do the same for `tools.deploy.serve`. Settings are
those of `serve.py`, and PROBE_SECONDS (4), within which something must have gone on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from tools.deploy.serve import SettingError, command, ports, stop_seconds, whole_number
from tools.probe import served_model
from tools.triton.options import ENVIRONMENT, Ports
from tools.triton.process import ServerError, TritonProcess
from tools.triton.supervisor import Watch, supervise

START_SECONDS = 300.0
HOST = "127.0.0.1"


class ContainerServer(TritonProcess):
    """Triton as `serve.py` would start it, as a process of its own; ``words`` are its command line."""

    def __init__(self, words: list[str], ports: Ports, stop_seconds: int) -> None:
        super().__init__(HOST, ports, START_SECONDS, stop_seconds)
        self._words = words

    def _launch(self) -> subprocess.Popen:
        environment = {**ENVIRONMENT, **os.environ}
        return subprocess.Popen([*self._words, self.region_option], env=environment, start_new_session=True)


def main() -> None:
    try:
        server = ContainerServer(command(os.environ), ports(os.environ), stop_seconds(os.environ))
        seconds = whole_number(os.environ, "PROBE_SECONDS", 4)
        watch = Watch(probe_seconds=seconds, model=served_model(os.environ))
    except SettingError as error:
        sys.exit(f"supervise: {error}")

    def stop(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one must not break off the orderly stop
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        server.start()
        supervise(server, watch, say=lambda message: print(f"supervise: {message}", flush=True))
    except ServerError as error:
        sys.exit(f"supervise: {error}")
    except KeyboardInterrupt:
        server.stop()


if __name__ == "__main__":
    main()
